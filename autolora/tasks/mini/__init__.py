"""Embedded data: all nine GLUE tasks as English templates, made on the spot. No torch, no files, no network.

Every block of rows is balanced by design, so that words and word pairs of a sentence tell nothing about the label, and
``dev`` uses templates and content words that ``train`` does not: what carries over is meaning. The rows are a pure
function of (task, split, seed).

Numbers on these rows are not GLUE numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from autolora.errors import DataError
from autolora.tasks.glue import GLUE
from autolora.tasks.mini.acceptability import cola
from autolora.tasks.mini.answers import qnli
from autolora.tasks.mini.design import Row, collect
from autolora.tasks.mini.inference import mnli, rte
from autolora.tasks.mini.paraphrase import mrpc, qqp, stsb
from autolora.tasks.mini.pronouns import wnli
from autolora.tasks.mini.sentiment import sst2
from autolora.tasks.records import Split

SIZES = {"train": 4000, "dev": 800, "dev_mismatched": 800}

_BLOCKS: dict[str, Callable[[str, Random], Iterator[list[Row]]]] = {
    "cola": cola,
    "sst2": sst2,
    "mrpc": mrpc,
    "stsb": stsb,
    "qqp": qqp,
    "mnli": mnli,
    "qnli": qnli,
    "rte": rte,
    "wnli": wnli,
}


def generate(task: str, split: str, seed: int = 0) -> Split:
    """One split of the embedded data of a GLUE task.

    Labels are class indices in the order of ``GLUE[task].labels``, or scores from 0 to 5 for STS-B. Sizes are those of
    :data:`SIZES`, up to the last block.

    Raises:
        DataError: If the task or the split does not exist.
    """
    made = rows(task, split, seed)
    labels = [row.label for row in made]
    return Split(
        text_a=[row.text_a for row in made],
        text_b=[row.text_b or "" for row in made] if len(GLUE[task].fields) == 2 else None,
        labels=[float(label) for label in labels] if GLUE[task].regression else [int(label) for label in labels],
        ids=list(range(len(made))),
    )


def rows(task: str, split: str, seed: int = 0) -> list[Row]:
    """The rows of :func:`generate`, each with the family of constructions it comes from.

    Raises:
        DataError: If the task or the split does not exist.
    """
    if task not in _BLOCKS:
        raise DataError(f"The embedded data has no task {task!r}; choose one of {', '.join(_BLOCKS)}.")
    splits = ("train", "dev", *GLUE[task].extra_dev)
    if split not in splits:
        raise DataError(f"The embedded {task} has no split {split!r}; choose one of {', '.join(splits)}.")
    rng = Random(f"{task}/{split}/{seed}")
    return collect(_BLOCKS[task](split, rng), SIZES[split], rng)
