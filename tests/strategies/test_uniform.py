"""Uniform ranks: what the budget buys, evenly."""

from __future__ import annotations

import pytest
import torch
from adapters.tiny_models import make
from strategies.handloop import excess_error, fit, planted_batches

from autolora.adapters import AdapterSettings, find_sites
from autolora.plan import Budget, RankPlan
from autolora.strategies.uniform import Uniform
from autolora.tasks.planted import plant


def uniform(budget: Budget, max_rank: int = 8) -> Uniform:
    return Uniform(Uniform.Options(), budget=budget, max_rank=max_rank)


@pytest.mark.parametrize("rank", [0, 1, 3, 8])
def test_a_whole_rank_is_that_rank_everywhere(rank: int) -> None:
    strategy = uniform(Budget(rank=rank))
    adapters = strategy.attach(make("bert"), AdapterSettings())
    plan = strategy.finalize(lambda plan: 0.0)
    assert plan == RankPlan.uniform(adapters.sites, rank)
    assert plan.params == strategy.allowance == adapters.count()["adapter"]


@pytest.mark.parametrize("budget", [Budget(rank=2.5), Budget(params=3001), Budget(fraction=0.3)])
def test_a_fraction_is_spread_evenly(budget: Budget) -> None:
    strategy = uniform(budget)
    adapters = strategy.attach(make("bert"), AdapterSettings())
    plan = strategy.finalize(lambda plan: 0.0)
    assert strategy.allowance is not None
    assert 0.98 * strategy.allowance <= plan.params <= strategy.allowance
    assert max(plan.values()) - min(plan.values()) <= 1
    assert adapters.attached_plan() == plan
    halves = [sum(plan[name] for name in plan if f"layer.{i}." in name) for i in (0, 1)]
    assert abs(halves[0] - halves[1]) <= 2


def test_without_a_budget_it_has_the_maximum_rank() -> None:
    strategy = uniform(Budget(), max_rank=5)
    strategy.attach(make("bert"), AdapterSettings())
    assert set(strategy.finalize(lambda plan: 0.0).values()) == {5}


def test_nothing_to_spend_leaves_the_head_alone() -> None:
    model = make("bert")
    strategy = uniform(Budget(params=1))
    adapters = strategy.attach(model, AdapterSettings())
    assert adapters.layers == {}
    assert [p for p in model.parameters() if p.requires_grad] == adapters.head_parameters()
    assert strategy.finalize(lambda plan: 0.0).params == 0


def test_the_maximum_of_rank_pattern_is_respected() -> None:
    strategy = uniform(Budget(rank=2))
    settings = AdapterSettings(rank_pattern={"key": 1})
    strategy.attach(make("bert"), settings)
    plan = strategy.finalize(lambda plan: 0.0)
    assert {rank for name, rank in plan.items() if name.endswith("key")} == {1}
    assert plan.params <= Budget(rank=2).resolve(RankPlan.uniform(find_sites(make("bert"), settings), 8))  # type: ignore[operator]


def test_it_fits_a_uniform_teacher() -> None:
    pair = plant(dim=16, widths=[8, 24], ranks=(2, 2, 2, 2))
    streams = planted_batches(pair, 64, seed=1), planted_batches(pair, 64, seed=2)
    fitted = fit(uniform(Budget(rank=2)), pair.student, *streams, steps=400, lr=1e-2)
    assert fitted.plan == pair.true_plan
    assert excess_error(pair, fitted.adapters) < 1e-2
    assert torch.isfinite(torch.tensor(fitted.losses)).all()
