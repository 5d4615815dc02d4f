"""Embedded data."""

from __future__ import annotations

from random import Random

from autolora.tasks.mini.acceptability import cola
from autolora.tasks.mini.answers import qnli
from autolora.tasks.mini.design import Row, collect
from autolora.tasks.mini.inference import mnli, rte
from autolora.tasks.mini.paraphrase import mrpc, qqp, stsb
from autolora.tasks.mini.pronouns import wnli
from autolora.tasks.mini.sentiment import sst2
from autolora.tasks.records import Split

_SIZES = {"train": 4000, "dev": 800, "dev_mismatched": 800}
_TASKS = {"mnli": mnli, "mrpc": mrpc, "qqp": qqp, "stsb": stsb, "sst2": sst2, "qnli": qnli, "wnli": wnli, "rte": rte, "cola": cola}


def _rows(task: str, split: str, seed: int) -> list[Row]:
    rng = Random(f"{task}/{split}/{seed}")
    return collect(_TASKS[task](split, rng), _SIZES[split], rng)


def families_of(task, split, seed=0):
    return [r.family for r in _rows(task, split, seed)]


def generate(task: str, split: str, seed: int = 0) -> Split:
    rows = _rows(task, split, seed)
    return Split([r.text_a for r in rows], None if rows[0].text_b is None else [r.text_b for r in rows], [r.label for r in rows], list(range(len(rows))))
