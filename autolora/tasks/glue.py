"""The nine GLUE tasks in one table: fields, labels, metrics and splits. No torch.

Source: Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding",
ICLR 2019, section 3 and table 1. Label order follows the ``nyu-mll/glue`` data set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class GlueTask:
    """A task's layout.

    ``fields`` are the canonical text columns (one or two), named as in the ``nyu-mll/glue`` data set; ``labels`` the
    class names in index order, ``None`` for regression; ``metrics`` the metric names computed on dev, the primary one
    first; ``extra_dev`` further dev splits whose metrics are reported under the split's name (MNLI mismatched).
    """

    name: str
    folder: str
    fields: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    extra_dev: tuple[str, ...] = ()
    score_range: tuple[float, float] | None = None

    @property
    def primary(self) -> str:
        """The metric that stands for the task."""
        return self.metrics[0]

    @property
    def regression(self) -> bool:
        """Whether the label is a score instead of a class."""
        return self.labels is None

    @property
    def problem_type(self) -> Literal["regression", "single_label_classification"]:
        """The kind of problem, in the words of transformers."""
        return "regression" if self.regression else "single_label_classification"

    @property
    def num_labels(self) -> int:
        """Outputs of a head for this task: the number of classes, or 1 for a score."""
        return 1 if self.labels is None else len(self.labels)

    @property
    def splits(self) -> tuple[str, ...]:
        """Every labelled split of the task: train, dev, and the further dev splits."""
        return ("train", "dev", *self.extra_dev)

    @property
    def reported(self) -> tuple[str, ...]:
        """Names of everything reported: the metrics on dev, then ``"<split>/<metric>"`` for each further dev split."""
        return self.metrics + tuple(f"{split}/{metric}" for split in self.extra_dev for metric in self.metrics)


_ENTAILMENT = ("entailment", "not_entailment")

GLUE: dict[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask("cola", "CoLA", ("sentence",), ("unacceptable", "acceptable"), ("matthews", "accuracy")),
        GlueTask("sst2", "SST-2", ("sentence",), ("negative", "positive"), ("accuracy",)),
        GlueTask("mrpc", "MRPC", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
        GlueTask("stsb", "STS-B", ("sentence1", "sentence2"), None, ("pearson", "spearman"), score_range=(0.0, 5.0)),
        GlueTask("qqp", "QQP", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
        GlueTask(
            "mnli",
            "MNLI",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            extra_dev=("dev_mismatched",),
        ),
        GlueTask("qnli", "QNLI", ("question", "sentence"), _ENTAILMENT, ("accuracy",)),
        GlueTask("rte", "RTE", ("sentence1", "sentence2"), _ENTAILMENT, ("accuracy",)),
        GlueTask("wnli", "WNLI", ("sentence1", "sentence2"), ("not_entailment", "entailment"), ("accuracy",)),
    )
}

OFFICIAL_ROWS: dict[str, tuple[int, ...]] = {
    "cola": (8_551, 1_043),
    "sst2": (67_349, 872),
    "mrpc": (3_668, 408),
    "stsb": (5_749, 1_500),
    "qqp": (363_846, 40_430),
    "mnli": (392_702, 9_815, 9_832),
    "qnli": (104_743, 5_463),
    "rte": (2_490, 277),
    "wnli": (635, 71),
}
"""Rows of each of a task's :attr:`GlueTask.splits`, in their order."""
