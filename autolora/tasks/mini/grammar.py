"""A small grammar: templates with inflected slots, and English inflection. No torch.

A template is a ``str.format`` string whose slots may carry an inflection after the colon:

``{thing:s}`` plural, ``{verb:ed}`` past, ``{verb:en}`` past participle, ``{verb:ing}`` present participle. An
indefinite article is written "a" and takes its form from the word that follows.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

_VOWELS = "aeiou"
_ARTICLE = re.compile(r"\b([Aa])n? (\w+)")

_PLURALS = {
    "child": "children", "sheep": "sheep", "shelf": "shelves", "thief": "thieves",
}  # fmt: skip

# base form -> (past, past participle)
_IRREGULAR = {
    "beat": ("beat", "beaten"), "bite": ("bit", "bitten"), "break": ("broke", "broken"), "buy": ("bought",) * 2,
    "choose": ("chose", "chosen"), "draw": ("drew", "drawn"), "find": ("found",) * 2, "get": ("got",) * 2,
    "give": ("gave", "given"), "hide": ("hid", "hidden"), "hurt": ("hurt",) * 2, "keep": ("kept",) * 2,
    "leave": ("left",) * 2, "lend": ("lent",) * 2, "lose": ("lost",) * 2, "meet": ("met",) * 2, "run": ("ran", "run"),
    "sell": ("sold",) * 2, "send": ("sent",) * 2, "sing": ("sang", "sung"), "sleep": ("slept",) * 2,
    "steal": ("stole", "stolen"), "swim": ("swam", "swum"), "teach": ("taught",) * 2, "throw": ("threw", "thrown"),
    "weep": ("wept",) * 2,
}  # fmt: skip

# Stressed final consonant-vowel-consonant verbs, whose consonant doubles.
_DOUBLING = frozenset({
    "admit", "grab", "hug", "kidnap", "plan", "run", "swim",
})  # fmt: skip


def _articles(text: str) -> str:
    """Every indefinite article in the form that the next word asks for."""
    return _ARTICLE.sub(lambda match: match[1] + ("n" if _starts_with_vowel(match[2]) else "") + " " + match[2], text)


def _starts_with_vowel(word: str) -> bool:
    if word.startswith(("hour", "honest", "heir")):
        return True
    return word[0].lower() in "aeiou8" and not word.startswith(("uni", "use", "euro", "one"))


def plural(noun: str) -> str:
    """The plural of a noun; of a compound, its last word."""
    head, _, last = noun.rpartition(" ")
    if last in _PLURALS:
        last = _PLURALS[last]
    elif last.endswith(("man", "woman")):
        last = last[:-2] + "en"
    elif last.endswith("y") and last[-2] not in _VOWELS:
        last = last[:-1] + "ies"
    else:
        last += "es" if last.endswith(("s", "x", "z", "ch", "sh")) else "s"
    return f"{head} {last}" if head else last


def _first(inflect: Callable[[str], str]) -> Callable[[str], str]:
    """Apply to the first word only: of "look after", the verb."""

    def apply(verb: str) -> str:
        head, space, rest = verb.partition(" ")
        return inflect(head) + space + rest

    return apply


def _regular_past(verb: str) -> str:
    if verb in _DOUBLING:
        return verb + verb[-1] + "ed"
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2] not in _VOWELS:
        return verb[:-1] + "ied"
    return verb + "ed"


def _past(verb: str) -> str:
    return _IRREGULAR[verb][0] if verb in _IRREGULAR else _regular_past(verb)


def _participle(verb: str) -> str:
    return _IRREGULAR[verb][1] if verb in _IRREGULAR else _regular_past(verb)


def _progressive(verb: str) -> str:
    if verb in _DOUBLING:
        return verb + verb[-1] + "ing"
    if verb.endswith("e") and not verb.endswith(("ee", "oe", "ye")):
        return verb[:-1] + "ing"
    return verb + "ing"


_INFLECTIONS: dict[str, Callable[[str], str]] = {
    "s": plural,
    "ed": _first(_past),
    "en": _first(_participle),
    "ing": _first(_progressive),
}


class _Inflector(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        return _INFLECTIONS[format_spec](value) if format_spec else str(value)


_FORMATTER = _Inflector()


def fill(template: str, /, **slots: str) -> str:
    """The template with its slots filled and inflected."""
    return _articles(_FORMATTER.vformat(template, (), slots))


def sentence(text: str) -> str:
    """Capitalised and closed with a full stop unless it ends in one or in a question mark."""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else text + "."


def say(rng: Random, templates: Sequence[str], /, **slots: str) -> str:
    """One of the templates, filled."""
    return fill(rng.choice(templates), **slots)
