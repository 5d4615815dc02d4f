"""``suite=run``: whole runs from process start to the final metric, each in a process of its own.

Ours are the command that a user would type; the references are PEFT in the Hugging Face Trainer
(:mod:`autolora.bench.hf_trainer`) on the same training rows, the same weights and modules, with the same batch size and
number of epochs. Ours does more in its time: it also scores its held-out rows after each epoch and once more for the
selection, and writes a run directory. Nothing is kept from one run to the next: ours tokenises anew each time, too.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autolora.backbones import locate
from autolora.bench.imports import import_seconds
from autolora.bench.measure import against, median_interval, take_turns
from autolora.bench.report import Row
from autolora.bench.settings import RunSettings
from autolora.compose import compose
from autolora.config import RunConfig
from autolora.errors import AutoLoRAError

RANK = 8
_MOST_IMPORTS = 6
_CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": lambda: sum(os.times()[2:4])}
PRECISIONS = {"auto": "auto", "float32": "32-true", "bf16": "bf16-mixed"}


class RunFailedError(AutoLoRAError):
    """A run that was to be timed failed."""


@dataclass(frozen=True)
class Outcome:
    """The metric that a run ended with, and wall-clock seconds of its parts as far as it says them.

    What the parts lack of the whole is the interpreter, reading the configuration, and what is imported for it.
    """

    metric: float
    parts: dict[str, float]


@dataclass(frozen=True)
class Command:
    """A process to time: its arguments in a fresh folder, or those of two steps, and how to read what it leaves."""

    arguments: Callable[[Path, bool], list[str]]
    outcome: Callable[[Path], Outcome]

    def run(self, folder: Path, *, importtime: bool = False) -> str:
        """Run it to its end, or for two steps with a report of its imports; gives its standard error.

        Raises:
            RunFailedError: if it fails.
        """
        python = [sys.executable, *(["-X", "importtime"] if importtime else []), "-m"]
        arguments = self.arguments(folder, importtime)
        done = subprocess.run([*python, *arguments], capture_output=True, text=True)
        if done.returncode:
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise RunFailedError(f"python -m {' '.join(arguments)}\nended with {done.returncode}:\n{tail}")
        return done.stderr


def run_suite(settings: RunSettings) -> Iterator[Row]:
    """Measure what the settings ask for.

    Raises:
        ConfigError, DataError, BackboneError: if the settings name what is not there.
        RunFailedError: if a run fails.
    """
    with tempfile.TemporaryDirectory(prefix="autolora-bench-") as scratch:
        commands = make_commands(settings, Path(scratch))
        outcomes: dict[str, list[Outcome]] = {name: [] for name in commands}

        def run(name: str) -> None:
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                began = time.perf_counter()
                commands[name].run(Path(folder))
                outcomes[name].append(commands[name].outcome(Path(folder)))
                print(f"  {name}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)

        turns = {name: (lambda name=name: run(name)) for name in commands}
        times = take_turns(
            turns, settings.rounds, warmup=settings.warmup, seed=settings.seed, clock=_CLOCKS[settings.clock]
        )
        imports = {name: _imports(commands[name], scratch) for name in commands} if settings.imports else {}
    for name, seconds in times.items():
        value = median_interval(seconds)
        measured = [outcome.parts for outcome in outcomes[name][settings.warmup :]]
        parts = {part: statistics.median(parts[part] for parts in measured) for part in measured[0]}
        yield Row(
            part="run",
            name=name,
            rounds=len(seconds),
            value=value,
            ratios=against(times, name, {"usual": "peft8-usual", "best": "peft8-best"}),
            parts=parts,
            imports=imports.get(name, {}),
            metric=statistics.median(outcome.metric for outcome in outcomes[name]),
        )


def make_commands(settings: RunSettings, scratch: Path) -> dict[str, Command]:
    """The processes to time, by contender; writes the rows of the references into ``scratch``."""
    overrides = {"uniform8": "uniform", "autolora8": "autolora"}
    configs = {name: [*_overrides(settings), f"strategy={strategy}"] for name, strategy in overrides.items()}
    commands: dict[str, Command] = {}
    for name in settings.chosen():
        if name in configs:
            compose(configs[name])  # faults are said before anything runs
            commands[name] = _ours(configs[name])
        else:
            if not (scratch / "rows.json").exists():
                job = _job(settings, compose(configs["uniform8"]), scratch / "rows.json")
            commands[name] = _reference(job, best=name == "peft8-best")
    return commands


def _overrides(settings: RunSettings) -> list[str]:
    given = settings.data.model_dump(exclude_defaults=True, exclude={"cache_dir"}) | {"source": settings.data.source}
    backbone = {key: value for key, value in settings.backbone.weights.items() if value is not None}
    return [
        f"task={settings.task}",
        f"backbone={backbone.pop('name')}",
        *(f"backbone.{key}={value}" for key, value in backbone.items()),
        *(f"data.{key}={value}" for key, value in given.items()),
        f"budget.rank={RANK}",
        f"trainer.max_epochs={settings.epochs}",
        f"trainer.precision={PRECISIONS[settings.precision]}",
        "trainer.enable_progress_bar=false",
        f"optim.adapter.lr={settings.learning_rate}",
        f"optim.head.lr={settings.learning_rate}",
        f"seed={settings.seed}",
        "logger=csv",
    ]


def _ours(overrides: list[str]) -> Command:
    def arguments(folder: Path, short: bool) -> list[str]:
        places = [f"run_root={folder / 'runs'}", f"data.cache_dir={folder / 'tokens'}"]
        return ["autolora.train", *overrides, *places, *(["trainer.max_steps=2"] if short else [])]

    def outcome(folder: Path) -> Outcome:
        result = json.loads(next(folder.glob("runs/*/result.json")).read_text(encoding="utf-8"))
        seconds: dict[str, float] = result["seconds"]
        named = {part: value for part, value in seconds.items() if part != "total" and value}
        rest = {"imports, data, model": seconds["total"] - sum(named.values())}
        return Outcome(result["metrics"]["all"]["accuracy"], rest | named)

    return Command(arguments, outcome)


def _job(settings: RunSettings, cfg: RunConfig, rows: Path) -> dict[str, Any]:
    """What both references train: the rows that ours fits, and the modules that ours adapts."""
    import torch

    from autolora.bench.model import Subject
    from autolora.parts import make_problem
    from autolora.training.fit import resolve_precision
    from autolora.training.text import TextProblem

    problem = make_problem(cfg)
    assert isinstance(problem, TextProblem)
    columns = {
        name: {"text_a": split.text_a, "text_b": split.text_b, "labels": split.labels}
        for name, split in (("train", problem.splits["fit"]), ("dev", problem.splits["dev"]))
    }
    rows.write_text(json.dumps(columns), encoding="utf-8")
    weights = settings.backbone.weights
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "model": str(locate(**weights).directory),
        "rows": str(rows),
        "targets": list(Subject.load(settings.backbone, torch.device("cpu")).targets),
        "num_labels": problem.task.num_labels,
        "bf16": str(resolve_precision(PRECISIONS[settings.precision], accelerator)).startswith("bf16"),
        "cpu": accelerator == "cpu",
        "epochs": settings.epochs,
        "batch_size": settings.data.batch_size,
        "eval_batch_size": settings.data.eval_batch_size,
        "max_length": settings.data.max_length,
        "rank": RANK,
        "learning_rate": settings.learning_rate,
        "seed": settings.seed,
    }


def _reference(job: dict[str, Any], *, best: bool) -> Command:
    def arguments(folder: Path, short: bool) -> list[str]:
        written = folder / "job.json"
        mine = {"best": best, "bf16": job["bf16"] and best, "out": str(folder / "metric.json")}
        written.write_text(json.dumps(job | mine | {"max_steps": 2 if short else -1}), encoding="utf-8")
        return ["autolora.bench.hf_trainer", str(written)]

    def outcome(folder: Path) -> Outcome:
        return Outcome(json.loads((folder / "metric.json").read_text(encoding="utf-8"))["eval_accuracy"], {})

    return Command(arguments, outcome)


def _imports(command: Command, scratch: str) -> dict[str, float]:
    """Where the imports of two steps go; the report itself makes them slower, so that no run is timed with it."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        seconds = import_seconds(command.run(Path(folder), importtime=True).splitlines())
    return {"all": sum(seconds.values())} | dict(list(seconds.items())[:_MOST_IMPORTS])
