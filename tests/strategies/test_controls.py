"""Plans to train again at: what they cost, and what they keep."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from autolora.adapters import AdapterSettings
from autolora.plan import Budget, RankPlan, Site
from autolora.strategies.controls import AtPlan, control_plan
from autolora.tasks.planted import plant

SITES = {"q": Site(8, 8), "k": Site(8, 8), "v": Site(8, 8), "up": Site(8, 32), "down": Site(32, 8), "odd": Site(20, 20)}
RANKS = st.fixed_dictionaries({name: st.integers(0, 8) for name in SITES})


@given(RANKS, st.integers(0, 5))
def test_a_permuted_plan_costs_the_same_and_stays_among_equal_modules(ranks: dict[str, int], seed: int) -> None:
    found = RankPlan(SITES, ranks)
    permuted = control_plan("permuted", found, seed, {})
    assert permuted.params == found.params
    same = len({ranks[name] for name in ("q", "k", "v")}) == 1 and ranks["up"] == ranks["down"]
    assert (permuted == found) == same  # a control differs where it can
    for group in (("q", "k", "v"), ("up", "down"), ("odd",)):
        assert Counter(permuted[name] for name in group) == Counter(found[name] for name in group)


def test_permutations_differ_between_seeds_and_not_within() -> None:
    found = RankPlan(SITES, {"q": 1, "k": 2, "v": 3, "up": 4, "down": 5, "odd": 6})
    plans = [tuple(control_plan("permuted", found, seed, {}).values()) for seed in range(60)]
    assert len(set(plans)) == 11  # 3! orders of q, k, v times 2 of up, down, but for the plan itself
    assert plans == [tuple(control_plan("permuted", found, seed, {}).values()) for seed in range(60)]


@given(RANKS)
def test_a_uniform_plan_costs_at_most_as_much_and_nothing_cheaper_fits(ranks: dict[str, int]) -> None:
    found = RankPlan(SITES, ranks)
    uniform = control_plan("uniform", found, 0, {})
    slack = found.params - uniform.params
    assert slack >= 0
    assert all(slack < site.cost or uniform[name] == site.full_rank for name, site in SITES.items())


def test_the_found_plan_is_itself() -> None:
    found = RankPlan(SITES, {"q": 3})
    assert control_plan("found", found, 0, {}) is found


def test_controls_adapt_the_modules_that_were_adapted() -> None:
    """One module was left out and one held at rank 1 (``rank_pattern``): controls leave it at that."""
    found = RankPlan(SITES, {"q": 0, "k": 4, "v": 1, "up": 2, "down": 1, "odd": 1})
    highest = {"q": 0, "v": 1}
    uniform = control_plan("uniform", found, 0, highest)  # 240 parameters: 152 for rank 1, then down and what is left
    assert uniform == {"q": 0, "k": 4, "v": 1, "up": 1, "down": 2, "odd": 1}
    permuted = [control_plan("permuted", found, seed, highest) for seed in range(9)]
    assert all((plan["q"], plan["k"], plan["v"]) == (0, 4, 1) for plan in permuted)


def test_the_highest_ranks_are_those_of_the_pattern() -> None:
    model = plant(dim=16, widths=[8, 24], ranks=(0, 2, 3, 0)).student
    found = {"U0": 0, "V0": 1, "U1": 4, "V1": 6}
    strategy = AtPlan(found, "uniform", 0, budget=Budget(), max_rank=4)
    strategy.attach(model, AdapterSettings(rank_pattern={"U0": 0, "V0": 1}))
    assert strategy.adapters.attached_plan() == {"U0": 0, "V0": 1, "U1": 5, "V1": 5}
