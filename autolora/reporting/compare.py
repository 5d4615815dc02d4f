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
    POWER,
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
    budgets = [run.result.budget for variant in variants for run in variant.all_runs()]

    def worth(variant: Variant) -> tuple[bool, bool, int, int]:
        runs = variant.all_runs()
        common = sum(map(budgets.count, {run.result.budget for run in runs}))
        return any(run.value is not None for run in runs), variant.strategy == "uniform", common, len(runs)

    return max(eligible, key=worth)


def compare(variants: Sequence[Variant], reference: Variant) -> list[Comparison]:
    """Every other variant against its :func:`counterpart`, where both have a score on a task with a seed."""
    resampled = _Resampled(variants)
    pairs = [(one, counterpart(one, variants, reference)) for one in variants if one is not reference]
    found = [comparison for one, other in pairs if (comparison := _compare(one, other, resampled)) is not None]
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


def counterpart(variant: Variant, variants: Sequence[Variant], reference: Variant) -> Variant:
    """What a variant is compared with, if several are of the reference's strategy.

    The one that is at the variant's budget, or without a budget has parameters most like its own, and of those the one
    whose other settings are most like its own. A variant of the reference's strategy itself is compared with the one
    at the reference's budget that has its other settings; at that budget, with the reference.
    """
    same_strategy = [one for one in variants if one.strategy == reference.strategy]
    if variant in same_strategy:
        wanted = reference
        same_strategy = [one for one in same_strategy if _same_budget(one, reference)]
        if variant in same_strategy:
            return reference
    else:
        wanted = variant

    def distance(other: Variant) -> tuple[bool, float, int, bool]:
        if not _in_common(variant, other):
            return True, 0.0, 0, other is not reference
        share = _share(variant, other)
        unlike = float(not _same_budget(wanted, other))
        if not any(_budgets(wanted).values()):
            unlike = abs(math.log(share)) if share else math.inf
        keys = [
            key
            for key in variant.settings.keys() | other.settings.keys()
            if not key.startswith(("strategy.", "budget."))
        ]
        apart = sum(variant.settings.get(key) != other.settings.get(key) for key in keys)
        return False, unlike, apart, other is not reference

    return min(same_strategy, key=distance)


def _budgets(variant: Variant) -> dict[str, tuple[str, int] | None]:
    return {task: next(iter(runs.values())).result.budget for task, runs in variant.runs.items()}


def _same_budget(one: Variant, other: Variant) -> bool:
    a, b = _budgets(one), _budgets(other)
    return all(a[task] == b[task] for task in a.keys() & b.keys())


def _in_common(one: Variant, other: Variant) -> dict[str, list[int]]:
    """The seeds with which both have a score, by task; tasks without one are left out."""
    seeds = {
        task: sorted(
            seed
            for seed in runs.keys() & other.runs.get(task, {}).keys()
            if runs[seed].value is not None and other.runs[task][seed].value is not None
        )
        for task, runs in one.runs.items()
    }
    return {task: found for task, found in seeds.items() if found}


def _compare(variant: Variant, reference: Variant, resampled: _Resampled) -> Comparison | None:
    on_tasks, boots = [], []
    for task, seeds in _in_common(variant, reference).items():
        ours, theirs = ([one.runs[task][seed] for seed in seeds] for one in (variant, reference))
        on_tasks.append(OnTask(task, tuple(seeds), paired_test(*_pseudovalues(ours, theirs))))
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
        return f"{a} and {b}: the same score{over} in every example{at}, which says nothing of other examples."
    shown = f"{_number(one.mean, unit)} [{_number(one.low, unit)}, {_number(one.high, unit)}]"
    bound = one.smallest_p
    if bound is not None and bound > ALPHA:
        found = f"{shown} apart{over}, too few for a finding (no p below {_p(bound)} can be reached){at}"
    else:
        found = f"no difference was found{over} ({shown}, p = {_p(one.adjusted)}){at}; {_limit(one, unit)}"
    return f"{a} and {b}: {found}{_single_tasks(one)}{_one_seed(one)}."


def not_compared(variants: Sequence[Variant], reference: Variant, comparisons: Sequence[Comparison]) -> list[str]:
    """A sentence for each variant that is in no comparison, with the reason."""
    if len(variants) == 1:
        return [f"{reference.label} stands alone: there is nothing to compare it with."]
    said = {one.label for comparison in comparisons for one in (comparison.variant, comparison.reference)}
    sentences = []
    for one in (one for one in variants if one.label not in said):
        if all(run.value is None for run in one.all_runs()):
            sentences.append(f"{one.label} has no score, and is in no comparison.")
        elif one is not reference:
            other = counterpart(one, variants, reference)
            sentences.append(f"{one.label} is not compared with {other.label}: they have no task and seed in common.")
    return sentences


def _single_tasks(one: Comparison) -> str:
    """The tasks on which there is a significant difference, if there are several tasks."""
    if len(one.tasks) == 1:
        return ""
    sides = {
        side: [task.task for task in one.tasks if task.significant and sign * task.difference.mean > 0]
        for side, sign in (("ahead", 1), ("behind", -1))
    }
    found = [f"{side} on {some_of(tasks)}" for side, tasks in sides.items() if tasks]
    if not found:
        return "; no difference was found on a single task either" if not one.significant else ""
    return f"; on single tasks {one.variant.label} is {' and '.join(found)}"


def _limit(one: Comparison, unit: float) -> str:
    """What the design can show."""
    if all(test.difference.over == "nothing" for test in one.tasks):
        return "one training each without predictions can show nothing"
    if math.isinf(one.detectable):
        return "nothing varies that would tell what this design can show"
    if beyond_scores(one.detectable, unit):
        return f"this design shows no difference between scores, however large, with a power of {POWER:.0%}"
    return f"this design shows differences above {_number(one.detectable, unit)} with a power of {POWER:.0%}"


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
    """In points where the unit is 100; what is rounded to 0 has no sign."""
    if math.isinf(value):
        return "unbounded"
    return f"{unit * value:z.1f}" if unit != 1.0 else f"{value:z.3g}"


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 0.001 else f"{value:.0e}"
