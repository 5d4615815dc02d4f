"""Metrics against scikit-learn, SciPy and torchmetrics' own formulas; the averages against published rows."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autolora.tasks.glue import GLUE
from autolora.tasks.metrics import compute, glue_average

BINARY = ("accuracy", "f1", "matthews")


def reference(name: str, predictions: list[int], labels: list[int]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "accuracy":
            return sklearn.metrics.accuracy_score(labels, predictions)
        if name == "f1":
            return sklearn.metrics.f1_score(labels, predictions, zero_division=0)
        return sklearn.metrics.matthews_corrcoef(labels, predictions)


def check_binary(predictions: list[int], labels: list[int]) -> None:
    result = compute(BINARY, predictions, labels)
    assert result.notes == []
    assert result.values == pytest.approx({name: reference(name, predictions, labels) for name in BINARY}, abs=1e-12)


# The first example pays for importing torchmetrics.
@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=50))
def test_binary_metrics_equal_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    check_binary(*map(list, zip(*pairs, strict=True)))


@pytest.mark.parametrize("constant", [0, 1])
@pytest.mark.parametrize("positives", [0, 3, 5, 7, 10])
def test_constant_predictor(constant: int, positives: int) -> None:
    labels = ([1] * positives + [0] * (10 - positives)) * 100
    check_binary([constant] * 1000, labels)
    assert compute(["matthews"], [constant] * 1000, labels).values == {"matthews": 0.0}


@pytest.mark.parametrize(("predictions", "expected"), [([1] * 5, 0.0), ([0, 1, 0, 1, 1], 0.0)])
def test_matthews_of_constant_labels(predictions: list[int], expected: float) -> None:
    assert compute(["matthews"], predictions, [1] * 5).values["matthews"] == expected
    check_binary(predictions, [1] * 5)


def test_matthews_of_a_large_split_is_exact() -> None:
    # The product under the root is about 1e21: beyond what 64-bit integers or float32 hold.
    labels = [i % 2 for i in range(400_000)]
    predictions = [label if i % 10 else 1 - label for i, label in enumerate(labels)]
    check_binary(predictions, labels)


def test_hand_computed() -> None:
    # TP 3, FP 1, FN 2, TN 4.
    predictions, labels = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    values = compute(BINARY, predictions, labels).values
    assert values == pytest.approx({"accuracy": 0.7, "f1": 6 / 9, "matthews": 10 / math.sqrt(4 * 5 * 5 * 6)})


def test_torchmetrics_agrees_where_nothing_is_degenerate() -> None:
    from torchmetrics.functional.classification import (
        binary_accuracy,
        binary_f1_score,
        binary_matthews_corrcoef,
    )

    generator = torch.Generator().manual_seed(0)
    predictions, labels = torch.randint(0, 2, (2, 500), generator=generator)
    expected = {
        "accuracy": binary_accuracy(predictions, labels).item(),
        "f1": binary_f1_score(predictions, labels).item(),
        "matthews": binary_matthews_corrcoef(predictions, labels).item(),
    }
    assert compute(BINARY, predictions, labels).values == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("labels", [[0, 1, 2, 2, 1], [0, 0, 0, 0, 0]])
def test_accuracy_of_three_classes(labels: list[int]) -> None:
    assert compute("mnli", [0, 1, 2, 0, 0], labels).values["accuracy"] == pytest.approx(
        sklearn.metrics.accuracy_score(labels, [0, 1, 2, 0, 0])
    )


def test_accuracy_of_one_class_only() -> None:
    assert compute(["accuracy"], [0, 0], [0, 0]).values == {"accuracy": 1.0}


def check_scores(predictions: list[float], labels: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            "pearson": float(scipy.stats.pearsonr(predictions, labels).statistic),
            "spearman": float(scipy.stats.spearmanr(predictions, labels).statistic),
        }
    assert compute("stsb", predictions, labels).values == pytest.approx(expected, abs=1e-9)


grid = st.integers(-20, 20).map(lambda value: value / 4)


# The first example pays for importing torchmetrics.
@settings(deadline=None)
@given(st.lists(st.tuples(grid, grid), min_size=2, max_size=40))
def test_correlations_equal_scipy_ties_included(pairs: list[tuple[float, float]]) -> None:
    predictions, labels = map(list, zip(*pairs, strict=True))
    if len(set(predictions)) > 1 and len(set(labels)) > 1:
        check_scores(predictions, labels)
    else:
        result = compute("stsb", predictions, labels)
        assert result.values == {"pearson": None, "spearman": None}
        assert len(result.notes) == 2


def test_correlations_of_random_scores_and_of_a_small_spread() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 26, 1500) / 5
    predictions = labels + rng.normal(size=1500)
    check_scores(predictions.tolist(), labels.tolist())
    check_scores((2.5 + 1e-6 * predictions).tolist(), labels.tolist())
    check_scores((-labels).tolist(), labels.tolist())


@pytest.mark.parametrize("constant", [0.0, 0.1, 2.7182818])
def test_correlation_of_a_constant_predictor_is_null_and_said(constant: float) -> None:
    labels = [i / 10 for i in range(50)]
    result = compute("stsb", [constant] * 50, labels)
    assert result.values == {"pearson": None, "spearman": None}
    assert result.notes[0] == f"pearson is undefined: all 50 predictions are {constant:g}"
    assert result.notes[1].startswith("spearman is undefined")
    assert "labels" in compute(["pearson"], labels, [constant] * 50).notes[0]


def test_correlation_of_one_row_is_null() -> None:
    assert compute(["pearson"], [1.0], [2.0]).values == {"pearson": None}


def test_names_tasks_and_containers() -> None:
    by_name = compute("mrpc", [1, 0, 1], [1, 1, 0])
    assert list(by_name.values) == ["accuracy", "f1"]
    assert compute(GLUE["mrpc"], np.array([1, 0, 1]), torch.tensor([1, 1, 0])) == by_name
    assert compute("accuracy", [1, 0, 1], [1, 1, 0]).values == {"accuracy": by_name.values["accuracy"]}
    assert list(compute("cola", [1], [1]).values) == ["matthews", "accuracy"]
    half = compute("stsb", torch.tensor([1.0, 2.0, 4.0], dtype=torch.bfloat16, requires_grad=True), [1.0, 2.0, 3.0])
    assert half.values["spearman"] == 1.0


@pytest.mark.parametrize("name", list(GLUE))
def test_every_task_reports_its_metrics_primary_first(name: str) -> None:
    columns = [0.0, 1.0, 0.5, 1.0] if GLUE[name].regression else [0, 1, 0, 1]
    values = compute(name, columns, columns).values
    assert tuple(values) == GLUE[name].metrics
    assert values[GLUE[name].primary] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("what", "predictions", "labels", "message"),
    [
        ("mnli", [0, 3], [0, 1], r"predictions must be class indices 0 to 2; got 3 \(1 such\)"),
        ("mnli", [0, -1], [0, 1], r"predictions must be class indices 0 to 2; got -1"),
        ("sst2", [0, 1], [0, 2], r"labels must be class indices 0 to 1; got 2"),
        ("sst2", [0.3, 1], [0, 1], r"predictions must be class indices 0 to 1; got 0.3"),
        (["f1"], [2, 1], [0, 1], r"predictions must be class indices 0 to 1; got 2"),
        (["accuracy"], [-2, 1], [0, 1], r"class indices 0, 1, 2, \.\.\.; got -2"),
        ("sst2", [0], [0, 1], "got 1 predictions for 2 labels; expected one for each"),
        ("sst2", [], [], "predictions are empty; expected at least one row"),
        ("sst2", [[0.1, 0.9]], [1], r"one value for each row, shape \(n,\); got shape \(1, 2\)"),
        ("stsb", [1.0, math.nan], [1.0, 2.0], "predictions hold 1 values of 2 that are not finite"),
        ("stsb", [1.0, 2.0], [1.0, math.inf], "labels hold 1 values of 2 that are not finite"),
        (["auc"], [1], [1], r"unknown task or metric 'auc'; expected a task \(cola, .*accuracy, f1, matthews"),
        ("sst-2", [1], [1], "unknown task or metric 'sst-2'"),
        ([], [1], [1], r"\(none given\)"),
    ],
)
def test_clear_errors(what: object, predictions: list, labels: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute(what, predictions, labels)  # type: ignore[arg-type]


BERT_LARGE = {
    "cola": {"matthews": 60.5},
    "sst2": {"accuracy": 94.9},
    "mrpc": {"f1": 89.3, "accuracy": 85.4},
    "stsb": {"pearson": 87.6, "spearman": 86.5},
    "qqp": {"f1": 72.1, "accuracy": 89.3},
    "mnli": {"accuracy": 86.7, "dev_mismatched/accuracy": 85.9},
    "qnli": {"accuracy": 92.7},
    "rte": {"accuracy": 70.1},
    "wnli": {"accuracy": 65.1},
}


def test_leaderboard_average_of_a_published_row() -> None:
    average = glue_average(BERT_LARGE)
    assert average.leaderboard is not None
    assert round(average.leaderboard, 1) == 80.5
    primaries = (60.5, 94.9, 85.4, 87.6, 89.3, 86.7, 92.7, 70.1, 65.1)
    assert average.primary == pytest.approx(sum(primaries) / 9)
    assert average.missing == []


def test_accuracy_of_cola_is_not_averaged_in() -> None:
    scores = BERT_LARGE | {"cola": {"matthews": 60.5, "accuracy": 0.0}}
    assert glue_average(scores) == glue_average(BERT_LARGE)


def test_averages_of_some_tasks() -> None:
    average = glue_average({"sst2": {"accuracy": 0.9}, "mrpc": {"accuracy": 0.7, "f1": 0.8}})
    assert average.primary == pytest.approx(0.8)
    assert average.leaderboard is None
    assert "cola/matthews" in average.missing
    assert "mnli/dev_mismatched/accuracy" in average.missing
    assert not any(name.startswith(("sst2", "mrpc")) for name in average.missing)


def test_an_undefined_metric_is_not_averaged_away() -> None:
    average = glue_average(BERT_LARGE | {"stsb": {"pearson": None, "spearman": 86.5}})
    assert (average.primary, average.leaderboard, average.missing) == (None, None, ["stsb/pearson"])
    assert glue_average({}).primary is None


def test_average_of_an_unknown_task() -> None:
    with pytest.raises(ValueError, match="unknown task 'ax'"):
        glue_average({"ax": {"matthews": 39.6}})


def test_the_table_readers_sources_and_metrics_load_without_torch() -> None:
    code = (
        "import sys\n"
        "import autolora.tasks.glue, autolora.tasks.metrics, autolora.tasks.readers, autolora.tasks.sources\n"
        "import autolora.tasks.splits\n"
        "print([name for name in ('torch', 'torchmetrics', 'transformers', 'datasets', 'lightning') "
        "if name in sys.modules])"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
