"""The content of ``bench.json``. No torch."""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autolora import results
from autolora.bench.measure import Interval
from autolora.errors import DataError
from autolora.files import write_json_atomic

SCHEMA = 1
Part = Literal[
    "train", "evaluate", "memory", "overhead", "once", "run", "bookkeeping", "cell", "dev", "report",
    "report-memory",
]  # fmt: skip
_ALSO = ("peft", "accelerate")  # packages beside those that a run's result names


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Row(_Record):
    """What was measured of one contender.

    Args:
        part: of the benchmark: a training step, a forward pass, peak memory, what adapters add to a forward pass, what
            happens once, a whole run, a cell of a sweep, evaluation, or the report.
        name: of the contender.
        shape: ``ROWSxTOKENS``, where there are batches.
        precision: of the products, where there are any.
        rounds: that were counted.
        value: milliseconds (train, evaluate, overhead, once, bookkeeping), bytes (memory), seconds (run, cell, report)
            or rows a second (dev): the median and its 95 % interval.
        ratios: of its time or memory to those of others, by what they are to it: ``peft``, ``adalora``, ``limit``,
            ``bare``, ``usual``, ``best``. Medians of the ratios in one round, which is why they differ a little from
            the ratios of the medians. Bookkeeping has its share of a whole ``step``, and its ``growth``: time for one
            module among many over that for one among few; evaluation its speed over that of ``training``; overhead what
            was ``predicted`` of it over itself.
        parts: medians of seconds of the parts of a run.
        imports: seconds of the imports of one run, in all and by package, under ``python -X importtime``.
        metric: that a run ended with.
    """

    part: Part
    name: str
    shape: str | None = None
    precision: str | None = None
    rounds: int
    value: Interval
    ratios: dict[str, Interval] = Field(default_factory=dict)
    parts: dict[str, float] = Field(default_factory=dict)
    imports: dict[str, float] = Field(default_factory=dict)
    metric: float | None = None


class Suite(_Record):
    """One measurement: what was asked for, where and when, and what came out."""

    settings: dict[str, Any]
    machine: dict[str, Any]
    rows: tuple[Row, ...]


class Report(_Record):
    """The content of ``bench.json``: the last measurement of each suite, by its name."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    suites: dict[str, Suite]


def machine(gpu: str | None, threads: int | None) -> dict[str, Any]:
    """Everything about this place and time that a number depends on.

    Args:
        gpu: name of the accelerator, if one is used.
        threads: that torch uses, as far as it is known.
    """
    versions = results.versions() | {name: importlib.metadata.version(name) for name in _ALSO}
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions,
        "hardware": results.hardware(gpu),
        "threads": threads,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "load_average_before": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "git": results.git_state().model_dump(),
    }


def write_report(path: Path, name: str, suite: Suite) -> None:
    """Write one suite into ``bench.json``, atomically; what the file has of other suites stays.

    Raises:
        DataError: if there is a file that is no report.
    """
    before = read_report(path).suites if path.exists() else {}
    report = Report(suites=before | {name: suite})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, report.model_dump(mode="json", by_alias=True))


def read_report(path: Path) -> Report:
    """Read a ``bench.json``.

    Raises:
        DataError: if it is missing, not JSON, or not of this schema.
    """
    try:
        return Report.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; python -m autolora.bench out={path} writes one") from None
    except (OSError, ValueError) as error:
        what = f"{error.error_count()} faults" if isinstance(error, ValidationError) else error
        raise DataError(f"{path}: expected the bench.json of schema {SCHEMA} ({what}); measure again") from None
