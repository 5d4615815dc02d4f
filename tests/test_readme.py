"""What the README shows runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from test_run import configure, sst2  # noqa: F401  fixtures

import autolora.strategies
from autolora.compose import compose
from autolora.run import run_one

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_a_strategy_in_one_file_and_one_yaml(
    configure: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = README.partition("<!-- strategy: begin -->")[2].partition("## Layout")[0]
    code, defaults = re.findall(r"```(?:python|yaml)\n(.*?)```", shown, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    (tmp_path / "strategy").mkdir()
    (tmp_path / "strategy" / "norm.yaml").write_text(defaults)
    (tmp_path / "norm.py").write_text(code)
    monkeypatch.setattr(autolora.strategies, "__path__", [*autolora.strategies.__path__, str(tmp_path)])

    best = ("trainer.checkpoint=best", "trainer.val_check_interval=0.25")  # also before the choice of ranks
    usual = configure("strategy=uniform", "trainer.max_epochs=1", *best)
    overrides = ["strategy=norm", "trainer.max_epochs=1", "strategy.share=0.4", "max_rank=4", "budget.rank=2"]
    norm = compose([*overrides, "task=sst2"], config_dir=tmp_path).strategy
    result = run_one(usual.model_copy(update={"strategy": norm}))
    assert result.status == "complete"
    assert result.params.budget is not None
    assert 0.98 * result.params.budget <= result.params.adapter <= result.params.budget
    assert len(set(result.ranks.values())) > 2

    early = configure("strategy=uniform", "trainer.max_epochs=100000", "trainer.max_time=00:00:00:01")
    result = run_one(early.model_copy(update={"strategy": norm}))  # long before the choice
    assert 0.98 * result.params.budget <= result.params.adapter <= result.params.budget
