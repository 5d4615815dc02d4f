"""autolora finds planted ranks exactly, in a loop written by hand."""

from __future__ import annotations

import pytest
from strategies.handloop import excess_error, fit, planted_batches

from autolora.plan import Budget
from autolora.strategies.autolora import AutoLoRA
from autolora.tasks.planted import exact_fraction, plant

TOTAL_6, TOTAL_18, TOTAL_40 = (0, 0, 1, 2, 0, 3), (0, 1, 2, 4, 8, 3), (4, 6, 8, 12, 2, 8)


@pytest.mark.parametrize(
    ("ranks", "budgeted"),
    [(TOTAL_6, True), (TOTAL_18, True), (TOTAL_40, True), (TOTAL_18, False)],
    ids=["total 6", "total 18", "total 40", "total 18 without a budget"],
)
def test_autolora_recovers_planted_ranks(ranks: tuple[int, ...], budgeted: bool) -> None:
    pair = plant(ranks=ranks)
    budget = Budget(params=pair.true_plan.params) if budgeted else Budget()
    strategy = AutoLoRA(AutoLoRA.Options(), budget=budget, max_rank=16)
    streams = planted_batches(pair, 128, seed=1), planted_batches(pair, 128, seed=2)
    fitted = fit(strategy, pair.student, *streams, steps=1000)
    assert list(fitted.plan.values()) == list(ranks)
    assert exact_fraction(pair.true_plan, fitted.plan) == 1.0
    assert excess_error(pair, fitted.adapters) < 1e-3
