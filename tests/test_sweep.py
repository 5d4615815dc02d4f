"""Sweeps: what is kept of every cell, in whatever process it runs and however that ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_train_cli import exit_code, install

from autolora.cells import Cell
from autolora.compose import Grid, check_command_line
from autolora.config import RunConfig
from autolora.errors import BackboneError, ConfigError
from autolora.results import RunResult, read_result
from autolora.signals import Interrupted
from autolora.sweep import Sweep

original_write_report = Sweep._write_report
PLANTED = ("-m", "task=planted", "logger=csv", "trainer.enable_progress_bar=false")


# In this process, with a stand-in for the run ---------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    return tmp_path


def cells(place: Path) -> list[Cell]:
    return [Cell.model_validate_json(file.read_text()) for file in sorted(place.glob("runs/sweeps/*/cells/*.json"))]


def failing(errors: dict[int, BaseException], ran: list[int]) -> Callable[[RunConfig], None]:
    """A run that fails for some seeds."""

    def run_one(config: RunConfig) -> None:
        ran.append(config.seed)
        if config.seed in errors:
            raise errors[config.seed]

    return run_one


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (BackboneError("no weights"), 1, "no weights"),
        (ConfigError("max_rank: too small"), 2, "max_rank: too small"),
        (ZeroDivisionError("a mistake of ours"), 1, "ZeroDivisionError: a mistake of ours"),
    ],
)
def test_a_failed_cell_is_listed_at_the_end_and_the_others_go_on(
    error: Exception, code: int, told: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    ran: list[int] = []
    install(monkeypatch, failing({1: error}, ran))
    assert exit_code("-m", "seed=0,1,2", "task=rte") == code
    assert ran == [0, 1, 2]
    assert [cell.status for cell in cells(place)] == ["complete", "failed", "complete"]
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "sweep: 2 of 3 done, 1 failed, 0 left"
    assert printed.err.splitlines()[-3:] == [
        "failed: seed=1 task=rte", f"  {told}", "the same command goes on with what is not complete",
    ]  # fmt: skip
    traced = isinstance(error, ZeroDivisionError)
    assert ("Traceback" in (cells(place)[1].error or "")) == traced

    install(monkeypatch, ran.append)  # mended
    assert exit_code("-m", "seed=0,1,2", "task=rte") == 0
    assert [cell.status for cell in cells(place)] == ["complete"] * 3
    assert capsys.readouterr().out.splitlines()[-1] == "sweep: 3 of 3 done, 0 failed, 0 left"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_ends_a_sweep(
    signum: int, code: int, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    ran: list[int] = []
    install(monkeypatch, failing({1: Interrupted(signum)}, ran))
    assert exit_code("-m", "seed=0,1,2") == code
    assert ran == [0, 1]
    assert [cell.status for cell in cells(place)] == ["complete", "interrupted"]
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "sweep: 1 of 3 done, 0 failed, 2 left",
        f"interrupted by {signal.Signals(signum).name}; the same command goes on",
    ]
    install(monkeypatch, failing({}, ran))
    assert exit_code("-m", "seed=0,1,2") == 0
    assert ran == [0, 1, 0, 1, 2]


def test_a_cell_has_the_command_line_of_its_own(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning starts the other processes of a run with it; a sweep there would be another sweep."""
    seen = []
    install(monkeypatch, lambda config: seen.append(sys.argv[1:]))
    assert exit_code("-m", "seed=0,1", "task=rte") == 0
    assert seen == [["++seed=0", "task=rte", "hydra.mode=RUN"], ["++seed=1", "task=rte", "hydra.mode=RUN"]]
    seen.clear()
    (place / "mine" / "experiment").mkdir(parents=True)
    (place / "mine" / "experiment" / "own.yaml").write_text("# @package _global_\nmax_rank: 4\n")
    assert exit_code("--config-dir", "mine", "sweep=seeds", "seed=1", "strategy=uniform", "experiment=own") == 0
    own = {"strategy=uniform", "seed=1", "sweep=seeds", "experiment=own", "hydra.mode=RUN"}
    assert [(line[:2], set(line[2:])) for line in seen] == [(["--config-dir", "mine"], own)]
    assert check_command_line(seen[0]).grid is None  # a run of its own, with all that the cell has


def test_what_a_file_sweeps_over_can_be_set(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """In its place, not beside it."""
    ran: list[Any] = []
    install(monkeypatch, lambda config: ran.append((config.strategy.name, config.seed)))
    assert exit_code("sweep=seeds", "task=rte", "seed=7,8") == 0
    assert sorted(ran) == [("autolora", 7), ("autolora", 8), ("uniform", 7), ("uniform", 8)]
    assert capsys.readouterr().out.splitlines()[-1] == "sweep seeds: 4 of 4 done, 0 failed, 0 left"
    ran.clear()
    assert exit_code("sweep=seeds", "task=rte", "seed=5", "strategy=head") == 0
    assert ran == [("head", 5)]


def test_a_signal_counts_more_than_the_failure_it_comes_with(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def run_one(config: RunConfig) -> None:
        ran.append(config.seed)
        os.kill(os.getpid(), signal.SIGINT)
        raise BackboneError("the hub does not answer")

    install(monkeypatch, run_one)
    assert exit_code("-m", "seed=0,1,2") == 130
    assert ran == [0]


def test_a_signal_after_the_end_of_a_cell_stops_the_next(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    install(monkeypatch, lambda config: ran.append(config.seed) or os.kill(os.getpid(), signal.SIGTERM))
    assert exit_code("-m", "seed=0,1,2") == 143
    assert ran == [0]
    assert [cell.status for cell in cells(place)] == ["complete"]


def test_force_and_lost_runs_are_done_again(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """What is known of cells from before counts only where it still holds."""
    install(monkeypatch, lambda config: None)
    assert exit_code("-m", "seed=0,1,2") == 0
    for lost in (False, True):
        capsys.readouterr()
        if lost:
            os.unlink("run/result.json")
            install(monkeypatch, failing({1: BackboneError("no weights")}, []))
        assert exit_code("-m", "seed=0,1,2", f"force={str(not lost).lower()}") == int(lost)
        printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sweep")]
        assert printed[-1].startswith("sweep: 2 of 3 done, 1 failed" if lost else "sweep: 3 of 3 done, 0 failed")


def test_a_sweep_is_carried_out_by_one_process_at_a_time(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    install(monkeypatch, lambda config: None)
    assert exit_code("-m", "seed=0,1") == 0
    (sweep,) = place.glob("runs/sweeps/*")
    holder = f"from autolora.locking import exclusive\nwith exclusive(Path({str(sweep)!r})): print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", f"from pathlib import Path\n{holder}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdout.readline()
        capsys.readouterr()
        before = cells(place)
        assert exit_code("-m", "seed=0,1") == 1
        assert f"{sweep}: process {other.pid} on " in capsys.readouterr().err
        assert cells(place) == before
        other.stdin.close()
    assert exit_code("-m", "seed=0,1") == 0


def test_a_report_that_fails_does_not_hide_what_failed(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    install(monkeypatch, failing({1: BackboneError("no weights")}, []))
    monkeypatch.setattr("autolora.sweep.Sweep._write_report", original_write_report)
    monkeypatch.setattr("autolora.reporting.runs.load_runs", lambda *_: 1 / 0)
    assert exit_code("-m", "seed=0,1,2") == 1
    told = capsys.readouterr().err
    assert "error: no report: Traceback" in told
    assert "ZeroDivisionError" in told
    assert "failed: seed=1\n  no weights\n" in told


def grid(*arguments: str) -> Grid:
    found = check_command_line(["-m", *arguments]).grid
    assert found is not None
    return found


def test_a_sweep_is_known_by_what_it_computes(place: Path) -> None:
    base = grid("seed=0,1,2", "task=rte,mrpc")
    assert (base.name, base.cells, base.local) == ("sweep", 6, True)
    kept_elsewhere = ("run_root=other", "force=true", "logger=csv", "trainer.enable_progress_bar=false")
    assert grid("seed=0,1,2", "task=rte,mrpc", *kept_elsewhere, "hydra/launcher=joblib").digest == base.digest
    others = [
        grid("seed=0,1", "task=rte,mrpc"),
        grid("seed=0,1,2", "task=rte,mrpc", "max_rank=4"),
        grid("seed=0,1,2", "task=rte,mrpc", "data.source=mini"),
        grid("seed=0,1,2", "task=rte,cola"),
        grid("task=rte,mrpc", "seed=0,1,2"),  # cells have other numbers
    ]
    assert len({base.digest, *(other.digest for other in others)}) == 6
    assert not grid("seed=0,1", "hydra/launcher=joblib").local
    parts = [grid("sweep=seeds", f"hydra.sweeper.params.seed={seed}", "task=rte") for seed in (0, 1)]
    assert [part.cells for part in parts] == [2, 2]
    assert parts[0].digest != parts[1].digest  # neither would stop the other
    named = grid("sweep=seeds", "task=rte")
    assert (named.name, named.cells) == ("seeds", 6)
    assert check_command_line(["seed=0"]).grid is None
    assert check_command_line(["-m", "seed=0,1", "--cfg", "job"]).grid is None


def cell(number: int, status: str, began: float, **known: Any) -> Cell:
    return Cell(number=number, overrides=(), status=status, began=began, process=("host", 1), **known)  # type: ignore[arg-type]


def test_progress_counts_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun at 1,000; now it is 1,600. Two cells were trained in 600 s, so four more take 1,200 s."""
    sweep = Sweep(Grid("rank_grid", "0", 9, tmp_path, False), ("host", 1), 1000.0)
    (sweep.path / "cells").mkdir(parents=True)
    for one in (
        cell(0, "complete", 500.0, trained=True),  # when the command was given before
        cell(1, "failed", 500.0),  # then too: to be tried again
        cell(2, "complete", 1000.0),  # found complete
        cell(3, "complete", 1001.0, trained=True),
        cell(4, "failed", 1002.0),
        cell(5, "complete", 1003.0, trained=True),
        cell(6, "running", 1004.0),
        cell(7, "interrupted", 500.0),
    ):
        sweep._write(one)
    monkeypatch.setattr(time, "time", lambda: 1600.0)
    clock = time.strftime("%H:%M", time.localtime(2800.0))
    expected = f"sweep rank_grid: 4 of 9 done, 1 failed, 4 left, about 20 min more, until {clock}"
    assert sweep.progress(sweep.cells()) == expected
    (sweep.path / "cells" / "00008.json").write_text("{half")  # nothing is known of it
    assert "4 left" in sweep.progress(sweep.cells())


def test_a_damaged_stop_file_stops_nothing(tmp_path: Path) -> None:
    sweep = Sweep(Grid("x", "0", 1, tmp_path, True))
    sweep.path.mkdir(parents=True)
    sweep._stop.write_text("")
    assert sweep._stopped_by() is None


# The real command ---------------------------------------------------------------------------------------------------


def start(
    root: Path, *overrides: str, base: Sequence[str] = PLANTED, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "autolora.train", *base, f"run_root={root}", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).resolve().parents[1],
        start_new_session=True,
    )


def without(variable: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != variable}


def finish(process: subprocess.Popen[str], seconds: float = 240) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def results(root: Path) -> dict[str, RunResult]:
    return {file.parent.name: read_result(file) for file in sorted(root.glob("*/result.json"))}


def outcomes(root: Path) -> dict[str, tuple[float | None, dict[str, int]]]:
    return {name: (result.metrics.value, result.ranks) for name, result in results(root).items()}


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def running(root: Path) -> list[Cell]:
    found = []
    for file in root.glob("sweeps/*/cells/*.json"):
        one = Cell.model_validate_json(file.read_text())
        if one.status == "running":
            found.append(one)
    return found


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A run root; what is still running there afterwards is ended."""
    yield tmp_path / "runs"
    for one in running(tmp_path / "runs"):
        try:
            os.kill(one.process[1], signal.SIGKILL)
        except ProcessLookupError:
            continue


def test_records_that_have_no_place_are_told_in_one_line(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    assert exit_code("-m", f"run_root={tmp_path / 'file' / 'runs'}", "seed=0,1") == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "Traceback" not in err


LONG = ("trainer.max_steps=1000", "trainer.checkpoint_every_n_steps=25")


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_launchers_run_cells_in_processes_of_their_own(launcher: str, root: Path) -> None:
    """A cell that fails there is told of here, and the report has the others."""
    arguments = [f"hydra/launcher={launcher}", "trainer.max_steps=20", "optim.adapter.lr=1e-3,1e30"]
    process = start(root, *arguments)
    code, out, err = finish(process)
    assert code == 1, err
    assert re.search(r"^sweep: 1 of 2 done, 1 failed, 0 left$", out, re.MULTILINE), out
    assert len(re.findall(r"^failed: .*lr=1e\+?30", err, re.MULTILINE)) == 1, err
    assert "the training loss became nan" in err
    assert sorted(result.status for result in results(root).values()) == ["complete", "failed"]
    (report,) = root.glob("sweeps/*/report")
    assert len((report / "results.csv").read_text().splitlines()) == 1 + 1
    assert "1 run; 1 was not used" in (page := (report / "index.html").read_text())
    assert re.search(r"optim\.adapter\.lr=1e\+?30.*: failed: .*the training loss became nan", page)
    processes = {Cell.model_validate_json(file.read_text()).process for file in root.glob("sweeps/*/cells/*")}
    assert process.pid not in {number for _, number in processes}


def test_joblib_divides_the_threads(tiny_bert_dir: Path, root: Path, tmp_path: Path) -> None:
    """As many as there are cores, over all cells that run at once."""
    import joblib

    text = ["task=rte", "data.source=mini", f"backbone.path={tiny_bert_dir}", f"data.cache_dir={tmp_path}"]
    several = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "strategy=head", "seed=0,1", "trainer.max_steps=2"]
    process = start(root, *several, *text, base=("-m", "logger=csv"), environment=without("OMP_NUM_THREADS"))
    code, _, err = finish(process)
    assert code == 0, err
    assert [result.hardware["threads"] for result in results(root).values()] == [max(1, joblib.cpu_count() // 2)] * 2


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_cells_of_joblib_and_they_go_on_later(signum: int, root: Path) -> None:
    arguments = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1,2", *LONG)
    process = start(root, *arguments)
    wait_for(lambda: len({file.parent for file in root.glob("*/checkpoints/step-*.ckpt")}) == 2, process)
    os.killpg(process.pid, signum) if signum == signal.SIGINT else process.send_signal(signum)
    code, out, err = finish(process)
    assert code == 128 + signum, err
    assert "the same command goes on" in out
    assert [result.status for result in results(root).values()] == ["interrupted"] * 2
    code, out, err = finish(start(root, *arguments))
    assert code == 0, err
    assert out.count("resuming at step") == 2
    assert [result.status for result in results(root).values()] == ["complete"] * 3


def test_cells_that_somebody_else_stopped_are_named(root: Path) -> None:
    arguments = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1", *LONG)
    process = start(root, *arguments)
    wait_for(lambda: len({file.parent for file in root.glob("*/checkpoints/step-*.ckpt")}) == 2, process)
    for one in running(root):
        os.kill(one.process[1], signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 1, err
    assert "sweep: 0 of 2 done, 0 failed, 2 left" in out
    assert err.count("interrupted: task=planted") == 2
    assert "the same command goes on with what is not complete" in err


def test_workers_of_a_killed_sweep_stop_by_themselves(root: Path) -> None:
    process = start(root, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1", *LONG)
    wait_for(lambda: len({file.parent for file in root.glob("*/checkpoints/step-*.ckpt")}) == 2, process)
    workers = [one.process[1] for one in running(root)]
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert [result.status for result in results(root).values()] == ["interrupted"] * 2


def test_cells_that_train_in_two_processes_follow_each_other(root: Path) -> None:
    """Nothing of the first run's processes is left when the second begins, also where it failed."""
    process = start(
        root, "optim.adapter.lr=1e30,1e-3", "trainer.max_steps=1500", "trainer.strategy=ddp", "trainer.devices=2"
    )
    code, out, err = finish(process)
    assert code == 1, err
    assert "sweep: 1 of 2 done, 1 failed, 0 left" in out
    complete = [result for result in results(root).values() if result.status == "complete"]
    assert [result.compute.passes for result in complete] == [2 * 1500]  # longer than Lightning waits to end the rest


def test_a_preempted_job_is_queued_again_and_ends_as_if_it_had_not_been(root: Path, tmp_path: Path) -> None:
    """submitit's local executor sends SIGUSR2 before the time is over, as Slurm does, and starts the job again."""
    arguments = ("hydra/launcher=submitit_local", "seed=0", *LONG)
    process = start(root, *arguments)
    wait_for(lambda: list(root.glob("*/checkpoints/step-*.ckpt")), process)
    (one,) = running(root)
    os.kill(one.process[1], signal.SIGTERM)  # as well, which alone would not say to queue it again
    os.kill(one.process[1], signal.SIGUSR2)
    code, _, err = finish(process)
    assert code == 0, err
    logs = "".join(file.read_text() for file in root.glob(".submitit/*/*log.*"))
    assert logs.count("resuming at step") == 1, logs
    code, _, err = finish(start(tmp_path / "whole", "seed=0", *LONG))
    assert code == 0, err
    assert outcomes(root) == outcomes(tmp_path / "whole")


def test_a_sweep_killed_twice_ends_as_if_it_had_not_been(root: Path, tmp_path: Path) -> None:
    """In the middle of the first cell, then of the second: no cell is lost, and none is trained twice."""
    arguments = ("strategy=uniform,autolora", *LONG)
    for complete in (0, 1):
        process = start(root, *arguments)
        wait_for(lambda complete=complete: len(results(root)) >= complete and running_with_checkpoint(root), process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    code, out, err = finish(start(root, *arguments))
    assert code == 0, err
    assert out.count("resuming at step") == 1
    assert out.count("complete already") >= 1
    assert "sweep: 2 of 2 done, 0 failed, 0 left" in out
    (report,) = root.glob("sweeps/*/report")
    assert len((report / "results.csv").read_text().splitlines()) == 1 + 2
    assert json.loads(next(root.glob("*/result.json")).read_text())["status"] == "complete"
    code, _, err = finish(start(tmp_path / "whole", *arguments))
    assert code == 0, err
    assert outcomes(root) == outcomes(tmp_path / "whole")


def running_with_checkpoint(root: Path) -> bool:
    folders = [file.parent.parent for file in root.glob("*/checkpoints/step-*.ckpt")]
    return any(not (folder / "result.json").exists() for folder in folders)
