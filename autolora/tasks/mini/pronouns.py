"""WNLI: whom a pronoun stands for. No torch.

Two participants take part in an event, and a clause says something of one of them by a pronoun. Its gender or number,
or what is said, decides which. The hypothesis puts one of the two in the pronoun's place. Both participants appear in
both roles, so that neither sentence alone tells the label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from autolora.tasks.mini.design import Claim, Row, latin
from autolora.tasks.mini.grammar import fill, plural, sentence
from autolora.tasks.mini.lexicon import LEXICON, Lexicon, words

Claims = tuple[list[Claim], list[Claim]]

# What is said of a participant: holds of either by itself.
_REMARKS = {
    "train": words("late tired hungry in_trouble ready lost new_in_town on_holiday bored in_love hurt surprised"),
    "dev": words("thirsty cold exhausted under_pressure homesick without_a_job puzzled upset"),
}
_MEETINGS: dict[str, tuple[str, ...]] = {
    "train": (
        "{a} met {b} while {p} {r}",
        "{a} called {b} when {p} {r}",
        "{a} talked to {b} because {p} {r}",
        "{a} saw {b} and noticed that {p} {r}",
        "{a} told {b} that {p} {r}",
    ),
    "dev": (
        "{a} wrote to {b} at a time when {p} {r}",
        "{a} went to see {b} since {p} {r}",
        "{a} reminded {b} that {p} {r}",
    ),
}
# (event, what explains it if it is true of the first, ... of the second)
_CAUSES: dict[str, tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]] = {
    "train": (
        ("{a} could not lift {b}", ("too weak", "too tired"), ("too heavy", "too fat")),
        ("{a} beat {b} in the race", ("faster", "in better shape"), ("slower", "out of breath")),
        ("{a} comforted {b}", ("kind", "full of pity"), ("sad", "in tears")),
        ("{a} envied {b}", ("jealous", "unsuccessful"), ("successful", "famous")),
        ("{a} hired {b}", ("short of staff", "in need of help"), ("well qualified", "a good worker")),
        ("{a} rescued {b}", ("brave", "a hero"), ("in danger", "trapped")),
        ("{a} lent money to {b}", ("generous", "rich"), ("broke", "poor")),
        ("{a} asked {b} for advice", ("confused", "at a loss"), ("experienced", "an expert")),
        ("{a} was afraid of {b}", ("timid", "easily scared"), ("cruel", "dangerous")),
        ("{a} punished {b}", ("strict", "severe"), ("naughty", "disobedient")),
        ("{a} carried {b}", ("strong", "muscular"), ("injured", "unable to walk")),
        ("{a} forgave {b}", ("merciful", "patient"), ("sorry", "full of regret")),
    ),
    "dev": (
        ("{a} protected {b}", ("powerful", "courageous"), ("helpless", "under threat")),
        ("{a} fed {b}", ("caring", "hospitable"), ("starving", "underfed")),
        ("{a} was knocked out by {b}", ("weaker", "outmatched"), ("stronger", "a boxer")),
        ("{a} cheered up {b}", ("friendly", "sympathetic"), ("depressed", "unhappy")),
        ("{a} admired {b}", ("a devotee", "a fan"), ("talented", "gifted")),
    ),
}


def _gender(lex: Lexicon, split: str, rng: Random) -> Claims:
    """A woman and a man: "she" or "he"."""
    return _agreement(split, (rng.choice(lex.women), rng.choice(lex.men)), ("she was", "he was"), rng)


def _number(lex: Lexicon, split: str, rng: Random) -> Claims:
    """One person and several: "he was" or "they were"."""
    one, many = rng.sample(lex.people, 2)
    singular = rng.choice(("he was", "she was"))
    return _agreement(split, (f"the {one}", f"the {plural(many)}"), (singular, "they were"), rng)


def _agreement(split: str, who: tuple[str, str], clauses: tuple[str, str], rng: Random) -> Claims:
    template, remark = rng.choice(_MEETINGS[split]), rng.choice(_REMARKS[split])
    order = rng.sample((0, 1), 2)
    a, b = (who[i] for i in order)
    premises = [
        Claim(sentence(fill(template, a=a, b=b, p=clause, r=remark)), frozenset({(i,)}))
        for i, clause in enumerate(clauses)
    ]
    hypotheses = [
        Claim(sentence(f"{who[i]} {clause.split()[1]} {remark}"), frozenset({(i,)})) for i, clause in enumerate(clauses)
    ]
    return premises, hypotheses


def _cause(lex: Lexicon, split: str, rng: Random) -> Claims:
    """Two of one gender: only what explains the event decides."""
    names, pronoun = rng.choice(((lex.women, "she"), (lex.men, "he")))
    who = rng.sample(names, 2)
    event, *explanations = rng.choice(_CAUSES[split])
    premises, hypotheses = [], []
    for bearer, choices in enumerate(explanations):
        trait = rng.choice(choices)
        for first in range(2):
            a, b = who[first], who[1 - first]
            clause = fill(event, a=a, b=b)
            true_of = first if bearer == 0 else 1 - first
            premises.append(Claim(sentence(f"{clause} because {pronoun} was {trait}"), frozenset({(bearer, true_of)})))
            hypotheses.append(Claim(sentence(f"{who[first]} was {trait}"), frozenset({(bearer, first)})))
    return premises, hypotheses


_FAMILIES: tuple[Callable[[Lexicon, str, Random], Claims], ...] = (_gender, _number, _gender, _cause, _gender)


def _label(premise: Claim, hypothesis: Claim) -> int:
    """1 if they speak of the same participant, 0 if of the other, -1 if they say different things."""
    ((*said, one),), ((*asked, other),) = premise.worlds, hypothesis.worlds
    return -1 if said != asked else int(one == other)


def wnli(split: str, rng: Random) -> Iterator[list[Row]]:
    """Blocks of premises with a pronoun and hypotheses with a participant in its place; class 1 is entailment."""
    while True:
        for family in _FAMILIES:
            premises, hypotheses = family(LEXICON[split], split, rng)
            rows = latin(premises, hypotheses, _label, 2, rng)
            yield [Row(a, b, label, family.__name__.strip("_")) for a, b, label in rows]
