"""Searchers on problems whose answer is known, without a super-net."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch

from autolora.compose import compose
from autolora.errors import ConfigError
from autolora.plan import RankPlan, Site
from autolora.search.evolution import Options as EvolutionOptions
from autolora.search.evolution import evolve
from autolora.search.measure import Measurements, search_at_random
from autolora.search.rl_search import Options as RLOptions
from autolora.search.rl_search import learn_to_move
from autolora.search.space import Levels, PlanSpace

# Five modules of unequal cost, each worth its price up to a rank of its own. The budget is what these ranks cost.
WANTED = (0, 3, 1, 4, 2)
WEIGHTS = (1.0, 0.8, 0.6, 1.2, 0.5)
SITES = {f"m{i}": Site(*shape) for i, shape in enumerate([(8, 8), (8, 24), (16, 16), (8, 8), (24, 8)])}
LARGEST = RankPlan.uniform(SITES, 4)
SPACE = PlanSpace(LARGEST, RankPlan(SITES, dict(zip(SITES, WANTED, strict=True))).params)

Search = Callable[[Measurements, int], None]
SEARCHES: dict[str, Search] = {
    "rl_search": lambda measured, seed: learn_to_move(measured, RLOptions(), seed),
    "evolution": lambda measured, seed: evolve(measured, EvolutionOptions(), seed),
    "random_search": search_at_random,
}


def missing(plan: RankPlan) -> float:
    """What the modules lack, weighted; 0 is best."""
    ranks = plan.values()
    return -sum(weight * max(0, want - rank) for weight, want, rank in zip(WEIGHTS, WANTED, ranks, strict=True))


def measured_by(name: str, seed: int, evaluations: int) -> Measurements:
    measured = Measurements(SPACE, missing, evaluations=evaluations)
    SEARCHES[name](measured, seed)
    return measured


@cache
def long(name: str, seed: int) -> Measurements:
    return measured_by(name, seed, 120)


def by_brute_force() -> tuple[Levels, int]:
    plans = [levels for levels in product(range(5), repeat=5) if SPACE.cost(levels) <= SPACE.limit]
    scores = [missing(SPACE.plan(levels)) for levels in plans]
    assert scores.count(max(scores)) == 1
    return plans[scores.index(max(scores))], len(plans)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["rl_search", "evolution"])
def test_the_optimum_of_five_modules(name: str, seed: int) -> None:
    """Of 1,679 plans within the budget one is best; 120 are measured."""
    best, plans = by_brute_force()
    assert (best, plans) == (WANTED, 1679)
    assert long(name, seed).best == best


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", SEARCHES)
def test_searches_are_compared_at_equal_evaluations(name: str, seed: int) -> None:
    """The first agent of PPO stops at 76 plans with seed 0, and keeps coming back to them."""
    assert len(long(name, seed).scores) == 120


def test_the_policy_learns() -> None:
    """Plans that an agent comes to late are better than those that it came to early, and than random ones."""
    scores = list(long("rl_search", 1).scores.values())
    at_random = list(long("random_search", 1).scores.values())
    early, late = np.mean(scores[:25]), np.mean(scores[-25:])
    assert late > early
    assert late > np.mean(at_random)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_seed_says_it_all(name: str) -> None:
    torch.manual_seed(1)
    one = measured_by(name, 5, 40)
    torch.manual_seed(2)
    assert list(measured_by(name, 5, 40).scores.items()) == list(one.scores.items())
    assert list(measured_by(name, 6, 40).scores) != list(one.scores)
    assert len(one.scores) == 40


@pytest.mark.parametrize("name", SEARCHES)
def test_the_random_state_of_the_process_stays_as_it_was(name: str) -> None:
    draws: list[Callable[[], float]] = [random.random, np.random.random, lambda: float(torch.rand(()))]
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    expected = [draw() for draw in draws]
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    measured_by(name, 5, 20)
    assert [draw() for draw in draws] == expected


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("evaluations", [1, 2])
def test_few_evaluations_and_few_plans(name: str, evaluations: int) -> None:
    measured = measured_by(name, 0, evaluations)
    assert len(measured.scores) == evaluations
    one = {"only": Site(3, 3)}
    nothing = Measurements(PlanSpace(RankPlan.uniform(one, 2), 0), lambda plan: 0.0, evaluations=30)
    SEARCHES[name](nothing, 0)
    assert list(nothing.scores) == [(0,)]


def test_without_a_budget_the_price_stops_a_search() -> None:
    """Each component is worth its price up to the wanted rank, and nothing beyond it."""
    space = PlanSpace(LARGEST, None)
    price = 0.01 * LARGEST.params / 48
    for name in ("rl_search", "evolution"):
        measured = Measurements(space, missing, evaluations=60, price=price)
        assert measured.best == space.top
        SEARCHES[name](measured, 0)
        assert space.plan(measured.best).params < 0.8 * LARGEST.params, name


def test_without_the_extra_the_configuration_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "stable_baselines3" else find(name, *rest)
    )
    with pytest.raises(ConfigError, match=r"rl_search needs stable_baselines3: pip install 'autolora\[search\]'"):
        compose(["strategy=rl_search"])
    assert compose(["strategy=evolution"]).strategy.name == "evolution"
