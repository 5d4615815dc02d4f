"""``suite=comparison``: what comparing costs beside the training: the report, a cell of a sweep, the evaluation on dev.

A sweep of a few short cells on embedded data runs in one process, as the user would type it. What a cell takes outside
its training, selection and evaluation is its fixed cost; the first one, which pays for the imports, does not count. Its
run directory is then copied many times, under other names and with other predictions, for ``autolora.report`` to read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from autolora.bench.measure import Interval, median_interval
from autolora.bench.report import Part, Row
from autolora.bench.runs import PRECISIONS, RunFailedError
from autolora.bench.settings import ComparisonSettings
from autolora.cells import Cell
from autolora.results import RunDirectory, RunResult

_STRATEGIES, _TASKS = 10, 5
_WRONG = 0.2


def comparison_suite(settings: ComparisonSettings) -> Iterator[Row]:
    """Measure what the settings ask for.

    Raises:
        RunFailedError: if the sweep or the report fails.
    """
    with tempfile.TemporaryDirectory(prefix="autolora-bench-") as scratch:
        many = Path(scratch) / "many"
        for precision in settings.precision:
            root = Path(scratch) / precision
            _run(["autolora.train", *_overrides(settings, precision), f"run_root={root}"])
            cells = list(_cells(root))[1:]
            results = [result for _, result in cells]
            yield _row("cell", "fixed cost of a cell", [_fixed(*cell) for cell in cells], precision)
            runs = [RunDirectory(folder) for folder in sorted(root.glob("*-*"))]
            rows = len(pd.read_csv(runs[0].predictions, usecols=["id"]))
            speeds = [rows / result.seconds.evaluate for result in results]
            ratios = [speed / result.examples_per_second for speed, result in zip(speeds, results, strict=True)]
            yield _row("dev", "rows of dev a second", speeds, precision, training=median_interval(ratios))
        copy_runs(runs[0], many, settings.runs, settings.seed)
        seconds, peak = _run(["autolora.report", f"runs={many}", f"out={scratch}/report"])
        yield _row("report", f"report over {settings.runs:,} runs", [seconds])
        yield _row("report-memory", f"report over {settings.runs:,} runs", [peak])


def copy_runs(source: RunDirectory, root: Path, count: int, seed: int) -> None:
    """Run directories like one, of ten strategies on five tasks, each with predictions and a score of its own."""
    result = source.read_result()
    config = yaml.safe_load(source.config.read_text(encoding="utf-8"))
    history = source.history.read_bytes()
    predictions = pd.read_csv(source.predictions)
    dev = (predictions["split"] == "dev").to_numpy()
    labels = predictions["label"].to_numpy()
    rng = np.random.default_rng(seed)
    for i in range(count):
        strategy, task = f"strategy{i % _STRATEGIES}", f"task{i // _STRATEGIES % _TASKS}"
        own = i // (_STRATEGIES * _TASKS)
        wrong = rng.random(len(labels)) < _WRONG
        predictions["prediction"] = np.where(wrong, labels + 1, labels)
        score = float((~wrong[dev]).mean())
        metrics = result.metrics.model_copy(update={"primary": "accuracy", "value": score, "all": {"accuracy": score}})
        told = {"strategy": strategy, "task": task, "seed": own, "config_hash": str(i), "metrics": metrics}
        directory = RunDirectory(root / f"{task}-{strategy}-{own}")
        directory.path.mkdir(parents=True)
        config |= {"seed": own, "strategy": {"name": strategy}, "task": {"name": task}}
        directory.config.write_text(yaml.safe_dump(config), encoding="utf-8")
        directory.history.write_bytes(history)
        predictions.to_csv(directory.predictions, index=False)
        directory.write_result(RunResult.model_validate(result.model_dump(by_alias=True) | told))


def _overrides(settings: ComparisonSettings, precision: str) -> list[str]:
    backbone = {key: value for key, value in settings.backbone.weights.items() if value is not None}
    return [
        "-m",
        f"seed={','.join(map(str, range(settings.cells)))}",
        "strategy=uniform",
        f"task={settings.task}",
        "data.source=mini",
        f"backbone={backbone.pop('name')}",
        *(f"backbone.{key}={value}" for key, value in backbone.items()),
        f"trainer.max_steps={settings.steps}",
        f"trainer.precision={PRECISIONS[precision]}",
        "trainer.enable_progress_bar=false",
    ]


def _cells(root: Path) -> Iterator[tuple[float, RunResult]]:
    """Seconds and result of every cell, in the order of the sweep."""
    for file in sorted(root.glob("sweeps/*/cells/*.json")):
        cell = Cell.model_validate(json.loads(file.read_text(encoding="utf-8")))
        assert cell.run is not None
        yield file.stat().st_mtime - cell.began, RunDirectory(cell.run).read_result()


def _fixed(seconds: float, result: RunResult) -> float:
    """What is left of the seconds of a cell beside its training, selection and evaluation."""
    return seconds - result.seconds.fit - result.seconds.select - result.seconds.evaluate


def _run(arguments: list[str]) -> tuple[float, float]:
    """Run a command to its end; gives its seconds and the most memory it had resident, in bytes.

    Raises:
        RunFailedError: if it fails.
    """
    with tempfile.TemporaryFile("w+") as said:
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            tail = "".join(said.readlines()[-15:])
            raise RunFailedError(f"python -m {' '.join(arguments)}\nended with {process.returncode}:\n{tail}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _row(part: Part, name: str, values: list[float], precision: str | None = None, **ratios: Interval) -> Row:
    value = median_interval(values)
    return Row(part=part, name=name, precision=precision, rounds=len(values), value=value, ratios=ratios)
