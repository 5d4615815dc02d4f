"""Random plans: seeded, within the budget, and fair."""

from __future__ import annotations

import pytest
from adapters.tiny_models import make
from strategies.trees import tree

from autolora.adapters import AdapterSettings
from autolora.plan import Budget, RankPlan, Site
from autolora.strategies.random import Random
from autolora.tasks.planted import plant


def plan_of(model: object, budget: Budget, max_rank: int = 8, run_seed: int = 0, **options: int) -> RankPlan:
    strategy = Random(Random.Options(**options), budget=budget, max_rank=max_rank)
    adapters = strategy.attach(model, AdapterSettings(seed=run_seed))  # type: ignore[arg-type]
    plan = strategy.finalize(lambda plan: 0.0)
    assert adapters.attached_plan() == plan
    return plan


@pytest.mark.parametrize("budget", [Budget(rank=1), Budget(rank=2.5), Budget(params=3001), Budget(fraction=0.7)])
def test_a_plan_spends_the_budget(budget: Budget) -> None:
    for seed in range(5):
        plan = plan_of(make("bert"), budget, run_seed=seed)
        allowance = budget.resolve(RankPlan.uniform(plan.sites, 8))
        assert allowance is not None
        assert 0.98 * allowance <= plan.params <= allowance


def test_where_one_draw_leaves_too_much_another_is_made() -> None:
    """On planted many first draws end with less than one component, but more than 2 % of the budget."""
    pair = plant()
    budget = Budget(params=pair.true_plan.params)
    for seed in range(10):
        assert plan_of(plant().student, budget, max_rank=16, run_seed=seed).params >= 0.98 * pair.true_plan.params


def test_the_seed_of_the_run_or_its_own_decides() -> None:
    first, again, other = (plan_of(make("bert"), Budget(rank=2), run_seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    own = [plan_of(make("bert"), Budget(rank=2), run_seed=seed, seed=7) for seed in (0, 1)]
    assert own[0] == own[1] != first


def test_the_budget_that_pays_for_one_buys_one_of_them_with_equal_chances() -> None:
    """Two modules offer three components and one: three to one, over 400 seeds."""
    sites = {"a": Site(8, 8), "b": Site(8, 8)}
    drawn = []
    for seed in range(400):
        strategy = Random(Random.Options(), budget=Budget(), max_rank=3)
        strategy.largest, strategy.allowance, strategy.seed = RankPlan(sites, {"a": 3, "b": 1}), 16, seed
        drawn.append(strategy.plan()["a"])
    assert abs(sum(drawn) / 400 - 0.75) < 3 * (0.75 * 0.25 / 400) ** 0.5


def test_without_a_budget_everything_on_offer_is_bought() -> None:
    assert set(plan_of(tree({"a": (8, 8), "b": (8, 4)}), Budget(), max_rank=4).values()) == {4}


def test_nothing_to_spend() -> None:
    assert plan_of(make("bert"), Budget(params=3)).params == 0
