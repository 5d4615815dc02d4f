"""Rank plans and budgets against arithmetic done by hand."""

from __future__ import annotations

import math
import random
import warnings
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autolora.errors import PlanError
from autolora.plan import Budget, RankPlan, Site, even_order, proportional_order, rank_by_score, spend

# Two modules: a component of `a` costs 10 + 6 = 16, one of `b` 10 + 2 = 12; b has full rank 2.
SMALL = {"a": Site(10, 6), "b": Site(10, 2)}


def minilm() -> dict[str, Site]:
    """The shapes of MiniLM's 36 encoder Linears and pooler.dense."""
    sites = {}
    for i in range(6):
        block = f"encoder.layer.{i}"
        for leaf in ("self.query", "self.key", "self.value", "output.dense"):
            sites[f"{block}.attention.{leaf}"] = Site(384, 384)
        sites[f"{block}.intermediate.dense"] = Site(384, 1536)
        sites[f"{block}.output.dense"] = Site(1536, 384)
    return {**sites, "pooler.dense": Site(384, 384)}


# Costs ----------------------------------------------------------------------------------------------------------------


def test_costs_by_hand() -> None:
    assert (SMALL["a"].cost, SMALL["b"].cost) == (16, 12)
    assert (SMALL["a"].full_rank, SMALL["b"].full_rank) == (6, 2)
    plan = RankPlan(SMALL, {"a": 3, "b": 2})
    assert plan.params == 3 * 16 + 2 * 12
    assert plan.components == 5
    assert dict(plan) == {"a": 3, "b": 2}
    # 6 layers of (4 * 768 + 2 * 1920), and the pooler
    assert RankPlan.uniform(minilm(), 1).params == 6 * (4 * 768 + 2 * 1920) + 768 == 42_240


def test_a_module_that_is_left_out_has_rank_0() -> None:
    assert dict(RankPlan(SMALL, {"b": 1})) == {"a": 0, "b": 1}
    assert RankPlan(SMALL, {}).params == 0


def test_uniform_is_clipped_to_the_full_rank() -> None:
    assert dict(RankPlan.uniform(SMALL, 4)) == {"a": 4, "b": 2}


@pytest.mark.parametrize("rank", [-1, 7, 2.5, float("nan")])
def test_impossible_ranks(rank: float) -> None:
    with pytest.raises(PlanError, match=r"rank of a: expected a whole number 0 to 6 .* got"):
        RankPlan(SMALL, {"a": rank})  # type: ignore[dict-item]


def test_a_plan_for_another_model_names_the_modules() -> None:
    with pytest.raises(PlanError, match=r"1 modules that the model does not adapt: c; expected names among: a, b$"):
        RankPlan(SMALL, {"a": 1, "c": 1})


def test_plans_compare_by_rank_and_do_not_follow_their_inputs() -> None:
    ranks = {"a": 1, "b": 2}
    plan = RankPlan(SMALL, ranks)
    ranks["a"] = 5
    assert plan == {"a": 1, "b": 2} == RankPlan(SMALL, {"b": 2, "a": 1})
    assert plan != RankPlan(SMALL, {"a": 2, "b": 2})


# Budgets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (Budget(rank=1), 28),
        (Budget(rank=1.5), 42),
        (Budget(rank=0.3), 8),  # floor of 8.4
        (Budget(rank=2), 56),
        (Budget(rank=4), 4 * 16 + 2 * 12),  # b cannot have more than rank 2
        (Budget(rank=0), 0),
        (Budget(params=100), 100),
        (Budget(fraction=0.25), 30),  # of 6 * 16 + 2 * 12 = 120
        (Budget(fraction=1.0), 120),
        (Budget(), None),
    ],
)
def test_budgets_by_hand(budget: Budget, expected: int | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert budget.resolve(RankPlan.uniform(SMALL, 16)) == expected


def test_rounding_does_not_lose_a_parameter() -> None:
    sites = {f"m{i}": Site(5, 5) for i in range(10)}  # 0.7 * 100 is 70 - 1.4e-14 in floating point, 0.29 * 100 also
    assert Budget(rank=0.7).resolve(RankPlan.uniform(sites, 5)) == 70
    assert Budget(fraction=0.29).resolve(RankPlan.uniform(sites, 1)) == 29


@pytest.mark.parametrize("budget", [Budget(rank=9), Budget(params=10_000)])
def test_a_budget_above_the_largest_plan_is_clamped(budget: Budget) -> None:
    largest = RankPlan.uniform(SMALL, 3)
    with pytest.warns(UserWarning, match=r"above the 72 of the largest plan .* raise max_rank"):
        assert budget.resolve(largest) == 3 * 16 + 2 * 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": -1}, r"budget\.rank: expected a number >= 0, got -1"),
        ({"params": -5}, r"budget\.params: expected a number >= 0, got -5"),
        ({"fraction": -0.1}, r"budget\.fraction: expected a number >= 0, got -0.1"),
        ({"fraction": 1.1}, r"budget\.fraction: expected 0 to 1, got 1.1"),
        ({"rank": float("nan")}, r"budget\.rank: expected a number >= 0, got nan"),
        ({"rank": float("inf")}, r"budget\.rank: expected a number >= 0, got inf"),
        ({"rank": 1, "params": 3}, r"one of rank, params, fraction; got rank, params"),
    ],
)
def test_impossible_budgets(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Budget(**arguments)  # type: ignore[arg-type]


# Spending -------------------------------------------------------------------------------------------------------------


def test_spend_passes_over_what_does_not_fit() -> None:
    largest = RankPlan.uniform(SMALL, 2)
    assert dict(spend(["a", "a", "b", "b"], largest, 30)) == {"a": 1, "b": 1}  # 16, not 16 again, 12
    assert dict(spend(["a", "a", "b", "b"], largest, 11)) == {"a": 0, "b": 0}
    assert spend(["a", "a", "b", "b"], largest, None) == largest


def test_spend_gives_no_module_more_than_the_largest_plan() -> None:
    assert dict(spend(["b"] * 9, RankPlan.uniform(SMALL, 2), None)) == {"a": 0, "b": 2}


problems = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 6)), min_size=1, max_size=8)


@given(problems, st.integers(0, 3000), st.randoms(use_true_random=False))
def test_spend_never_exceeds_and_leaves_less_than_the_cheapest_on_offer(
    shapes: list[tuple[int, int, int]], budget: int, shuffle: random.Random
) -> None:
    sites = {f"m{i}": Site(n_in, n_out) for i, (n_in, n_out, _) in enumerate(shapes)}
    largest = RankPlan(sites, {f"m{i}": min(r, sites[f"m{i}"].full_rank) for i, (_, _, r) in enumerate(shapes)})
    order = [name for name, rank in largest.items() for _ in range(rank)]
    shuffle.shuffle(order)
    plan = spend(order, largest, budget)
    slack = budget - plan.params
    left_on_offer = [sites[name].cost for name in plan if plan[name] < largest[name]]
    assert slack >= 0
    assert all(slack < cost for cost in left_on_offer)


@given(problems, st.integers(0, 6))
def test_even_spending_at_a_whole_rank_is_the_uniform_plan(shapes: list[tuple[int, int, int]], rank: int) -> None:
    sites = {f"m{i}": Site(n_in, n_out) for i, (n_in, n_out, _) in enumerate(shapes)}
    largest, uniform = RankPlan.uniform(sites, 6), RankPlan.uniform(sites, rank)
    budget = Budget(rank=rank).resolve(largest)
    assert budget == uniform.params
    assert spend(even_order(largest), largest, budget) == uniform


@given(st.integers(1, 32).map(lambda halves: halves / 2), st.randoms(use_true_random=False))
def test_at_least_98_percent_of_the_budget_is_spent_on_minilm(rank: float, shuffle: random.Random) -> None:
    """In any order of components, so whatever a strategy prefers."""
    largest = RankPlan.uniform(minilm(), 16)
    budget = Budget(rank=rank).resolve(largest)
    assert budget is not None
    order = even_order(largest)
    assert 0.98 * budget <= spend(order, largest, budget).params <= budget
    shuffle.shuffle(order)
    assert 0.98 * budget <= spend(order, largest, budget).params <= budget


def test_even_order_goes_level_by_level_and_spreads_over_the_depth() -> None:
    sites = {f"m{i}": Site(4, 4) for i in range(8)}
    largest = RankPlan.uniform(sites, 2)
    order = even_order(largest)
    assert order[:8] == [f"m{i}" for i in (0, 4, 2, 6, 1, 5, 3, 7)]
    assert sorted(order[8:]) == sorted(sites)
    half = spend(order, largest, Budget(rank=0.5).resolve(largest))
    assert list(half.values()) == [1, 0] * 4


@pytest.mark.parametrize("count", [1, 2, 3, 5, 37])
def test_even_order_offers_every_component_once(count: int) -> None:
    sites = {f"m{i}": Site(9, 9) for i in range(count)}
    largest = RankPlan(sites, {name: i % 4 for i, name in enumerate(sites)})
    order = even_order(largest)
    assert {name: order.count(name) for name in sites} == dict(largest)


def test_rank_by_score_is_descending_and_stable() -> None:
    assert rank_by_score(["a", "b", "a", "c"], [0.5, 0.9, 0.5, -1.0]) == ["b", "a", "a", "c"]
    assert rank_by_score(["x", "y"], [1.0, 1.0]) == ["x", "y"]


def test_proportional_order_scales_a_shape_as_webster_does() -> None:
    sites = {"a": Site(1, 1), "b": Site(1, 1), "c": Site(1, 1)}
    largest = RankPlan.uniform(sites, 1)
    largest = RankPlan({name: Site(9, 9) for name in sites}, dict.fromkeys(sites, 9))
    order = proportional_order({"a": 4.0, "b": 2.0, "c": 0.0}, largest)
    # (k - 1/2) / w: a at 1/8, 3/8, 5/8, 7/8, 9/8, ...; b at 1/4, 3/4, 5/4, ...
    assert order[:7] == ["a", "b", "a", "a", "b", "a", "a"]
    assert "c" not in order
    assert Counter(order) == {"a": 9, "b": 9}
    shape = spend(order, largest, 6 * 18)
    assert dict(shape) == {"a": 4, "b": 2, "c": 0}


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 1.0, "b": -1.0}, {"a": 1.0, "b": math.nan}])
def test_proportional_order_refuses_other_weights(weights: dict[str, float]) -> None:
    largest = RankPlan({"a": Site(4, 4), "b": Site(4, 4)}, {"a": 2, "b": 2})
    with pytest.raises(PlanError, match="weight"):
        proportional_order(weights, largest)


# Prices other than parameters, and multiples --------------------------------------------------------------------------

# The first component of `a` costs 50 and each further one 5; those of `b` cost 10 each.
PRICED = {"a": Site(10, 6, prices=(0, 50, 55, 60), unit="ns"), "b": Site(10, 4, prices=(0, 10, 20, 30, 40), unit="ns")}


def test_a_plan_costs_what_the_tables_say() -> None:
    plan = RankPlan(PRICED, {"a": 2, "b": 1})
    assert (plan.cost, plan.unit, plan.params) == (65, "ns", 2 * 16 + 14)
    assert (PRICED["a"].cost, PRICED["b"].cost) == (20, 10)
    assert [PRICED["a"].step_price(rank) for rank in (0, 1, 2)] == [50, 5, 5]
    assert PRICED["a"].price(6) == 75  # the table ends at 3, and goes on by 5
    assert RankPlan(SMALL, {"a": 2}).cost == RankPlan(SMALL, {"a": 2}).params == 32


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(Budget(rank=1), 60), (Budget(rank=0.5), 30), (Budget(rank=2.5), 57 + 25), (Budget(fraction=0.5), 50)],
)
def test_budgets_in_other_units(budget: Budget, expected: int) -> None:
    assert budget.resolve(RankPlan(PRICED, {"a": 3, "b": 4})) == expected  # 57.5 and 25 at rank 2.5; 100 in all


def test_the_first_component_of_a_module_may_be_too_dear_and_those_after_it_cheap() -> None:
    largest = RankPlan(PRICED, {"a": 3, "b": 3})
    assert dict(spend(["b", "a", "a", "b", "a", "b"], largest, 49)) == {"a": 0, "b": 3}
    assert dict(spend(["b", "a", "a", "b", "a", "b"], largest, 70)) == {"a": 3, "b": 1}


tables = st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=6), min_size=1, max_size=6)


@given(tables, st.integers(1, 3), st.integers(0, 400), st.randoms(use_true_random=False))
def test_with_any_prices_and_multiples_the_slack_is_below_the_cheapest_step(
    steps: list[list[int]], multiple: int, budget: int, shuffle: random.Random
) -> None:
    sites = {
        f"m{i}": Site(9, 9, multiple, tuple(sum(own[:k]) for k in range(len(own) + 1))) for i, own in enumerate(steps)
    }
    largest = RankPlan(sites, {name: len(own) // multiple * multiple for name, own in zip(sites, steps, strict=True)})
    order = [name for name, rank in largest.items() for _ in range(rank)]
    shuffle.shuffle(order)
    plan = spend(order, largest, budget)
    slack = budget - plan.cost
    assert slack >= 0
    assert all(rank % multiple == 0 for rank in plan.values())
    assert all(slack < sites[name].step_price(rank) for name, rank in plan.items() if rank < largest[name])


def test_multiples_are_bought_where_their_middle_is_wanted() -> None:
    sites = {name: Site(8, 8, multiple=4) for name in "ab"}
    largest = RankPlan(sites, {"a": 8, "b": 4})
    # The third of four: that of b comes before the second multiple of a.
    assert dict(spend("aaaabbbaaaab", largest, 8 * 16)) == {"a": 4, "b": 4}
    assert dict(spend("aaaaaaaabbbb", largest, 8 * 16)) == {"a": 8, "b": 0}
    assert dict(spend("aabb", largest, None)) == {"a": 0, "b": 0}


def test_spending_goes_on_from_what_is_there_and_may_end_at_what_is_too_dear() -> None:
    largest = RankPlan.uniform(SMALL, 2)
    start = RankPlan(SMALL, {"a": 1})
    assert dict(spend(["a", "b"], largest, 28, start)) == {"a": 1, "b": 1}
    assert dict(spend(["a", "b"], largest, 28, start, pass_over=False)) == {"a": 1, "b": 0}
