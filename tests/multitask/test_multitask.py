"""The command on a tiny encoder: what it trains, what it writes, and that it goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from autolora.adapters.peft_format.load import read_factors
from autolora.multitask.__main__ import main
from autolora.results import read_result

TASKS = ["rte", "stsb", "mnli"]  # two classes, a score, three classes


@pytest.fixture
def command(tiny_bert_dir: Path, tmp_path: Path) -> Any:
    def make(*more: str) -> list[str]:
        fixed = (
            f"tasks=[{','.join(TASKS)}]", "probe_steps=12", "probe_rank=3", "budget.rank=2", "data.source=mini",
            "data.max_train=120", f"data.cache_dir={tmp_path / 'cache'}", f"backbone.path={tiny_bert_dir}",
            f"run_root={tmp_path / 'runs'}", f"out={tmp_path / 'out'}", "logger=csv", "trainer.accelerator=cpu",
            "trainer.precision=32-true", "trainer.enable_progress_bar=false", "trainer.max_epochs=1",
        )  # fmt: skip
        given = {one.partition("=")[0]: one for one in (*fixed, *more)}
        return list(given.values())

    return make


def test_the_arms_share_one_budget(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(command())
    written = json.loads((tmp_path / "out" / "multitask.json").read_text())
    (seed,) = written["seeds"]
    assert seed["cost"] == sum(seed["params"].values()) <= seed["budget"]
    assert seed["budget"] - seed["cost"] < seed["cheapest_left"]
    assert 0 <= seed["gap"] < 0.1
    assert seed["optimal_value"] >= seed["value"] > 0
    assert all(complexity >= 1 for complexity in seed["complexity"].values())
    assert set(seed["gradient_cosines"]) == {"rte, stsb", "rte, mnli", "stsb, mnli"}
    assert all(-1 <= cosine <= 1 for cosine in seed["gradient_cosines"].values())

    arms = written["arms"]
    for task in TASKS:
        assert arms["isolated"][task]["adapter_params"] == [seed["params"][task]]
        assert arms["separate"][task]["adapter_params"][0] <= seed["budget"] // 3
        plan = json.loads((tmp_path / "out" / "seed0" / f"{task}.json").read_text())
        assert read_result(Path(arms["isolated"][task]["runs"][0])).ranks == plan
    merged = json.loads((tmp_path / "out" / "seed0" / "merged.json").read_text())
    assert all(arms["merged"][task]["adapter_params"] == [seed["cost"]] for task in TASKS)
    assert merged == read_result(Path(arms["merged"]["rte"]["runs"][0])).ranks
    said = capsys.readouterr().out
    assert "value" in said
    assert all(task in said for task in TASKS)

    results = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/result.json")}
    assert len(results) == 3 + 3 + 3 + 1
    main(command())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/result.json")} == results
    assert json.loads((tmp_path / "out" / "multitask.json").read_text()) == written


def test_isolated_tasks_may_keep_out_of_each_others_subspaces(command: Any, tmp_path: Path) -> None:
    overlaps = []
    for weight in (0, 5):
        main(command("arms=[isolated]", f"orthogonality={weight}", f"out={tmp_path / str(weight)}", "tasks=[rte,mnli]"))
        arms = json.loads((tmp_path / str(weight) / "multitask.json").read_text())["arms"]["isolated"]
        first, second = (read_factors(Path(arms[task]["runs"][0]) / "adapter") for task in ("rte", "mnli"))
        shares = []
        for name in first.keys() & second.keys():
            basis = torch.linalg.qr(first[name][0].T).Q
            a = second[name][0]
            shares.append(float((a @ basis).square().sum() / a.square().sum()))
        overlaps.append(sum(shares) / len(shares))
    assert overlaps[1] < overlaps[0] / 5


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["tasks=[rte]"], 2, "tasks=[rte]: expected"),
        (["tasks=[rte,rte]"], 2, "tasks: expected each once, got rte, rte"),
        (["tasks=[rte,nope]"], 2, "tasks=[rte,nope]: expected"),
        (["strategy=autolora"], 2, "strategy=autolora: expected tasks=, arms=, seeds="),
        (["arms=[joint]"], 2, "arms=[joint]: expected"),
        (["trainer.max_epoch=3"], 2, "unknown key trainer.max_epoch"),
        (["budget.rank=0.01"], 1, "does not pay for one component for each of 3 tasks"),
        (["data.source=local", "data.dir=/"], 1, "RTE"),
    ],
)
def test_bad_input(command: Any, capsys: pytest.CaptureFixture[str], more: list[str], code: int, message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command(*more))
    assert stop.value.code == code
    assert message in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from autolora.multitask.__main__ import main; main(['--help']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m autolora.multitask")
