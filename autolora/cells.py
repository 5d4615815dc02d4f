"""What is known of the cells of a sweep: files in ``RUN_ROOT/sweeps/NAME-DIGEST/cells``, one for each."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from autolora.errors import DataError
from autolora.files import read_json, write_json_atomic

FOLDER = "cells"
_SIZE = "sweep.json"


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

    @property
    def last_words(self) -> list[str]:
        """The end of its error."""
        return last_words(self.error)

    @property
    def state(self) -> str:
        """Its status, or "killed" where it runs no more and could not say so."""
        return "killed" if self.status == "running" and gone(self.process) else self.status


def last_words(error: str | None) -> list[str]:
    """Lines of an error: of a traceback what was raised, and what was noted on it."""
    lines = (error or "").splitlines()
    raised = [i for i, line in enumerate(lines) if line and not line.startswith((" ", "Traceback"))]
    return lines[next((i for i in raised if i), 0) :] if lines and lines[0].startswith("Traceback") else lines


def gone(process: tuple[str, int]) -> bool:
    """Whether a process, given by its host and number, was of this machine and has ended."""
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


def cell_file(sweep: Path, number: int) -> Path:
    """Where a cell of the sweep in a folder is written down."""
    return sweep / FOLDER / f"{number:05d}.json"


def read_cell(sweep: Path, number: int) -> Cell | None:
    """What is known of a cell; a damaged file says nothing."""
    try:
        return Cell.model_validate(read_json(cell_file(sweep, number), ""))
    except (DataError, ValidationError):
        return None


def read_cells(sweep: Path) -> list[Cell]:
    """The cells that have begun, now or when the command was given before."""
    return [cell for number in _begun(sweep) if (cell := read_cell(sweep, number)) is not None]


def damaged_cells(sweep: Path, known: Sequence[Cell]) -> list[Path]:
    """Files that say nothing of the cells that they are of: those of no known cell."""
    numbers = {cell.number for cell in known}
    return [cell_file(sweep, number) for number in _begun(sweep) if number not in numbers]


def _begun(sweep: Path) -> list[int]:
    """Numbers of the cells that have a file."""
    return sorted(int(file.stem) for file in (sweep / FOLDER).glob("[0-9]*.json"))


def write_size(sweep: Path, cells: int | None) -> None:
    """Note how many cells a sweep has, begun or not; ``None`` where nobody knows."""
    write_json_atomic(sweep / _SIZE, {"cells": cells})


def cells_not_begun(sweep: Path) -> tuple[int, int]:
    """How many cells have not begun, and how many there are; 0 of 0 where nobody knows."""
    try:
        size = int(read_json(sweep / _SIZE, "")["cells"])
    except (DataError, TypeError, KeyError, ValueError):
        return 0, 0
    return max(0, size - len(_begun(sweep))), size
