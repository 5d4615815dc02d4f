"""QNLI: whether a sentence answers a question about an event. No torch.

The sentences tell of two similar events and leave different things out; a question asks for one thing about one of
them. Question and sentence may share the topic either way: what counts is whether the asked-for role is filled.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from autolora.tasks.mini.design import Claim, Row, latin
from autolora.tasks.mini.grammar import say, sentence
from autolora.tasks.mini.lexicon import LEXICON, words

_QUESTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "who": ("who {v:ed} the {x}?", "by whom was the {x} {v:en}?"),
        "when": ("when was the {x} {v:en}?", "when did they {v} the {x}?"),
        "where": ("where was the {x} {v:en}?", "where did they {v} the {x}?"),
        "why": ("why was the {x} {v:en}?", "why did they {v} the {x}?"),
    },
    "dev": {
        "who": ("which person {v:ed} the {x}?", "do you know who {v:ed} the {x}?"),
        "when": ("at what time was the {x} {v:en}?", "do you know when the {x} was {v:en}?"),
        "where": ("in which place was the {x} {v:en}?", "do you know where the {x} was {v:en}?"),
        "why": ("for what reason was the {x} {v:en}?", "do you know why the {x} was {v:en}?"),
    },
}
_SENTENCES: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "who": ("{who} {v:ed} the {x}", "the {x} was {v:en} by {who}"),
        "when": ("the {x} was {v:en} {when}", "{when} they {v:ed} the {x}"),
        "where": ("the {x} was {v:en} {where}", "they {v:ed} the {x} {where}"),
        "why": ("the {x} was {v:en} because {why}", "they {v:ed} the {x} because {why}"),
    },
    "dev": {
        "who": ("it was {who} who {v:ed} the {x}", "the {x} had been {v:en} by {who}"),
        "when": ("the {x} had been {v:en} {when}", "it was {when} that the {x} was {v:en}"),
        "where": ("the {x} had been {v:en} {where}", "it was {where} that the {x} was {v:en}"),
        "why": ("the {x} had been {v:en} since {why}", "as {why}, the {x} had been {v:en}"),
    },
}
_TIMES = {
    "train": words(
        "on_Monday yesterday at_noon in_March last_week before_dawn in_1990 after_lunch on_Sunday in_spring"
    ),
    "dev": words("on_Thursday last_month at_midnight in_October two_hours_ago in_1875 on_Christmas_Eve"),
}
_REASONS = {
    "train": words(
        "it_was_too_old nobody_needed_it it_looked_nice it_was_cheap the_law_required_it they_had_no_choice "
        "it_caused_trouble people_liked_it it_was_dirty the_owner_asked_for_it"
    ),
    "dev": words("it_was_in_the_way it_smelled_bad the_neighbors_complained it_was_valuable someone_had_ordered_it"),
}


def qnli(split: str, rng: Random) -> Iterator[list[Row]]:
    """Blocks of questions and sentences about two things; class 0 is entailment: the sentence answers."""
    lex = LEXICON[split]
    while True:
        verb = rng.choice(lex.dealings)
        things = rng.sample([thing for _, members in lex.kinds for thing in members], 2)
        asked = rng.sample(("who", "when", "where", "why"), 2)
        questions, sentences = [], []
        for thing in things:
            for role in asked:
                slots = {
                    "x": thing,
                    "v": verb,
                    "who": rng.choice(lex.women + lex.men),
                    "when": rng.choice(_TIMES[split]),
                    "where": "in the " + rng.choice(lex.places),
                    "why": rng.choice(_REASONS[split]),
                }
                content = frozenset({(things.index(thing), asked.index(role))})
                questions.append(Claim(sentence(say(rng, _QUESTIONS[split][role], **slots)), content))
                sentences.append(Claim(sentence(say(rng, _SENTENCES[split][role], **slots)), content))
        rows = latin(questions, sentences, lambda q, s: int(q.worlds != s.worlds), 2, rng)
        yield [Row(a, b, label, "+".join(sorted(asked))) for a, b, label in rows]
