"""Every variant of an arena against a reference: differences, intervals, tests, and a plain sentence for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from autolora.errors import ConfigError
from autolora.reporting.runs import Run, Variant
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
    """The difference on one task, over the seeds that both have; ``adjusted`` by Holm over the variants."""

    task: str
    seeds: tuple[int, ...]
    difference: Difference
    adjusted: float = math.nan

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
        detectable: the smallest true difference that the design finds with a probability of 80 %.
        adjusted: p by Holm over the variants.
        share: parameters of the adapters relative to the reference's; ``None`` without any.
    """

    variant: Variant
    reference: Variant
    tasks: tuple[OnTask, ...]
    mean: float
    low: float
    high: float
    p: float
    detectable: float
    adjusted: float
    share: float | None

    @property
    def smallest_p(self) -> float | None:
        """The smallest p that a test over so many tasks can give; with one task there is no such bound."""
        return smallest_p(len(self.tasks)) if len(self.tasks) > 1 else None

    @property
    def significant(self) -> bool:
        """Whether the difference over all tasks is one."""
        return self.adjusted < ALPHA


def choose_reference(variants: Sequence[Variant], wanted: str | None) -> Variant:
    """The variant that the others are compared with: the wanted one, or uniform ranks, or the one with most runs.

    Of several uniform ones it is that with as many parameters as most other variants are allowed.

    Raises:
        ConfigError: if there is none of the wanted name.
    """
    if wanted is not None:
        named = [variant for variant in variants if wanted in (variant.label, variant.strategy)]
        if not named:
            labels = ", ".join(variant.label for variant in variants)
            raise ConfigError(f"reference={wanted}: there is no such strategy among the runs (there are: {labels})")
        return next((variant for variant in named if variant.label == wanted), named[0])
    budgets = [run.result.params.budget for variant in variants for run in variant.all_runs()]

    def worth(variant: Variant) -> tuple[bool, int, int]:
        runs = variant.all_runs()
        return variant.strategy == "uniform", sum(map(budgets.count, {r.result.params.budget for r in runs})), len(runs)

    return max(variants, key=worth)


def compare(variants: Sequence[Variant], reference: Variant) -> list[Comparison]:
    """Every other variant against the reference, where they have a task and a seed in common."""
    resampled = _Resampled(variants)
    found = [
        comparison
        for variant in variants
        if variant is not reference and (comparison := _compare(variant, reference, resampled)) is not None
    ]
    by_task: dict[str, dict[str, float]] = {}
    for comparison in found:
        for one in comparison.tasks:
            by_task.setdefault(one.task, {})[comparison.variant.label] = one.difference.p
    adjusted_on = {task: holm(values) for task, values in by_task.items()}
    adjusted = holm({comparison.variant.label: comparison.p for comparison in found})
    return [
        replace(
            comparison,
            adjusted=adjusted[comparison.variant.label],
            tasks=tuple(
                replace(one, adjusted=adjusted_on[one.task][comparison.variant.label]) for one in comparison.tasks
            ),
        )
        for comparison in found
    ]


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
        (low, high), p, visible = (tests[0].low, tests[0].high), tests[0].p, tests[0].detectable()
    else:
        means = [test.mean for test in tests]
        low, high = nested_interval(boots, np.random.default_rng(0))
        p = sign_flip_test(means)
        spread = float(np.std(means, ddof=1))
        visible = detectable_over_tasks(len(means)) * spread if spread else 0.0
    return Comparison(
        variant, reference, tuple(on_tasks), mean, low, high, p, visible, math.nan, _share(variant, reference)
    )


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
    """Adapter parameters over those of the reference, as means over the tasks that both have."""
    tasks = [task for task in variant.runs if task in reference.runs]
    ours, theirs = (
        fmean(fmean(run.result.params.adapter for run in one.runs[task].values()) for task in tasks)
        for one in (variant, reference)
    )
    return ours / theirs if ours and theirs else None


# Sentences -----------------------------------------------------------------------------------------------------------


def sentence(comparison: Comparison) -> str:
    """What a comparison says, in one plain sentence; scores that are correlations or shares are in points (of 100)."""
    one, unit = comparison, _unit(comparison)
    a, b = one.variant.label, one.reference.label
    shown = f"{_number(one.mean, unit)} [{_number(one.low, unit)}, {_number(one.high, unit)}]"
    at = "" if one.share is None or abs(one.share - 1) < 0.02 else f", at {100 * one.share:.0f} % of the parameters"
    over = f" on {one.tasks[0].task}" if len(one.tasks) == 1 else f" on average over {len(one.tasks)} tasks"
    if one.significant:
        verb = "beats" if one.mean > 0 else "is behind"
        size = f"{_number(abs(one.mean), unit)} [{shown.partition('[')[2]}"
        return f"{a} {verb} {b} by {size}{over}, p = {_p(one.adjusted)}{at}{_one_seed(one)}{_single_tasks(one)}."
    found = f"no difference was found{over} ({shown}, p = {_p(one.adjusted)})"
    return f"{a} and {b}: {found}{at}; {_limit(one, unit)}{_single_tasks(one)}."


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
        return f"over {len(one.tasks)} tasks no p below {_p(bound)} can be reached, whatever the differences"
    if math.isinf(one.detectable):
        return "one training each without predictions can show nothing"
    return f"this design can only show differences above {_number(one.detectable, unit)}{_one_seed(one)}"


def _one_seed(one: Comparison) -> str:
    """What a test over examples alone does not say."""
    return " (one seed: of these trainings only)" if one.tasks[0].difference.over == "examples" else ""


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
