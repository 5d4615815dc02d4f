"""Runs that are stopped, killed or short of disk: they go on, and end as if nothing had been."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from test_run import configure, sst2  # noqa: F401  fixtures

import autolora.run
from autolora.compose import compose
from autolora.config import RunConfig
from autolora.errors import BusyError, CheckpointError, DiskFullError
from autolora.files import append
from autolora.results import RunDirectory
from autolora.run import run_one
from autolora.signals import Interrupted
from autolora.training.checkpoints import FORMAT, Checkpoints, read

VARYING = {"seconds", "examples_per_second", "peak_memory_bytes", "git"}


class Stopper:
    """Sends this process a signal at the beginning of training batches, counted over the epochs of an attempt."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at = -1
        self.count = 0
        original = Checkpoints.on_train_batch_start

        def on_train_batch_start(saving: Checkpoints, trainer: pl.Trainer, *rest: Any) -> None:
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGTERM)
            self.count += 1
            original(saving, trainer, *rest)

        monkeypatch.setattr(Checkpoints, "on_train_batch_start", on_train_batch_start)


@pytest.fixture
def stopper(monkeypatch: pytest.MonkeyPatch) -> Stopper:
    return Stopper(monkeypatch)


def outcome(cfg: RunConfig) -> dict[str, Any]:
    """Everything that a run leaves behind and that has to repeat."""
    (path,) = [path for path in cfg.run_root.iterdir() if path.is_dir()]
    directory = RunDirectory(path)
    result = json.loads(directory.result.read_text())
    histories = [
        [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file.open())]
        for file in (directory.history, directory.retrain_history)
        if file.exists()
    ]
    return {
        "result": {key: value for key, value in result.items() if key not in VARYING},
        "ranks": directory.ranks.read_text(),
        "predictions": directory.predictions.read_text(),
        "histories": histories,
        "adapter": {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*.safetensors")},
    }


def interrupted_run(cfg: RunConfig, stopper: Stopper, every: int) -> int:
    """Run to the end with an interruption every so many batches; gives how many there were."""
    for attempt in range(100):
        stopper.count, stopper.at = 0, every
        with suppress(Interrupted):
            run_one(cfg)
            return attempt
    raise AssertionError("no end")


CASES = {
    "every batch": ("adapter.dropout=0.2", "strategy.selector.form=gumbel", "trainer.max_epochs=1"),
    "accumulation": ("trainer.accumulate_grad_batches=2", "trainer.max_epochs=4"),
    "best": ("trainer.checkpoint=best", "trainer.val_check_interval=2", "trainer.max_epochs=3"),
    "patience": ("trainer.early_stopping_patience=1", "trainer.max_epochs=8", "strategy=uniform"),
    "workers": ("data.num_workers=1", "trainer.limit_train_batches=5", "trainer.max_epochs=3"),
    "selectors from the start": ("strategy.phases.warmup=0",),
    "validation by steps": (
        "trainer.check_val_every_n_epoch=null", "trainer.val_check_interval=5", "trainer.max_steps=8",
        "trainer.max_epochs=-1", "trainer.accumulate_grad_batches=3",
    ),
    "planted": (
        "task=planted", "backbone=none", "task.dim=12", "task.widths=[8]", "task.ranks=[2,1]", "task.eval_size=64",
        "data.batch_size=16", "trainer.max_steps=20", "trainer.max_epochs=-1", "budget.rank=1",
        "strategy.selector.form=hard_concrete",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_ends_as_an_unbroken_one(
    configured: Any, stopper: Stopper, tmp_path: Path, case: str
) -> None:
    """The same result, ranks, predictions, history and tensors, to the last bit."""
    extra = ("strategy=autolora", "trainer.log_every_n_steps=4", *CASES[case])
    unbroken, broken = configured(*extra), configured(*extra, f"run_root={tmp_path / 'broken'}")
    run_one(unbroken)
    every = 1 if case == "every batch" else 5
    assert interrupted_run(broken, stopper, every) >= (6 if every == 1 else 2)
    assert outcome(broken) == outcome(unbroken)


@pytest.fixture
def configured(configure: Any) -> Any:  # noqa: F811
    """Later overrides win, and a planted task takes neither data nor a backbone."""

    def make(*overrides: str) -> RunConfig:
        given = {item.partition("=")[0]: item for item in overrides}
        return configure(*given.values())

    return make


# By signals and by force, with the real command ----------------------------------------------------------------------

PLANTED = (
    "task=planted", "task.dim=12", "task.widths=[8]", "task.ranks=[2,1]", "task.eval_size=64", "data.batch_size=16",
    "logger=csv", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.enable_progress_bar=false",
    "trainer.log_every_n_steps=100", "budget.rank=1", "max_rank=4",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]


def planted(tmp_path: Path, *overrides: str) -> RunConfig:
    given = {item.partition("=")[0]: item for item in (*PLANTED, f"run_root={tmp_path / 'runs'}", *overrides)}
    return compose(list(given.values()))


def directory_in(run_root: Path) -> RunDirectory:
    (path,) = run_root.iterdir()
    return RunDirectory(path)


def start(*arguments: str) -> subprocess.Popen[str]:
    return launch(*PLANTED, *arguments)


def launch(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "autolora.train", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def wait_for_checkpoint_after(root: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until there is a checkpoint of a later step."""
    for _ in range(18000):
        if any(int(path.stem.partition("-")[2]) > step for path in root.glob("*/checkpoints/step-*.ckpt")):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("no checkpoint in three minutes")


def test_the_real_command_killed_and_stopped_by_signals(tmp_path: Path) -> None:
    steps = ("trainer.max_steps=600", "trainer.checkpoint_every_n_steps=20")
    root = tmp_path / "broken"
    process = start(*steps, f"run_root={root}")
    wait_for_checkpoint_after(root, 0, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    seen = 0
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = start(*steps, f"run_root={root}")
        wait_for_checkpoint_after(root, newest_step(root), process)
        process.send_signal(signum)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert err == f"{signum.name}: stopping after this step; once more stops at once\n"
        result = directory_in(root).read_result()
        assert (result.status, result.metrics.value) == ("interrupted", None)
        assert f"at step {result.steps}; the same command goes on from step-{result.steps:08d}.ckpt" in out
        assert f"resuming at step {seen}" in out or not seen
        assert 0 < result.seconds.earlier < result.seconds.total
        assert newest_step(root) == result.steps > seen
        seen = result.steps
    run_one(planted(tmp_path, *steps, f"run_root={root}"))
    run_one(planted(tmp_path, *steps))
    assert outcome(planted(tmp_path, *steps, f"run_root={root}")) == outcome(planted(tmp_path, *steps))
    assert list(directory_in(root).checkpoints.glob("step-*")) == []


def test_a_signal_to_the_whole_group_finds_workers_unmoved(
    tiny_bert_dir: Path,
    sst2: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """As Ctrl-C in a terminal sends it."""
    text = (
        "data.source=local", f"data.dir={sst2}", f"data.cache_dir={tmp_path / 'cache'}", "data.num_workers=1",
        f"backbone.path={tiny_bert_dir}", "logger=csv", "max_rank=4", "budget.rank=2", "trainer.accelerator=cpu",
        "trainer.precision=32-true", "trainer.enable_progress_bar=false", "trainer.max_epochs=500",
        "trainer.checkpoint_every_n_steps=5", f"run_root={tmp_path / 'runs'}", "strategy=uniform",
    )  # fmt: skip
    step = 0
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = launch("task=sst2", *text)
        wait_for_checkpoint_after(tmp_path / "runs", step, process)
        os.killpg(process.pid, signum)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert err == f"{signum.name}: stopping after this step; once more stops at once\n"
        result = directory_in(tmp_path / "runs").read_result()
        assert result.status == "interrupted"
        assert result.steps == newest_step(tmp_path / "runs") > step
        assert "goes on from step-" in out
        with pytest.raises(ProcessLookupError):  # no worker is left in the group
            os.killpg(process.pid, 0)
        step = result.steps


@pytest.mark.parametrize("moment", ["make_problem", "make_strategy"])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_signal_before_the_fit_waits_for_the_step_and_is_recorded(
    tmp_path: Path,
    stopper: Stopper,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moment: str,
    resumed: bool,
) -> None:
    """At the step of the checkpoint, where there is one; what is kept is not touched."""
    cfg = planted(tmp_path, "trainer.max_steps=20")
    if resumed:
        stopped_at(cfg, stopper, 11)
    made: list[str] = []
    original = getattr(autolora.run, moment)

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        made.append(moment)
        return original(*arguments)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(autolora.run, moment, interrupted)
        patch.setattr("autolora.training.fit.fit", lambda *_: pytest.fail("trained"))
        with pytest.raises(Interrupted) as stop:
            run_one(cfg)
    assert (stop.value.exit_code, made) == (143, [moment])
    result = directory_in(cfg.run_root).read_result()
    step = 11 if resumed else 0
    assert (result.status, result.steps, result.compute.fit_steps) == ("interrupted", step, step)
    goes_on = "goes on from step-00000011.ckpt" if resumed else "begins again"
    assert f"interrupted by SIGTERM at step {step}; the same command {goes_on}" in capsys.readouterr().out
    assert run_one(cfg).steps == 20


def test_a_signal_before_a_forced_run_leaves_the_complete_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = planted(tmp_path, "trainer.max_steps=4")
    run_one(cfg)
    before = directory_in(cfg.run_root).result.read_bytes()
    original = autolora.run.make_problem
    monkeypatch.setattr(autolora.run, "make_problem", lambda cfg: os.kill(os.getpid(), signal.SIGINT) or original(cfg))
    with pytest.raises(Interrupted):
        run_one(cfg.model_copy(update={"force": True}))
    assert directory_in(cfg.run_root).result.read_bytes() == before


@pytest.mark.slow
def test_two_processes_are_stopped_and_go_on_together(tmp_path: Path) -> None:
    """Killed with everything they have started, then asked to stop, then to the end."""
    steps = (
        "trainer.max_steps=1500",
        "trainer.checkpoint_every_n_steps=25",
        "trainer.devices=2",
        "trainer.strategy=ddp",
    )
    root, whole = tmp_path / "broken", tmp_path / "whole"
    process = start(*steps, f"run_root={root}")
    wait_for_checkpoint_after(root, 0, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    process = start(*steps, f"run_root={root}")
    wait_for_checkpoint_after(root, newest_step(root), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert directory_in(root).read_result().status == "interrupted"
    for folder in (root, whole):
        process = start(*steps, f"run_root={folder}")
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert ("resuming at step" in out) == (folder == root)
    assert directory_in(whole).read_result().compute.passes == 2 * 1500
    cfg = planted(tmp_path, *steps, f"run_root={root}")
    assert outcome(cfg) == outcome(cfg.model_copy(update={"run_root": whole}))


def newest_step(root: Path) -> int:
    return max(int(path.stem.partition("-")[2]) for path in root.glob("*/checkpoints/step-*.ckpt"))


@pytest.mark.parametrize("end", ["steps", "patience"])
def test_a_signal_during_evaluation_ends_at_once_and_nothing_is_trained_again(
    configure: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    end: str,
) -> None:
    """Whatever had ended the fit."""
    cfg = planted(tmp_path, "trainer.max_steps=9")
    if end == "patience":
        waits = ("trainer.early_stopping_patience=1", "trainer.checkpoint=best", "optim.adapter.lr=1e-9")
        cfg = configure("strategy=uniform", "trainer.max_epochs=9", "optim.head.lr=1e-9", *waits)
    other = cfg.model_copy(update={"run_root": tmp_path / "other"})
    with monkeypatch.context() as patch:
        patch.setattr("autolora.run.prediction_rows", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted) as stop:
            run_one(cfg)
    assert stop.value.exit_code == 130
    files = directory_in(cfg.run_root)
    assert files.read_result().status == "interrupted"
    assert files.read_result().steps == (9 if end == "steps" else 14)
    with monkeypatch.context() as patch:
        patch.setattr("autolora.training.module.AdapterModule.training_step", lambda *_: pytest.fail("trained again"))
        run_one(cfg)
    run_one(other)
    assert outcome(cfg) == outcome(other)


def test_signals_have_their_usual_effect_after_a_run(tmp_path: Path) -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    run_one(planted(tmp_path, "trainer.max_steps=4"))
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


# What is kept, and what is refused -----------------------------------------------------------------------------------


def stopped_at(cfg: RunConfig, stopper: Stopper, batch: int) -> RunDirectory:
    """A run that was interrupted before that batch."""
    stopper.count, stopper.at = 0, batch
    with pytest.raises(Interrupted):
        run_one(cfg)
    stopper.at = -1
    return directory_in(cfg.run_root)


def test_the_last_two_checkpoints_are_kept_and_none_after_the_end(
    tmp_path: Path, stopper: Stopper, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = planted(tmp_path, "trainer.max_steps=20", "trainer.checkpoint_every_n_steps=3")
    files = stopped_at(cfg, stopper, 11)
    names = sorted(path.name for path in files.checkpoints.iterdir())
    assert names == ["step-00000009.ckpt", "step-00000011.ckpt"]
    (files.path / ".ranks.json.1.tmp").touch()
    (files.checkpoints / ".step-00000012.ckpt.1.tmp").touch()
    capsys.readouterr()
    run_one(cfg)
    assert f"resuming at step 11 of 20 in {files.path}\n" in capsys.readouterr().out
    assert list(files.path.rglob(".*.tmp")) + list(files.checkpoints.glob("step-*")) == []
    run_one(planted(tmp_path, "trainer.max_steps=20", "trainer.keep_checkpoints=true", "force=true"))
    assert [path.name for path in files.checkpoints.glob("step-*")] == ["step-00000020.ckpt"]


@pytest.mark.parametrize(
    "damage", ["cut", "changed", "empty", "garbage", "folder", "no trainable", "no seconds", "no part"]
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, stopper: Stopper, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    cfg = planted(tmp_path, "trainer.max_steps=20", "trainer.checkpoint_every_n_steps=3")
    files = stopped_at(cfg, stopper, 11)
    older, last = sorted(files.checkpoints.iterdir())
    content = last.read_bytes()
    middle = content.index(b"squared_gradient") if damage == "changed" else len(content) // 2
    if damage == "folder":
        last.unlink()
        last.mkdir()
        (last / "file").touch()
    elif damage.startswith("no "):
        checkpoint = torch.load(last, weights_only=True)
        lacking = checkpoint["autolora"] if damage == "no seconds" else checkpoint
        del lacking["autolora" if damage == "no part" else damage.removeprefix("no ")]
        torch.save(checkpoint, last)
    else:
        changed = content[:middle] + b"X" + content[middle + 1 :]
        garbage = b"\x80" + random.Random(0).randbytes(5000)  # the first byte is that of a pickle
        last.write_bytes({"cut": content[:middle], "changed": changed, "empty": b"", "garbage": garbage}[damage])
    capsys.readouterr()
    run_one(cfg)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{last} is damaged (")
    assert said[1] == f"resuming at step 9 of 20 in {files.path}"
    other = cfg.model_copy(update={"run_root": tmp_path / "other"})
    run_one(other)
    assert outcome(cfg) == outcome(other)
    assert older.name == "step-00000009.ckpt"


@pytest.mark.parametrize("part", ["text", [1], None])
def test_what_is_no_part_of_ours_is_damage(
    tmp_path: Path, stopper: Stopper, capsys: pytest.CaptureFixture[str], part: Any
) -> None:
    cfg = planted(tmp_path, "trainer.max_steps=20")
    (last,) = stopped_at(cfg, stopper, 11).checkpoints.iterdir()
    torch.save(torch.load(last, weights_only=True) | {"autolora": part}, last)
    assert run_one(cfg).status == "complete"
    assert f"{last} is damaged (" in capsys.readouterr().out


@pytest.mark.parametrize("version", [None, 0, FORMAT + 1])
def test_another_format_is_refused(tmp_path: Path, stopper: Stopper, version: int | None) -> None:
    cfg = planted(tmp_path, "trainer.max_steps=20")
    (last,) = stopped_at(cfg, stopper, 11).checkpoints.iterdir()
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["autolora"]["format"] = version
    torch.save(checkpoint, last)
    with pytest.raises(CheckpointError, match=rf"of format {FORMAT}, got {version}: .*again with force=true"):
        run_one(cfg)
    assert run_one(cfg.model_copy(update={"force": True})).status == "complete"


@pytest.mark.parametrize(("damage", "lost"), [("gone", 5), ("cut", 3), ("torn", 3), ("other", 5), ("binary", 5)])
def test_lost_rows_of_history_are_said_and_do_not_stop_a_run(
    tmp_path: Path, stopper: Stopper, capsys: pytest.CaptureFixture[str], damage: str, lost: int
) -> None:
    cfg = planted(tmp_path, "trainer.max_steps=20", "trainer.log_every_n_steps=2")
    files = stopped_at(cfg, stopper, 9)
    lines = files.history.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 5  # after steps 1, 2, 4, 6 and 8
    if damage == "gone":
        files.history.unlink()
    else:
        content = {"cut": "".join(lines[:3]), "torn": "".join(lines[:4])[:-3], "other": "a,b\n1,2\n", "binary": "x"}
        files.history.write_bytes(b"\xff\xfe" if damage == "binary" else content[damage].encode())
    capsys.readouterr()
    assert run_one(cfg).status == "complete"
    assert f"{files.history}: {lost} of 5 rows from before the checkpoint are lost\n" in capsys.readouterr().out
    whole = cfg.model_copy(update={"run_root": tmp_path / "whole"})
    run_one(whole)
    broken, unbroken = outcome(cfg), outcome(whole)
    (expected,), (kept,) = unbroken.pop("histories"), broken.pop("histories")
    assert kept == expected[: 5 - lost] + expected[5:]
    assert broken == unbroken


def test_without_a_readable_checkpoint_it_starts_again(
    tmp_path: Path, stopper: Stopper, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = planted(tmp_path, "trainer.max_steps=20")
    files = stopped_at(cfg, stopper, 11)
    for path in list(files.checkpoints.iterdir()):
        path.write_bytes(path.read_bytes()[:100])
    capsys.readouterr()
    assert run_one(cfg).seconds.earlier == 0
    assert (
        f"an earlier attempt left no checkpoint to go on from; starting again in {files.path}"
        in capsys.readouterr().out
    )


def test_damaged_checkpoints_do_not_crowd_out_new_ones(
    tmp_path: Path, stopper: Stopper, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = planted(tmp_path, "trainer.max_steps=20", "trainer.checkpoint_every_n_steps=3")
    files = stopped_at(cfg, stopper, 17)
    for path in list(files.checkpoints.iterdir()):
        path.write_bytes(path.read_bytes()[:100])
    stopped_at(cfg, stopper, 8)
    assert "at step 8; the same command goes on from step-00000008.ckpt" in capsys.readouterr().out
    assert sorted(path.name for path in files.checkpoints.glob("*.ckpt")) == [
        "step-00000006.ckpt",
        "step-00000008.ckpt",
    ]
    assert run_one(cfg).status == "complete"
    assert "resuming at step 8 of 20" in capsys.readouterr().out
    assert b"\r" not in files.history.read_bytes()
    assert not files.checkpoints.exists()


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [None, *range(pickle.HIGHEST_PROTOCOL + 1)])
def test_a_checkpoint_that_carries_code_is_refused_and_not_run(
    tmp_path: Path, stopper: Stopper, protocol: int | None
) -> None:
    """In an archive, as torch makes them, or as a bare pickle of any protocol."""
    cfg = planted(tmp_path, "trainer.max_steps=20")
    files = stopped_at(cfg, stopper, 11)
    (last,) = files.checkpoints.iterdir()
    if protocol is None:
        torch.save(torch.load(last, weights_only=True) | {"extra": Payload(tmp_path / "run")}, last)
    else:
        last.write_bytes(pickle.dumps(Payload(tmp_path / "run"), protocol))
    refused = r"step-00000011\.ckpt carries code or objects, and is refused: .* start again with force=true\nsee "
    with pytest.raises(CheckpointError, match=refused):
        run_one(cfg)
    assert not (tmp_path / "run").exists()
    assert last.exists()
    run_one(cfg.model_copy(update={"force": True}))
    assert files.is_complete()


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path, stopper: Stopper) -> None:
    cfg = planted(tmp_path, "trainer.max_steps=20")
    files = stopped_at(cfg, stopper, 11)
    other = planted(tmp_path, "trainer.max_steps=20", "seed=1", f"run_root={tmp_path / 'other'}")
    copied = stopped_at(other, stopper, 3)
    shutil.copy(next(files.checkpoints.iterdir()), copied.checkpoints)
    with pytest.raises(CheckpointError, match=r"00011\.ckpt is of another configuration or other data"):
        run_one(other)


def test_force_begins_afresh(tmp_path: Path, stopper: Stopper, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = planted(tmp_path, "trainer.max_steps=20")
    stopped_at(cfg, stopper, 11)
    assert run_one(cfg.model_copy(update={"force": True})).seconds.earlier == 0
    assert "resuming" not in capsys.readouterr().out


def test_a_second_process_on_a_run_says_who_holds_it(tmp_path: Path, stopper: Stopper) -> None:
    cfg = planted(tmp_path, "trainer.max_steps=20")
    files = stopped_at(cfg, stopper, 5)
    code = "import sys; from pathlib import Path; from autolora.locking import exclusive\n"
    code += "with exclusive(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(files.path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(BusyError, match=rf"process {holder.pid} on {socket.gethostname()} is working here"):
        run_one(cfg)
    assert files.read_result().status == "interrupted"
    holder.kill()
    holder.communicate()
    assert run_one(cfg).status == "complete"


def test_a_resumed_run_is_one_run_for_wandb(tmp_path: Path, stopper: Stopper) -> None:
    cfg = planted(tmp_path, "trainer.max_steps=12", "logger=wandb")
    files = stopped_at(cfg, stopper, 5)
    run_one(cfg)
    parts = [path.name for path in files.wandb.glob("offline-run-*/run-*.wandb")]
    assert len(parts) == 2
    assert len(set(parts)) == 1


# A disk that fills ---------------------------------------------------------------------------------------------------


def assert_nothing_half_written(files: RunDirectory) -> None:
    """Every file that is there under its own name can be read, and no other is there."""
    assert list(files.path.rglob(".*.tmp")) == []
    assert not files.result.exists() or files.read_result().status == "failed"
    if files.history.exists():
        text = files.history.read_text()
        assert text == "" or text.endswith("\n")
        assert len({line.count(",") for line in text.splitlines()}) <= 1
    if files.ranks.exists():
        json.loads(files.ranks.read_text())
    if files.predictions.exists():
        assert len(files.predictions.read_text().splitlines()) == 1 + 64
    for path in files.path.rglob("*.safetensors"):
        load_file(path)
    for path in files.checkpoints.glob("*.ckpt"):
        read(path)


def test_every_file_may_find_the_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file after the other cannot be written; the same command then goes on, at last to the same end."""
    steps = ("trainer.max_steps=9", "trainer.checkpoint_every_n_steps=4", "trainer.log_every_n_steps=2")
    cfg = planted(tmp_path, *steps)
    fsync = os.fsync
    for name in (
        "config.yaml", "history.csv", "step-00000004.ckpt", "step-00000008.ckpt", "step-00000009.ckpt", "ranks.json",
        "predictions.csv", "result.json",
    ):  # fmt: skip

        def full(descriptor: int, name: str = name) -> None:
            if list(cfg.run_root.rglob(f".{name}.*.tmp")):
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(
            DiskFullError, match=rf"{name}: could not be written \(No space left.*free space and repeat"
        ):
            run_one(cfg)
        assert_nothing_half_written(directory_in(cfg.run_root))
    monkeypatch.undo()
    run_one(cfg)
    other = cfg.model_copy(update={"run_root": tmp_path / "other"})
    run_one(other)
    assert outcome(cfg) == outcome(other)


def test_a_row_of_history_that_does_not_fit_leaves_no_part(tmp_path: Path) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 5:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(bytes(data)[:4])

    with Full(tmp_path / "history.csv", "w") as file:
        append(file, "a,b\n")
        with pytest.raises(DiskFullError, match=r"history\.csv: could not be written"):
            append(file, "1,2345678\n")
    assert (tmp_path / "history.csv").read_text() == "a,b\n"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no mount command: {error}")
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_real_disk_that_is_full(small_disk: Path, tmp_path: Path) -> None:
    """More and more room, from none to enough: each time one clear error, or the end."""
    steps = ("trainer.max_steps=9", "trainer.checkpoint_every_n_steps=2", "trainer.log_every_n_steps=1")
    cfg = planted(tmp_path, *steps, f"run_root={small_disk / 'runs'}")
    failed = set()
    for room in (*range(0, 64, 8), 96, 128, 256):
        ballast = small_disk / "ballast"
        free = shutil.disk_usage(small_disk).free + (ballast.stat().st_size if ballast.exists() else 0)
        with ballast.open("wb") as file:
            file.write(b"x" * max(0, free - 1024 * room))
        try:
            run_one(cfg)
        except DiskFullError as error:
            failed.add(Path(str(error).partition(":")[0]).suffix)
            if cfg.run_root.exists():
                assert_nothing_half_written(directory_in(cfg.run_root))
            continue
        break
    assert len(failed) >= 2
    other = cfg.model_copy(update={"run_root": tmp_path / "other"})
    run_one(other)
    assert outcome(cfg) == outcome(other)
