"""Budgets shared by tasks: by hand, against every possible choice, and what has to hold whatever the values."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autolora.errors import PlanError
from autolora.multitask.allocate import cheapest_left, merge, optimum, total_cost, total_value
from autolora.plan import RankPlan, Site

SITES = {"q": Site(4, 4), "up": Site(4, 12)}  # a component costs 8 and 16
VALUES = {"rte": {"q": [5.0, 1.0], "up": [9.0, 2.0]}, "cola": {"q": [6.0, 4.0], "up": [4.0, 0.0]}}


def everything(values: dict) -> dict[str, RankPlan]:
    return {task: RankPlan(SITES, {m: len(own) for m, own in modules.items()}) for task, modules in values.items()}


def test_what_is_worth_least_per_parameter_goes_first() -> None:
    """Per 8 parameters: cola q 6 4, rte q 5, rte up 4.5, cola up 2, rte q 1, rte up 1, cola up 0."""
    assert total_cost(everything(VALUES)) == 96
    plans = merge(VALUES, SITES, 56, everything(VALUES))
    assert {task: dict(plan) for task, plan in plans.items()} == {"rte": {"q": 1, "up": 1}, "cola": {"q": 2, "up": 1}}
    plans = merge(VALUES, SITES, 48, everything(VALUES))  # cola's up goes too, and 8 buy rte's second q again
    assert {task: dict(plan) for task, plan in plans.items()} == {"rte": {"q": 2, "up": 1}, "cola": {"q": 2, "up": 0}}
    assert total_value(plans, VALUES) == 5 + 1 + 9 + 6 + 4


def test_initial_ranks_are_where_it_begins_and_what_is_left_is_spent() -> None:
    initial = {"rte": RankPlan(SITES, {"q": 1}), "cola": RankPlan(SITES, {"q": 2})}
    plans = merge(VALUES, SITES, 40, initial)
    assert {task: dict(plan) for task, plan in plans.items()} == {"rte": {"q": 1, "up": 1}, "cola": {"q": 2, "up": 0}}


def test_the_greedy_choice_may_miss_the_best_one() -> None:
    values = {"rte": {"q": [5.0], "up": [9.0]}, "cola": {"q": [], "up": []}}
    plans = merge(values, SITES, 16, everything(values))
    assert dict(plans["rte"]) == {"q": 1, "up": 0}  # 5 for 8 is more than 9 for 16, and then 9 does not fit
    best = optimum(values, SITES, 16)
    assert dict(best["rte"]) == {"q": 0, "up": 1}
    assert total_value(best, values) == 9


numbers = st.lists(st.integers(0, 30).map(float), max_size=3)
drawn = st.fixed_dictionaries(
    {task: st.fixed_dictionaries({"q": numbers, "up": numbers}) for task in ("rte", "cola", "mrpc")}
)


@settings(max_examples=60, deadline=None)
@given(drawn, st.integers(24, 200))
def test_the_optimum_is_that_of_all_choices(values: dict, budget: int) -> None:
    slots = [(task, module, len(own)) for task, modules in values.items() for module, own in modules.items()]
    highest = 0.0
    for ranks in itertools.product(*(range(count + 1) for _, _, count in slots)):
        if sum(SITES[module].price(rank) for (_, module, _), rank in zip(slots, ranks, strict=True)) <= budget:
            of_task = {task: {m: r for (t, m, _), r in zip(slots, ranks, strict=True) if t == task} for task in values}
            plans = {task: RankPlan(SITES, chosen) for task, chosen in of_task.items()}
            highest = max(highest, total_value(plans, values))
    best = optimum(values, SITES, budget)
    assert total_value(best, values) == highest
    assert total_cost(best) <= budget


@settings(max_examples=200, deadline=None)
@given(drawn, st.integers(24, 200), st.integers(0, 3))
def test_the_budget_is_kept_and_spent_and_the_gap_is_less_than_one_component(
    values: dict, budget: int, first: int
) -> None:
    initial = {
        task: RankPlan(SITES, {module: min(first, len(own)) for module, own in modules.items()})
        for task, modules in values.items()
    }
    plans = merge(values, SITES, budget, initial)
    slack, cheapest = budget - total_cost(plans), cheapest_left(plans, values)
    assert slack >= 0
    assert cheapest is None or slack < cheapest
    if first == 3:  # everything on offer was there to be removed: what is lost is at most the component that broke it
        most = max((value for modules in values.values() for own in modules.values() for value in own), default=0.0)
        assert 0 <= total_value(optimum(values, SITES, budget), values) - total_value(plans, values) <= most


def test_a_budget_below_one_component_a_task_is_refused() -> None:
    with pytest.raises(PlanError, match=r"15 parameters does not pay for one component for each of 2 tasks.*least 16"):
        merge(VALUES, SITES, 15, everything(VALUES))


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_values_are_numbers_from_0_on(value: float) -> None:
    with pytest.raises(PlanError, match=r"expected finite numbers >= 0, got .* of q for rte"):
        merge({"rte": {"q": [value]}}, SITES, 100, {"rte": RankPlan(SITES, {})})
