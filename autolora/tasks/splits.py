"""Choosing rows of a split: seeded, stratified sub-samples and held-out slices. No torch.

The rows depend on the labels, the seed and the sizes alone: never on a strategy, on the hash seed of the interpreter,
or on another random stream, so that everything compared is compared on the same rows.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from autolora.errors import DataError
from autolora.tasks.records import Arrays, Split

RowsT = TypeVar("RowsT", Split, Arrays)

_QUANTILES = 10


def subsample(split: RowsT, n: int, seed: int, stratify: bool = True) -> RowsT:
    """``n`` rows of a split (``data.max_train``), in their original order; all of them if it has no more than ``n``.

    Args:
        split: the rows to choose from.
        n: how many to keep, at least 1.
        seed: the same seed gives the same rows.
        stratify: keep the proportions of the classes (scores: of ten quantile bands), to within one row each, and at
            least one row of each where ``n`` allows.

    Raises:
        DataError: if ``n`` is below 1.
    """
    if n < 1:
        raise DataError(f"data.max_train must be at least 1, got {n}; leave it out to use every row")
    if n >= len(split):
        return split
    strata = _strata(split.labels) if stratify else [list(range(len(split)))]
    return split.take(_draw(strata, n, random.Random(f"subsample-{seed}")))


def hold_out(split: RowsT, fraction: float, max_rows: int | None, seed: int) -> tuple[RowsT, RowsT]:
    """Cut a stratified slice off a training split: ``(fit, heldout)``, disjoint, together the split, in order.

    The slice has ``fraction`` of the rows but at most ``max_rows``, and at least one row of every class (for scores:
    at least three rows, since any two correlate, spread over ten quantile bands); every class keeps at least one row in
    ``fit``.

    Raises:
        DataError: if the fraction is not between 0 and 1, or the split is too small to be cut like this.
    """
    if not 0.0 < fraction < 1.0:
        raise DataError(f"the held-out fraction must be between 0 and 1, exclusive; got {fraction:g}")
    scores = any(isinstance(label, float) for label in split.labels)
    strata = _strata(split.labels)
    least = 3 if scores else max(1, len(strata))
    if len(split) < 2 * least or (not scores and min(map(len, strata)) < 2):
        raise DataError(
            f"too few rows to hold a slice out: {len(split)} rows ({_counts(split)}); expected at least "
            f"{'six rows' if scores else 'two of each class'}: use more data or a larger data.max_train"
        )
    if max_rows is not None and max_rows < least:
        raise DataError(
            f"the held-out slice needs at least {least} rows{'' if scores else ', one of each class'}; "
            f"its limit is {max_rows}: raise the limit"
        )
    size = min(max(round(fraction * len(split)), least), len(split) - least)
    size = size if max_rows is None else min(size, max_rows)
    held = _draw(strata, size, random.Random(f"holdout-{seed}"), leave=0 if scores else 1)
    chosen = set(held)
    return split.take([i for i in range(len(split)) if i not in chosen]), split.take(held)


def _counts(split: Split | Arrays) -> str:
    if any(isinstance(label, float) for label in split.labels):
        return "scores"
    return ", ".join(f"class {label}: {count}" for label, count in sorted(Counter(split.labels).items())) or "none"


def _strata(labels: Sequence[int | float]) -> list[list[int]]:
    """Row positions by class, or by up to ten bands of equal size in the order of the scores."""
    if not any(isinstance(label, float) for label in labels):
        return [[i for i, label in enumerate(labels) if label == value] for value in sorted(set(labels))]
    order = sorted(range(len(labels)), key=lambda i: (labels[i], i))
    edges = [len(order) * band // _QUANTILES for band in range(_QUANTILES + 1)]
    bands = [order[low:high] for low, high in itertools.pairwise(edges)]
    return [band for band in bands if band]


def _draw(strata: list[list[int]], n: int, rng: random.Random, leave: int = 0) -> list[int]:
    """``n`` positions in ascending order, drawn from each stratum in proportion to its size."""
    counts = _allocate([len(stratum) for stratum in strata], n, leave)
    return sorted(i for stratum, count in zip(strata, counts, strict=True) for i in rng.sample(stratum, count))


def _allocate(sizes: Sequence[int], n: int, leave: int) -> list[int]:
    """Shares of ``n`` in proportion to ``sizes`` by largest remainder: 1 (if ``n`` allows) to size - leave of each."""
    total = sum(sizes)
    quotas = [n * size / total for size in sizes]
    least = 1 if n >= len(sizes) else 0
    most = [size - leave for size in sizes]
    counts = [min(max(int(quota), least), limit) for quota, limit in zip(quotas, most, strict=True)]
    while sum(counts) != n:
        step = 1 if sum(counts) < n else -1
        movable = [i for i, count in enumerate(counts) if least <= count + step <= most[i]]
        # The stratum furthest from its share moves; ties go to the first, so that the outcome is unique.
        furthest = max(movable, key=lambda i: (step * (quotas[i] - counts[i]), -i))
        counts[furthest] += step
    return counts
