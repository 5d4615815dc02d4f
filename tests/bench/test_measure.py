"""Medians, intervals, ratios and turns, by hand and against scipy."""

from __future__ import annotations

import pytest
from scipy.stats import binom

from autolora.bench.imports import import_seconds
from autolora.bench.measure import Interval, against, median_interval, ratio, take_turns
from autolora.bench.overhead import compared, plans
from autolora.plan import RankPlan, Site


def test_the_interval_of_twelve_values_is_from_the_third_to_the_tenth() -> None:
    # P(Bin(12, 1/2) <= 2) = 79 / 4096 = 0.0193, and with 3 it is 0.073
    assert median_interval([7.0, 1, 12, 3, 10, 5, 6, 4, 8, 9, 2, 11]) == Interval(median=6.5, low=3, high=10)


@pytest.mark.parametrize("n", [6, 7, 20, 50, 51, 200])
def test_the_interval_is_the_narrowest_that_covers_the_median_with_95_per_cent(n: int) -> None:
    k = int(median_interval([float(i) for i in range(1, n + 1)]).low)
    assert 2 * binom.cdf(k - 1, n, 0.5) <= 0.05 < 2 * binom.cdf(k, n, 0.5)


def test_few_values_give_their_whole_range() -> None:
    assert median_interval([3.0]) == Interval(median=3, low=3, high=3)
    assert median_interval([5.0, 1, 2]) == Interval(median=2, low=1, high=5)


def test_a_ratio_compares_what_was_measured_in_one_round() -> None:
    # The machine is ten times slower in the second round: the ratio of the medians would be 2 / 4.
    assert ratio([1.0, 20, 2], [2.0, 40, 4]) == Interval(median=0.5, low=0.5, high=0.5)


def test_references_that_were_not_timed_are_left_out() -> None:
    times = {"a": [1.0], "b": [4.0]}
    found = against(times, "a", {"peft": "b", "limit": "c", "adalora": None, "own": "a"})
    assert {what: value.median for what, value in found.items()} == {"peft": 0.25}


def test_an_overhead_is_compared_with_what_was_predicted() -> None:
    """By hand: 10, 12 and 14 ms over the bare model, predicted are 6 ms; what may be nothing has no ratio."""
    sites = {"a": Site(8, 8, prices=tuple(range(0, 9_000_000, 1_000_000)))}
    predicted = {"six": RankPlan(sites, {"a": 6}), "lost": RankPlan(sites, {"a": 1})}
    times = {"bare": [0.1, 0.2, 0.3], "six": [0.11, 0.212, 0.314], "lost": [0.099, 0.201, 0.302]}
    (name, measured, ratios), (lost, noise, none) = compared(times, predicted)
    assert (name, lost, none) == ("six", "lost", {})
    assert (measured.low, measured.median, measured.high) == pytest.approx((10, 12, 14))
    assert (ratios["predicted"].low, ratios["predicted"].median, ratios["predicted"].high) == pytest.approx(
        (6 / 14, 6 / 12, 6 / 10)
    )
    assert noise.median == pytest.approx(1)


def test_plans_whose_time_is_compared_differ_by_three_times_and_more() -> None:
    sites = {f"m{i}": Site(64, 64) for i in range(12)}
    costs = [plan.cost for plan in plans(sites).values()]
    assert max(costs) > 30 * min(costs)


def test_contenders_take_turns_in_shuffled_rounds() -> None:
    calls: list[str] = []
    now = [0.0]

    def step(name: str, seconds: float) -> None:
        calls.append(name)
        now[0] += seconds

    steps = {name: (lambda n=name, s=s: step(n, s)) for name, s in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    times = take_turns(steps, 20, warmup=2, clock=lambda: now[0], before_round=lambda: step("-", 100.0))
    assert times == {"a": [1.0] * 20, "b": [2.0] * 20, "c": [4.0] * 20}
    rounds = [calls[i : i + 4] for i in range(0, len(calls), 4)]
    assert len(rounds) == 22
    assert {tuple(sorted(one)) for one in rounds} == {("-", "a", "b", "c")}
    assert len({tuple(one) for one in rounds}) > 3


def test_time_is_up_after_a_whole_round() -> None:
    assert take_turns({"a": lambda: None, "b": lambda: None}, 5, max_seconds=-1.0).keys() == {"a", "b"}
    assert [len(t) for t in take_turns({"a": lambda: None, "b": lambda: None}, 5, max_seconds=-1.0).values()] == [1, 1]


def test_import_times_are_summed_by_package() -> None:
    report = """\
import time: self [us] | cumulative | imported package
import time:       300 |        300 |   torch._C
a line of the program's own | 5 | x
import time:    500000 |     500300 | torch
import time:      2000 |       2000 |     json.decoder
"""
    assert import_seconds(report.splitlines()) == {"torch": pytest.approx(0.5003), "json": pytest.approx(0.002)}
