"""autolora finds planted ranks exactly, in a loop written by hand."""

from __future__ import annotations

import pytest
from strategies.handloop import excess_error, fit, planted_batches

from autolora.plan import Budget
from autolora.strategies.autolora import AutoLoRA
from autolora.tasks.planted import exact_fraction, plant

TOTAL_6, TOTAL_18, TOTAL_40 = (0, 0, 1, 2, 0, 3), (0, 1, 2, 4, 8, 3), (4, 6, 8, 12, 2, 8)


@pytest.mark.parametrize(
    ("ranks", "share", "sparsity"),
    [
        (TOTAL_6, 1.0, {}),
        (TOTAL_18, 1.0, {}),
        (TOTAL_40, 1.0, {}),
        (TOTAL_18, None, {}),
        (TOTAL_18, 1.5, {"spend_all": False}),
    ],
    ids=["total 6", "total 18", "total 40", "total 18 without a budget", "total 18 below a budget that is a ceiling"],
)
def test_autolora_recovers_planted_ranks(
    ranks: tuple[int, ...], share: float | None, sparsity: dict[str, bool]
) -> None:
    pair = plant(ranks=ranks)
    budget = Budget() if share is None else Budget(params=round(share * pair.true_plan.params))
    strategy = AutoLoRA(AutoLoRA.Options.model_validate({"sparsity": sparsity}), budget=budget, max_rank=16)
    streams = planted_batches(pair, 128, seed=1), planted_batches(pair, 128, seed=2)
    fitted = fit(strategy, pair.student, *streams, steps=1000)
    assert list(fitted.plan.values()) == list(ranks)
    assert exact_fraction(pair.true_plan, fitted.plan) == 1.0
    assert excess_error(pair, fitted.adapters) < 1e-3
