"""Measurements are made once each, are counted, and say what was best."""

from __future__ import annotations

import math

import pytest

from autolora.plan import RankPlan, Site
from autolora.search.measure import Measurements, search_at_random
from autolora.search.space import PlanSpace

SITES = {"a": Site(5, 5), "b": Site(5, 5), "c": Site(5, 15)}
SPACE = PlanSpace(RankPlan.uniform(SITES, 4), 80)


class Counted:
    """Scores a plan, and remembers which it was asked for."""

    def __init__(self, scores: dict[tuple[int, ...], float] | None = None) -> None:
        self.plans: list[tuple[int, ...]] = []
        self.scores = scores or {}

    def __call__(self, plan: RankPlan) -> float:
        levels = tuple(plan.values())
        self.plans.append(levels)
        return self.scores.get(levels, 0.0)


def test_a_plan_is_measured_once_and_the_uniform_one_first() -> None:
    evaluate = Counted({(4, 0, 2): 1.5})
    measured = Measurements(SPACE, evaluate, evaluations=3)
    assert evaluate.plans == [(2, 2, 2)] == [measured.uniform]
    assert [measured((4, 0, 2)) for _ in range(5)] == [1.5] * 5
    assert evaluate.plans == [(2, 2, 2), (4, 0, 2)]
    assert measured.knows((4, 0, 2))
    assert not measured.knows((0, 4, 2))
    assert not measured.done
    measured((0, 4, 2))
    assert measured.done
    with pytest.raises(ValueError, match="all 3 evaluations are spent"):
        measured((0, 0, 0))
    assert measured((4, 0, 2)) == 1.5  # what is known may still be asked for
    assert measured.best == (4, 0, 2)
    assert len(evaluate.plans) == len(measured.scores) == 3


def test_what_another_search_has_measured_counts_and_needs_no_pass() -> None:
    evaluate = Counted()
    measured = Measurements(SPACE, evaluate, evaluations=3, known={(2, 2, 2): 0.5, (4, 0, 2): 1.5})
    assert [measured((4, 0, 2)), measured((0, 4, 2))] == [1.5, 0.0]
    assert measured.done
    assert measured.scores[measured.uniform] == 0.5
    assert evaluate.plans == [(0, 4, 2)]


def test_of_equal_plans_the_first_is_best_so_that_uniform_ranks_have_to_be_beaten() -> None:
    measured = Measurements(SPACE, Counted({(0, 0, 0): -1.0}), evaluations=9)
    for levels in ((4, 0, 2), (0, 0, 0), (0, 4, 2)):
        measured(levels)
    assert measured.best == measured.uniform


def test_the_price_is_that_of_the_largest_plan() -> None:
    """The largest plan has 4 * 10 + 4 * 10 + 4 * 20 = 160 parameters."""
    measured = Measurements(SPACE, Counted({(2, 2, 2): 1.0, (1, 1, 1): 0.9}), evaluations=9, price=0.4)
    assert measured((2, 2, 2)) == pytest.approx(1.0 - 0.4 * 80 / 160)
    assert measured((1, 1, 1)) == pytest.approx(0.9 - 0.4 * 40 / 160)
    assert measured.best == (2, 2, 2)
    measured = Measurements(SPACE, Counted({(2, 2, 2): 1.0, (1, 1, 1): 0.9}), evaluations=9, price=0.5)
    measured((1, 1, 1))
    assert measured.best == (1, 1, 1)
    assert measured.scores[(1, 1, 1)] == 0.9


@pytest.mark.parametrize("score", [-math.inf, math.nan])
def test_an_undefined_score_is_worst_and_finite(score: float) -> None:
    measured = Measurements(SPACE, Counted({(2, 2, 2): score, (1, 1, 1): -0.9}), evaluations=9)
    assert measured(measured.uniform) == -1
    measured((1, 1, 1))
    assert measured.best == (1, 1, 1)


def test_random_search_measures_as_many_plans_as_it_may() -> None:
    evaluate = Counted()
    measured = Measurements(SPACE, evaluate, evaluations=12)
    search_at_random(measured, seed=0)
    assert len(evaluate.plans) == len(set(evaluate.plans)) == 12
    again = Counted()
    search_at_random(Measurements(SPACE, again, evaluations=12), seed=0)
    other = Counted()
    search_at_random(Measurements(SPACE, other, evaluations=12), seed=1)
    assert again.plans == evaluate.plans != other.plans


def test_a_search_ends_where_there_are_fewer_plans_than_evaluations() -> None:
    evaluate = Counted()
    space = PlanSpace(RankPlan.uniform({"a": Site(5, 5), "b": Site(5, 5)}, 1), 10)
    measured = Measurements(space, evaluate, evaluations=50)
    search_at_random(measured, seed=0)
    assert set(evaluate.plans) == {(1, 0), (0, 1)}
    assert measured.done
