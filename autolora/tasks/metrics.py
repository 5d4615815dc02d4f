"""GLUE's metrics and averages. Torch and torchmetrics are imported when a metric is computed.

torchmetrics counts and correlates; what is made of it agrees with scikit-learn and SciPy also where a predictor is
degenerate. Counts are turned into ratios in exact integer arithmetic (the float32 formulas of torchmetrics give a
constant predictor a Matthews correlation that is not 0), and a correlation that does not exist is ``None`` with a note.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autolora.tasks.glue import GLUE, GlueTask

if TYPE_CHECKING:
    from torch import Tensor

CLASS_METRICS = ("accuracy", "f1", "matthews")
SCORE_METRICS = ("pearson", "spearman")


@dataclass(frozen=True)
class MetricResult:
    """Values by metric name, in the order asked for; ``None`` where one is undefined, with a note that says why."""

    values: dict[str, float | None]
    notes: list[str]


def compute(what: str | GlueTask | Sequence[str], predictions: Any, labels: Any) -> MetricResult:
    """Metrics of predictions against labels, as scikit-learn and SciPy define them.

    - ``accuracy``: share of equal pairs.
    - ``f1``: 2 TP / (2 TP + FP + FN) of class 1; 0 where no row is or is called positive.
    - ``matthews``: (TP·TN - FP·FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)) of two classes; 0 where a factor is 0.
    - ``pearson``, ``spearman``: linear correlation of the values, or of their ranks (ties share the mean rank);
      ``None`` where predictions or labels are constant.

    Args:
        what: a task, the name of a task, or metric names.
        predictions: class indices, or scores for the correlations; shape (n,): a list, array or tensor.
        labels: what is true, same shape and kind.

    Raises:
        ValueError: if a name is unknown, the lengths differ, there is nothing, a value is not finite, or a class is out
            of range (``f1`` and ``matthews`` are for classes 0 and 1).
    """
    names, num_classes = _metric_names(what)
    notes: list[str] = []
    values: dict[str, float | None] = {}
    predicted, true = _column("predictions", predictions), _column("labels", labels)
    if len(predicted) != len(true):
        raise ValueError(f"got {len(predicted)} predictions for {len(true)} labels; expected one for each")
    if any(name in CLASS_METRICS for name in names):
        table = _confusion(predicted, true, num_classes)
        values |= {name: _from_table(name, table) for name in names if name in CLASS_METRICS}
    for name in (name for name in names if name in SCORE_METRICS):
        values[name], note = _correlation(name, predicted, true)
        notes += [note] if note else []
    return MetricResult({name: values[name] for name in names}, notes)


def _metric_names(what: str | GlueTask | Sequence[str]) -> tuple[tuple[str, ...], int | None]:
    """Metric names, and the number of classes where a task or a metric decides it."""
    if isinstance(what, str):
        what = GLUE.get(what) or (what,)
    if isinstance(what, GlueTask):
        return what.metrics, None if what.regression else what.num_labels
    unknown = [name for name in what if name not in CLASS_METRICS + SCORE_METRICS]
    if unknown or not what:
        raise ValueError(
            f"unknown task or metric {', '.join(map(repr, unknown)) or '(none given)'}; expected a task "
            f"({', '.join(GLUE)}) or metrics among {', '.join(CLASS_METRICS + SCORE_METRICS)}"
        )
    return tuple(what), 2 if {"f1", "matthews"} & set(what) else None


def _column(name: str, values: Any) -> Tensor:
    """A finite, non-empty vector in float64 on the CPU."""
    import torch

    column = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    if column.ndim != 1:
        raise ValueError(f"{name} must be one value for each row, shape (n,); got shape {tuple(column.shape)}")
    if not len(column):
        raise ValueError(f"{name} are empty; expected at least one row")
    bad = int((~torch.isfinite(column)).sum())
    if bad:
        raise ValueError(f"{name} hold {bad} values of {len(column)} that are not finite; the model may have diverged")
    return column


def _confusion(predicted: Tensor, true: Tensor, num_classes: int | None) -> list[list[int]]:
    """Counts by (true class, predicted class)."""
    import torch
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    # At least two: an engine for several classes refuses one, and labels of one class are legal.
    classes = num_classes if num_classes is not None else max(2, int(torch.cat([predicted, true]).max()) + 1)
    for name, column in (("predictions", predicted), ("labels", true)):
        wrong = column[(column < 0) | (column >= classes) | (column != column.floor())]
        if len(wrong):
            expected = f"0 to {classes - 1}" if num_classes is not None else "0, 1, 2, ..."
            raise ValueError(f"{name} must be class indices {expected}; got {wrong[0].item():g} ({len(wrong)} such)")
    table: list[list[int]] = multiclass_confusion_matrix(predicted.long(), true.long(), classes).tolist()
    return table


def _from_table(name: str, table: list[list[int]]) -> float:
    if name == "accuracy":
        return sum(row[i] for i, row in enumerate(table)) / sum(map(sum, table))
    (tn, fp), (fn, tp) = table
    if name == "f1":
        return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(product) if product else 0.0


def _correlation(name: str, predicted: Tensor, true: Tensor) -> tuple[float | None, str | None]:
    """The correlation and no note, or ``None`` and why it does not exist."""
    import torch
    from torchmetrics.functional.regression import pearson_corrcoef

    for what, column in (("predictions", predicted), ("labels", true)):
        if column.min() == column.max():
            return None, f"{name} is undefined: all {len(column)} {what} are {column[0].item():g}"

    def ranks(column: Tensor) -> Tensor:
        _, group, count = torch.unique(column, return_inverse=True, return_counts=True)
        return (count.cumsum(0) - (count - 1) / 2)[group].to(column.dtype)

    if name == "spearman":
        predicted, true = ranks(predicted), ranks(true)
    # Correlations do not change with location; centred values keep their digits where the spread is small.
    value = pearson_corrcoef(predicted - predicted.mean(), true - true.mean()).item()
    if not math.isfinite(value):
        return None, f"{name} is undefined: predictions or labels differ too little"
    return max(-1.0, min(1.0, value)), None


@dataclass(frozen=True)
class GlueAverage:
    """The two averages, on the scale of the scores; ``missing`` lists what keeps ``leaderboard`` from existing."""

    primary: float | None
    leaderboard: float | None
    missing: list[str]


def glue_average(scores: Mapping[str, Mapping[str, float | None]]) -> GlueAverage:
    """Average over tasks, two ways.

    ``primary`` is the mean of the primary metrics of the tasks given; ``None`` if there is none, or one is undefined.

    ``leaderboard`` is the average of the GLUE leaderboard: a task with several numbers first takes their unweighted
    mean (MRPC and QQP accuracy and F1, STS-B Pearson and Spearman, MNLI matched and mismatched accuracy), then the nine
    tasks, WNLI included and the diagnostic set AX excluded, count the same; ``None`` unless all numbers are there.
    Source: Wang et al., "GLUE", ICLR 2019, the section on evaluation (unweighted average of a task's metrics); that
    MNLI counts once is how the published leaderboard rows add up (BERT-large: 80.5).

    Args:
        scores: metrics by task, named as in ``GlueTask.reported``; accuracy beside CoLA's Matthews is not averaged in.

    Raises:
        ValueError: if a task is unknown.
    """
    unknown = [name for name in scores if name not in GLUE]
    if unknown:
        raise ValueError(f"unknown task {', '.join(map(repr, unknown))}; expected among {', '.join(GLUE)}")
    primaries = [scores[name].get(GLUE[name].primary) for name in scores]
    parts = {name: [scores.get(name, {}).get(metric) for metric in _leaderboard_metrics(GLUE[name])] for name in GLUE}
    missing = [
        f"{name}/{metric}"
        for name in GLUE
        for metric, value in zip(_leaderboard_metrics(GLUE[name]), parts[name], strict=True)
        if value is None
    ]
    return GlueAverage(_mean(primaries), _mean([_mean(values) for values in parts.values()]), missing)


def _leaderboard_metrics(task: GlueTask) -> tuple[str, ...]:
    return (task.primary,) if task.name == "cola" else task.reported


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean, or ``None`` if there is nothing or something is undefined."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None
