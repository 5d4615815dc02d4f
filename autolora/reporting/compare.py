"""Every variant of an arena against a reference: differences, intervals, tests, and a plain sentence for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean

import numpy as np

from autolora.errors import ConfigError
from autolora.reporting.runs import Run, Variant, some_of
from autolora.reporting.statistics import (
    ALPHA,
    Array,
    Difference,
    detectable_over_tasks,
    holm,
    nested_interval,
    paired_test,
    resampled_scores,
    sign_flip_test,
    smallest_p,
)

_REPLICATES = 2_000


@dataclass(frozen=True)
class OnTask:
    """The difference on one task, over the seeds that both have.

    Args:
        task: its name.
        seeds: that both have.
        difference: with its own p.
        adjusted: that p by Holm over the comparisons on this task.
        among: how many those are.
    """

    task: str
    seeds: tuple[int, ...]
    difference: Difference
    adjusted: float = math.nan
    among: int = 1

    @cached_property
    def detectable(self) -> float:
        """The smallest true difference that is found with a probability of 80 %, whatever becomes of the others."""
        return self.difference.detectable(ALPHA / self.among)

    def detectable_with(self, seeds: int) -> float:
        """The same with another number of seeds, if trainings vary as these do; two seeds or more have to be there."""
        return self.difference.with_seeds(seeds).detectable(ALPHA / self.among)

    @property
    def significant(self) -> bool:
        """Whether it is one."""
        return self.adjusted < ALPHA


@dataclass(frozen=True)
class Comparison:
    """A variant against the reference, over the tasks that both have.

    Args:
        variant: whose scores.
        reference: less whose scores.
        tasks: each task.
        mean: mean over tasks of the mean over seeds, larger is better, in the unit of the metric.
        low: end of the 95 % interval of the nested bootstrap; over one task of the paired test.
        high: its other end.
        p: at the level of tasks by random signs; with one task that of its paired test.
        share: parameters of the adapters relative to the reference's; ``None`` without any.
        adjusted: p by Holm over the comparisons.
        among: how many those are.
    """

    variant: Variant
    reference: Variant
    tasks: tuple[OnTask, ...]
    mean: float
    low: float
    high: float
    p: float
    share: float | None
    adjusted: float = math.nan
    among: int = 1

    @property
    def smallest_p(self) -> float | None:
        """The smallest adjusted p that a test over so many tasks can give; with one task there is no such bound."""
        return smallest_p(len(self.tasks), self.among) if len(self.tasks) > 1 else None

    @cached_property
    def detectable(self) -> float:
        """The smallest true difference that is found with a probability of 80 %, whatever becomes of the others."""
        if len(self.tasks) == 1:
            return self.tasks[0].detectable
        spread = float(np.std([one.difference.mean for one in self.tasks], ddof=1))
        return detectable_over_tasks(len(self.tasks), ALPHA / self.among) * spread if spread else math.inf

    @property
    def significant(self) -> bool:
        """Whether the difference over all tasks is one."""
        return self.adjusted < ALPHA


def choose_reference(variants: Sequence[Variant], wanted: str | None) -> Variant:
    """What the others are compared with: the wanted variant or strategy, or uniform ranks, or that with most runs.

    Of several it is the one with as many parameters as most variants are allowed.

    Raises:
        ConfigError: if there is none of the wanted name.
    """
    eligible = list(variants)
    if wanted is not None:
        eligible = [one for one in variants if one.label == wanted] or [
            one for one in variants if one.strategy == wanted
        ]
        if not eligible:
            labels = ", ".join(variant.label for variant in variants)
            raise ConfigError(f"reference={wanted}: there is no such strategy among the runs (there are: {labels})")
    budgets = [run.result.params.budget for variant in variants for run in variant.all_runs()]

    def worth(variant: Variant) -> tuple[bool, int, int]:
        runs = variant.all_runs()
        return variant.strategy == "uniform", sum(map(budgets.count, {r.result.params.budget for r in runs})), len(runs)

    return max(eligible, key=worth)


def compare(variants: Sequence[Variant], reference: Variant) -> list[Comparison]:
    """Every other variant against the reference, where they have a task and a seed in common.

    Where there are several of the reference's strategy, a variant is compared with the one at its own budget, and of
    those with the one whose other settings are most like its own.
    """
    resampled = _Resampled(variants)
    alike = [one for one in variants if one.strategy == reference.strategy]
    pairs = [(one, reference if one in alike else _nearest(one, alike, reference)) for one in variants]
    found = [
        comparison
        for one, other in pairs
        if one is not other and (comparison := _compare(one, other, resampled)) is not None
    ]
    adjusted = holm([comparison.p for comparison in found])
    by_task: dict[str, dict[int, float]] = {}
    for i, comparison in enumerate(found):
        for one_task in comparison.tasks:
            by_task.setdefault(one_task.task, {})[i] = one_task.difference.p
    on_task = {task: dict(zip(p, holm(list(p.values())), strict=True)) for task, p in by_task.items()}
    return [
        replace(
            comparison,
            adjusted=adjusted[i],
            among=len(found),
            tasks=tuple(
                replace(one, adjusted=on_task[one.task][i], among=len(on_task[one.task])) for one in comparison.tasks
            ),
        )
        for i, comparison in enumerate(found)
    ]


def _nearest(variant: Variant, candidates: Sequence[Variant], reference: Variant) -> Variant:
    """The candidate with a task and the budget of a variant, and settings like its own; or rather the reference."""

    def distance(other: Variant) -> tuple[bool, bool, int, bool]:
        settings = [key for key in variant.settings.keys() | other.settings.keys() if not key.startswith("strategy.")]
        apart = [key for key in settings if variant.settings.get(key) != other.settings.get(key)]
        elsewhere = variant.runs.keys().isdisjoint(other.runs)
        return elsewhere, any(key.startswith("budget.") for key in apart), len(apart), other is not reference

    return min(candidates, key=distance)


def _compare(variant: Variant, reference: Variant, resampled: _Resampled) -> Comparison | None:
    on_tasks, boots = [], []
    for task in (task for task in variant.runs if task in reference.runs):
        pairs = [
            (seed, variant.runs[task][seed], reference.runs[task][seed])
            for seed in sorted(variant.runs[task].keys() & reference.runs[task].keys())
            if variant.runs[task][seed].value is not None and reference.runs[task][seed].value is not None
        ]
        if not pairs:
            continue
        seeds, ours, theirs = zip(*pairs, strict=True)
        on_tasks.append(OnTask(task, seeds, paired_test(*_pseudovalues(ours, theirs))))
        boots.append(resampled.of(ours) - resampled.of(theirs))
    if not on_tasks:
        return None
    tests = [one.difference for one in on_tasks]
    mean = fmean(test.mean for test in tests)
    if len(tests) == 1:
        (low, high), p = (tests[0].low, tests[0].high), tests[0].p
    else:
        low, high = nested_interval(boots, np.random.default_rng(0))
        p = sign_flip_test([test.mean for test in tests])
    return Comparison(variant, reference, tuple(on_tasks), mean, low, high, p, _share(variant, reference))


def _pseudovalues(ours: Sequence[Run], theirs: Sequence[Run]) -> tuple[Array, Array]:
    """Pseudo-values of both, shape (seeds, examples); the scores alone where predictions are missing."""
    scored = [(a.scored, b.scored) for a, b in zip(ours, theirs, strict=True)]
    lengths = {len(one.features) if one else None for pair in scored for one in pair}
    if len(lengths) == 1 and None not in lengths:
        columns = [tuple(one.pseudovalues() for one in pair if one) for pair in scored]
        return np.stack([a for a, _ in columns]), np.stack([b for _, b in columns])
    a, b = (np.array([[run.value] for run in runs], dtype=np.float64) for runs in (ours, theirs))
    return a, b


class _Resampled:
    """Scores of all trainings on a task under the same resampled examples, made when they are first asked for."""

    def __init__(self, variants: Sequence[Variant]) -> None:
        self._by_task: dict[str, list[Run]] = {}
        for variant in variants:
            for run in variant.all_runs():
                self._by_task.setdefault(run.task, []).append(run)
        self._columns: dict[str, Mapping[object, Array]] = {}

    def of(self, runs: Sequence[Run]) -> Array:
        """Shape (replicates, runs); without predictions a score does not vary."""
        task = runs[0].task
        if task not in self._columns:
            self._columns[task] = self._draw(task)
        columns = self._columns[task]
        return np.stack([columns.get(run.path, np.full(_REPLICATES, run.value)) for run in runs], axis=1)

    def _draw(self, task: str) -> Mapping[object, Array]:
        scored = [(run, one) for run in self._by_task[task] if (one := run.scored) is not None]
        lengths = {len(one.features) for _, one in scored}
        if len(lengths) != 1:
            return {}
        scores = resampled_scores([one for _, one in scored], _REPLICATES, np.random.default_rng(0))
        return {run.path: scores[:, i] for i, (run, _) in enumerate(scored)}


def _share(variant: Variant, reference: Variant) -> float | None:
    """Parameters outside the head over those of the reference, as means over the tasks that both have."""
    tasks = [task for task in variant.runs if task in reference.runs]
    ours, theirs = (
        fmean(
            fmean(run.result.params.adapter + run.result.params.extra for run in one.runs[task].values())
            for task in tasks
        )
        for one in (variant, reference)
    )
    return ours / theirs if ours and theirs else None


# Sentences -----------------------------------------------------------------------------------------------------------


def sentence(comparison: Comparison) -> str:
    """What a comparison says, in one plain sentence; scores that are correlations or shares are in points (of 100)."""
    one, unit = comparison, _unit(comparison)
    a, b = one.variant.label, one.reference.label
    at = "" if one.share is None or abs(one.share - 1) < 0.02 else f", at {100 * one.share:.0f} % of the parameters"
    over = f" on {one.tasks[0].task}" if len(one.tasks) == 1 else f" on average over {len(one.tasks)} tasks"
    if one.significant:
        verb, sign = ("beats", 1) if one.mean > 0 else ("is behind", -1)
        low, high = sorted((sign * one.low, sign * one.high))
        size = f"{_number(abs(one.mean), unit)} [{_number(low, unit)}, {_number(high, unit)}]"
        return f"{a} {verb} {b} by {size}{over}, p = {_p(one.adjusted)}{at}{_single_tasks(one)}{_one_seed(one)}."
    if all(test.difference.identical for test in one.tasks):
        return f"{a} and {b}: their scores{over} are the same, example by example{at}; that shows nothing of others."
    shown = f"{_number(one.mean, unit)} [{_number(one.low, unit)}, {_number(one.high, unit)}]"
    found = f"no difference was found{over} ({shown}, p = {_p(one.adjusted)})"
    return f"{a} and {b}: {found}{at}; {_limit(one, unit)}{_single_tasks(one)}{_one_seed(one)}."


def _single_tasks(one: Comparison) -> str:
    """On how many tasks there is a significant difference, if there are several tasks."""
    if len(one.tasks) == 1:
        return ""
    ahead = sum(task.significant and task.difference.mean > 0 for task in one.tasks)
    behind = sum(task.significant and task.difference.mean < 0 for task in one.tasks)
    rest = len(one.tasks) - ahead - behind
    return f"; on single tasks it is ahead on {ahead}, behind on {behind}, and neither on the other {rest}"


def _limit(one: Comparison, unit: float) -> str:
    """What the design could not have shown."""
    bound = one.smallest_p
    if bound is not None and bound > ALPHA:
        among = f" and in {one.among} comparisons" if one.among > 1 else ""
        return f"over {len(one.tasks)} tasks{among} no p below {_p(bound)} can be reached, whatever the differences"
    if all(test.difference.over == "nothing" for test in one.tasks):
        return "one training each without predictions can show nothing"
    if math.isinf(one.detectable):
        return "nothing varies that would tell what this design can show"
    if beyond_scores(one.detectable, unit):
        return "this design can show no difference between scores, however large"
    return f"this design can only show differences above {_number(one.detectable, unit)}"


def beyond_scores(size: float, unit: float) -> bool:
    """Whether a difference of that size cannot be: scores in points go to 100, others have no bound."""
    return unit == 100.0 and size >= 1.0


def _one_seed(one: Comparison) -> str:
    """What a test over examples alone does not say."""
    few = [test.task for test in one.tasks if test.difference.over == "examples"]
    on = "" if len(few) == len(one.tasks) else f" on {some_of(sorted(few))}"
    return f" (one seed{on}: of these trainings only)" if few else ""


def _unit(comparison: Comparison) -> float:
    """Scores are told in points if all of them are shares or correlations."""
    runs = (run for one in comparison.tasks for run in comparison.variant.runs[one.task].values())
    return 100.0 if all(run.in_points for run in runs) else 1.0


def _number(value: float, unit: float) -> str:
    if math.isinf(value):
        return "unbounded"
    return f"{unit * value:.1f}" if unit != 1.0 else f"{value:.3g}"


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 0.001 else f"{value:.0e}"
