"""CoLA: minimal sets of sentences in which every word is as often right as wrong. No torch.

Each construction crosses two choices (say, subject number and verb number); a sentence is acceptable if the choices
go together. Phenomena after Warstadt et al., "BLiMP", TACL 2020: agreement across attractors, anaphora, determiners,
verb forms, argument structure, gaps, gerunds and infinitives, tense and time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from random import Random

from autolora.tasks.mini.design import Row
from autolora.tasks.mini.grammar import fill, plural, sentence
from autolora.tasks.mini.lexicon import LEXICON, Lexicon, words

Marked = tuple[str, bool]  # a sentence and whether it is acceptable
Construction = Callable[[Lexicon, str, Random], list[Marked]]


def _cross(template: str, first: tuple[str, str], second: tuple[str, str], **common: str) -> list[Marked]:
    """The template with each of two choices for ``{a}`` and ``{b}``, which must go together."""
    return [
        (sentence(fill(template, a=first[i], b=second[j], **common).strip()), i == j)
        for i, j in product((0, 1), repeat=2)
    ]


_AGREEMENT = {
    "train": ("the {a} near the {n} {b} {r} now", "my {a} {b} probably {r}", "the young {a} surely {b} {r}"),
    "dev": ("the {a} next to the {n} {b} {r} again", "her {a} perhaps {b} {r}", "the foreign {a} {b} indeed {r}"),
}
_AUXILIARIES = {"train": (("is", "are"), ("was", "were")), "dev": (("has been", "have been"), ("is", "are"))}


def _agreement(lex: Lexicon, split: str, rng: Random) -> list[Marked]:
    """Subject and verb in number, past another noun of either number."""
    head, attractor = rng.sample(lex.people, 2)
    attractor = rng.choice((attractor, plural(attractor)))
    verb = rng.choice(_AUXILIARIES[split])
    state = rng.choice(rng.choice(lex.states))
    return _cross(rng.choice(_AGREEMENT[split]), (head, plural(head)), verb, n=attractor, r=state)


_REFLEXIVE = {
    "train": ("{a} {v:ed} {b}", "{a} often {v:ed} {b} in the {p}", "I think that {a} {v:ed} {b}"),
    "dev": ("in the {p} {a} {v:ed} {b} twice", "they say that {a} never {v:ed} {b}"),
}


def _reflexive(lex: Lexicon, split: str, rng: Random) -> list[Marked]:
    """A reflexive and its antecedent in gender."""
    subjects = (rng.choice(lex.women), rng.choice(lex.men))
    return _cross(
        rng.choice(_REFLEXIVE[split]),
        subjects,
        ("herself", "himself"),
        v=rng.choice(lex.acts),
        p=rng.choice(lex.places),
    )


_DETERMINER = {
    "train": ("{who} {v:ed} {a} {k} {b}", "{a} {k} {b} will please {who}"),
    "dev": ("we told {who} about {a} {k} {b}", "did {who} {v} {a} {k} {b}?"),
}


def _determiner(lex: Lexicon, split: str, rng: Random) -> list[Marked]:
    """A demonstrative and its noun in number."""
    noun = rng.choice(rng.choice(lex.kinds)[1])
    return _cross(
        rng.choice(_DETERMINER[split]),
        rng.choice((("this", "these"), ("that", "those"))),
        (noun, plural(noun)),
        who=rng.choice(lex.women + lex.men),
        v=rng.choice(lex.dealings),
        k=rng.choice(lex.looks),
    )


_QUANTIFIERS = {
    "train": (("every", "several"), ("each", "both"), ("a", "many")),
    "dev": (("another", "numerous"), ("one", "most"), ("neither", "few")),
}
_QUANTITY = {
    "train": ("{who} {v:ed} {a} {k} {b}", "{who} will {v} {a} {k} {b} in the {p}"),
    "dev": ("near the {p} {who} {v:ed} {a} {k} {b}", "would {who} {v} {a} {k} {b}?"),
}


def _quantity(lex: Lexicon, split: str, rng: Random) -> list[Marked]:
    """A quantifier and its noun in number."""
    noun = rng.choice(rng.choice(lex.kinds)[1])
    return _cross(
        rng.choice(_QUANTITY[split]),
        rng.choice(_QUANTIFIERS[split]),
        (noun, plural(noun)),
        who=rng.choice(lex.women + lex.men),
        v=rng.choice(lex.dealings),
        k=rng.choice(lex.looks),
        p=rng.choice(lex.places),
    )


_EXISTENTIAL = {
    "train": ("there {a} certainly {b} in the {p}", "in the {p} there {a} often {b}"),
    "dev": ("we heard that there {a} again {b} near the {p}", "at the {p} there {a} now {b}"),
}


def _existential(lex: Lexicon, split: str, rng: Random) -> list[Marked]:
    """The verb after "there" and the number of what exists."""
    noun = rng.choice(rng.choice(lex.kinds)[1])
    look = rng.choice(lex.looks)
    amount = rng.choice(("two", "three", "some"))
    things = (f"a {look} {noun}", f"{amount} {look} {plural(noun)}")
    return _cross(rng.choice(_EXISTENTIAL[split]), rng.choice(_AUXILIARIES[split]), things, p=rng.choice(lex.places))


_FORM = {
    "train": ("the {n} {a} probably {b} the {x}", "{a} the {n} {b} the {x}?"),
    "dev": ("the {n} who lives here {a} already {b} the {x}", "I hope that the {n} {a} soon {b} the {x}"),
}


def _form(lex: Lexicon, split: str, rng: Random) -> list[Marked]:
    """An auxiliary and the form of its verb."""
    verb = rng.choice(lex.dealings)
    forms = {"will": verb, "has": fill("{v:en}", v=verb), "is": fill("{v:ing}", v=verb)}
    one, two = rng.sample(sorted(forms), 2)
    return _cross(
        rng.choice(_FORM[split]),
        (one, two),
        (forms[one], forms[two]),
        n=rng.choice(lex.people),
        x=rng.choice(rng.choice(lex.kinds)[1]),
    )


_TRANSITIVE = {
    "train": words("devour destroy visit avoid mention describe invite praise expect own contain admire"),
    "dev": words("examine purchase resemble accompany possess inspect"),
}
_ARGUMENTS = {
    "train": ("the {n} {a:ed}{b}", "yesterday the {n} {a:ed}{b}", "I know that the {n} {a:ed}{b}"),
    "dev": ("we were told that the {n} {a:ed}{b}", "two days ago my {n} {a:ed}{b}"),
}


def _arguments(lex: Lexicon, split: str, rng: Random) -> list[Marked]:
    """A verb that takes an object and one that takes none, with and without an object."""
    verbs = (rng.choice(_TRANSITIVE[split]), rng.choice(lex.deeds))
    thing = rng.choice(rng.choice(lex.kinds)[1])
    return _cross(rng.choice(_ARGUMENTS[split]), verbs, (f" the {thing}", ""), n=rng.choice(lex.people))


_GAP = {
    "train": ("{a} did {w} say that the {n} {v:ed}{b}?", "{a} did {w} {v}{b} in the {p}?", "{a} will {w} {v}{b}?"),
    "dev": ("{a} does the {n} believe that {w} {v:ed}{b}?", "{a} was {w} going to {v}{b} near the {p}?"),
}


def _gap(lex: Lexicon, split: str, rng: Random) -> list[Marked]:
    """A question word needs a gap, and a gap a question word."""
    thing = rng.choice(rng.choice(lex.kinds)[1])
    return _cross(
        rng.choice(_GAP[split]),
        ("what", ""),
        ("", f" the {thing}"),
        w=rng.choice(lex.women + lex.men),
        n=rng.choice(lex.people),
        v=rng.choice(_TRANSITIVE[split]),
        p=rng.choice(lex.places),
    )


_COMPLEMENT = {
    "train": (
        ("want", "hope", "plan", "decide", "agree", "refuse"),
        ("enjoy", "avoid", "finish", "dislike", "suggest"),
    ),
    "dev": (("promise", "offer", "manage", "pretend"), ("keep", "admit", "deny", "imagine")),
}
_COMPLEMENT_FRAMES = {
    "train": ("{who} {a:ed} {b}", "the friends of {who} {a:ed} {b}"),
    "dev": ("in the end {who} {a:ed} {b}", "it seems that {who} {a:ed} {b}"),
}


def _complement(lex: Lexicon, split: str, rng: Random) -> list[Marked]:
    """Verbs that take an infinitive and verbs that take a gerund."""
    infinitive, gerund = (rng.choice(verbs) for verbs in _COMPLEMENT[split])
    deed = rng.choice(lex.deeds)
    return _cross(
        rng.choice(_COMPLEMENT_FRAMES[split]),
        (infinitive, gerund),
        (f"to {deed}", fill("{v:ing}", v=deed)),
        who=rng.choice(lex.women + lex.men),
    )


_TIMES = {
    "train": ((words("yesterday last_year an_hour_ago"), words("tomorrow next_year in_an_hour"))),
    "dev": ((words("last_week two_days_ago"), words("next_week two_days_from_now"))),
}


def _tense(lex: Lexicon, split: str, rng: Random) -> list[Marked]:
    """Past and future with a time that suits."""
    past, future = (rng.choice(times) for times in _TIMES[split])
    verb = rng.choice(lex.dealings)
    frames = {
        "train": ("{a} the {n} {b} the {x}", "{a} in the {p} the {n} {b} the {x}"),
        "dev": ("the {n} {b} the {x} in the {p} {a}", "I believe the {n} {b} the {x} {a}"),
    }
    return _cross(
        rng.choice(frames[split]),
        (past, future),
        (fill("{v:ed}", v=verb), f"will {verb}"),
        n=rng.choice(lex.people),
        x=rng.choice(rng.choice(lex.kinds)[1]),
        p=rng.choice(lex.places),
    )


# One round of blocks. Agreement in its several forms weighs most.
_CONSTRUCTIONS: tuple[Construction, ...] = (
    _determiner, _reflexive, _tense, _quantity, _determiner, _reflexive, _agreement, _tense,
    _determiner, _reflexive, _existential, _form, _arguments, _gap, _complement,
)  # fmt: skip


def cola(split: str, rng: Random) -> Iterator[list[Row]]:
    """Blocks of four sentences, two of them acceptable (class 1)."""
    while True:
        for construction in _CONSTRUCTIONS:
            marked = construction(LEXICON[split], split, rng)
            yield [Row(text, None, int(good), construction.__name__.strip("_")) for text, good in marked]
