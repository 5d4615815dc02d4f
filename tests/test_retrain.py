"""Training again after a selection: at which plan, on which rows, and after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_resume import Stopper, interrupted_run, outcome, stopper  # noqa: F401  fixture
from test_run import configure, directory_of, sst2  # noqa: F401  fixtures

from autolora.compose import compose
from autolora.errors import ConfigError
from autolora.run import run_one


@pytest.mark.parametrize("control", ["found", "permuted", "uniform"])
def test_a_second_training_starts_afresh_at_the_plan_it_names(configure: Any, control: str) -> None:  # noqa: F811
    cfg = configure("strategy=autolora", f"retrain={control}", "trainer.max_epochs=1", "budget.rank=1.5")
    result = run_one(cfg)
    assert result.found is not None
    assert result.retrain == control
    assert (result.compute.fit_steps, result.compute.retrain_steps, result.steps) == (7, 7, 14)
    assert result.params.budget is not None
    assert result.params.adapter <= result.params.budget
    if control == "found":
        assert result.ranks == result.found
    if control == "permuted":
        assert sorted(result.ranks.values()) == sorted(result.found.values())
    if control == "uniform":
        assert max(result.ranks.values()) - min(result.ranks.values()) <= 1
    assert result.seconds.retrain > 0
    files = directory_of(cfg, result)
    assert json.loads(files.selection.read_text())["ranks"] == result.found
    assert len(files.retrain_history.read_text().splitlines()) == len(files.history.read_text().splitlines())
    assert json.loads(files.ranks.read_text()) == result.ranks
    assert not files.checkpoints.exists()


def test_a_second_training_at_the_plan_of_a_first_is_that_training(configure: Any) -> None:  # noqa: F811
    """Uniform ranks, found and trained again on the same rows, are the same run."""
    once = run_one(configure("strategy=uniform"))
    again = run_one(configure("strategy=uniform", "retrain=found"))
    assert again.ranks == once.ranks
    assert again.metrics == once.metrics
    assert again.selection_metrics == once.selection_metrics


def test_a_control_that_is_the_plan_that_was_found_says_so(configure: Any) -> None:  # noqa: F811
    overrides = ("strategy=uniform", "trainer.max_epochs=1")
    result = run_one(configure(*overrides, "retrain=uniform"))
    assert result.ranks == result.found
    assert "retrain=uniform is the plan that was found: it is no control" in result.notes
    assert not [note for note in run_one(configure(*overrides, "retrain=found")).notes if "no control" in note]


def test_all_rows(configure: Any) -> None:  # noqa: F811
    result = run_one(configure("strategy=uniform", "retrain=found", "retrain_on=all", "trainer.max_epochs=1"))
    assert (result.compute.fit_steps, result.compute.retrain_steps) == (7, 8)  # 216 rows, then 240, in batches of 32
    assert result.selection_metrics == {}


def test_controls_share_one_search(configure: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """What a search of its own gives is what comes out, and a run with force searches itself."""
    overrides = ("strategy=autolora", "trainer.max_epochs=1", "budget.rank=1.5")
    own = configure(*overrides, "retrain=permuted", f"run_root={tmp_path / 'own'}")
    alone = run_one(own)
    run_one(configure(*overrides, "retrain=found", f"run_root={tmp_path / 'shared'}"))
    run_one(configure(*overrides, "retrain=found", "seed=1", f"run_root={tmp_path / 'shared'}"))
    shared = configure(*overrides, "retrain=permuted", f"run_root={tmp_path / 'shared'}")
    capsys.readouterr()
    result = run_one(shared)
    assert "the same search has ended in" in capsys.readouterr().out
    for field in ("ranks", "found", "metrics", "selection_metrics", "compute", "steps", "params"):
        assert getattr(result, field) == getattr(alone, field)
    assert (result.compute.fit_steps, result.compute.retrain_steps, result.steps) == (7, 7, 14)
    forced = run_one(shared.model_copy(update={"force": True}))
    assert "the same search has ended in" not in capsys.readouterr().out
    assert forced.ranks == result.ranks


@pytest.mark.parametrize("seed", [0, 1])
def test_interrupted_in_either_training(configure: Any, stopper: Stopper, tmp_path: Path, seed: int) -> None:  # noqa: F811
    overrides = ("strategy=autolora", "retrain=permuted", "trainer.max_epochs=1", f"seed={seed}")
    whole = configure(*overrides, f"run_root={tmp_path / 'whole'}")
    run_one(whole)
    broken = configure(*overrides, f"run_root={tmp_path / 'broken'}")
    stops = interrupted_run(broken, stopper, every=3)
    assert stops >= 4
    assert outcome(broken) == outcome(whole)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["retrain_on=all"], "retrain_on=all: only has a meaning beside retrain=found, permuted or uniform"),
        (["retrain=found", "retrain_on=all", "trainer.checkpoint=best"], "nothing is held out to choose by"),
        (["retrain=foud"], "expected one of none, found, permuted, uniform"),
    ],
)
def test_faults(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(overrides)
