"""MRPC, QQP and STS-B: the same content in other words, or other content in much the same words. No torch.

A scheme is a frame in two wordings, left and right, whose slots are filled from pairs of synonyms: one of the pair on
the left, the other on the right, so that agreement does not show in common words. Content is a tuple of bits, one for
each contrast (which of two values fills a slot, or who plays which of two roles); two sentences mean the same if and
only if their bits are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random

from autolora.tasks.mini.design import Row
from autolora.tasks.mini.grammar import fill, sentence
from autolora.tasks.mini.synonyms import SYNONYMS, Pairs, Synonyms

Slots = dict[str, str]
Value = tuple[Slots, Slots]  # what fills the left wording, what fills the right one
Contrast = tuple[Value, Value]
Bits = tuple[int, ...]


@dataclass(frozen=True)
class Scheme:
    """A frame in two wordings.

    Attributes:
        left, right: templates.
        vary: slot -> word list, two entries of which contrast.
        fixed: slot -> word list, one entry of which is common to the block.
        swap: word list of the two parties ``a`` and ``b``, whose roles contrast; none if empty.
    """

    left: str
    right: str
    vary: Slots
    fixed: Slots
    swap: str = ""


def _scheme(left: str, right: str, vary: str = "", fixed: str = "", swap: str = "") -> Scheme:
    """``vary`` and ``fixed`` are written as "slot=list slot=list"."""
    varying, constant = (dict(item.split("=", 1) for item in text.split()) for text in (vary, fixed))
    return Scheme(left, right, varying, constant, swap)


STATEMENTS: dict[str, tuple[Scheme, ...]] = {
    "train": (
        _scheme("the {p} {v:ed} the {t} near the {l}", "near the {l}, the {t} was {v:en} by the {p}",
                "p=people v=handlings t=things l=places"),
        _scheme("the {a} {v:ed} the {b}", "the {b} was {v:en} by the {a}", "v=acts", "", "people"),
        _scheme("a {r} {p} waited for {n} days at the {l}", "for {n} days, a {r} {p} was waiting at the {l}",
                "r=traits p=people n=amounts l=places"),
        _scheme("the {a} {v:ed} the {t} to the {b}", "the {b} {v:ed} the {t} from the {a}", "t=things",
                "v=converses", "people"),
        _scheme("the {p} who {v:ed} the {t} was {r}", "the {r} {p} was the one who {v:ed} the {t}",
                "p=people v=handlings t=things r=traits"),
        _scheme("there was a {k} {t} in front of the {l}", "in front of the {l} stood a {t} that was {k}",
                "k=looks t=things l=places"),
        _scheme("close to the {l} lives a {p} who is {r}", "the {r} {p} resides close to the {l}",
                "r=traits p=people l=places"),
        _scheme("{n} {p:s} {v:ed} the {t}", "the {t} was {v:en} by {n} {p:s}",
                "n=amounts p=people v=handlings t=things"),
        _scheme("police say the {k} {t} belongs to a {p}", "according to the police, a {p} owns the {k} {t}",
                "k=looks t=things p=people"),
    ),
    "dev": (
        _scheme("it was the {p} who {v:ed} the {t} at the {l}", "the {t} at the {l} had been {v:en} by the {p}",
                "p=people v=handlings t=things l=places"),
        _scheme("last night a {a} {v:ed} a {b}", "a {b} was {v:en} by a {a} last night", "v=acts", "", "people"),
        _scheme("{n} {k} {t:s} were on show at the {l}", "the {l} showed {n} {t:s} that were {k}",
                "k=looks t=things l=places", "n=amounts"),
        _scheme("on Monday the {a} {v:ed} a {t} to the {b}", "the {b} {v:ed} a {t} from the {a} on Monday", "t=things",
                "v=converses", "people"),
        _scheme("they saw a {r} {p} outside the {l}", "outside the {l} they noticed a {p} who seemed {r}",
                "r=traits p=people l=places"),
    ),
}  # fmt: skip

QUESTIONS: dict[str, tuple[Scheme, ...]] = {
    "train": (
        _scheme("how can I {v} my {t}?", "what is the best way to {v} my {t}?", "v=handlings t=things"),
        _scheme("why is the {p} so {r}?", "what makes the {p} so {r}?", "p=people r=traits"),
        _scheme("where can I see a {k} {t}?", "what is a good place to see a {k} {t}?", "k=looks t=things"),
        _scheme("does the {p} at the {l} need {n} {t:s}?", "are {n} {t:s} needed by the {p} at the {l}?",
                "p=people l=places n=amounts t=things"),
        _scheme("who {v:ed} the {k} {t}?", "by whom was the {k} {t} {v:en}?", "v=handlings k=looks t=things"),
        _scheme("did the {a} {v} the {b}?", "was the {b} {v:en} by the {a}?", "v=acts", "", "people"),
        _scheme("is the {p} going to {v} the {t}?", "will the {t} be {v:en} by the {p}?",
                "p=people v=handlings t=things"),
    ),
    "dev": (
        _scheme("what should one do to {v} a {t}?", "do you have any tips on how to {v} a {t}?",
                "v=handlings t=things"),
        _scheme("what is the reason that the {p} looks {r}?", "how come the {p} looks {r}?", "p=people r=traits"),
        _scheme("which {l} has {n} {k} {t:s}?", "at which {l} are there {n} {t:s} that are {k}?",
                "l=places k=looks t=things", "n=amounts"),
        _scheme("has the {a} ever {v:en} a {b}?", "has a {b} ever been {v:en} by the {a}?", "v=acts", "", "people"),
        _scheme("when did the {p} {v} the {t}?", "at what time was the {t} {v:en} by the {p}?",
                "p=people v=handlings t=things"),
    ),
}  # fmt: skip


class Content:
    """A scheme with its words drawn; ``plain`` is the chance that a value has one word for both wordings."""

    def __init__(self, scheme: Scheme, words: Synonyms, rng: Random, plain: float = 0.0) -> None:
        self.frames = (scheme.left, scheme.right)
        self.contrasts: list[Contrast] = []
        self.common: Value = ({}, {})
        for slot, name in scheme.vary.items():
            first, second = rng.sample(_entries(words, name), 2)
            self.contrasts.append((_value((slot,), (first,), rng, plain), _value((slot,), (second,), rng, plain)))
        for slot, name in scheme.fixed.items():
            for side, word in enumerate(rng.choice(_entries(words, name))):
                self.common[side][slot] = word
        if scheme.swap:
            first, second = rng.sample(_entries(words, scheme.swap), 2)
            straight = _value(("a", "b"), (first, second), rng, plain)
            crossed = tuple({"a": slots["b"], "b": slots["a"]} for slots in straight)
            self.contrasts.append((straight, (crossed[0], crossed[1])))

    def two(self, rng: Random) -> tuple[Bits, Bits]:
        """A content, and one that differs from it in some contrasts."""
        count = len(self.contrasts)
        flipped = rng.sample(range(count), rng.randint(1, count))
        one = tuple(rng.randrange(2) for _ in range(count))
        return one, tuple(bit ^ (i in flipped) for i, bit in enumerate(one))

    def text(self, side: int, bits: Bits) -> str:
        """The sentence with this content in the left (0) or right (1) wording."""
        slots = dict(self.common[side])
        for contrast, bit in zip(self.contrasts, bits, strict=True):
            slots |= contrast[bit][side]
        return sentence(fill(self.frames[side], **slots))


def _entries(words: Synonyms, name: str) -> Pairs:
    entries: Pairs = getattr(words, name)
    return entries


def _value(slots: tuple[str, ...], entries: Sequence[tuple[str, str]], rng: Random, plain: float) -> Value:
    """The two wordings of these entries; which word of an entry stands on the left is a toss."""
    left: Slots = {}
    right: Slots = {}
    for slot, entry in zip(slots, entries, strict=True):
        left[slot], right[slot] = rng.sample(entry, 2)
        if plain and rng.random() < plain:
            right[slot] = left[slot]
    return left, right


def _equivalence(schemes: Sequence[Scheme], split: str, rng: Random) -> Iterator[list[Row]]:
    """Blocks of two contents on either side: paired straight they agree, paired crosswise they do not."""
    while True:
        for number, scheme in enumerate(schemes):
            content = Content(scheme, SYNONYMS[split], rng)
            one, other = content.two(rng)
            order = rng.sample((0, 1), 2)
            yield [
                Row(content.text(order[0], a), content.text(order[1], b), int(a == b), f"scheme {number}")
                for a, b in product((one, other), repeat=2)
            ]


def mrpc(split: str, rng: Random) -> Iterator[list[Row]]:
    """Statements that agree in content or differ in one or two respects."""
    return _equivalence(STATEMENTS[split], split, rng)


def qqp(split: str, rng: Random) -> Iterator[list[Row]]:
    """Questions that ask the same or differ in one or two respects."""
    return _equivalence(QUESTIONS[split], split, rng)


# Common words tell something of similarity, as they do in real pairs, but not most of it.
_PLAIN = 0.2


def stsb(split: str, rng: Random) -> Iterator[list[Row]]:
    """Statements scored by the share of contrasts in which they agree, from 0 (none) to 5 (all).

    A block pairs a content and its complement with those two and with another content and its complement, all eight
    ways; or two contents of different schemes with each other and themselves. The scores of every sentence average 2.5.
    """
    schemes = [scheme for scheme in STATEMENTS[split] if len(scheme.vary) >= 3]
    while True:
        for number, scheme in enumerate(schemes):
            content = Content(scheme, SYNONYMS[split], rng, _PLAIN)
            one, other = content.two(rng)
            left = (one, _complement(one))
            right = (*left, other, _complement(other))
            order = rng.sample((0, 1), 2)
            yield [
                Row(content.text(order[0], a), content.text(order[1], b), _similarity(a, b), f"scheme {number}")
                for a, b in product(left, right)
            ]
            topics = [Content(drawn, SYNONYMS[split], rng, _PLAIN) for drawn in rng.sample(schemes, 2)]
            told = [[topic.text(side, (0,) * len(topic.contrasts)) for topic in topics] for side in order]
            yield [Row(told[0][i], told[1][j], 5.0 if i == j else 0.0, "topics") for i, j in product((0, 1), repeat=2)]


def _complement(bits: Bits) -> Bits:
    return tuple(1 - bit for bit in bits)


def _similarity(first: Bits, second: Bits) -> float:
    """Five times the share of contrasts in which two contents agree, to two digits as raters' averages are."""
    return round(5.0 * sum(a == b for a, b in zip(first, second, strict=True)) / len(first), 2)
