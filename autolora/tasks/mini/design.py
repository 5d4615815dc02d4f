"""Balanced designs: which sentence is paired with which, so that only their *relation* tells the label. No torch.

Labels are computed, not written: a claim is a sentence with the set of possible worlds in which it holds, so that
entailment is inclusion of sets, contradiction is disjointness, and equivalence is equality. From a list of claims on
each side, :func:`latin` pairs every text exactly once with every label. A model that scores the two sides separately
(f(a) + g(b), as a bag of words does) can then learn nothing from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random

World = tuple[int, ...]


@dataclass(frozen=True)
class Claim:
    """A sentence and the worlds it is true in."""

    text: str
    worlds: frozenset[World]


class Space:
    """All possible worlds: one variable for each argument, which takes the values ``0 .. size - 1``."""

    def __init__(self, *sizes: int) -> None:
        self.worlds: list[World] = list(product(*(range(size) for size in sizes)))

    def fact(self, text: str, variable: int, *values: int) -> Claim:
        """The claim that a variable has one of these values."""
        return Claim(text, frozenset(world for world in self.worlds if world[variable] in values))

    def some(self, text: str, variables: Sequence[int]) -> Claim:
        """The claim that one of these variables, at least, is not 0."""
        return Claim(text, frozenset(world for world in self.worlds if any(world[i] for i in variables)))

    def none(self, text: str, variables: Sequence[int]) -> Claim:
        """The claim that all of these variables are 0."""
        return Claim(text, frozenset(world for world in self.worlds if not any(world[i] for i in variables)))


_DRAWS = 32

ENTAILMENT, NEUTRAL, CONTRADICTION = "entailment", "neutral", "contradiction"


def inference(premise: Claim, hypothesis: Claim) -> str:
    """Entailment if the hypothesis holds wherever the premise does, contradiction if it holds nowhere there."""
    if premise.worlds <= hypothesis.worlds:
        return ENTAILMENT
    return NEUTRAL if premise.worlds & hypothesis.worlds else CONTRADICTION


@dataclass(frozen=True)
class Row:
    """One example, and the family of constructions it comes from."""

    text_a: str
    text_b: str | None
    label: int | float
    family: str


def latin(
    left: Sequence[Claim],
    right: Sequence[Claim],
    label: Callable[[Claim, Claim], int],
    classes: int,
    rng: Random,
) -> list[tuple[str, str, int]]:
    """For each class a perfect matching of left and right whose pairs have that label.

    Each text therefore occurs exactly once with each label. Pairs of equal texts are left out. Of several random
    matchings each class takes the one whose share of common words is nearest to what all classes can reach, so that
    the number of common words says little about the label.

    Returns:
        ``len(left) * classes`` triples (left text, right text, class); empty if some class has no perfect matching.
    """
    table = [[-1 if a.text == b.text else label(a, b) for b in right] for a in left]
    overlap = [[_overlap(a.text, b.text) for b in right] for a in left]
    choices: list[list[tuple[float, list[int]]]] = []
    for wanted in range(classes):
        allowed = [[j for j, found in enumerate(line) if found == wanted] for line in table]
        matchings = [matching for _ in range(_DRAWS) if (matching := _perfect_matching(allowed, rng)) is not None]
        if not matchings:
            return []
        choices.append([(sum(overlap[i][j] for i, j in enumerate(m)), m) for m in matchings])
    target = max(min(shared for shared, _ in drawn) for drawn in choices)
    rows: list[tuple[str, str, int]] = []
    for wanted, drawn in enumerate(choices):
        _, matching = min(drawn, key=lambda choice: abs(choice[0] - target))
        rows += [(left[i].text, right[j].text, wanted) for i, j in enumerate(matching)]
    return rows


def _overlap(first: str, second: str) -> float:
    """Common words as a share of all words (Jaccard index)."""
    a, b = (set(text.lower().rstrip(".?").split()) for text in (first, second))
    return len(a & b) / len(a | b)


def _perfect_matching(allowed: list[list[int]], rng: Random) -> list[int] | None:
    """A partner for each line among its allowed columns, all different (Kuhn's augmenting paths)."""
    for line in allowed:
        rng.shuffle(line)
    owner: dict[int, int] = {}

    def place(line: int, visited: set[int]) -> bool:
        for column in allowed[line]:
            if column in visited:
                continue
            visited.add(column)
            if column not in owner or place(owner[column], visited):
                owner[column] = line
                return True
        return False

    order = list(range(len(allowed)))
    rng.shuffle(order)
    if not all(place(line, set()) for line in order):
        return None
    partner = {line: column for column, line in owner.items()}
    return [partner[line] for line in range(len(allowed))]


def collect(blocks: Iterable[Sequence[Row]], size: int, rng: Random) -> list[Row]:
    """Whole blocks until there are ``size`` rows, shuffled; a block that repeats a known row is left out."""
    seen: set[tuple[str, str | None]] = set()
    rows: list[Row] = []
    for block in blocks:
        keys = [(row.text_a, row.text_b) for row in block]
        if len(set(keys)) < len(keys) or not seen.isdisjoint(keys):
            continue
        seen.update(keys)
        rows += block
        if len(rows) >= size:
            break
    rng.shuffle(rows)
    return rows
