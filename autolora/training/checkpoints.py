"""Checkpoints of a running fit: what is in them, when they are written, and which one to go on from.

A checkpoint is Lightning's own (loops, optimizer, schedule, callbacks), with what training can change in place of the
whole model, the strategy's state, and what Lightning leaves out: the random streams of every process, the position in
the data, the seconds spent, and whose run it is. It is always taken between two optimizer steps, when the next batch is
there and untouched: the step is complete, its validation included, and no gradient is waiting. Only batches that were
trained on count, however far loaders have read ahead.

Files hold tensors, numbers, text, lists and dictionaries alone, and are read with ``weights_only=True``: one that
carries code is refused.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import random
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO

from autolora.errors import CheckpointError
from autolora.files import replacing, writing
from autolora.signals import Interrupted, Signals
from autolora.training.module import AdapterModule

KEPT = 2
FORMAT = 2
_OURS = "autolora"
_OUR_KEYS = {
    "run", "step", "total_steps", "finished", "should_stop", "position", "random", "seconds", "logger",
}  # fmt: skip
_KEYS = {
    _OURS, "state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers", "trainable", "strategy",
    "steps_done", "examples_seen", "heldout_taken", "passes", "peak_trainable",
}  # fmt: skip
_SUFFIX = ".ckpt"
_DAMAGED = ".damaged"
_IMPORTS = ("GLOBAL", "STACK_GLOBAL", "INST")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that can be gone on from.

    Args:
        path: its file.
        step: optimizer steps that were done.
        total_steps: of the run.
        seconds: wall-clock seconds of the parts of the run until then.
        logger: the identifier of the run with its logger.
    """

    path: Path
    step: int
    total_steps: int
    seconds: Mapping[str, float]
    logger: str | None


class _DamagedError(Exception):
    """A file was cut short, or changed, or is no checkpoint of ours."""


# Reading -------------------------------------------------------------------------------------------------------------


def newest(folder: Path, run: str, say: Callable[[str], None]) -> Checkpoint | None:
    """The last checkpoint that can be read; each one that is damaged is said and set aside, so that none counts as
    one of those that are kept.

    Args:
        folder: of the checkpoints.
        run: identity of the run that they have to be of.
        say: tells the user.

    Raises:
        CheckpointError: if one carries code, or is of another run or another format.
        PathError: if one that is damaged cannot be renamed.
    """
    for path in _by_age(folder):
        try:
            ours = _checked(path, run)[_OURS]
        except _DamagedError as error:
            aside = path.with_name(path.name + _DAMAGED)
            say(f"{path} is damaged ({error}): set aside as {aside.name}")
            with writing(path):
                _delete(aside)
                path.rename(aside)
            continue
        return Checkpoint(path, ours["step"], ours["total_steps"], ours["seconds"], ours["logger"])
    return None


def discard(folder: Path) -> None:
    """Delete the checkpoints of a run that is complete, and their folder."""
    for path in (*_by_age(folder), *folder.glob(f"step-*{_SUFFIX}{_DAMAGED}")):
        _delete(path)
    with suppress(OSError):  # something else is in it
        folder.rmdir()


def _by_age(folder: Path) -> list[Path]:
    """The youngest first; the step is in the name."""
    return sorted(folder.glob(f"step-*{_SUFFIX}"), reverse=True)


def _delete(path: Path) -> None:
    """Also where something has put a folder in the place of a file."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _checked(path: Path, run: str) -> dict[str, Any]:
    checkpoint = read(path)
    ours = checkpoint.get(_OURS) if isinstance(checkpoint, dict) else None
    if not isinstance(ours, dict):
        raise _DamagedError("it does not say whose it is")
    if ours.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: expected a checkpoint of format {FORMAT}, got {ours.get('format')}: it is of another version of "
            "this program; start again with force=true"
        )
    missing = sorted((_KEYS - checkpoint.keys()) | (_OUR_KEYS - ours.keys()))
    if missing:
        raise _DamagedError(f"it lacks {', '.join(missing)}")
    if ours["run"] != run:
        raise CheckpointError(
            f"{path} is of another configuration or other data: delete it, or start again with force=true"
        )
    return checkpoint


def read(path: Path) -> dict[str, Any]:
    """Tensors and plain values of a file; no code in it is run.

    Raises:
        CheckpointError: if the file is whole and holds something else.
    """
    refused = (
        f"{path} carries code or objects, and is refused: checkpoints hold tensors and plain values alone; delete it, "
        "or start again with force=true"
    )
    try:
        data = path.read_bytes()
        if _imports(data):  # a bare pickle; a checkpoint is an archive
            raise CheckpointError(refused)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            changed = archive.testzip()  # torch itself does not look at the checksums
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise _DamagedError(str(error)) from None
    if changed is not None:
        raise _DamagedError(f"wrong checksum of {changed}")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(refused) from None
    except RuntimeError as error:
        raise _DamagedError(str(error).splitlines()[0]) from None


def _imports(data: bytes) -> bool:
    """Whether this is a pickle, of any protocol, that would import something; it is not run."""
    try:
        return any([code.name in _IMPORTS for code, _, _ in pickletools.genops(data)])  # to the end: garbage has none
    except Exception:  # whatever the parser of garbage comes upon
        return False


# Random streams ------------------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """The global streams of this process: torch on CPU and CUDA, numpy, Python."""
    name, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, keys.tolist(), *rest],
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the streams back to where :func:`random_state` found them."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    random.setstate(state["python"])


def _of_all_processes(mine: Any) -> list[Any]:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [mine]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, mine)
    return gathered


# Writing -------------------------------------------------------------------------------------------------------------


class SafeFiles(CheckpointIO):
    """How Lightning writes and reads checkpoints here: as a whole or not at all, and without code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write to a file beside ``path`` and put it in its place.

        Raises:
            DiskFullError: if there is no space.
        """
        stream = io.BytesIO()
        torch.save(checkpoint, stream)
        with replacing(Path(path), binary=True) as file:
            file.write(stream.getbuffer())

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        """:func:`read`, whatever Lightning asks for."""
        return read(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a file."""
        Path(path).unlink(missing_ok=True)


class Checkpoints(pl.Callback):
    """Writes checkpoints, stops the fit on a signal after one, and puts back what Lightning does not.

    A checkpoint is written every ``every_steps`` optimizer steps, every ``every_minutes``, when a signal asks to stop,
    and at the end of the fit. The last two are kept. With several processes the first one decides for all.

    Args:
        folder: of the checkpoints.
        run: identity of the run.
        signals: what asks to stop.
        seconds: wall-clock seconds of the parts of the run so far.
        every_steps, every_minutes: never, where ``None``.
    """

    def __init__(
        self,
        folder: Path,
        run: str,
        signals: Signals,
        seconds: Callable[[], Mapping[str, float]],
        *,
        every_steps: int | None,
        every_minutes: float | None,
    ) -> None:
        self.folder, self.run, self.signals, self.seconds = folder, run, signals, seconds
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self._batch = 0
        self._finished = self._should_stop = False
        self._random: Mapping[str, Any] | None = None
        self._step, self._time = 0, time.monotonic()

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Go to the position in the data; the random streams follow right before the first batch."""
        ours = checkpoint[_OURS]
        if len(ours["random"]) != trainer.world_size:
            raise CheckpointError(
                f"the checkpoint is of {len(ours['random'])} processes, and here are {trainer.world_size}: use as many,"
                " or start again with force=true"
            )
        self._random = ours["random"][trainer.global_rank]
        self._step, self._should_stop = ours["step"], ours["finished"] or ours["should_stop"]
        trainer.datamodule.start = ours["position"]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A fit that had come to its end is not trained further."""
        trainer.should_stop = self._should_stop

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """From here on a signal waits for the end of a step."""
        self.signals.deferred = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Signals are ours again: Lightning has put handlers of its own in place, which would not wait."""
        self._time = time.monotonic()
        self.signals.take_over()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps: write what is due, and stop if asked to."""
        assert isinstance(pl_module, AdapterModule)
        self._restore_streams()
        if batch_idx % trainer.accumulate_grad_batches:
            return
        self._batch = batch_idx
        stop, due = self._decide(trainer, pl_module.steps_done)
        if stop or due:
            self._save(trainer, pl_module)
        if stop:
            raise Interrupted(stop)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the outcome, so that what follows can be repeated without training."""
        assert isinstance(pl_module, AdapterModule)
        self._finished = True
        self._save(trainer, pl_module)
        self.signals.deferred = False
        stop, _ = self._decide(trainer, pl_module.steps_done)
        if stop:
            raise Interrupted(stop)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A fit that was only restored has drawn nothing."""
        self._restore_streams()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Signals no longer wait."""
        self.signals.deferred = False

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Add what Lightning leaves out, and count the batch that is there as not begun."""
        assert isinstance(pl_module, AdapterModule)
        checkpoint[_OURS] = {
            "format": FORMAT,
            "run": self.run,
            "step": pl_module.steps_done,
            "total_steps": pl_module.total_steps,
            "finished": self._finished,
            "should_stop": trainer.should_stop,
            "position": (0, 0) if self._finished else (trainer.current_epoch, self._batch),
            "random": _of_all_processes(random_state()),
            "seconds": dict(self.seconds()),
            "logger": str(trainer.logger.version) if trainer.logger is not None else None,
        }
        if not self._finished:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                counts["ready"] = counts["completed"]
            progress["is_last_batch"] = False

    def _decide(self, trainer: pl.Trainer, step: int) -> tuple[int | None, bool]:
        """The signal to stop for, and whether a checkpoint is due: as the first process sees it."""
        minutes = (time.monotonic() - self._time) / 60
        due = self.every_steps is not None and step - self._step >= self.every_steps
        due = due or (self.every_minutes is not None and minutes >= self.every_minutes)
        decision = (self.signals.received, due)
        return decision if trainer.world_size == 1 else trainer.strategy.broadcast(decision)

    def _save(self, trainer: pl.Trainer, module: AdapterModule) -> None:
        """Write a checkpoint, unless this step has one, and delete all but the last two."""
        path = self.folder / f"step-{module.steps_done:08d}{_SUFFIX}"
        self._time = time.monotonic()
        if self._finished or module.steps_done != self._step:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            if trainer.is_global_zero and path.is_dir():
                _delete(path)
            trainer.save_checkpoint(path)
            self._step = module.steps_done
        if trainer.is_global_zero:
            for old in _by_age(self.folder)[KEPT:]:
                _delete(old)

    def _restore_streams(self) -> None:
        if self._random is not None:
            set_random_state(self._random)
            self._random = None
