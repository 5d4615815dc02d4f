"""Comparisons of variants: pairing, the reference, what is significant, and the sentence that says so."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from reporting.fake_runs import change_result, write_run
from scipy import stats

from autolora.errors import ConfigError
from autolora.reporting.compare import Comparison, choose_reference, compare, sentence
from autolora.reporting.report import make_arenas
from autolora.reporting.runs import Variant, circumstances_apart, load_runs, settings_apart, variants
from autolora.reporting.statistics import sign_flip_test

TASKS = ("sst2", "rte", "mrpc", "qnli", "qqp", "mnli", "cola")


def those(root: Path) -> list[Variant]:
    return variants(load_runs([root]).runs, [])


def comparisons(root: Path, reference: str | None = None) -> dict[str, Comparison]:
    found = those(root)
    return {one.variant.label: one for one in compare(found, choose_reference(found, reference))}


def references(root: Path) -> dict[str, str]:
    """What each variant is compared with."""
    return {label: one.reference.label for label, one in comparisons(root).items()}


def test_one_seed_on_one_task_is_scipys_paired_test_over_examples(tmp_path: Path) -> None:
    paths = [write_run(tmp_path, accuracy=0.8), write_run(tmp_path, strategy="autolora", accuracy=0.7)]
    columns = []
    for path in paths:
        table = np.genfromtxt(path / "predictions.csv", delimiter=",", names=True, dtype=None, encoding=None)
        columns.append((table["label"] == table["prediction"]).astype(float))
    expected = stats.ttest_rel(columns[1], columns[0])
    one = comparisons(tmp_path)["autolora"]
    assert (one.p, one.mean) == (pytest.approx(expected.pvalue), pytest.approx(-0.1))
    interval = expected.confidence_interval()
    assert (one.low, one.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert sentence(one) == (
        f"autolora is behind uniform by 10.0 [{-100 * interval.high:.1f}, {-100 * interval.low:.1f}] on sst2, p = "
        f"{expected.pvalue:.2g} (one seed: of these trainings only)."
    )


def test_seeds_are_paired_and_those_of_one_side_alone_are_left_out(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        write_run(tmp_path, seed=seed)
    for seed in (1, 2, 3):
        write_run(tmp_path, strategy="autolora", seed=seed)
    (task,) = comparisons(tmp_path)["autolora"].tasks
    assert task.seeds == (1, 2)


def test_without_predictions_only_seeds_count(tmp_path: Path) -> None:
    scores = {"uniform": [0.8, 0.82, 0.79], "autolora": [0.85, 0.84, 0.86]}
    for strategy, values in scores.items():
        for seed, value in enumerate(values):
            (write_run(tmp_path, strategy=strategy, seed=seed, accuracy=value) / "predictions.csv").unlink()
    one = comparisons(tmp_path)["autolora"]
    assert one.p == pytest.approx(stats.ttest_rel(scores["autolora"], scores["uniform"]).pvalue)
    assert one.tasks[0].difference.over == "seeds"


def test_over_tasks_signs_decide_and_holm_counts_the_comparisons(tmp_path: Path) -> None:
    for i, task in enumerate(TASKS):
        write_run(tmp_path, task=task, accuracy=0.7)
        write_run(tmp_path, task=task, strategy="autolora", accuracy=0.8)
        write_run(tmp_path, task=task, strategy="sora", accuracy=0.75 - 0.1 * (i % 2))
    found = comparisons(tmp_path)
    assert found["autolora"].p == 2 / 2**7
    assert found["autolora"].smallest_p == 2 * 2 / 2**7
    means = [one.difference.mean for one in found["sora"].tasks]
    assert found["sora"].p == pytest.approx(sign_flip_test(means))
    assert found["autolora"].adjusted == 2 * 2 / 2**7
    assert re.fullmatch(
        r"autolora beats uniform by 10\.0 \[\d+\.\d, \d+\.\d\] on average over 7 tasks, p = 0\.031; "
        r"on single tasks autolora is ahead on (\w+, )+\w+( and \d more)? \(one seed: .*\)\.",
        sentence(found["autolora"]),
    )
    assert "no difference was found on average over 7 tasks" in sentence(found["sora"])
    assert re.search(r"; this design shows differences above \d+\.\d with a power of 80%", sentence(found["sora"]))


def test_few_seeds_are_said_with_what_more_would_show(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path, seed=seed)
        for strategy in ("autolora", "sora", "adalora", "eva"):
            write_run(tmp_path, strategy=strategy, seed=seed, accuracy=0.78 + 0.05 * seed)
    (arena,) = make_arenas(load_runs([tmp_path]))
    (line,) = (
        line for line in arena.limits() if line.startswith("Differences on sst2 that are found with a power of 80%")
    )
    few, *more = re.findall(r"with (\d+) seeds (none|those above (\S+?))[, ]", line)
    assert few[:2] == ("2", "none")
    assert [int(seeds) for seeds, *_ in more] == [5, 10, 20]
    tests = [one.tasks[0].difference for one in arena.comparisons]
    ten = np.median([test.with_seeds(10).detectable(0.05 / 4) for test in tests])
    assert more[1][2] == f"{100 * ten:.2g}"
    assert all("shows no difference between scores, however large" in text for text in arena.sentences())


def test_too_few_tasks_are_said_with_the_smallest_p(tmp_path: Path) -> None:
    for task in TASKS[:3]:
        write_run(tmp_path, task=task, accuracy=0.6)
        write_run(tmp_path, task=task, strategy="autolora", accuracy=0.9)
    one = comparisons(tmp_path)["autolora"]
    assert (one.p, one.smallest_p, one.significant) == (0.25, 0.25, False)
    assert all(task.significant for task in one.tasks)
    assert re.fullmatch(
        r"autolora and uniform: 30\.0 \[\d+\.\d, \d+\.\d\] apart on average over 3 tasks, too few for a "
        r"finding \(no p below 0\.25 can be reached\); on single tasks autolora is ahead on (\w+, ){2}\w+ \(one seed: "
        r"of these trainings only\)\.",
        sentence(one),
    )


def test_parameters_are_said_where_they_differ(tmp_path: Path) -> None:
    write_run(tmp_path, params=1000)
    write_run(tmp_path, strategy="autolora", params=250, accuracy=0.5)
    write_run(tmp_path, strategy="head", params=0, budget=None, accuracy=0.5)
    found = comparisons(tmp_path)
    assert "at 25 % of the parameters" in sentence(found["autolora"])
    assert found["head"].share is None


def test_equal_runs_differ_by_nothing(tmp_path: Path) -> None:
    write_run(tmp_path, "optim.adapter.lr=0.001")
    write_run(tmp_path, "optim.adapter.lr=0.002")
    (one,) = comparisons(tmp_path).values()
    assert (one.mean, one.p, one.detectable) == (0.0, 1.0, math.inf)
    assert sentence(one) == (
        "uniform (lr=0.002) and uniform (lr=0.001): the same score on sst2 in every example, which says nothing of "
        "other examples."
    )


def test_an_undefined_score_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_run(tmp_path, strategy="autolora", metrics={"primary": "accuracy", "value": None, "all": {}})
    assert comparisons(tmp_path) == {}


def test_errors_of_planted_tasks_are_compared_with_their_sign_turned(tmp_path: Path) -> None:
    for seed, (a, b) in enumerate([(0.1, 0.3), (0.2, 0.35), (0.15, 0.34)]):
        for strategy, value in (("autolora", a), ("uniform", b)):
            metrics = {"primary": "excess_error", "value": value, "all": {"excess_error": value}}
            write_run(tmp_path, strategy=strategy, seed=seed, metrics=metrics)
    one = comparisons(tmp_path)["autolora"]
    assert one.mean == pytest.approx(0.18)
    assert "beats uniform by 0.18 [" in sentence(one)


def test_what_is_rounded_to_zero_has_no_sign(tmp_path: Path) -> None:
    """Of five seeds differences are 0.0004 of a point below and above 0 by turns."""
    for seed in range(5):
        for strategy, value in (("uniform", 0.5), ("autolora", 0.5 - 4e-6 * (-1) ** seed)):
            metrics = {"primary": "accuracy", "value": value, "all": {"accuracy": value}}
            write_run(tmp_path, strategy=strategy, seed=seed, metrics=metrics)
    one = comparisons(tmp_path)["autolora"]
    assert one.mean < 0
    assert "(0.0 [0.0, 0.0], p = " in sentence(one)
    (arena,) = make_arenas(load_runs([tmp_path]))
    assert "-0.0 " not in f"{arena.markdown()} {sentence(one)}"


def test_the_reference_is_uniform_at_the_budget_of_most(tmp_path: Path) -> None:
    write_run(tmp_path, "budget.rank=1", budget=100)
    write_run(tmp_path, "budget.rank=4", budget=400)
    for strategy in ("autolora", "sora"):
        write_run(tmp_path, "budget.rank=1", strategy=strategy, budget=100)
    found = those(tmp_path)
    assert choose_reference(found, None).label == "uniform (rank 1)"
    assert choose_reference(found, "sora").strategy == "sora"
    assert choose_reference(found, "uniform (rank 4)").label == "uniform (rank 4)"
    with pytest.raises(
        ConfigError, match=r"reference=x: there is no such strategy among the runs \(there are: autolora"
    ):
        choose_reference(found, "x")


def test_one_training_each_without_predictions_says_nothing(tmp_path: Path) -> None:
    for strategy in ("uniform", "autolora"):
        (write_run(tmp_path, strategy=strategy, accuracy=0.5 + 0.1 * len(strategy) / 8) / "predictions.csv").unlink()
    one = comparisons(tmp_path)["autolora"]
    assert one.p == 1.0
    assert math.isinf(one.detectable)
    assert "one training each without predictions can show nothing" in sentence(one)


def test_variants_that_differ_in_having_a_budget_have_names_and_p_of_their_own(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        write_run(tmp_path, "budget=default", seed=seed)
        write_run(tmp_path, "budget=none", seed=seed, budget=None, accuracy=0.6)
        write_run(tmp_path, "budget=default", strategy="autolora", seed=seed)
        write_run(tmp_path, "budget=none", strategy="autolora", seed=seed, budget=None, accuracy=0.5)
    found = those(tmp_path)
    assert [one.label for one in found] == [
        "autolora (default budget)", "autolora (no budget)", "uniform (default budget)", "uniform (no budget)",
    ]  # fmt: skip
    by_label = comparisons(tmp_path)
    assert len(by_label) == 3
    p = {label: one.tasks[0].difference.p for label, one in by_label.items()}
    order = sorted(p, key=lambda label: p[label])
    assert by_label[order[0]].tasks[0].adjusted == pytest.approx(min(1.0, 3 * p[order[0]]))
    assert by_label[order[2]].adjusted == pytest.approx(max(p[order[2]], by_label[order[1]].adjusted))


def test_names_tell_two_keys_of_one_name_apart(tmp_path: Path) -> None:
    write_run(tmp_path, "optim.adapter.lr=0.001", "optim.head.lr=0.001")
    write_run(tmp_path, "optim.adapter.lr=0.001", "optim.head.lr=0.002")
    write_run(tmp_path, "optim.adapter.lr=0.00100000001", "optim.head.lr=0.002")
    assert [one.label for one in those(tmp_path)] == [
        "uniform (adapter.lr=0.001, head.lr=0.001)",
        "uniform (adapter.lr=0.001, head.lr=0.002)",
        "uniform (adapter.lr=0.00100000001, head.lr=0.002)",
    ]


def test_a_variant_is_compared_with_the_reference_at_its_own_budget(tmp_path: Path) -> None:
    for rank in (1, 4):
        write_run(tmp_path, f"budget.rank={rank}", budget=100 * rank)
        write_run(tmp_path, f"budget.rank={rank}", strategy="autolora", budget=100 * rank)
    write_run(tmp_path, "budget.rank=4", "trainer.max_epochs=9", budget=400)
    write_run(tmp_path, "budget.rank=1", strategy="sora", budget=100)
    write_run(tmp_path, "budget.rank=4", "trainer.max_epochs=9", strategy="sora", budget=400)
    write_run(tmp_path, "budget=none", strategy="head", budget=None)
    assert references(tmp_path) == {
        "autolora (rank 1)": "uniform (rank 1, max_epochs=3)",
        "autolora (rank 4)": "uniform (rank 4, max_epochs=3)",
        "head": "uniform (rank 4, max_epochs=3)",
        "sora (rank 1, max_epochs=3)": "uniform (rank 1, max_epochs=3)",
        "sora (rank 4, max_epochs=9)": "uniform (rank 4, max_epochs=9)",
        "uniform (rank 1, max_epochs=3)": "uniform (rank 4, max_epochs=3)",
        "uniform (rank 4, max_epochs=9)": "uniform (rank 4, max_epochs=3)",
    }


def test_a_reference_without_a_common_task_is_none(tmp_path: Path) -> None:
    write_run(tmp_path, "budget.rank=1", budget=100, task="rte")
    write_run(tmp_path, "budget.rank=4", budget=400)
    write_run(tmp_path, "budget.rank=1", strategy="autolora", budget=100)
    assert references(tmp_path)["autolora (rank 1)"] == "uniform (rank 4)"


def test_ranks_are_compared_on_the_same_rows(tmp_path: Path) -> None:
    """What is varied besides the budget is equal where it can be, in the reference's strategy too."""
    for rank in (1, 4, 8):
        for rows in (500, 5000):
            write_run(tmp_path, f"budget.rank={rank}", f"data.max_train={rows}", budget=100 * rank)
    write_run(tmp_path, "budget.rank=8", "data.max_train=500", strategy="autolora", budget=800)
    assert references(tmp_path) == {
        "uniform (rank 1, max_train=500)": "uniform (rank 8, max_train=500)",
        "uniform (rank 1, max_train=5000)": "uniform (rank 8, max_train=5000)",
        "uniform (rank 4, max_train=500)": "uniform (rank 8, max_train=500)",
        "uniform (rank 4, max_train=5000)": "uniform (rank 8, max_train=5000)",
        "uniform (rank 8, max_train=5000)": "uniform (rank 8, max_train=500)",
        "autolora (rank 8)": "uniform (rank 8, max_train=500)",
    }


def test_without_a_budget_the_nearest_number_of_parameters_counts(tmp_path: Path) -> None:
    for rank in (4, 16, 64):
        write_run(tmp_path, f"budget.rank={rank}", budget=100 * rank, params=100 * rank)
    write_run(tmp_path, strategy="hierarchical", budget=None, params=5000)
    assert references(tmp_path)["hierarchical"] == "uniform (rank 64)"


def test_who_is_in_no_comparison_is_said_with_the_reason(tmp_path: Path) -> None:
    nothing = {"primary": "accuracy", "value": None, "all": {}}
    write_run(tmp_path, seed=0)
    write_run(tmp_path, strategy="autolora", seed=0)
    write_run(tmp_path, strategy="hierarchical", seed=1)
    write_run(tmp_path, strategy="sora", metrics=nothing)
    (arena,) = make_arenas(load_runs([tmp_path]))
    assert [one.variant.label for one in arena.comparisons] == ["autolora"]
    assert arena.sentences()[1:] == [
        "hierarchical is not compared with uniform: they have no task and seed in common.",
        "sora has no score, and is in no comparison.",
    ]


def test_one_strategy_stands_alone(tmp_path: Path) -> None:
    write_run(tmp_path)
    (arena,) = make_arenas(load_runs([tmp_path]))
    assert arena.sentences() == ["uniform stands alone: there is nothing to compare it with."]


def test_arithmetic_machine_and_code_that_differ_are_said(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_run(tmp_path, seed=1, git={"commit": "b" * 40, "dirty": False})
    hardware = {"cpu": "EPYC", "gpu": "H200", "precision": "32-true"}
    write_run(tmp_path, strategy="autolora", hardware=hardware, versions={"torch": "2.6.0"})
    apart = circumstances_apart(those(tmp_path))
    assert [line.split(":")[0] for line in apart] == ["precision", "device", "torch", "commit"]
    assert "32-true (autolora)" in apart[0]
    assert apart[3] == "commit: None, bbbbbbbbbb"


def test_settings_that_are_not_equal_are_said(tmp_path: Path) -> None:
    for task in ("sst2", "rte"):
        write_run(tmp_path, "trainer.max_epochs=1", "optim.adapter.lr=1e-5", task=task)
        write_run(tmp_path, "trainer.max_epochs=30", "optim.adapter.lr=1e-3", task=task, strategy="autolora")
        write_run(tmp_path, "trainer.max_epochs=1", "optim.adapter.lr=1e-3", task=task, strategy="sora")
    write_run(tmp_path, "data.max_train=100", "trainer.max_epochs=1", task="cola")
    write_run(tmp_path, "trainer.max_epochs=1", task="cola", strategy="sora")
    assert settings_apart(those(tmp_path)) == [
        "data.max_train on cola: 100 (uniform), None (sora)",
        "optim.adapter.lr on rte, sst2: 0.001 (autolora, sora), 1e-05 (uniform)",
        "trainer.max_epochs: 1 (sora, uniform), 30 (autolora)",  # autolora has no run on cola
    ]


def test_what_can_be_shown_counts_the_comparisons(tmp_path: Path) -> None:
    others = ["autolora", "sora", "random", "eva", "adalora", "svd_truncate"]
    for task in TASKS[:6]:
        write_run(tmp_path, task=task, accuracy=0.6)
        for strategy in others:
            write_run(tmp_path, task=task, strategy=strategy, accuracy=0.9)
    one = comparisons(tmp_path)["autolora"]
    assert (one.p, one.adjusted, one.smallest_p) == (2 / 2**6, 6 * 2 / 2**6, 6 * 2 / 2**6)
    assert "over 6 tasks, too few for a finding (no p below 0.19 can be reached)" in sentence(one)
    (task, *_) = one.tasks
    assert task.detectable == task.difference.detectable(0.05 / 6) > task.difference.detectable(0.05)


def test_one_seed_on_some_tasks_is_said_of_those(tmp_path: Path) -> None:
    for task in TASKS:
        for seed in (0,) if task in ("sst2", "mnli") else (0, 1):
            write_run(tmp_path, task=task, seed=seed, accuracy=0.6)
            write_run(tmp_path, task=task, seed=seed, strategy="autolora", accuracy=0.9)
    assert " (one seed on mnli, sst2: of these trainings only)." in sentence(comparisons(tmp_path)["autolora"])


def test_what_is_outside_lora_counts_with_all_its_parameters(tmp_path: Path) -> None:
    write_run(tmp_path, params=1000)
    path = write_run(tmp_path, strategy="bitfit", budget=None, accuracy=0.5)
    params = {"adapter": 0, "extra": 150, "head": 66, "peak_trainable": 216, "budget": None, "backbone": 10_000}
    change_result(path, params=params)
    assert "at 15 % of the parameters" in sentence(comparisons(tmp_path)["bitfit"])


def test_a_budget_of_time_is_not_one_of_parameters(tmp_path: Path) -> None:
    """The numbers are equal; what they count is not."""
    priced = {"budget": None, "price": {"unit": "ns", "budget": 1000, "plan": 900}}
    for strategy in ("uniform", "autolora"):
        write_run(tmp_path, "budget.rank=1", strategy=strategy)
        write_run(tmp_path, "budget.rank=1", "budget.cost=latency", strategy=strategy, **priced)
    others = references(tmp_path)
    assert others["autolora (rank 1)"] == "uniform (rank 1)"
    assert others["autolora (rank 1 of latency)"] == "uniform (rank 1 of latency)"
