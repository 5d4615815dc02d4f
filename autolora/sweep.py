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
from typing import TYPE_CHECKING, Any

from autolora.cells import FOLDER, Cell, cell_file, gone, read_cell, read_cells, write_size
from autolora.compose import Grid
from autolora.errors import AutoLoRAError, ConfigError
from autolora.files import write_json_atomic, writing
from autolora.locking import exclusive
from autolora.results import RunDirectory
from autolora.signals import STOPPING, Interrupted, Signals, requeue

if TYPE_CHECKING:
    from omegaconf import DictConfig

IN_CELL = "AUTOLORA_IN_CELL"
"""Set in the environment of the processes of one cell: one that fails must not have Lightning kill the whole sweep."""
_POLL_SECONDS = 1.0


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
        """Its folder."""
        return self.grid.run_root / "sweeps" / f"{self.grid.name}-{self.grid.digest}"

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
            The exit code: 0 if all are complete, 1 if one failed or was stopped, 2 if its configuration was wrong,
            128 + the signal if one has asked the sweep to stop.

        Raises:
            BusyError: if another process carries out the same sweep.
        """
        with writing(self.path):
            (self.path / FOLDER).mkdir(parents=True, exist_ok=True)
        with exclusive(self.path):
            return self._carry_out(launch)

    def _carry_out(self, launch: Callable[[], None]) -> int:
        with writing(self.path):
            write_size(self.path, self.grid.cells)
        self._stop.unlink(missing_ok=True)
        for cell in self.cells():
            if self.grid.force or cell.run is None or not RunDirectory(cell.run).result.exists():
                cell_file(self.path, cell.number).unlink()
        broken = None
        with self._watched():
            try:
                launch()
            except Exception:  # a worker that was killed, a queue that is not there
                broken = traceback.format_exc()
                while any(self._runs_here(cell) for cell in self.cells()):  # submitit leaves its other jobs alone
                    time.sleep(_POLL_SECONDS)
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
            cells = self.cells()
            now = len(self._ended(cells))
            if now != ended:
                print(self.progress(cells), flush=True)
            ended = now

    def _pass_on(self, signum: int, frame: FrameType | None) -> None:
        """Stop the cells that run on this machine, each after its step, and begin no other; a second one stops us."""
        for one in STOPPING:
            signal.signal(one, signal.default_int_handler if one == signal.SIGINT else signal.SIG_DFL)
        self._stop.write_text(str(signum), encoding="ascii")
        for cell in self.cells():
            if self._runs_here(cell):
                with suppress(ProcessLookupError):  # SIGINT, since submitit has its jobs pass over SIGTERM
                    os.kill(cell.process[1], signal.SIGINT)

    def _conclude(self, broken: str | None) -> int:
        cells = self.cells()
        failed = [cell for cell in self._ended(cells) if cell.status == "failed"]
        stopped = [cell for cell in cells if cell.began >= self.began and cell.status in ("running", "interrupted")]
        print(f"\n{self._counts(cells)}")
        code = max((cell.code for cell in failed), default=0)
        if any(cell.status == "complete" for cell in cells):
            code = max(code, self._write_report())
        for cell in failed:
            print(f"failed: {cell.name}", *cell.last_words, sep="\n  ", file=sys.stderr)
        for cell in stopped:
            print(f"{'killed' if cell.status == 'running' else 'interrupted'}: {cell.name}", file=sys.stderr)
        if broken is not None:
            print(broken, end="", file=sys.stderr)
        stopped_by = self._stopped_by()
        if stopped_by is not None:
            print(f"interrupted by {signal.Signals(stopped_by).name}; the same command goes on")
            return 128 + stopped_by
        if failed or stopped or broken is not None or self._left(cells):
            print("the same command goes on with what is not complete", file=sys.stderr)
            return max(code, 1)
        return code

    def _write_report(self) -> int:
        from autolora.reporting.report import write_report
        from autolora.reporting.runs import load_runs

        try:
            write_report(load_runs([self.path]), self.report, title=self.grid.name.replace("_", " "))
        except Exception as error:  # the runs are there, whatever is wrong with the report
            print(f"error: no report: {_told(error)}", file=sys.stderr)
            return 1
        print(f"report: {self.report / 'index.html'}")
        return 0

    # The process that runs a cell -----------------------------------------------------------------------------------

    def run_cell(self, cfg: DictConfig, run: Callable[[DictConfig, Signals], RunDirectory]) -> None:
        """Run the cell that Hydra is at, and write down what became of it; errors end the cell and not the sweep.

        Args:
            cfg: its configuration.
            run: runs it, and answers signals.
        """
        from hydra.core.hydra_config import HydraConfig

        ours = _this_process() == self.owner
        if not ours:
            _follow_parent(self.owner[1])
        hydra = HydraConfig.get()
        overrides = tuple(hydra.overrides.task)
        stop: Interrupted | None = None
        with Signals(quiet=True) as signals:
            cell = Cell(number=hydra.job.num, overrides=overrides, began=time.time(), process=_this_process())
            before = read_cell(self.path, cell.number)
            self._write(cell)
            if self._stopped_by() is not None:  # asked for after it is known that this cell runs
                cell_file(self.path, cell.number).unlink() if before is None else self._write(before)
                return
            try:
                with self._as_one_run(overrides):
                    directory = run(cfg, signals)
            except Interrupted as interrupted:
                stop = interrupted
                outcome: dict[str, Any] = {"status": "interrupted"}
            except Exception as error:
                outcome = {
                    "status": "failed",
                    "error": _told(error),
                    "code": 2 if isinstance(error, ConfigError) else 1,
                }
                print(f"error: {outcome['error']}", file=sys.stderr)
            else:
                trained = directory.result.stat().st_mtime >= cell.began
                outcome = {"status": "complete", "run": directory.path.absolute(), "trained": trained}
            self._write(cell.model_copy(update=outcome))
            if stop is None and signals.received is not None:  # too late for this cell
                stop = Interrupted(signals.received)
        if stop is not None:
            if ours:
                self._stop.write_text(str(stop.signum), encoding="ascii")
            requeue(stop)
            if gone(self.owner):  # nobody reads what a worker returns, and it would wait for ever
                os._exit(stop.exit_code)
        elif ours and outcome.get("trained", True):
            cells = self.cells()
            if self._left(cells) != 0:
                print(self.progress(cells), flush=True)

    @contextmanager
    def _as_one_run(self, overrides: tuple[str, ...]) -> Iterator[None]:
        """Inside this context the command line is that of the cell, with which Lightning starts other processes."""
        before, sys.argv = sys.argv, [sys.argv[0], *self.grid.flags, *overrides, "hydra.mode=RUN"]
        os.environ[IN_CELL] = "1"
        try:
            yield
        finally:
            sys.argv = before
            del os.environ[IN_CELL]

    # Both -----------------------------------------------------------------------------------------------------------

    def cells(self) -> list[Cell]:
        """What is known of the cells that have begun, now or when the command was given before."""
        return read_cells(self.path)

    def progress(self, cells: list[Cell]) -> str:
        """One line: cells that are done, failed and left, and when the sweep should end."""
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

    def _runs_here(self, cell: Cell) -> bool:
        """Whether a cell is running in another process of this machine."""
        elsewhere = cell.process[0] != self.owner[0] or cell.process == self.owner
        return cell.status == "running" and cell.began >= self.began and not elsewhere and not gone(cell.process)

    def _write(self, cell: Cell) -> None:
        write_json_atomic(cell_file(self.path, cell.number), cell.model_dump(mode="json"))


def _this_process() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


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


def _told(error: Exception) -> str:
    """The message of an error that is the user's to mend, the traceback of any other."""
    if isinstance(error, AutoLoRAError):
        return "\n".join([str(error), *getattr(error, "__notes__", ())])
    return "".join(traceback.format_exception(error)).rstrip()


def _duration(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
