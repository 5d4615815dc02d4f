"""Tables by hand, and text that means something to Markdown or TeX."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from reporting.fake_runs import write_run

from autolora.reporting.compare import choose_reference, compare
from autolora.reporting.runs import load_runs, variants
from autolora.reporting.tables import Table, caption, escape_tex, make_table, markdown, row_of, tex, write_results


def table_of(root: Path) -> Table:
    found = variants(load_runs([root]).runs, [])
    return make_table(found, compare(found, choose_reference(found, None)))


def test_means_and_standard_deviations_by_hand(tmp_path: Path) -> None:
    for seed, (a, b) in enumerate([(0.80, 0.5), (0.84, 0.6), (0.88, 0.7)]):
        write_run(tmp_path, task="sst2", seed=seed, accuracy=a)
        write_run(tmp_path, task="rte", seed=seed, accuracy=b)
    write_run(tmp_path, task="sst2", strategy="head", accuracy=0.85, params=0, budget=None)
    header, rule, uniform, head = markdown(table_of(tmp_path)).splitlines()
    assert header == (
        "| strategy | rte, accuracy | sst2, accuracy | average | seeds | adapter parameters | head parameters "
        "| seconds | passes |"
    )
    assert rule.count("---:") == 8
    assert uniform == "| uniform | 60.0 ± 10.0 | 84.0 ± 4.0 | 72.0 ± 7.0 | 3 | 1,000 | 66 | 61 | 100 |"
    # No average without all tasks, and so no place before those that have one; no spread of one seed.
    assert head == "| head |  | 85.0 |  | 1 | 0 | 66 | 60 | 100 |"


def test_bold_is_significant_and_nothing_else(tmp_path: Path) -> None:
    for strategy, accuracy in (("uniform", 0.6), ("autolora", 0.9), ("sora", 0.605), ("random", 0.3)):
        write_run(tmp_path, strategy=strategy, accuracy=accuracy)
    lines = markdown(table_of(tmp_path)).splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == ["**90.0†**", "60.5", "60.0", "30.0"]  # one seed
    assert r"\textbf{90.0$^\dagger$}" in tex(table_of(tmp_path))
    assert tex(table_of(tmp_path)).count(r"\textbf") == 1


def test_errors_are_shown_as_they_are(tmp_path: Path) -> None:
    metrics = {"primary": "excess_error", "value": 0.0123, "all": {"excess_error": 0.0123}}
    write_run(tmp_path, metrics=metrics)
    header, _, line = markdown(table_of(tmp_path)).splitlines()
    assert "| sst2, excess error (less is better) |" in header
    assert "| uniform | 1.23e-02 |" in line


def test_what_is_rounded_to_zero_has_no_sign(tmp_path: Path) -> None:
    write_run(tmp_path, metrics={"primary": "matthews", "value": -0.0004, "all": {"matthews": -0.0004}})
    write_run(tmp_path, task="rte", metrics={"primary": "mse", "value": 0.0, "all": {"mse": 0.0}})
    assert "| uniform | 0.00e+00 | 0.0 |" in markdown(table_of(tmp_path))


def test_runs_without_a_score_are_in_no_mean(tmp_path: Path) -> None:
    write_run(tmp_path, params=1000)
    write_run(tmp_path, params=5000, seed=1, metrics={"primary": "accuracy", "value": None, "all": {}})
    assert "| uniform | 80.0 | 1 | 1,000 |" in markdown(table_of(tmp_path))


def test_a_caption_says_what_bold_means(tmp_path: Path) -> None:
    for strategy, accuracy in (("uniform", 0.6), ("autolora", 0.9)):
        for seed in (0, 1, 2):
            write_run(tmp_path, strategy=strategy, accuracy=accuracy, seed=seed)
    said = caption(table_of(tmp_path), "uniform")
    assert "in points. Bold: better than uniform, p < 0.05 by Holm's method" in said
    assert "†" not in said
    write_run(tmp_path, strategy="sora", accuracy=0.9)
    assert "† with one seed: of these trainings only" in caption(table_of(tmp_path), "uniform")


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a_b & 5 %", r"a\_b \& 5 \%"),
        ("\\x{y}$#", r"\textbackslash{}x\{y\}\$\#"),
        ("~^<>", r"\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}"),
        ("1.0 ± 0.1", r"1.0 $\pm$ 0.1"),
    ],
)
def test_tex_is_escaped(text: str, escaped: str) -> None:
    assert escape_tex(text) == escaped


def test_markdown_is_escaped(tmp_path: Path) -> None:
    write_run(tmp_path, "adapter.targets=[query,'a|b*']")
    write_run(tmp_path, "adapter.targets=[query]")
    assert r"uniform (targets=query a\|b\*)" in markdown(table_of(tmp_path))


def test_every_run_is_a_row(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path, "data.max_train=500", seed=seed)
    runs = load_runs([tmp_path]).runs
    write_results(tmp_path / "results.csv", [row_of(run) for run in runs])
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    shown = sorted((row["seed"], row["value"], row["max_train"], row["ranks"]) for row in rows)
    assert shown == [(seed, "0.8", "500", "2 1 0 3 1 2") for seed in "01"]
