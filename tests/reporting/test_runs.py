"""Reading run directories: what is used, what is not, and what is the same thing at another seed."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from reporting.fake_runs import change_result, write_run

from autolora.cells import Cell, cell_file, write_size
from autolora.errors import DataError
from autolora.reporting.runs import Run, circumstances_apart, load_runs, variants


def labels(runs: list[Run]) -> list[str]:
    return [variant.label for variant in variants(runs, [])]


def test_complete_runs_are_read_and_the_rest_is_named(tmp_path: Path) -> None:
    good = write_run(tmp_path)
    trace = "Traceback (most recent call last):\n  File x\nValueError: rank"
    failed = write_run(tmp_path, seed=1, status="failed", error=trace)
    half = write_run(tmp_path, seed=2)
    (half / "result.json").write_text('{"schema": 1, "status": "comp')
    old = write_run(tmp_path, seed=3)
    change_result(old, schema=0)
    begun = write_run(tmp_path, seed=4)
    (begun / "result.json").unlink()
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "notes.txt").touch()
    found = load_runs([tmp_path])
    assert [run.path for run in found.runs] == [good]
    reasons = {path: reason for path, reason in found.skipped}
    assert reasons.keys() == {failed, half, old, begun}
    assert reasons[failed] == "failed: ValueError: rank"
    assert "could not read it" in reasons[half]
    assert "expected a result of schema 1, got 0" in reasons[old]
    assert "under way or was killed" in reasons[begun]
    assert [run.path for run in load_runs([good, tmp_path, good]).runs] == [good]


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected run directories with a complete result\.json, found none"):
        load_runs([tmp_path])
    with pytest.raises(DataError, match="nowhere: there is no such folder"):
        load_runs([tmp_path / "nowhere"])
    write_run(tmp_path, status="interrupted")
    with pytest.raises(DataError, match=r"found none\n  .*: interrupted"):
        load_runs([tmp_path])


def test_where_runs_are_instead_is_said(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "old")
    write_cells(tmp_path / "runs" / "old" / "sweeps" / "grid", [])
    with pytest.raises(DataError, match=r"runs: expected .*, found none: they are in \S*/runs/old$"):
        load_runs([tmp_path / "runs"])
    with pytest.raises(DataError, match=r"sweeps: expected .*, found none: they are in \S*/sweeps/grid$"):
        load_runs([tmp_path / "runs" / "old" / "sweeps"])


def test_a_sweep_is_read_by_its_folder(tmp_path: Path) -> None:
    mine, other = write_run(tmp_path / "runs"), write_run(tmp_path / "runs", seed=1)
    sweep = tmp_path / "runs" / "sweeps" / "grid"
    failed = {"status": "failed", "error": "Traceback (most recent call last):\n  File x\nValueError: rank"}
    write_cells(sweep, [{"status": "complete", "run": mine}, {"status": "running"}, failed])
    found = load_runs([sweep])
    assert [run.path for run in found.runs] == [mine]
    assert found.skipped == [("seed=1", "running"), ("seed=2", "failed: ValueError: rank")]
    assert [run.path for run in load_runs([sweep, tmp_path / "runs"]).runs] == [mine, other]
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere"
    assert [run.path for run in load_runs([moved / "sweeps" / "grid"]).runs] == [moved / mine.name]


def test_cells_that_were_killed_damaged_or_never_begun_are_named(tmp_path: Path) -> None:
    mine = write_run(tmp_path / "runs")
    sweep = tmp_path / "runs" / "sweeps" / "grid"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = socket.gethostname()
    states = [{"status": "complete", "run": mine}, {"process": (here, ended.pid)}, {"process": (here, os.getpid())}, {}]
    write_cells(sweep, states)
    cell_file(sweep, 3).write_text("{half")
    write_size(sweep, 9)
    found = load_runs([sweep])
    assert [run.path for run in found.runs] == [mine]
    reasons = dict(found.skipped)
    assert reasons["seed=1"] == "killed"
    assert reasons["seed=2"] == "running"
    assert reasons[cell_file(sweep, 3)].startswith("damaged: ")
    assert reasons[sweep].startswith("5 of 9 cells have not begun")
    (sweep / "sweep.json").write_text("[]")  # of another version: nobody knows how many there are
    assert sweep not in dict(load_runs([sweep]).skipped)


def test_a_cell_whose_run_was_removed_is_named(tmp_path: Path) -> None:
    mine, gone = write_run(tmp_path / "runs"), tmp_path / "runs" / "gone"
    sweep = tmp_path / "runs" / "sweeps" / "grid"
    write_cells(sweep, [{"status": "complete", "run": mine}, {"status": "complete", "run": gone}])
    assert load_runs([sweep]).skipped == [(gone, "the run's folder is gone")]


def test_names_are_of_one_line(tmp_path: Path) -> None:
    """Or they would end the comment of a table in TeX, and a row of one in Markdown."""
    good, bad = write_run(tmp_path), write_run(tmp_path, seed=1)
    change_result(bad, backbone="x\n\\input{file}")
    found = load_runs([tmp_path])
    assert [run.path for run in found.runs] == [good]
    assert found.skipped == [(bad, "result.json: missing or malformed fields: backbone; run again with force=true")]


def write_cells(sweep: Path, known: Sequence[Mapping[str, Any]]) -> None:
    (sweep / "cells").mkdir(parents=True)
    for i, one in enumerate(known):
        cell = Cell(**{"number": i, "overrides": (f"seed={i}",), "began": 0.0, "process": ("host", 1), **one})
        cell_file(sweep, i).write_text(cell.model_dump_json())


def test_one_configuration_counts_once_and_other_numbers_are_flagged(tmp_path: Path) -> None:
    for root in ("a", "b", "c"):
        write_run(tmp_path / root)
    change_result(write_run(tmp_path / "c"), metrics={"primary": "accuracy", "value": 0.5, "all": {"accuracy": 0.5}})
    found = load_runs([tmp_path / name for name in "abc"])
    assert [run.path.parent.name for run in found.runs] == ["a"]
    assert [path.parent.name for path, _ in found.skipped] == ["b", "c"]
    (flag,) = found.flagged
    assert "same configuration and different numbers (accuracy 0.5 and 0.8)" in flag
    change_result(write_run(tmp_path / "c"), metrics={"primary": "accuracy", "value": 0.5, "all": {"accuracy": 0.8}})
    assert len(load_runs([tmp_path / name for name in "ac"]).flagged) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe\x00", "config.yaml: not a configuration: 'utf-8' codec"),
        (b"a: {b\n", "config.yaml: not a configuration: while parsing"),
        (b"[a]", "config.yaml: expected keys and values, got list"),
        (None, "config.yaml: could not read it: No such file"),
    ],
)
def test_a_configuration_that_is_none_is_skipped_and_named(tmp_path: Path, content: bytes | None, said: str) -> None:
    write_run(tmp_path)
    broken = write_run(tmp_path, seed=1)
    file = broken / "config.yaml"
    file.unlink() if content is None else file.write_bytes(content)
    ((path, reason),) = load_runs([tmp_path]).skipped
    assert path == broken
    assert reason.startswith(said)
    assert "\n" not in reason


def test_what_the_code_and_the_library_were_is_said_where_it_matters(tmp_path: Path) -> None:
    def lines() -> list[str]:
        return circumstances_apart(variants(load_runs([tmp_path]).runs, []))

    write_run(tmp_path, git={"commit": "a", "dirty": False}, versions={"torch": "2.0"})
    assert lines() == []
    other = write_run(tmp_path, strategy="random", git={"commit": "a", "dirty": True}, versions={})
    assert lines() == [
        "torch: 2.0 (uniform), not recorded (random)",
        f"code that was changed and not committed: {other.name}",
    ]


def test_a_run_without_a_score_is_named(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = write_run(tmp_path, seed=1, metrics={"primary": "accuracy", "value": None, "all": {"accuracy": None}})
    assert load_runs([tmp_path]).flagged == [
        f"{path} has no accuracy (undefined or NaN): it is in no mean and no comparison"
    ]


def test_predictions_count_if_they_say_what_the_result_says(tmp_path: Path) -> None:
    (run,) = load_runs([write_run(tmp_path)]).runs
    assert run.scored is not None
    assert run.scored.value() == run.value == pytest.approx(0.8)
    other = write_run(tmp_path, seed=1)
    change_result(other, metrics={"primary": "accuracy", "value": 0.9, "all": {"accuracy": 0.9}})
    missing = write_run(tmp_path, seed=2)
    (missing / "predictions.csv").unlink()
    broken = write_run(tmp_path, seed=3)
    (broken / "predictions.csv").write_text("split,id\ndev,1\n")
    assert [run.scored for run in load_runs([other, missing, broken]).runs] == [None, None, None]


def test_a_run_from_before_a_key_is_of_the_variant_that_has_its_default(tmp_path: Path) -> None:
    write_run(tmp_path)
    older = write_run(tmp_path, seed=1) / "config.yaml"
    lines = older.read_text().splitlines()
    kept = [
        line for line in lines if line.split(":")[0].strip() not in ("cost", "rows", "quantization", "rank_multiple")
    ]
    assert len(kept) == len(lines) - 4
    older.write_text("\n".join(kept))
    assert labels(load_runs([tmp_path]).runs) == ["uniform"]


def test_seeds_and_tasks_are_one_variant_and_settings_are_several(tmp_path: Path) -> None:
    for task in ("sst2", "rte"):
        for seed in (0, 1):
            write_run(tmp_path, task=task, seed=seed)
            write_run(tmp_path, "strategy.selector.form=sigmoid", task=task, seed=seed, strategy="autolora")
            write_run(tmp_path, "strategy.selector.form=gumbel", task=task, seed=seed, strategy="autolora")
    found = variants(load_runs([tmp_path]).runs, [])
    assert [variant.label for variant in found] == ["autolora (form=gumbel)", "autolora (form=sigmoid)", "uniform"]
    assert {task: sorted(runs) for task, runs in found[-1].runs.items()} == {"rte": [0, 1], "sst2": [0, 1]}


def test_a_setting_of_one_strategy_is_not_in_the_label_of_another(tmp_path: Path) -> None:
    write_run(tmp_path, "optim.adapter.lr=0.01", strategy="autolora")
    write_run(tmp_path, "optim.adapter.lr=0.002")
    assert labels(load_runs([tmp_path]).runs) == ["autolora", "uniform"]


def test_budgets_are_never_averaged_also_not_over_tasks(tmp_path: Path) -> None:
    write_run(tmp_path, "budget.rank=1", task="sst2")
    write_run(tmp_path, "budget.rank=2", task="rte")
    assert labels(load_runs([tmp_path]).runs) == ["uniform (rank 1)", "uniform (rank 2)"]


def test_where_results_go_and_how_they_are_logged_makes_no_variant(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "trainer.enable_progress_bar=false")
    write_run(tmp_path / "b", "force=true", seed=1)
    assert labels(load_runs([tmp_path / "a", tmp_path / "b"]).runs) == ["uniform"]


def test_sources_and_backbones_are_arenas_of_their_own(tmp_path: Path) -> None:
    write_run(tmp_path, source="local")
    write_run(tmp_path, source="mini")
    write_run(tmp_path, "backbone=bert_base")
    assert len({run.arena for run in load_runs([tmp_path]).runs}) == 3


def test_other_rows_from_the_same_source_are_another_task(tmp_path: Path) -> None:
    runs = load_runs([write_run(tmp_path), write_run(tmp_path, seed=1, data_fingerprint="other")]).runs
    assert sorted(run.task for run in runs) == ["sst2 [data-sst2]", "sst2 [other]"]


def test_an_error_is_better_if_it_is_lower(tmp_path: Path) -> None:
    metrics = {"primary": "excess_error", "value": 0.25, "all": {"excess_error": 0.25}}
    (run,) = load_runs([write_run(tmp_path, metrics=metrics)]).runs
    assert (run.value, run.scored) == (-0.25, None)
    unknown = dataclasses.replace(
        run, result=run.result.model_copy(update={"metrics": run.result.metrics.model_copy(update={"value": None})})
    )
    assert unknown.value is None
