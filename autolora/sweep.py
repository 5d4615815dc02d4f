"""Many runs as one: what became of every cell, how far they are, and at the end what failed, and the report.

A sweep keeps a folder, ``RUN_ROOT/sweeps/NAME-DIGEST``, with a file for each of its cells. Hydra's launcher decides in
which process a cell runs, on this machine or another, and however that process ends, these files tell the others. The
same command finds the same folder: cells that are complete are not run again, and the others go on.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from autolora.compose import Grid
from autolora.errors import AutoLoRAError, ConfigError, DataError
from autolora.files import read_json, write_json_atomic, writing
from autolora.results import RunDirectory
from autolora.signals import STOPPING, Interrupted, requeue

if TYPE_CHECKING:
    from omegaconf import DictConfig

_POLL_SECONDS = 1.0


class Cell(BaseModel):
    """What is known of one cell: the content of ``cells/NUMBER.json``.

    ``began`` is in seconds since 1970; ``trained`` says that the run was not complete already; ``error`` is a message
    that tells the user what to do, or a traceback; ``code`` what the sweep exits with because of it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    number: int
    overrides: tuple[str, ...]
    status: Literal["running", "complete", "failed", "interrupted"] = "running"
    began: float
    process: tuple[str, int]
    run: Path | None = None
    trained: bool = False
    error: str | None = None
    code: int = 0

    @property
    def name(self) -> str:
        """The cell as it could be typed."""
        return " ".join(override.removeprefix("++") for override in self.overrides) or "(no overrides)"


@dataclass(frozen=True)
class Sweep:
    """A sweep under way.

    Args:
        grid: what was asked for.
        owner: host and process that the user has started.
        began: when, in seconds since 1970.
    """

    grid: Grid
    owner: tuple[str, int] = field(default_factory=lambda: _this_process())
    began: float = field(default_factory=time.time)

    @property
    def path(self) -> Path:
        """Its folder; absolute, for the sake of processes that begin elsewhere."""
        return (self.grid.run_root / "sweeps" / f"{self.grid.name}-{self.grid.digest}").absolute()

    @property
    def report(self) -> Path:
        """Where the report goes."""
        return self.path / "report"

    @property
    def _stop(self) -> Path:
        """A file that is there when no further cell is to begin; it holds the signal that said so."""
        return self.path / "stop"

    # The process that the user has started --------------------------------------------------------------------------

    def carry_out(self, launch: Callable[[], None]) -> int:
        """Let Hydra launch the cells, and conclude.

        Args:
            launch: returns when every cell has ended; each goes through :meth:`run_cell`.

        Returns:
            The exit code: 0 if all are complete, 1 if one failed, 2 if its configuration was wrong, 128 + the signal if
            one has asked to stop.
        """
        with writing(self.path):
            (self.path / "cells").mkdir(parents=True, exist_ok=True)
        self._stop.unlink(missing_ok=True)
        broken = None
        with self._watched():
            try:
                launch()
            except Exception:  # a worker that was killed, a queue that is not there
                broken = traceback.format_exc()
        return self._conclude(broken)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Inside this context cells of other processes are told of, and signals reach them."""
        if self.grid.local:
            yield
            return
        over = threading.Event()
        before = {signum: signal.signal(signum, self._pass_on) for signum in STOPPING}
        watch = threading.Thread(target=self._watch, args=(over,), daemon=True)
        watch.start()
        try:
            yield
        finally:
            over.set()
            watch.join()
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _watch(self, over: threading.Event) -> None:
        ended = 0
        while not over.wait(_POLL_SECONDS):
            now = len(self._ended(self.cells()))
            if now != ended:
                print(self.progress(), flush=True)
            ended = now

    def _pass_on(self, signum: int, frame: FrameType | None) -> None:
        """Stop the cells that run on this machine, each after its step, and begin no other; a second one stops us."""
        for one in STOPPING:
            signal.signal(one, signal.default_int_handler if one == signal.SIGINT else signal.SIG_DFL)
        self._stop.write_text(str(signum), encoding="ascii")
        for cell in self.cells():
            if cell.status == "running" and cell.began >= self.began and cell.process[0] == self.owner[0]:
                with suppress(ProcessLookupError):
                    os.kill(cell.process[1], signum)

    def _conclude(self, broken: str | None) -> int:
        cells = self.cells()
        failed = [cell for cell in self._ended(cells) if cell.status == "failed"]
        complete = [cell for cell in cells if cell.status == "complete"]
        code = max((cell.code for cell in failed), default=0)
        print(f"\n{self._counts(cells)}")
        if complete:
            code = max(code, self._write_report(complete))
        for cell in failed:
            print(f"failed: {cell.name}", *_last_words(cell), sep="\n  ", file=sys.stderr)
        if broken is not None:
            print(broken, end="", file=sys.stderr)
            code = max(code, 1)
        stopped_by = self._stopped_by()
        if stopped_by is not None:
            print(f"interrupted by {signal.Signals(stopped_by).name}; the same command goes on")
            code = 128 + stopped_by
        elif failed or broken is not None:
            print("the same command tries again what is not complete", file=sys.stderr)
        return code

    def _write_report(self, complete: list[Cell]) -> int:
        from autolora.reporting.report import write_report
        from autolora.reporting.runs import read_runs

        runs = [cell.run for cell in complete if cell.run is not None]
        try:
            write_report(read_runs(runs, str(self.path)), self.report, title=self.grid.name.replace("_", " "))
        except AutoLoRAError as error:
            print(f"error: no report: {error}", file=sys.stderr)
            return 1
        print(f"report: {self.report / 'index.html'}")
        return 0

    # The process that runs a cell -----------------------------------------------------------------------------------

    def run_cell(self, cfg: DictConfig, run: Callable[[DictConfig], RunDirectory]) -> None:
        """Run the cell that Hydra is at, and write down what became of it; errors end the cell and not the sweep.

        Args:
            cfg: its configuration.
            run: runs it.
        """
        from hydra.core.hydra_config import HydraConfig

        ours = _this_process() == self.owner
        if not ours:
            _follow_parent(self.owner[1])
        if self._stopped_by() is not None:
            return
        hydra = HydraConfig.get()
        overrides = tuple(hydra.overrides.task)
        cell = Cell(number=hydra.job.num, overrides=overrides, began=time.time(), process=_this_process())
        self._write(cell)
        stop = None
        try:
            with _arguments(overrides):
                directory = run(cfg)
        except Interrupted as interrupted:
            stop = interrupted
            outcome: dict[str, Any] = {"status": "interrupted"}
            if ours:
                self._stop.write_text(str(stop.signum), encoding="ascii")
        except Exception as error:
            outcome = {"status": "failed", "error": _told(error), "code": 2 if isinstance(error, ConfigError) else 1}
            print(f"error: {outcome['error']}", file=sys.stderr)
        else:
            trained = directory.result.stat().st_mtime >= cell.began
            outcome = {"status": "complete", "run": directory.path.absolute(), "trained": trained}
        self._write(cell.model_copy(update=outcome))
        if stop is not None:
            requeue(stop)
            if _gone(self.owner):  # nobody reads what a worker returns, and it would wait for ever
                os._exit(stop.exit_code)
        elif ours and self._left(self.cells()) != 0:
            print(self.progress(), flush=True)

    # Both -----------------------------------------------------------------------------------------------------------

    def cells(self) -> list[Cell]:
        """What is known of the cells that have begun, now or when the command was given before."""
        found = []
        for file in sorted((self.path / "cells").glob("*.json")):
            with suppress(DataError, ValidationError):
                found.append(Cell.model_validate(read_json(file, f"{file} is gone")))
        return found

    def progress(self) -> str:
        """One line: cells that are done, failed and left, and when the sweep should end."""
        cells = self.cells()
        line = self._counts(cells)
        left, trained = self._left(cells), sum(cell.trained for cell in self._ended(cells))
        if not left or not trained:
            return line
        seconds = (time.time() - self.began) * left / trained
        clock = time.strftime("%a %H:%M" if seconds > 12 * 3600 else "%H:%M", time.localtime(time.time() + seconds))
        return f"{line}, about {_duration(seconds)} more, until {clock}"

    def _counts(self, cells: list[Cell]) -> str:
        done = sum(cell.status == "complete" for cell in cells)
        failed = sum(cell.status == "failed" for cell in self._ended(cells))
        left = self._left(cells)
        of = "" if self.grid.cells is None else f" of {self.grid.cells}"
        name = "sweep" if self.grid.name == "sweep" else f"sweep {self.grid.name}"
        return f"{name}: {done}{of} done, {failed} failed" + ("" if left is None else f", {left} left")

    def _left(self, cells: list[Cell]) -> int | None:
        """Cells that are still to end: what failed or was interrupted before is tried again."""
        if self.grid.cells is None:
            return None
        ended = self._ended(cells)
        return self.grid.cells - sum(cell.status == "complete" or cell in ended for cell in cells)

    def _ended(self, cells: list[Cell]) -> list[Cell]:
        """The cells that have come to an end since the command was given."""
        return [cell for cell in cells if cell.began >= self.began and cell.status in ("complete", "failed")]

    def _stopped_by(self) -> int | None:
        try:
            return int(self._stop.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None

    def _write(self, cell: Cell) -> None:
        write_json_atomic(self.path / "cells" / f"{cell.number:05d}.json", cell.model_dump(mode="json"))


def _this_process() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


def _gone(process: tuple[str, int]) -> bool:
    """Whether a process of this machine has ended."""
    host, number = process
    if host != socket.gethostname():
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _follow_parent(parent: int) -> None:
    """In a worker that ``parent`` has started: leave the terminal's signals to it, and stop when it is gone."""
    if os.getppid() != parent or os.getpgrp() == os.getpid():  # on another machine, or done already
        return
    os.setpgid(0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _arguments(overrides: tuple[str, ...]) -> Iterator[None]:
    """Inside this context the command line is that of the cell: Lightning starts its other processes with it."""
    before, sys.argv = sys.argv, [sys.argv[0], *overrides]
    try:
        yield
    finally:
        sys.argv = before


def _told(error: Exception) -> str:
    """The message of an error that is the user's to mend, the traceback of any other."""
    if isinstance(error, AutoLoRAError):
        return "\n".join([str(error), *getattr(error, "__notes__", ())])
    return "".join(traceback.format_exception(error)).rstrip()


def _last_words(cell: Cell) -> list[str]:
    """The end of an error: of a traceback what was raised, and what was noted on it."""
    lines = (cell.error or "").splitlines()
    raised = [i for i, line in enumerate(lines) if line and not line.startswith((" ", "Traceback"))]
    return lines[next((i for i in raised if i), 0) :] if lines and lines[0].startswith("Traceback") else lines


def _duration(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
