"""Paired comparisons of trainings: tests, intervals, and what a design can show. numpy and scipy only.

A score is a smooth function of means over examples: accuracy of the share that is right, Matthews of the four counts,
Pearson of first and second moments. :class:`Scored` keeps those features, one row for each example, so that a jackknife
and a bootstrap are sums with other weights, and no metric has its own code.

Seeds of one task are not replications of tasks, and the examples of a dev set are the same for every seed. So there are
two tests: within a task over seeds *and* examples (:func:`paired_test`), and over tasks (:func:`sign_flip_test`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

METRICS = ("accuracy", "matthews", "pearson")
"""What :class:`Scored` can compute; shares and correlations, which are shown in points of 100."""
ALPHA, POWER, LEVEL = 0.05, 0.8, 0.95
_EXACT_TASKS = 14
"""Up to so many tasks every pattern of signs is counted; above, so many random ones are drawn:"""
_RANDOM_SIGNS = 20_000
_NO_EXAMPLE = 1e-9
"""A share below this is 0 but for rounding."""
_TINY = 1e-100
"""Smaller p are 0."""
_CHUNK = 4_000_000
"""Weights that a bootstrap holds at once."""


# Scores --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """The score of one training on one dev set, as a function of means.

    Args:
        metric: ``"accuracy"``, ``"matthews"`` or ``"pearson"``.
        features: what is averaged, shape (examples, k).
    """

    metric: str
    features: Array

    @classmethod
    def of(cls, metric: str, predictions: Array, labels: Array) -> Scored:
        """From predictions and labels, shape (examples,) each.

        Raises:
            ValueError: if the metric is another.
        """
        x, y = np.asarray(predictions, dtype=np.float64), np.asarray(labels, dtype=np.float64)
        if metric == "accuracy":
            columns = [x == y]
        elif metric == "matthews":
            columns = [(x == 1) & (y == 1), (x == 1) & (y != 1), (x != 1) & (y == 1)]
        elif metric == "pearson":
            x, y = x - x.mean(), y - y.mean()  # correlations do not change, and digits are kept
            columns = [x, y, x * x, y * y, x * y]
        else:
            raise ValueError(f"metric {metric!r}: expected one of accuracy, matthews, pearson")
        return cls(metric, np.stack(columns, axis=1).astype(np.float64))

    def value(self) -> float:
        """The score."""
        return float(self.at(self.features.mean(axis=0)))

    def at(self, means: Array) -> Array:
        """The score at given means, shape (..., k) to (...). 0 where it does not exist, as for a constant predictor."""
        if self.metric == "accuracy":
            return means[..., 0]
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.metric == "matthews":
                tp, fp, fn = np.moveaxis(means, -1, 0)
                tn = 1 - tp - fp - fn
                sides = np.stack([tp + fp, tp + fn, tn + fp, tn + fn])
                exists = (sides > _NO_EXAMPLE).all(axis=0)
                score = np.where(exists, (tp * tn - fp * fn) / np.sqrt(sides.prod(axis=0)), 0.0)
            else:
                x, y, xx, yy, xy = np.moveaxis(means, -1, 0)
                spread = (xx - x * x) * (yy - y * y)
                score = np.where(spread > 0, (xy - x * y) / np.sqrt(spread), 0.0)
        return np.nan_to_num(score)

    def pseudovalues(self) -> Array:
        """Jackknife pseudo-values, shape (examples,), shifted so that their mean is the score.

        n·f(all) - (n-1)·f(all but i): for accuracy 0 or 1 for each example, for other metrics what it contributes.
        Source: Quenouille 1956, Tukey 1958; the shift: Hillis et al., Statistics in Medicine 24, 2005, section 2.
        """
        n = len(self.features)
        whole = self.at(self.features.mean(axis=0))
        without = self.at((self.features.sum(axis=0) - self.features) / (n - 1))
        values = n * whole - (n - 1) * without
        return np.asarray(values - values.mean() + whole)


# Within a task -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A mean difference, with the parts of its variance and what follows from them.

    With parts V_i that are estimated with f_i degrees of freedom, the difference d is significant at alpha if

        d² > reach(alpha)² = sum over i of t²(1 - alpha/2; f_i)·V_i,

    which has at most the nominal rate of false findings at every alpha, whatever the shares of the parts, since the
    distribution function of chi-square with one degree of freedom is concave. With one part it is the t-test. Source:
    Banerjee, Sankhya 22, 1960.

    Args:
        mean: the difference.
        parts: variance of the mean and degrees of freedom of its estimate.
        over: what it generalises to: new trainings and new examples, or only one of them.
    """

    mean: float
    parts: tuple[tuple[float, float], ...]
    over: str

    @property
    def se(self) -> float:
        """Standard error."""
        return math.sqrt(sum(variance for variance, _ in self.parts))

    @cached_property
    def p(self) -> float:
        """Two-sided p; where nothing varies that of random signs of all differences."""
        from scipy.optimize import brentq
        from scipy.stats import t

        parts = [part for part in self.parts if part[0] > 0]
        if self.mean == 0.0 or not self.parts:
            return 1.0
        if not parts:
            return smallest_p(round(min(df for _, df in self.parts)) + 1)
        if len(parts) == 1:
            return float(2 * t.sf(abs(self.mean) / self.se, parts[0][1]))
        if self.reach(_TINY) < abs(self.mean):
            return 0.0
        return math.exp(brentq(lambda log: self.reach(math.exp(log)) - abs(self.mean), math.log(_TINY), 0.0))

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.mean - self.reach(1 - LEVEL) if self._bounded else -math.inf

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.mean + self.reach(1 - LEVEL) if self._bounded else math.inf

    @property
    def _bounded(self) -> bool:
        return self.se > 0 or (self.mean == 0.0 and bool(self.parts))

    @property
    def identical(self) -> bool:
        """Whether the scores are equal in every example, so that there is nothing to test."""
        return self.mean == 0.0 and self.se == 0.0 and bool(self.parts)

    def reach(self, alpha: float) -> float:
        """How large the difference has to be to be significant at ``alpha``."""
        from scipy.stats import t

        return math.sqrt(sum(float(t.isf(alpha / 2, df)) ** 2 * variance for variance, df in self.parts if variance))

    def with_seeds(self, seeds: int) -> Difference:
        """What so many trainings would give if they vary as these do; for a difference that is over seeds.

        The part of trainings, V_1 of S seeds, becomes V_1·S/S' with S' - 1 degrees of freedom; that of examples stays.
        """
        (variance, df), *rest = self.parts
        return replace(self, parts=((variance * (df + 1) / seeds, seeds - 1.0), *rest))

    def detectable(self, alpha: float = ALPHA) -> float:
        """The smallest true difference that a test at ``alpha`` finds with a probability of 80 %.

        That of a t-test with the same standard error, and degrees of freedom that give the same reach; infinite where
        nothing varies, and so nothing tells what could have been found.
        """
        from scipy.optimize import brentq
        from scipy.stats import t

        parts = [part for part in self.parts if part[0] > 0]
        if not parts:
            return math.inf
        least, most = (pick(df for _, df in parts) for pick in (min, max))
        critical = self.reach(alpha) / self.se
        df = least if least == most else brentq(lambda df: t.isf(alpha / 2, df) - critical, least, most)
        return detectable(self.se, df, alpha)


def paired_test(a: Array, b: Array) -> Difference:
    """The difference of two strategies on one task, paired by seed and example.

    With D[s, e] = a[s, e] - b[s, e] and the mean squares MS of a two-way layout without replication, the variance of
    mean D has the parts

        max(MS_seeds, MS_rest) / (S·E)            with S - 1 degrees of freedom,
        max(MS_examples - MS_rest, 0) / (S·E)     with E - 1,

    so that the statement is about new trainings *and* new examples. Their sum is the variance in the analysis of
    readers and cases (Dorfman, Berbaum and Metz, Investigative Radiology 27, 1992) with seeds as readers, but for
    MS_rest, whose expectation is no larger, below MS_seeds, which few seeds may leave near 0. Degrees of freedom of the
    sum after Satterthwaite (Hillis, Statistics in Medicine 26, 2007) are many just where MS_seeds is small by chance:
    with 3 seeds and nothing to find, p is then below 0.001 ten times too often, which no adjustment for many
    comparisons bears. Hence :class:`Difference`.

    One seed: a t-test over examples, about these two trainings only. One column (a score that is no mean over
    examples): a t-test over seeds.

    Args:
        a: pseudo-values, shape (seeds, examples).
        b: the same of the other strategy.
    """
    apart = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    seeds, examples = apart.shape
    mean = float(apart.mean())
    if seeds == 1 and examples == 1:
        return Difference(mean, (), "nothing")
    if seeds == 1 or examples == 1:
        variance = float(apart.var(ddof=1)) / apart.size
        return Difference(mean, ((variance, apart.size - 1.0),), "examples" if seeds == 1 else "seeds")
    by_seed, by_example = apart.mean(axis=1), apart.mean(axis=0)
    rest = apart - by_seed[:, None] - by_example[None, :] + mean
    ms_seeds = examples * float(((by_seed - mean) ** 2).sum()) / (seeds - 1)
    ms_examples = seeds * float(((by_example - mean) ** 2).sum()) / (examples - 1)
    ms_rest = float((rest**2).sum()) / ((seeds - 1) * (examples - 1))
    trainings = max(ms_seeds, ms_rest) / apart.size, seeds - 1.0
    cases = max(ms_examples - ms_rest, 0.0) / apart.size, examples - 1.0
    return Difference(mean, (trainings, cases), "seeds and examples")


def detectable(se: float, df: float, alpha: float = ALPHA, power: float = POWER) -> float:
    """The true difference that a two-sided t-test at ``alpha`` finds with probability ``power``: noncentral t."""
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    critical = float(t.ppf(1 - alpha / 2, df))

    def shortfall(shift: float) -> float:
        # Far from 0 SciPy has no value for the other tail, which is nothing there.
        return float(nct.sf(critical, df, shift) + np.nan_to_num(nct.cdf(-critical, df, shift))) - power

    return float(brentq(shortfall, 0.0, 2 * critical + 5.0)) * se


# Over tasks ----------------------------------------------------------------------------------------------------------


def smallest_p(tasks: int, comparisons: int = 1) -> float:
    """The smallest p that :func:`sign_flip_test` can give, adjusted for so many comparisons.

    2 of 2^T patterns are as extreme as all signs equal.
    """
    return min(1.0, comparisons * 2.0 / 2**tasks)


def sign_flip_test(differences: Sequence[float]) -> float:
    """Two-sided p of a mean over tasks under random signs: exact up to 14 tasks, above by 20,000 drawn patterns.

    Source: Fisher, The Design of Experiments, 1935, section 21.
    """
    values = np.asarray(differences, dtype=np.float64)
    means = np.abs(_signs(values.size) @ values)
    extreme = np.abs(values.sum()) * (1 - 1e-12)
    hits = int((means >= extreme).sum())
    if values.size <= _EXACT_TASKS:
        return hits / len(means)
    return (hits + 1) / (len(means) + 1)


@cache
def _signs(tasks: int) -> Array:
    if tasks <= _EXACT_TASKS:
        return np.array(list(product((-1.0, 1.0), repeat=tasks)))
    return np.random.default_rng(0).choice([-1.0, 1.0], size=(_RANDOM_SIGNS, tasks))


@cache
def detectable_over_tasks(tasks: int, alpha: float = ALPHA) -> float:
    """The mean difference, in standard deviations of the tasks' differences, that the sign-flip test finds with 80 %.

    By simulation of normal differences, 4,000 with common random numbers; infinite where no p reaches ``alpha``.
    """
    if smallest_p(tasks) > alpha:
        return np.inf
    from scipy.optimize import brentq

    noise = np.random.default_rng(0).standard_normal((4_000, tasks))
    signs = _signs(tasks)

    def shortfall(shift: float) -> float:
        found = 0
        for block in np.array_split(noise + shift, max(1, noise.shape[0] * len(signs) // _CHUNK)):
            means = np.abs(block @ signs.T)
            share = (means >= np.abs(block.sum(axis=1, keepdims=True)) * (1 - 1e-12)).mean(axis=1)
            found += int((share <= alpha).sum())
        return found / len(noise) - POWER

    return float(brentq(shortfall, 0.0, 20.0, xtol=1e-3))


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p adjusted for so many comparisons at once. Source: Holm, Scandinavian Journal of Statistics 6, 1979."""
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


# The bootstrap -------------------------------------------------------------------------------------------------------


def resampled_scores(runs: Sequence[Scored], replicates: int, rng: np.random.Generator) -> Array:
    """Scores of trainings on one dev set under resampled examples, the same ones for all, shape (replicates, runs)."""
    examples = len(runs[0].features)
    width = runs[0].features.shape[1]
    stacked = np.concatenate([run.features for run in runs], axis=1)
    blocks = []
    for start in range(0, replicates, block := max(1, _CHUNK // examples)):
        count = min(block, replicates - start)
        weights = rng.multinomial(examples, np.full(examples, 1 / examples), size=count) / examples
        means = (weights @ stacked).reshape(count, len(runs), width)
        blocks.append(runs[0].at(means))
    return np.concatenate(blocks)


def nested_interval(tasks: Sequence[Array], rng: np.random.Generator) -> tuple[float, float]:
    """A 95 % interval of a difference, averaged over T tasks, with tasks, seeds and examples resampled.

    A percentile interval of T draws from T is too narrow by sqrt((T - 1) / T), and by the normal tail in place of t's:
    what the draw of tasks does to the mean is multiplied by sqrt(T / (T - 1))·t/z, with T - 1 degrees of freedom; what
    seeds and examples do is not. Source: Hesterberg, The American Statistician 69, 2015, on what is narrow, and by how
    much.

    Args:
        tasks: for each task the differences under resampled examples, shape (replicates, seeds); two or more.
        rng: draws tasks and seeds.
    """
    from scipy.stats import norm, t

    replicates = len(tasks[0])
    rows = np.arange(replicates)[:, None]
    by_task = np.stack(
        [
            values[rows, rng.integers(values.shape[1], size=(replicates, values.shape[1]))].mean(axis=1)
            for values in tasks
        ],
        axis=1,
    )
    count, top = len(tasks), (1 + LEVEL) / 2
    drawn = rng.integers(count, size=(replicates, count))
    centres = by_task.mean(axis=0)
    stretch = np.sqrt(count / (count - 1)) * t.ppf(top, count - 1) / norm.ppf(top)
    of_tasks = stretch * (centres[drawn].mean(axis=1) - centres.mean())
    within = (by_task - centres)[rows, drawn].mean(axis=1)
    low, high = np.percentile(centres.mean() + of_tasks + within, [100 * (1 - top), 100 * top])
    return float(low), float(high)
