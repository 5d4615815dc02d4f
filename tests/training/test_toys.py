"""The three toy strategies of tests/strategies/toys, driven by Lightning with clipping and accumulation."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from strategies.toys.activation_svd import ActivationSVD
from strategies.toys.growth import Growth
from strategies.toys.one_step_bilevel import OneStepBilevel
from training.small import small_planted, train

from autolora.plan import Budget

TOYS = [ActivationSVD, Growth, OneStepBilevel]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.__name__)
def test_a_toy_trains_within_the_budget(tmp_path: Path, toy: Any, accumulate: int) -> None:
    problem = small_planted()
    strategy = toy(toy.Options(), budget=Budget(rank=1.5), max_rank=4)
    lightning, module = train(problem, strategy, tmp_path, steps=300, accumulate_grad_batches=accumulate)
    plan = strategy.finalize(lambda plan: 0.0)
    assert strategy.allowance is not None
    assert 0 < plan.params <= strategy.allowance
    assert strategy.adapters.active_plan() == plan
    assert (module.steps_done, lightning.global_step) == (300, 300)
    assert module.examples_seen == 300 * accumulate * 32
    losses = [float(row["loss"]) for row in csv.DictReader((tmp_path / "history.csv").open())]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_a_bilevel_strategy_gets_one_held_out_batch_for_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, Any]] = []
    original = OneStepBilevel.heldout_step

    def heldout_step(self: Any, batch: Any, heldout: Any, loss_fn: Any) -> None:
        calls.append((batch["inputs"], heldout["inputs"]))
        original(self, batch, heldout, loss_fn)

    monkeypatch.setattr(OneStepBilevel, "heldout_step", heldout_step)
    strategy = OneStepBilevel(OneStepBilevel.Options(), budget=Budget(rank=1), max_rank=4)
    train(small_planted(), strategy, tmp_path, steps=6, accumulate_grad_batches=2)
    assert len(calls) == 6
    for batch, heldout in calls:
        assert not (batch[:, None] == heldout[None]).all(-1).any()  # no row of the one is in the other
