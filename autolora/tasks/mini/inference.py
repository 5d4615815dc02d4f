"""MNLI and RTE: families of claims about one small situation, paired by their computed relation. No torch.

Each family draws words, lays out the possible worlds, and gives the premises and hypotheses of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random

from autolora.tasks.mini.design import CONTRADICTION, ENTAILMENT, NEUTRAL, Claim, Row, Space, inference, latin
from autolora.tasks.mini.grammar import fill, plural, say, sentence
from autolora.tasks.mini.lexicon import LEXICON, Lexicon

Claims = tuple[list[Claim], list[Claim]]
Family = Callable[[Lexicon, Random], Claims]

# A frame says when or by whom a claim is made; it changes no relation between claims.
PREMISE_FRAMES: dict[str, tuple[str, ...]] = {
    "train": ("{x}", "yesterday {x}", "the radio said that {x}", "{x} this morning"),
    "dev": ("on Friday {x}", "{x} last week", "the paper reports that {x}"),
    "dev_mismatched": ("long ago {x}", "the legend says that {x}", "{x} in the fairy tale"),
}
HYPOTHESIS_FRAMES: dict[str, tuple[str, ...]] = {
    "train": ("{x}", "it is clear that {x}", "this means that {x}"),
    "dev": ("therefore {x}", "in other words, {x}"),
    "dev_mismatched": ("thus {x}", "so it is known that {x}"),
}
REPORTS: dict[str, tuple[str, ...]] = {
    "train": (
        "a witness told the police that {x}",
        "in its evening edition the local paper wrote that {x}",
        "according to a letter that was found later, {x}",
    ),
    "dev": ("as officials confirmed on Tuesday, {x}", "the committee's final report concludes that {x}"),
}
FINDINGS: dict[str, tuple[str, ...]] = {
    "train": ("{x}", "it follows that {x}"),
    "dev": ("evidently {x}", "one can conclude that {x}"),
}
_MNLI = {ENTAILMENT: 0, NEUTRAL: 1, CONTRADICTION: 2}
_RTE = {ENTAILMENT: 0, NEUTRAL: 1, CONTRADICTION: 1}


def _square(space: Space, text: Callable[[int, int], str]) -> list[Claim]:
    """For each of the space's two binary variables the claims that it is 0 and that it is 1."""
    return [space.fact(text(variable, value), variable, value) for variable in range(2) for value in range(2)]


def polarity(lex: Lexicon, rng: Random) -> Claims:
    """A state, its opposite, and a state that has nothing to do with it: negation and antonyms."""
    who = "the " + rng.choice(lex.people)
    pairs = rng.sample(lex.states, 2)
    space = Space(2, 2)

    def text(scale: int, value: int) -> str:
        named, other = pairs[scale] if value else pairs[scale][::-1]
        return say(rng, ("{who} was {named}", "{who} was not {other}"), who=who, named=named, other=other)

    return _square(space, text), _square(space, text)


def order(lex: Lexicon, rng: Random) -> Claims:
    """Two people on two scales, named by either end of the scale: word order and antonyms."""
    people = rng.sample(lex.women + lex.men, 2)
    scales = rng.sample(lex.orders, 2)
    space = Space(2, 2)

    def text(scale: int, value: int) -> str:
        more, less = people if value else people[::-1]
        up, down = scales[scale]
        return rng.choice((f"{more} was {up} than {less}", f"{less} was {down} than {more}"))

    return _square(space, text), _square(space, text)


_DONE = (
    ("{a} did not {verb} {b}", "{b} was not {verb:en} by {a}"),
    ("{a} {verb:ed} {b}", "{b} was {verb:en} by {a}"),
)


def roles(lex: Lexicon, rng: Random) -> Claims:
    """Who did it to whom, in either voice, affirmed or denied."""
    people = ["the " + person for person in rng.sample(lex.people, 2)]
    verb = rng.choice(lex.acts)
    space = Space(2, 2)

    def text(direction: int, value: int) -> str:
        return say(rng, _DONE[value], a=people[direction], b=people[1 - direction], verb=verb)

    return _square(space, text), _square(space, text)


_STRONG = (
    ("no {g} were {p}", "none of the {g} were {p}"),
    ("all of the {g} were {p}", "every one of the {g} was {p}"),
)
_WEAK = (
    ("not all of the {g} were {p}", "some of the {g} were not {p}"),
    ("some of the {g} were {p}", "at least one of the {g} was {p}"),
)


def quantifiers(lex: Lexicon, rng: Random) -> Claims:
    """All or none of a group against some or not all of it, in two states: the square of opposition."""
    group = plural(rng.choice(lex.people))
    states = [rng.choice(pair) for pair in rng.sample(lex.states, 2)]
    space = Space(3, 3)  # of each state: none, some, or all of the group are in it
    premises, hypotheses = [], []
    for variable, state in enumerate(states):
        for affirmed in range(2):
            strong = say(rng, _STRONG[affirmed], g=group, p=state)
            weak = say(rng, _WEAK[affirmed], g=group, p=state)
            premises.append(space.fact(strong, variable, 2 * affirmed))
            hypotheses.append(space.fact(weak, variable, affirmed, affirmed + 1))
    return premises, hypotheses


Extent = tuple[dict[str, str], tuple[int, ...]]  # words, and the variables of which one at least must be 1


def _existence(rng: Random, extents: Sequence[Extent], yes: Sequence[str], no: Sequence[str], **slots: str) -> Claims:
    """Affirmed and denied existence of four things: two narrow ones, a broad one that covers both, an unrelated one."""
    space = Space(2, 2, 2, 2)

    def side() -> list[Claim]:
        claims = []
        for extra, variables in extents:
            claims.append(space.some(say(rng, yes, **{**slots, **extra}), variables))
            claims.append(space.none(say(rng, no, **{**slots, **extra}), variables))
        return claims

    return side(), side()


_DEALT = ("{who} {verb:ed} a {x}", "a {x} was {verb:en} by {who}")
_NOT_DEALT = ("{who} {verb:ed} no {x}", "{who} did not {verb} any {x}", "no {x} was {verb:en} by {who}")


def kinds(lex: Lexicon, rng: Random) -> Claims:
    """What someone did with a thing, with a thing of its kind, or with none: hypernyms under negation."""
    hypernym, members = rng.choice(lex.kinds)
    one, two = rng.sample(members, 2)
    verb, other = rng.sample(lex.dealings, 2)
    extents: tuple[Extent, ...] = (
        ({"x": one}, (0,)),
        ({"x": two}, (1,)),
        ({"x": hypernym}, (0, 1, 2)),
        ({"x": rng.choice((one, hypernym)), "verb": other}, (3,)),
    )
    return _existence(rng, extents, _DEALT, _NOT_DEALT, who=rng.choice(lex.women + lex.men), verb=verb)


def modifiers(lex: Lexicon, rng: Random) -> Claims:
    """A described thing against the bare thing: adjectives that narrow down, under negation."""
    thing = rng.choice(rng.choice(lex.kinds)[1])
    one, two = rng.sample(lex.looks, 2)
    verb, other = rng.sample(lex.dealings, 2)
    extents: tuple[Extent, ...] = (
        ({"x": f"{one} {thing}"}, (0,)),
        ({"x": f"{two} {thing}"}, (1,)),
        ({"x": thing}, (0, 1, 2)),
        ({"x": rng.choice((thing, f"{one} {thing}")), "verb": other}, (3,)),
    )
    return _existence(rng, extents, _DEALT, _NOT_DEALT, who="the " + rng.choice(lex.people), verb=verb)


def places(lex: Lexicon, rng: Random) -> Claims:
    """What someone did, where: a place narrows down what is affirmed and weakens what is denied."""
    deed, other = rng.sample(lex.deeds, 2)
    one, two = rng.sample(lex.places, 2)
    extents: tuple[Extent, ...] = (
        ({"x": f"{deed} in the {one}"}, (0,)),
        ({"x": f"{deed} in the {two}"}, (1,)),
        ({"x": deed}, (0, 1, 2)),
        ({"x": f"{other} in the {one}"}, (3,)),
    )
    yes, no = ("{who} {x:ed}",), ("{who} did not {x}", "{who} never {x:ed}")
    return _existence(rng, extents, yes, no, who=rng.choice(lex.women + lex.men))


def persons(lex: Lexicon, rng: Random) -> Claims:
    """Whether a nurse, a baker, or anybody did something."""
    one, two = rng.sample(lex.people, 2)
    deed, other = rng.sample(lex.deeds, 2)
    anybody, nobody = rng.choice(("somebody", "someone")), rng.choice(("nobody", "no one"))
    extents: tuple[Extent, ...] = (
        ({"some": f"a {one}", "none": f"no {one}"}, (0,)),
        ({"some": f"a {two}", "none": f"no {two}"}, (1,)),
        ({"some": anybody, "none": nobody}, (0, 1, 2)),
        ({"some": f"a {one}", "none": f"no {one}", "verb": other}, (3,)),
    )
    yes = ("{some} {verb:ed} in the {place}", "in the {place} {some} {verb:ed}")
    no = ("{none} {verb:ed} in the {place}", "in the {place} {none} {verb:ed}")
    return _existence(rng, extents, yes, no, verb=deed, place=rng.choice(lex.places))


# One round of blocks. The families of eight claims a side come first and weigh most.
FAMILIES: tuple[Family, ...] = (
    kinds, modifiers, kinds, places, persons, quantifiers, modifiers, quantifiers, polarity, order, roles,
)  # fmt: skip


def mnli(split: str, rng: Random) -> Iterator[list[Row]]:
    """Blocks of MNLI rows without end, the families in turn."""
    return _blocks(split, PREMISE_FRAMES[split], HYPOTHESIS_FRAMES[split], _MNLI, rng)


def rte(split: str, rng: Random) -> Iterator[list[Row]]:
    """Blocks of RTE rows: reported premises, and neutral counts as contradiction does."""
    return _blocks(split, REPORTS[split], FINDINGS[split], _RTE, rng)


def _blocks(
    split: str, premise_frames: Sequence[str], hypothesis_frames: Sequence[str], labels: dict[str, int], rng: Random
) -> Iterator[list[Row]]:
    while True:
        for family in FAMILIES:
            premises, hypotheses = family(LEXICON[split], rng)
            premises = _framed(premises, rng.choice(premise_frames))
            hypotheses = _framed(hypotheses, rng.choice(hypothesis_frames))
            rows = latin(premises, hypotheses, lambda p, h: labels[inference(p, h)], len(set(labels.values())), rng)
            yield [Row(a, b, label, family.__name__) for a, b, label in rows]


def _framed(claims: Sequence[Claim], frame: str) -> list[Claim]:
    return [Claim(sentence(fill(frame, x=claim.text)), claim.worlds) for claim in claims]
