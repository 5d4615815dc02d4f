"""The command as a user calls it, its tables, and the table in the README."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from reporting.fake_runs import write_run

from autolora.bench.__main__ import main
from autolora.bench.comparison import copy_runs
from autolora.bench.measure import Interval
from autolora.bench.report import Report, Row, Suite, read_report
from autolora.bench.tables import BEGIN, END, line, markdown
from autolora.reporting.runs import load_runs
from autolora.results import RunDirectory

ROOT = Path(__file__).parents[2]
TINY = ["rounds=2", "warmup=1", "shapes=2x8"]


def interval(median: float) -> Interval:
    return Interval(median=median, low=median / 2, high=median * 2)


def one(value: float) -> Interval:
    return Interval(median=value, low=value, high=value)


def suite(*rows: Row, **settings: Any) -> Suite:
    machine = {
        "date": "2030-01-02T03:04:05Z",
        "hardware": {"cpu": "A processor", "cores": 2, "gpu": None},
        "threads": 2,
        "load_average_before": [0.5, 0.1, 0.0],
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "versions": {"torch": "2", "transformers": "5", "peft": "1"},
    }
    return Suite(settings={"rounds": 9, **settings}, machine=machine, rows=rows)


def test_the_tables_of_a_report() -> None:
    step = Row(
        part="train",
        name="uniform8",
        shape="2x8",
        precision="float32",
        rounds=9,
        value=one(12.34),
        ratios={"peft": interval(0.8), "limit": one(1.1)},
    )
    run = Row(
        part="run",
        name="autolora8",
        rounds=3,
        value=one(20.0),
        ratios={"usual": interval(0.25)},
        parts={"fit": 15.04},
        imports={"all": 3.0, "torch": 2.0},
        metric=0.75,
    )
    data = {"source": "mini", "max_train": 64}
    report = Report(suites={"steps": suite(step, clock="wall"), "run": suite(run, task="mrpc", epochs=2, data=data)})
    place = "2030-01-02, A processor, 2 cores, 2 threads, load 0.5 before; 9 rounds; torch 2, transformers 5, peft 1"
    assert (
        markdown(report)
        == f"""\
| Training step, float32 | 2×8: ms | ÷ limit | ÷ PEFT | ÷ AdaLoRA |
| --- | ---: | ---: | ---: | ---: |
| **uniform r=8** | 12.3 | 1.10 | 0.80 (0.40 to 1.60) |  |

{place}; commit 0123456789.

| mrpc (mini, 64 training rows), 2 epochs | s | × usual | × best | accuracy | fit |
| --- | ---: | ---: | ---: | ---: | ---: |
| **autolora r_max=16**, budget of rank 8 | 20.0 | 4.00 (2.00 to 8.00) |  | 0.750 | 15.0 |

Imports of autolora r_max=16, budget of rank 8: 3.0 s, of which torch 2.0.

{place.replace("9 rounds", "3 rounds")}; commit 0123456789.
"""
    )
    assert line(step).split() == [
        "train", "2x8", "float32", "uniform8", "12.34", "ms", "peft", "0.800", "[0.400,", "1.600]", "limit", "1.100",
        "[1.100,", "1.100]",
    ]  # fmt: skip


def test_the_readme_shows_what_was_measured() -> None:
    committed = markdown(read_report(ROOT / "experiments" / "bench" / "bench.json"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count(BEGIN) == readme.count(END) == 1
    assert readme.partition(BEGIN)[2].partition(END)[0].strip() == committed.strip()


def test_steps_from_end_to_end(tiny_bert_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "bench.json"
    main([f"backbone.path={tiny_bert_dir}", f"out={out}", "precision=float32", *TINY])
    data = json.loads(out.read_text())
    rows = read_report(out).suites["steps"].rows
    assert [row.part for row in rows].count("train") == 8
    ratios = {(row.part, row.name): set(row.ratios) for row in rows}
    assert ratios["train", "uniform8"] == ratios["memory", "uniform16"] == {"peft", "limit"}
    assert ratios["train", "autolora16-prune"] == {"peft", "limit", "adalora"}
    assert ratios["evaluate", "compact"] == {"peft", "bare"}
    assert ratios["once", "attach-autolora16"] == {"peft"}
    assert all(row.value.low > 0 for row in rows)
    machine = data["suites"]["steps"]["machine"]
    assert machine["threads"] >= 1
    assert {"torch", "peft", "transformers"} <= machine["versions"].keys()
    assert machine["hardware"]["cores"] >= 1
    printed = capsys.readouterr().out
    assert printed.count("\n") == len(rows) + 1

    # A second measurement of less replaces the suite's part of the file.
    main([f"backbone.path={tiny_bert_dir}", f"out={out}", "precision=bf16", "only=limit,peft8", "parts=train", *TINY])
    assert [row.precision for row in read_report(out).suites["steps"].rows] == ["bf16", "bf16"]


def test_comparison_from_end_to_end(tiny_bert_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    small = ["runs=60", "cells=2", "steps=4", "task=rte"]
    main(["suite=comparison", f"backbone.path={tiny_bert_dir}", f"out={out}", *small])
    rows = {row.part: row for row in read_report(out).suites["comparison"].rows}
    assert rows.keys() == {"cell", "dev", "report", "report-memory"}
    assert rows["cell"].rounds == 1  # of two cells the first one pays for the imports
    assert rows["dev"].ratios["training"].median > 0
    assert 0 < rows["cell"].value.median < 60
    assert rows["report-memory"].value.median > 1e7
    table = markdown(read_report(out))
    assert "| fixed cost of a cell, float32 |" in table
    assert "| report over 60 runs |" in table


def test_copied_runs_are_runs_that_the_report_can_compare(tmp_path: Path) -> None:
    """Ten strategies on five tasks, as many seeds as there are copies for, and every score that of its predictions."""
    run = write_run(tmp_path / "one", examples=50)
    copy_runs(RunDirectory(run), tmp_path / "many", 100, seed=0)
    found = load_runs([tmp_path / "many"])
    assert (len(found.runs), found.skipped, found.flagged) == (100, [], [])
    assert {run.result.seed for run in found.runs} == {0, 1}
    assert len({(run.result.strategy, run.task) for run in found.runs}) == 50
    assert all(run.scored is not None for run in found.runs)


@pytest.mark.slow
def test_runs_from_end_to_end(tiny_bert_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    small = ["data.max_train=64", "epochs=1", "rounds=1", "precision=float32"]
    main(["suite=run", f"backbone.path={tiny_bert_dir}", f"out={out}", *small])
    rows = {row.name: row for row in read_report(out).suites["run"].rows}
    assert rows.keys() == {"uniform8", "autolora8", "peft8-usual", "peft8-best"}
    assert rows["uniform8"].ratios.keys() == {"usual", "best"}
    assert 0 < sum(rows["uniform8"].parts.values()) < rows["uniform8"].value.median
    for row in rows.values():
        assert row.metric is not None
        assert 0 <= row.metric <= 1
        assert row.imports["all"] > row.imports["torch"] > 0


def test_both_sides_of_a_run_train_on_the_same(tiny_bert_dir: Path, tmp_path: Path) -> None:
    from autolora.bench.runs import make_commands
    from autolora.bench.settings import RunSettings, read_command_line

    settings = read_command_line(["suite=run", f"backbone.path={tiny_bert_dir}", "data.max_train=100", "epochs=3"])
    assert isinstance(settings, RunSettings)
    commands = make_commands(settings, tmp_path)
    ours = commands["uniform8"].arguments(tmp_path, False)
    assert {"data.source=mini", "data.max_train=100", "trainer.max_epochs=3", "budget.rank=8"} <= set(ours)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows["train"]["labels"]) == 90  # ours holds a tenth of its rows out
    jobs = {}
    for name in ("peft8-usual", "peft8-best"):
        (tmp_path / name).mkdir()
        jobs[name] = json.loads(Path(commands[name].arguments(tmp_path / name, False)[1]).read_text())
    assert [jobs[name]["best"] for name in jobs] == [False, True]
    assert jobs["peft8-usual"]["bf16"] is False
    assert jobs["peft8-best"]["epochs"] == 3
    assert len(jobs["peft8-best"]["targets"]) == 13


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["rounds=0", "onyl=limit"], 2, ["rounds=0: expected an integer >= 1, got 0", "did you mean only?"]),
        (["shapes=32"], 2, ["expected ROWSxTOKENS such as 32x32, got 32"]),
        (["backbone.quantization=int8"], 2, ["expected a backbone that is neither quantised nor pruned: leave"]),
        (["suite=run", "data.dri=x"], 2, ["did you mean data.dir?"]),
        (["table=nowhere.json"], 1, ["nowhere.json: there is no such file"]),
        (["backbone.path=nowhere", "rounds=1"], 1, ["nowhere"]),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    arguments: list[str], code: int, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == code
    error = capsys.readouterr().err
    assert all(text in error for text in said)
    assert "Traceback" not in error


def test_a_file_that_is_no_report_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    out.write_text('{"mine": 1}')
    with pytest.raises(SystemExit) as stopped:
        main([f"out={out}", "rounds=1"])
    assert stopped.value.code == 1
    assert "expected the bench.json of schema 1" in capsys.readouterr().err
    assert out.read_text() == '{"mine": 1}'


@pytest.mark.parametrize("argv", [["--help"], ["rounds=0"]])
def test_help_and_mistakes_load_nothing_heavy(argv: list[str]) -> None:
    code = f"""
import sys
from autolora.bench.__main__ import main
try:
    main({argv!r})
except SystemExit:
    pass
print(sorted({{"torch", "transformers", "peft", "lightning"}} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
