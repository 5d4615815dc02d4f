"""One split of a text task, as plain Python columns. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
