"""The plans that searches choose from: what a plan costs, what is drawn, and how infeasible wishes are repaired."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autolora.errors import PlanError
from autolora.plan import Budget, RankPlan, Site, even_order, spend
from autolora.search.space import PlanSpace

SITES = {"a": Site(4, 4), "b": Site(4, 12), "c": Site(12, 12)}  # a component costs 8, 16, 24
LARGEST = RankPlan(SITES, {"a": 3, "b": 4, "c": 2})


@st.composite
def spaces(draw: st.DrawFn) -> PlanSpace:
    """Modules of any size, and a budget that may be tight, odd or absent."""
    count = draw(st.integers(1, 7))
    sizes = st.integers(1, 9)
    sites = {f"m{i}": Site(draw(sizes), draw(sizes)) for i in range(count)}
    largest = RankPlan(sites, {name: draw(st.integers(0, site.full_rank)) for name, site in sites.items()})
    min_rank, step = draw(st.integers(0, 2)), draw(st.integers(1, 3))
    floors = sum(min(min_rank, largest[name]) * site.cost for name, site in sites.items())
    allowance = draw(st.none() | st.integers(floors, max(floors, largest.params)))
    return PlanSpace(largest, allowance, min_rank=min_rank, step=step)


def check(space: PlanSpace, levels: tuple[int, ...]) -> None:
    assert space.cost(levels) <= space.limit
    assert all(0 <= level <= top for level, top in zip(levels, space.top, strict=True))
    plan = space.plan(levels)
    assert all(plan[name] <= space.largest[name] for name in plan)


# The grid -------------------------------------------------------------------------------------------------------------


def test_levels_are_ranks_on_a_grid_above_the_floor() -> None:
    space = PlanSpace(LARGEST, 70, min_rank=1, step=2)
    assert space.top == (1, 1, 0)  # ranks 1 or 3, 1 or 3, 1
    assert space.costs == [16, 32, 48]
    assert space.limit == 70 - (8 + 16 + 24)
    assert space.plan((1, 0, 0)) == {"a": 3, "b": 1, "c": 1}
    assert space.plan((1, 0, 0)).params == 48 + space.cost((1, 0, 0)) == 64


def test_a_module_that_cannot_have_the_floor_has_its_maximum() -> None:
    space = PlanSpace(LARGEST, None, min_rank=3)
    assert space.plan((0, 0, 0)) == {"a": 3, "b": 3, "c": 2}


def test_a_budget_below_the_floor_is_refused() -> None:
    with pytest.raises(
        PlanError, match=r"budget of 95 parameters does not pay for rank 2 everywhere, which costs 96: raise the budget"
    ):
        PlanSpace(LARGEST, 95, min_rank=2)
    assert PlanSpace(LARGEST, 96, min_rank=2).limit == 0


@pytest.mark.parametrize("budget", [Budget(rank=2), Budget(rank=1.5), Budget(params=37), Budget()])
def test_the_uniform_plan_is_that_of_the_strategy_uniform(budget: Budget) -> None:
    allowance = budget.resolve(LARGEST)
    space = PlanSpace(LARGEST, allowance)
    assert space.plan(space.uniform()) == spend(even_order(LARGEST), LARGEST, allowance)


def test_the_smallest_plan_has_one_component_everywhere() -> None:
    assert PlanSpace(LARGEST, 0).plan(PlanSpace(LARGEST, 0).smallest()) == {"a": 1, "b": 1, "c": 1}
    space = PlanSpace(LARGEST, None, min_rank=2)
    assert space.plan(space.smallest()) == {"a": 2, "b": 2, "c": 2}


# Drawing --------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(spaces(), st.integers(0, 9))
def test_whatever_is_drawn_is_within_the_budget(space: PlanSpace, seed: int) -> None:
    rng = Random(seed)
    one, other = space.random(rng), space.random(rng)
    for levels in (space.uniform(), one, space.crossed(one, other, rng), space.mutated(one, rng, 2)):
        check(space, levels)


@settings(deadline=None)
@given(spaces(), st.integers(0, 9))
def test_what_is_drawn_under_a_budget_spends_it(space: PlanSpace, seed: int) -> None:
    rng = Random(seed)
    drawn = space.random(rng)
    for levels in (drawn, space.mutated(drawn, rng), space.crossed(drawn, space.uniform(), rng)):
        left = space.limit - space.cost(levels)
        unfilled = [cost for cost, level, top in zip(space.costs, levels, space.top, strict=True) if level < top]
        if space.bounded:
            assert all(cost > left for cost in unfilled)


def test_random_shares_are_uniform_on_the_simplex() -> None:
    """Of two equal modules the first gets a share that is uniform from nothing to everything."""
    sites = {"a": Site(5, 5), "b": Site(5, 5)}
    largest = RankPlan.uniform(sites, 4)
    space = PlanSpace(largest, 40)
    rng = Random(0)
    counts = [0] * 5
    for _ in range(8000):
        counts[space.random(rng)[0]] += 1
    # Webster's rounding: rank k for shares within 1/8 of k/4, and half of that range at the ends
    for count, expected in zip(counts, (1000, 2000, 2000, 2000, 1000), strict=True):
        assert abs(count - expected) < 5 * expected**0.5


def test_without_a_budget_sums_vary() -> None:
    space = PlanSpace(LARGEST, None)
    sums = {space.cost(space.random(Random(seed))) for seed in range(40)}
    assert len(sums) > 8
    assert max(sums) <= LARGEST.params


# Moving ---------------------------------------------------------------------------------------------------------------


def test_downs_are_made_first_and_pay_for_ups() -> None:
    space = PlanSpace(LARGEST, 48)
    full = (3, 0, 1)
    assert space.moved(full, (0, 1, 0)) == full  # nothing left
    assert space.moved(full, (-1, 1, 0)) == (2, 0, 1)  # 8 are freed, 16 are wanted
    assert space.moved(full, (0, 1, -1)) == (3, 1, 0)
    assert space.moved(full, (1, 1, -1)) == (3, 1, 0)  # the first is at its top


def test_the_lowest_go_up_first_and_equal_ones_spread_over_the_depth() -> None:
    sites = {f"m{i}": Site(5, 5) for i in range(4)}
    space = PlanSpace(RankPlan.uniform(sites, 3), 20)
    assert space.moved((0, 0, 0, 0), (1, 1, 1, 1)) == (1, 0, 1, 0)
    assert space.moved((1, 0, 0, 0), (1, 0, 0, 1)) == (1, 0, 0, 1)
    assert space.moved((0, 0, 0, 2), (1, 1, 1, -1)) == (1, 0, 0, 1)


@settings(deadline=None)
@given(spaces(), st.data())
def test_any_move_is_within_the_budget_and_does_what_fits(space: PlanSpace, data: st.DataObject) -> None:
    levels = space.random(Random(data.draw(st.integers(0, 9))))
    wishes = data.draw(st.lists(st.sampled_from((-1, 0, 1)), min_size=len(levels), max_size=len(levels)))
    moved = space.moved(levels, wishes)
    check(space, moved)
    assert moved == space.moved(levels, wishes)
    left = space.limit - space.cost(moved)
    for before, after, wish, top, cost in zip(levels, moved, wishes, space.top, space.costs, strict=True):
        if wish <= 0:
            assert after == max(0, before + wish)
        else:
            assert after == before + 1 or before == top or cost > left
    feasible = [min(top, max(0, level + wish)) for level, wish, top in zip(levels, wishes, space.top, strict=True)]
    if space.cost(feasible) <= space.limit:
        assert moved == tuple(feasible)


def test_every_plan_within_the_budget_can_be_reached_by_moves() -> None:
    space = PlanSpace(LARGEST, 60)
    reached, frontier = set(), {space.uniform()}
    while frontier:
        reached |= frontier
        frontier = {space.moved(one, wishes) for one in frontier for wishes in product((-1, 0, 1), repeat=3)} - reached
    feasible = {one for one in product(*(range(top + 1) for top in space.top)) if space.cost(one) <= space.limit}
    assert reached == feasible


def test_a_mutation_moves_few_modules_and_others_pay() -> None:
    sites = {f"m{i}": Site(5, 5) for i in range(30)}
    largest = RankPlan.uniform(sites, 5)
    space = PlanSpace(largest, 30 * 2 * 10)
    rng = Random(0)
    changed = [
        sum(a != b for a, b in zip(space.mutated((2,) * 30, rng, 1), (2,) * 30, strict=True)) for _ in range(200)
    ]
    assert max(changed) <= 4  # one module by up to three levels, and as many that pay for it or profit
    assert sum(changed) / len(changed) > 1.5
