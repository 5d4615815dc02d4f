"""One split of a task, as plain columns. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Split:
    """Rows of one split.

    ``text_b`` is ``None`` for single-sentence tasks; ``labels`` holds class indices (int) or scores (float);
    ``ids`` identifies a row inside its split (its position in the source, from 0) and is what predictions are saved
    under; ``skipped`` counts the rows of the source that were left out for want of a usable label.
    """

    text_a: list[str]
    text_b: list[str] | None
    labels: list[int] | list[float]
    ids: list[int]
    skipped: int = 0

    def __post_init__(self) -> None:
        n = len(self.text_a)
        assert len(self.labels) == n
        assert len(self.ids) == n
        assert self.text_b is None or len(self.text_b) == n

    def __len__(self) -> int:
        return len(self.text_a)

    def __add__(self, other: Split) -> Split:
        """The rows of both."""
        return Split(
            text_a=self.text_a + other.text_a,
            text_b=None if self.text_b is None or other.text_b is None else self.text_b + other.text_b,
            labels=[*self.labels, *other.labels],
            ids=self.ids + other.ids,
        )

    def take(self, rows: Sequence[int]) -> Split:
        """The rows at these positions, in this order."""
        return Split(
            text_a=[self.text_a[i] for i in rows],
            text_b=None if self.text_b is None else [self.text_b[i] for i in rows],
            labels=[self.labels[i] for i in rows],
            ids=[self.ids[i] for i in rows],
        )


@dataclass(frozen=True)
class Arrays:
    """Rows of one split of a task on images or sound.

    ``inputs`` are what was recorded, float32, ``(rows, ...)``; ``labels`` and ``ids`` as in :class:`Split`.
    """

    inputs: NDArray[np.float32]
    labels: list[int]
    ids: list[int]

    def __post_init__(self) -> None:
        assert len(self.inputs) == len(self.labels) == len(self.ids)

    def __len__(self) -> int:
        return len(self.labels)

    def __add__(self, other: Arrays) -> Arrays:
        """The rows of both."""
        inputs = np.concatenate([self.inputs, other.inputs])
        return Arrays(inputs, self.labels + other.labels, self.ids + other.ids)

    def take(self, rows: Sequence[int]) -> Arrays:
        """The rows at these positions, in this order."""
        return Arrays(self.inputs[list(rows)], [self.labels[i] for i in rows], [self.ids[i] for i in rows])


def fingerprint(splits: Mapping[str, Arrays]) -> str:
    """A hash of all rows."""
    digest = hashlib.sha256()
    for name, rows in splits.items():
        digest.update(f"{name} {rows.ids} {rows.labels}".encode())
        digest.update(np.ascontiguousarray(rows.inputs).tobytes())
    return digest.hexdigest()[:12]
