"""Tests, intervals and power: against SciPy, against GLUE's own metrics, and on data whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from autolora.reporting.statistics import (
    Difference,
    Scored,
    detectable,
    detectable_over_tasks,
    holm,
    nested_interval,
    paired_test,
    resampled_scores,
    sign_flip_test,
    smallest_p,
)
from autolora.tasks.metrics import compute

METRICS = ("accuracy", "matthews", "pearson")


def columns(metric: str, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    if metric == "pearson":
        labels = rng.uniform(0, 5, n)
        return labels + rng.standard_normal(n), labels
    labels = rng.integers(0, 2, n)
    return np.where(rng.random(n) < 0.8, labels, 1 - labels), labels


def simulate(
    rng: np.random.Generator,
    *,
    seeds: int = 3,
    examples: int = 200,
    shift: float = 0.0,
    spread: tuple = (0.5, 2.0, 3.0),
) -> np.ndarray:
    """Differences with an effect of the seed, of the example, and of both together."""
    by_seed, by_example, rest = spread
    return (
        shift
        + by_seed / 10 * rng.standard_normal((seeds, 1))
        + by_example * rng.standard_normal((1, examples))
        + rest * rng.standard_normal((seeds, examples))
    )


# Scores --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_the_tasks(metric: str, seed: int) -> None:
    predictions, labels = columns(metric, 100, seed)
    expected = compute([metric], predictions, labels).values[metric]
    assert Scored.of(metric, predictions, labels).value() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("constant", [0, 1])
def test_matthews_of_a_constant_is_zero(constant: int) -> None:
    labels = np.array([0, 1, 1] * 333)
    assert Scored.of("matthews", np.full(999, constant), labels).value() == 0.0


def test_pearson_of_a_constant_is_zero() -> None:
    assert Scored.of("pearson", np.full(9, 0.1), np.arange(9.0)).value() == 0.0


def test_unknown_metric() -> None:
    with pytest.raises(ValueError, match="'bleu': expected one of accuracy, matthews, pearson"):
        Scored.of("bleu", np.zeros(2), np.zeros(2))


@pytest.mark.parametrize("metric", METRICS)
def test_pseudovalues_are_those_of_a_jackknife_done_one_by_one(metric: str) -> None:
    predictions, labels = columns(metric, 40, 7)
    whole = compute([metric], predictions, labels).values[metric]
    assert whole is not None
    one_by_one = []
    for i in range(40):
        without = compute([metric], np.delete(predictions, i), np.delete(labels, i)).values[metric]
        assert without is not None
        one_by_one.append(40 * whole - 39 * without)
    expected = np.array(one_by_one) - np.mean(one_by_one) + whole
    np.testing.assert_allclose(Scored.of(metric, predictions, labels).pseudovalues(), expected, atol=1e-9)


def test_pseudovalues_of_accuracy_are_right_or_wrong() -> None:
    predictions, labels = columns("accuracy", 50, 0)
    np.testing.assert_allclose(
        Scored.of("accuracy", predictions, labels).pseudovalues(), predictions == labels, atol=1e-9
    )


# Within a task -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 60), (7, 1)])
def test_one_seed_or_one_column_is_a_paired_t_test(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal(shape) + 0.3, rng.standard_normal(shape)
    ours, expected = paired_test(a, b), stats.ttest_rel(a.ravel(), b.ravel())
    interval = expected.confidence_interval()
    assert ours.p == pytest.approx(expected.pvalue)
    assert ours.parts == ((pytest.approx(np.var(a - b, ddof=1) / a.size), expected.df),)
    assert (ours.low, ours.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert ours.over == ("examples" if shape[0] == 1 else "seeds")


def test_without_an_effect_of_examples_it_is_a_t_test_over_seeds() -> None:
    seeds = np.array([0.4, -0.1, 0.7, 0.3])
    noise = np.array([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]]) * 0.01  # every example the same on average
    ours = paired_test(seeds[:, None] + noise, np.zeros((4, 2)))
    expected = stats.ttest_1samp(seeds, 0.0)
    assert ours.p == pytest.approx(expected.pvalue)
    assert ours.over == "seeds and examples"


def test_the_two_way_layout_by_hand() -> None:
    # D = [[1, 3, 2], [2, 6, 1]]: means 2.5; seeds 2, 3; examples 1.5, 4.5, 1.5.
    apart = np.array([[1.0, 3.0, 2.0], [2.0, 6.0, 1.0]])
    ms_seeds = 3 * (0.25 + 0.25) / 1
    ms_examples = 2 * (1 + 4 + 1) / 2
    ms_rest = ((1 - 1) ** 2 + (3 - 4) ** 2 + (2 - 1) ** 2 + (2 - 2) ** 2 + (6 - 5) ** 2 + (1 - 2) ** 2) / 2
    ours = paired_test(apart, np.zeros((2, 3)))
    assert (ms_seeds, ms_examples, ms_rest) == (1.5, 6.0, 2.0)
    # Seeds differ by less than the rest, which is taken in their place.
    assert ours.mean == 2.5
    assert ours.parts == ((pytest.approx(2 / 6), 1.0), (pytest.approx((6 - 2) / 6), 2.0))
    reach = math.sqrt(stats.t.ppf(0.975, 1) ** 2 * 2 / 6 + stats.t.ppf(0.975, 2) ** 2 * 4 / 6)
    assert (ours.low, ours.high) == (pytest.approx(2.5 - reach), pytest.approx(2.5 + reach))
    assert ours.reach(ours.p) == pytest.approx(2.5)


def test_equal_predictions_are_no_difference() -> None:
    same = np.random.default_rng(0).random((3, 20))
    ours = paired_test(same, same)
    assert (ours.mean, ours.p, ours.low, ours.high, ours.identical) == (0.0, 1.0, 0.0, 0.0, True)
    assert math.isinf(ours.detectable())


def test_the_same_difference_everywhere_is_a_matter_of_signs() -> None:
    ours = paired_test(np.full((3, 20), 0.25), np.zeros((3, 20)))
    assert (ours.mean, ours.p, ours.low, ours.high) == (0.25, 2 / 2**3, -math.inf, math.inf)
    assert not ours.identical


def test_one_number_each_says_nothing() -> None:
    ours = paired_test(np.array([[0.9]]), np.array([[0.1]]))
    assert (ours.p, ours.over) == (1.0, "nothing")
    assert math.isinf(ours.detectable())


@pytest.mark.parametrize("spread", [(0.0, 1.0, 1.0), (3.0, 0.0, 1.0), (3.0, 1.5, 2.0), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_nothing_is_found_in_nothing_at_more_than_the_nominal_rate(spread: tuple, seeds: int) -> None:
    if seeds == 1:
        spread = (0.0, *spread[1:])  # one training each: the statement is about these two
    rng = np.random.default_rng(5)
    p = np.array(
        [paired_test(simulate(rng, seeds=seeds, spread=spread), np.zeros((seeds, 200))).p for _ in range(1000)]
    )
    # 0.05 + 3 standard errors of 1,000 simulations. Fewer are found where seeds and examples both count, and with two
    # seeds, whose t needs an MS_seeds so small that MS_rest stands in its place.
    assert (p < 0.05).mean() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)
    if seeds == 1 or (seeds > 2 and spread == (3.0, 0.0, 1.0)):  # one part of the variance is all of it
        assert (p < 0.05).mean() >= 0.03


@pytest.mark.parametrize("alpha", [0.05, 0.01, 0.001, 1e-4])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_tail_is_no_heavier_than_nominal_whatever_the_parts(seeds: int, alpha: float) -> None:
    rng = np.random.default_rng(seeds)
    chi, z = rng.chisquare(seeds - 1, 200_000) / (seeds - 1), rng.standard_normal(200_000)
    for share in (1.0, 0.9, 0.5, 0.1, 0.02):
        # The reach at alpha of estimated parts, by their definition; the test against it is that of the class.
        reach = np.sqrt(
            stats.t.isf(alpha / 2, seeds - 1) ** 2 * share * chi + stats.t.isf(alpha / 2, 999) ** 2 * (1 - share)
        )
        parts = ((share * chi[0], seeds - 1.0), (1 - share, 999.0))
        assert Difference(1.0, parts, "seeds and examples").reach(alpha) == pytest.approx(reach[0])
        found = (np.abs(z) > reach).mean()
        assert found <= alpha + 3 * math.sqrt(alpha / 200_000)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("apart", [0.0, 0.6])
def test_eleven_comparisons_on_one_task_find_nothing_in_nothing(seeds: int, apart: float) -> None:
    """Right and wrong answers of twelve strategies that are equally good, on easy and hard examples.

    ``apart`` is how much strategies differ in what is easy for them; of trainings, how good they are differs too.
    """
    rng = np.random.default_rng(seeds)
    errors = 0
    for _ in range(200):
        easy = rng.normal(1.0, 1.5, (1, 1, 300)) + apart * rng.standard_normal((12, 1, 300))
        trained = easy + 0.1 * rng.standard_normal((12, seeds, 1)) + 0.7 * rng.standard_normal((12, seeds, 300))
        right = (trained > 0).astype(float)
        tests = [paired_test(right[i], right[0]) for i in range(1, 12)]
        errors += any(abs(test.mean) > test.reach(0.05 / 11) for test in tests)  # Holm's first step
    assert errors / 200 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 11])
@pytest.mark.parametrize(
    ("seeds", "spread"), [(3, (3.0, 0.0, 0.5)), (5, (3.0, 0.0, 0.5)), (3, (3.0, 3.0, 0.5)), (1, (0.0, 1.0, 1.0))]
)
def test_a_difference_of_the_stated_size_is_found_as_often_as_stated(seeds: int, spread: tuple, alpha: float) -> None:
    rng = np.random.default_rng(6)
    by_seed, by_example, rest = spread
    trainings, cases = (by_seed / 10) ** 2 / seeds + rest**2 / (seeds * 200), by_example**2 / 200
    parts = ((trainings, seeds - 1.0), (cases, 199.0)) if seeds > 1 else ((trainings + cases, 199.0),)
    shift = Difference(0.0, parts, "").detectable(alpha)
    tests = [
        paired_test(simulate(rng, seeds=seeds, spread=spread, shift=shift), np.zeros((seeds, 200))) for _ in range(1000)
    ]
    found = np.mean([abs(test.mean) > test.reach(alpha) for test in tests])
    assert found == pytest.approx(0.8, abs=3 * math.sqrt(0.8 * 0.2 / 1000) + 0.01)  # two parts: 0.81


def test_more_seeds_shrink_the_part_of_trainings_alone() -> None:
    three = Difference(0.3, ((4.0, 2.0), (1.0, 99.0)), "seeds and examples")
    assert three.with_seeds(12) == Difference(0.3, ((1.0, 11.0), (1.0, 99.0)), "seeds and examples")
    assert three.with_seeds(3) == three


def test_what_is_detectable_follows_the_power_of_a_t_test() -> None:
    shift = detectable(2.0, 10) / 2.0
    critical = stats.t.ppf(0.975, 10)
    assert stats.nct.sf(critical, 10, shift) + stats.nct.cdf(-critical, 10, shift) == pytest.approx(0.8)


# Over tasks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [2, 3, 6, 9])
def test_sign_flips_agree_with_scipy(tasks: int) -> None:
    rng = np.random.default_rng(tasks)
    for _ in range(10):
        values = rng.standard_normal(tasks) + 0.5
        expected = stats.permutation_test(
            (values,),
            lambda x, axis: x.mean(axis=axis),
            permutation_type="samples",
            n_resamples=np.inf,
            vectorized=True,
        ).pvalue
        assert sign_flip_test(values) == pytest.approx(expected)


def test_the_smallest_p() -> None:
    assert [smallest_p(tasks) for tasks in (1, 2, 3, 6)] == [1.0, 0.5, 0.25, 0.03125]
    for tasks in (1, 2, 3, 6):
        assert sign_flip_test(np.arange(1, tasks + 1)) == smallest_p(tasks)
    assert sign_flip_test(np.ones(40)) == 1 / 20_001


def test_no_difference_over_tasks_is_p_one() -> None:
    assert sign_flip_test([0.0, 0.0, 0.0]) == 1.0


def test_over_tasks_nothing_is_found_in_nothing() -> None:
    rng = np.random.default_rng(2)
    found = np.mean([sign_flip_test(rng.standard_normal(8)) <= 0.05 for _ in range(1000)])
    assert 0.02 <= found <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


@pytest.mark.parametrize("tasks", [6, 9])
def test_over_tasks_a_difference_of_the_stated_size_is_found_as_often_as_stated(tasks: int) -> None:
    rng = np.random.default_rng(3)
    shift = detectable_over_tasks(tasks)
    found = np.mean([sign_flip_test(rng.standard_normal(tasks) + shift) <= 0.05 for _ in range(1000)])
    assert found == pytest.approx(0.8, abs=3 * math.sqrt(0.8 * 0.2 / 1000))


def test_few_tasks_can_show_nothing() -> None:
    assert math.isinf(detectable_over_tasks(5))
    assert math.isfinite(detectable_over_tasks(6))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == [0.03, 0.06, 0.06]
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


# The bootstrap -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_resampling_examples_agrees_with_scipy(metric: str) -> None:
    predictions, labels = columns(metric, 150, 3)
    ours = resampled_scores([Scored.of(metric, predictions, labels)], 2000, np.random.default_rng(0))[:, 0]

    def score(x: np.ndarray, y: np.ndarray) -> float:
        return Scored.of(metric, x, y).value()

    theirs = stats.bootstrap(
        (predictions, labels), score, paired=True, vectorized=False, n_resamples=2000, method="percentile", rng=1
    )
    assert ours.std(ddof=1) == pytest.approx(theirs.standard_error, rel=0.1)
    low, high = np.percentile(ours, [2.5, 97.5])
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert low == pytest.approx(theirs.confidence_interval.low, abs=0.1 * width)
    assert high == pytest.approx(theirs.confidence_interval.high, abs=0.1 * width)


def test_trainings_share_the_resampled_examples() -> None:
    one = Scored.of("accuracy", *columns("accuracy", 100, 0))
    scores = resampled_scores([one, one], 50, np.random.default_rng(0))
    assert (scores[:, 0] == scores[:, 1]).all()
    assert len(set(scores[:, 0])) > 5


def test_the_nested_interval_widens_with_every_level() -> None:
    rng = np.random.default_rng(0)
    examples = 0.01 * rng.standard_normal((2000, 1))
    seeds = np.array([-0.05, 0.0, 0.05])
    constant, by_seed = np.zeros((2000, 3)), np.zeros((2000, 3)) + seeds

    def width(*tasks: np.ndarray) -> float:
        low, high = nested_interval(tasks, np.random.default_rng(1))
        return high - low

    # Two tasks that agree: drawing them adds nothing but that one may be drawn twice.
    assert width(constant, constant) == 0.0
    assert width(constant + examples, constant + examples) == pytest.approx(2 * 1.96 * 0.01, rel=0.1)
    # Three draws of three values: standard deviation sqrt(2/3)·0.05/sqrt(3), on two tasks, with examples besides.
    seeds_alone = 0.05 * math.sqrt(2) / 3 * math.sqrt(1 / 2 + 1 / 4)
    both = width(by_seed + examples, by_seed + examples)
    assert both == pytest.approx(2 * 1.96 * math.hypot(seeds_alone, 0.01), rel=0.1)
    # Two tasks apart by 0.2: a quarter of all draws has one of them twice, on either side, 0.1 from the mean.
    stretch = math.sqrt(2) * stats.t.ppf(0.975, 1) / 1.96
    assert width(constant, constant + 0.2) == pytest.approx(0.2 * stretch, rel=1e-3)


@pytest.mark.parametrize("tasks", [2, 3, 4, 6, 9])
@pytest.mark.parametrize("apart", [0.0, 0.005, 0.02])
def test_the_nested_interval_covers_the_mean_over_tasks_as_often_as_it_says(tasks: int, apart: float) -> None:
    rng = np.random.default_rng(tasks)
    covered = 0
    for _ in range(400):
        true = apart * rng.standard_normal(tasks)
        boots = []
        for effect in true:
            seeds = effect + 0.01 * rng.standard_normal() + 0.01 * rng.standard_normal((1, 3))
            boots.append(seeds + 0.01 * rng.standard_normal((500, 1)))
        low, high = nested_interval(boots, np.random.default_rng(0))
        covered += low <= 0.0 <= high
    assert covered / 400 >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 400)
