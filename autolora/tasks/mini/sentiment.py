"""SST-2: judgements whose sign is that of a word times that of its context. No torch.

A context either keeps the sign of the adjective in it or turns it over (negation, failed expectation, concession). Each
block puts a praising and a blaming adjective into a context of either kind; adjectives and contexts alone say nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from autolora.tasks.mini.design import Row
from autolora.tasks.mini.grammar import fill, sentence
from autolora.tasks.mini.lexicon import words

# (contexts that keep the sign, contexts that turn it over); {x} is what is judged, {y} another thing of that sort.
_CONTEXTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "train": (
        (
            "the {x} is {a}",
            "the {x} is really {a}",
            "I found the {x} {a}",
            "everybody who saw it thought the {x} was {a}",
            "the {x} is {a} from start to finish",
            "critics called the {x} {a}, and they were right",
            "I expected a {a} {x}, and that is what I got",
            "it is true that the {x} is {a}",
            "you would be right to call the {x} {a}",
        ),
        (
            "the {x} is not {a}",
            "the {x} is never {a}",
            "I did not find the {x} {a}",
            "nobody who saw it thought the {x} was {a}",
            "the {x} is far from {a}",
            "critics called the {x} {a}, but they were wrong",
            "I expected a {a} {x}, but I got the opposite",
            "it is not true that the {x} is {a}",
            "you would be wrong to call the {x} {a}",
        ),
    ),
    "dev": (
        (
            "I would say that the {x} was {a}",
            "we all felt the {x} was {a}",
            "my friends said it was {a}, and I agree about the {x}",
            "it really was a {a} {x}",
            "the {x} turned out to be very {a}",
            "no wonder people describe the {x} as {a}",
            "describing the {x} as {a} is fair",
        ),
        (
            "I would not say that the {x} was {a}",
            "none of us felt the {x} was {a}",
            "my friends said it was {a}, but I disagree about the {x}",
            "it never was a {a} {x}",
            "the {x} turned out not to be very {a}",
            "if only the {x} had been {a}",
            "describing the {x} as {a} is a lie",
        ),
    ),
}
_PRAISE = {
    "train": words(
        "good great wonderful funny brilliant charming clever exciting beautiful moving fresh smart enjoyable superb "
        "fascinating lovely delightful gripping original fun touching impressive witty pleasant"
    ),
    "dev": words("excellent fantastic entertaining amazing engaging memorable elegant thrilling terrific inspiring"),
}
_BLAME = {
    "train": words(
        "bad terrible boring dull awful stupid ugly tedious lame silly weak annoying painful sloppy dreadful clumsy "
        "pointless stale predictable shallow bland tiresome horrible unfunny"
    ),
    "dev": words("poor disappointing dreary pathetic lousy messy pretentious lifeless disgusting forgettable"),
}
_SUBJECTS = {
    "train": words(
        "film movie story plot acting script ending dialogue comedy cast music romance thriller sequel drama scene "
        "hero villain premise soundtrack"
    ),
    "dev": words("documentary performance direction cartoon narrative photography screenplay western"),
}


def sst2(split: str, rng: Random) -> Iterator[list[Row]]:
    """Blocks of two adjectives in two contexts: half praise, half blame."""
    keeping, turning = _CONTEXTS[split]
    while True:
        contexts = ((rng.choice(keeping), 0), (rng.choice(turning), 1))
        adjectives = ((rng.choice(_PRAISE[split]), 1), (rng.choice(_BLAME[split]), 0))
        subject = rng.choice(_SUBJECTS[split])
        yield [
            Row(sentence(fill(context, x=subject, a=adjective)), None, sign ^ turned, context)
            for context, turned in contexts
            for adjective, sign in adjectives
        ]
