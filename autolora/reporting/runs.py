"""Run directories, read: results, configurations and, when they are asked for, predictions. Nothing is trained.

What cannot be used is not an error but a finding: half-written results, older schemas, runs that failed or were
interrupted, and runs of one configuration that disagree are counted and named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from autolora.cells import FOLDER, Cell, cells_not_begun, damaged_cells, last_words, read_cells
from autolora.errors import DataError
from autolora.reporting.statistics import METRICS, Array, Scored
from autolora.results import LATER, NOT_IDENTITY, RunDirectory, RunResult, read_result

LOWER_IS_BETTER = ("excess_error", "mse")
_SAME = 1e-6
_UNKNOWN = "not recorded"
_PLANTED = ("planted", "planted_encoder")
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Run:
    """One complete run: what it says of itself, and the configuration that led to it, one value for each dotted key.

    ``task`` is unique to what is learned: with the settings of a planted task, and with the fingerprint of the data
    where the same source gave different rows.
    """

    path: Path
    result: RunResult
    config: Mapping[str, Any]
    task: str

    @property
    def value(self) -> float | None:
        """The primary metric on dev, larger is better: errors are negative."""
        value = self.result.metrics.value
        return None if value is None else -value if self.lower_is_better else value

    @property
    def lower_is_better(self) -> bool:
        """Whether the primary metric is an error."""
        return self.result.metrics.primary in LOWER_IS_BETTER

    @property
    def in_points(self) -> bool:
        """Whether the primary metric is a share or a correlation, and shown in points of 100."""
        return self.result.metrics.primary in METRICS

    @property
    def arena(self) -> tuple[str, str, str]:
        """Source of the data, backbone and its weights: runs that differ in it are never averaged or compared."""
        return self.result.data_source, self.result.backbone, self.result.backbone_fingerprint

    @cached_property
    def scored(self) -> Scored | None:
        """The score as a function of the predictions on dev; ``None`` where they are missing or say something else."""
        metric, value = self.result.metrics.primary, self.result.metrics.value
        if metric not in METRICS or value is None:
            return None
        columns = read_split(RunDirectory(self.path).predictions, "dev")
        if columns is None:
            return None
        scored = Scored.of(metric, *columns)
        return scored if abs(scored.value() - value) <= _SAME else None


@dataclass
class Found:
    """What lies under some folders.

    Args:
        runs: complete runs, each configuration once.
        skipped: path, or the cell of a sweep as it was typed, and reason of what cannot be used.
        flagged: sentences on what is suspicious.
    """

    runs: list[Run] = field(default_factory=list)
    skipped: list[tuple[Path | str, str]] = field(default_factory=list)
    flagged: list[str] = field(default_factory=list)


def load_runs(roots: Sequence[Path]) -> Found:
    """Read every run under the folders: run directories themselves, folders of them, or folders of sweeps.

    Raises:
        DataError: if a folder is not there, or there is not one complete run in any of them.
    """
    found = Found()
    directories: list[Path] = []
    for root in roots:
        cells = read_cells(root)
        directories += _runs_of(root, cells) if (root / FOLDER).is_dir() else _directories(root)
        found.skipped += _missing(root, cells)
    for directory in dict.fromkeys(directories):
        try:
            result = _complete_result(directory)
            config = _read_config(RunDirectory(directory).config)
            found.runs.append(Run(directory, result, config, _task(result, config)))
        except DataError as error:
            found.skipped.append((directory, str(error).removeprefix(f"{directory}/")))
    if not found.runs:
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in found.skipped[:10])
        where = ", ".join(map(str, roots))
        raise DataError(
            f"{where}: expected run directories with a complete result.json, found none{reasons or _hint(roots)}"
        )
    _keep_one_of_each(found)
    found.flagged += [
        f"{run.path} has no {run.result.metrics.primary} (undefined or NaN): it is in no mean and no comparison"
        for run in found.runs
        if run.value is None
    ]
    found.runs = _tell_data_apart(found.runs)
    return found


def _missing(sweep: Path, cells: Sequence[Cell]) -> Iterator[tuple[Path | str, str]]:
    """Cells of a sweep that gave no complete run, and why."""
    for cell in cells:
        if cell.status != "complete":
            yield cell.name, ": ".join([cell.state, *cell.last_words[:1]])
    for file in damaged_cells(sweep, cells):
        yield file, "damaged: its run is not used until the command of the sweep is repeated"
    left, size = cells_not_begun(sweep)
    if left:
        yield sweep, f"{left} of {size} cells have not begun: repeat the command of the sweep"


def _complete_result(directory: Path) -> RunResult:
    if not directory.is_dir():
        raise DataError("the run's folder is gone")
    if not RunDirectory(directory).result.exists():
        raise DataError("no result.json: the run is under way or was killed; its command, repeated, goes on")
    result = read_result(directory)
    if result.status != "complete":
        raise DataError(": ".join([result.status, *last_words(result.error)[:1]]))
    return result


def _read_config(file: Path) -> dict[str, Any]:
    """One value for each dotted key; what a key that came later means for an older run is filled in."""
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise DataError(f"{file}: could not read it: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"{file}: not a configuration: {' '.join(str(error).split())}") from None
    if not isinstance(tree, Mapping):
        raise DataError(f"{file}: expected keys and values, got {type(tree).__name__}")
    return _flat(LATER) | _flat(tree)


def _task(result: RunResult, config: Mapping[str, Any]) -> str:
    if result.task not in _PLANTED:
        return result.task
    said = [
        f"{key}={_short(config[f'task.{key}'])}"
        for key in ("ranks", "text", "profile", "noise")
        if config.get(f"task.{key}")
    ]
    return f"{result.task} ({', '.join(said)})" if said else result.task


def _tell_data_apart(runs: Sequence[Run]) -> list[Run]:
    """Tasks with the fingerprint of their data where there are several; a planted task has one for each seed."""
    prints: dict[tuple[str, str], set[str]] = {}
    for run in runs:
        prints.setdefault((run.result.data_source, run.task), set()).add(run.result.data_fingerprint)
    several = {key for key, found in prints.items() if len(found) > 1}
    return [
        replace(run, task=f"{run.task} [{run.result.data_fingerprint}]")
        if run.result.task not in _PLANTED and (run.result.data_source, run.task) in several
        else run
        for run in runs
    ]


def _runs_of(sweep: Path, cells: Sequence[Cell]) -> Iterator[Path]:
    """Folders of complete cells; a run root that was moved has its runs beside the folder of sweeps."""
    for run in (cell.run for cell in cells if cell.status == "complete" and cell.run is not None):
        yield run if run.is_dir() else sweep.parent.parent / run.name


def _directories(root: Path) -> Iterator[Path]:
    """Folders under ``root`` that a run has begun in."""
    if root.is_file():
        raise DataError(f"runs={root}: expected a folder, got a file")
    if not root.is_dir():
        raise DataError(f"runs={root}: there is no such folder (relative to {Path.cwd()})")
    if (root / "config.yaml").is_file() or (root / "result.json").is_file():
        yield root
        return
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and ((folder / "result.json").is_file() or (folder / "config.yaml").is_file()):
            yield folder


def _hint(roots: Sequence[Path]) -> str:
    """Where runs are instead, if that is one or two folders further down."""
    below = sorted(
        {file.parents[1] for root in roots for depth in (2, 3) for file in root.glob("*/" * depth + "config.yaml")}
    )
    sweeps = sorted({folder.parent for root in roots for folder in root.glob(f"*/{FOLDER}")})
    places = [str(path) for path in (*below, *sweeps)]
    if places:
        return f": they are in {some_of(places)}"
    return " (run directories lie in the folder that run_root named, one beside the other)"


def _keep_one_of_each(found: Found) -> None:
    """One run of each configuration; two that differ in their numbers are flagged."""
    kept: dict[str, Run] = {}
    for run in found.runs:
        first = kept.setdefault(run.result.config_hash, run)
        if first is run:
            continue
        same = (first.result.metrics, first.result.ranks) == (run.result.metrics, run.result.ranks)
        if not same:
            found.flagged.append(
                f"{run.path} and {first.path} have the same configuration and different numbers "
                f"({run.result.metrics.primary} {run.result.metrics.value} and {first.result.metrics.value}); the "
                "second is used"
            )
        found.skipped.append((run.path, f"the same configuration as {first.path}"))
    found.runs = list(kept.values())


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """One value for each dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def read_split(path: Path, split: str) -> tuple[Array, Array] | None:
    """Predictions and labels of a split, in the order of their ids; ``None`` where they are missing or not finite."""
    import pandas as pd

    try:
        table = pd.read_csv(path, usecols=["split", "id", "label", "prediction"], dtype={"split": "category"})
    except (OSError, ValueError):
        return None
    rows = table[table["split"] == split].sort_values("id", kind="stable")
    columns = rows["prediction"].to_numpy(np.float64), rows["label"].to_numpy(np.float64)
    return columns if len(rows) and all(np.isfinite(column).all() for column in columns) else None


# Variants ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """What is compared: a strategy together with everything of the configuration that runs of it differ in.

    Args:
        label: unique among the variants of an arena.
        strategy: its name.
        family: what it shares with variants that differ from it in the budget, and in what goes with the budget, alone.
        runs: by task, then by seed.
    """

    label: str
    strategy: str
    family: str
    runs: Mapping[str, Mapping[int, Run]]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What its runs have in common of what decides results, by dotted keys."""
        first, *others = self.all_runs()
        return {
            key: value
            for key, value in first.config.items()
            if _decides(key) and all(run.config.get(key) == value for run in others)
        }

    def all_runs(self) -> list[Run]:
        """Every run of it."""
        return [run for by_seed in self.runs.values() for run in by_seed.values()]


def variants(runs: Sequence[Run], flagged: list[str]) -> list[Variant]:
    """Sort the runs of one arena into variants.

    Runs of one task and strategy that differ in a key besides the seed are different variants, and so are runs at
    different budgets, whatever their tasks: those are never averaged. What was varied is in the label.

    Args:
        runs: of one arena.
        flagged: takes a sentence for each run that would stand in the place of another.
    """
    varied = _varied_keys(runs)
    by_identity: dict[str, list[Run]] = {}
    for run in runs:
        keys = varied[run.result.strategy] | {key for key in run.config if key.startswith("budget.")}
        identity = {key: run.config.get(key) for key in sorted(keys)} | {"strategy": run.result.strategy}
        by_identity.setdefault(json.dumps(identity, sort_keys=True, default=str), []).append(run)
    groups = list(by_identity.values())
    labels, families = _labels(groups, varied), _families(groups, varied)
    found = []
    for label, family, group in zip(labels, families, groups, strict=True):
        table: dict[str, dict[int, Run]] = {}
        for run in group:
            first = table.setdefault(run.task, {}).setdefault(run.result.seed, run)
            if first is not run:
                flagged.append(f"{run.path} differs from {first.path} in its data alone; the second is used")
        found.append(Variant(label, group[0].result.strategy, family, table))
    return sorted(found, key=lambda variant: variant.label)


def _varied_keys(runs: Sequence[Run]) -> dict[str, set[str]]:
    """By strategy: the keys in which its runs on one task differ, without the seed and what is no part of identity."""
    seen: dict[tuple[str, str], dict[str, set[str]]] = {}
    for run in runs:
        values = seen.setdefault((run.result.strategy, run.task), {})
        for key, value in run.config.items():
            values.setdefault(key, set()).add(json.dumps(value, sort_keys=True, default=str))
    varied: dict[str, set[str]] = {run.result.strategy: set() for run in runs}
    for (strategy, _), values in seen.items():
        varied[strategy] |= {key for key, found in values.items() if len(found) > 1 and _decides(key)}
    return varied


def _decides(key: str) -> bool:
    outside = any(key == name or key.startswith(f"{name}.") for name in NOT_IDENTITY)
    return not (outside or key in ("seed", "strategy.path") or key.startswith("task."))


def _labels(groups: Sequence[Sequence[Run]], varied: Mapping[str, set[str]]) -> list[str]:
    """Unique names of variants: the strategy, the budget where there are several, and what else was varied."""
    budgets: dict[str, set[str | None]] = {}
    for group in groups:
        budgets.setdefault(group[0].result.strategy, set()).add(_budget(group[0]))
    several = len(set().union(*budgets.values()) - {None}) > 1
    labels: list[str] = []
    for group in groups:
        run, budget = group[0], _budget(group[0])
        keys = sorted(key for key in varied[run.result.strategy] if not key.startswith("budget."))
        said = _settings_of(run, keys)
        if len(budgets[run.result.strategy]) > 1 or (several and budget is not None):
            said.insert(0, budget or "no budget")
        label = _named(run, said)
        labels.append(label if label not in labels else f"{label} #{labels.count(label) + 1}")
    return labels


def _families(groups: Sequence[Sequence[Run]], varied: Mapping[str, set[str]]) -> list[str]:
    """The strategy, and what was varied at one and the same budget."""
    free: dict[str, list[str]] = {}
    for strategy, keys in varied.items():
        those = [group[0] for group in groups if group[0].result.strategy == strategy]
        budgets = {_budget(run) for run in those}
        free[strategy] = [
            key
            for key in sorted(keys)
            if not key.startswith("budget.")
            and len({(_budget(run), _short(run.config.get(key))) for run in those}) > len(budgets)
        ]
    return [_named(group[0], _settings_of(group[0], free[group[0].result.strategy])) for group in groups]


def _settings_of(run: Run, keys: Sequence[str]) -> list[str]:
    return [f"{_short_key(key, keys)}={_short(run.config.get(key))}" for key in keys]


def _named(run: Run, said: Sequence[str]) -> str:
    """The strategy, and what is said of it."""
    return f"{run.result.strategy} ({', '.join(said)})" if said else run.result.strategy


def _budget(run: Run) -> str | None:
    """The budget as it was written; ``None`` for a run without one."""
    if run.result.budget is None:
        return None
    counted = run.config.get("budget.cost", "parameters")
    of = "" if counted == "parameters" else f" of {counted}"
    for name in ("rank", "params", "fraction"):
        value = run.config.get(f"budget.{name}")
        if value is not None:
            return f"{name} {_short(value)}{of}"
    return f"default budget{of}"


def _short_key(key: str, keys: Sequence[str]) -> str:
    """The last part of a key, with as many before it as tell it from the others."""
    parts = key.split(".")
    for i in range(len(parts) - 1, 0, -1):
        end = ".".join(parts[i:])
        if not any(other != key and f".{other}".endswith(f".{end}") for other in keys):
            return end
    return key


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else " ".join(str(value).split())


def settings_apart(variants: Sequence[Variant]) -> list[str]:
    """Settings besides strategy and budget in which variants differ on a task, a line for each key.

    ``optim.adapter.lr: 0.001 (uniform, random), 0.003 (autolora)``; where a variant's own setting differs between its
    tasks, a line for each group of tasks on which all variants have the same.
    """
    configs = {
        one.label: {task: next(iter(runs.values())).config for task, runs in one.runs.items()} for one in variants
    }
    tasks = sorted({task for by_task in configs.values() for task in by_task})
    keys = sorted({key for by_task in configs.values() for config in by_task.values() for key in config})
    lines = []
    for key in (key for key in keys if _decides(key) and not key.startswith(("strategy.", "budget."))):
        values = {
            label: {task: _short(config.get(key)) for task, config in by_task.items()}
            for label, by_task in configs.items()
        }
        apart = [task for task in tasks if len({each[task] for each in values.values() if task in each}) > 1]
        if apart and all(len(set(each.values())) == 1 for each in values.values()):
            lines.append(f"{key}: {_by_value((next(iter(each.values())), label) for label, each in values.items())}")
            continue
        said: dict[str, list[str]] = {}
        for task in apart:
            here = _by_value((each[task], label) for label, each in values.items() if task in each)
            said.setdefault(here, []).append(task)
        lines += [
            f"{key}{'' if len(where) == len(tasks) else f' on {some_of(where)}'}: {here}"
            for here, where in said.items()
        ]
    return lines


def circumstances_apart(variants: Sequence[Variant]) -> list[str]:
    """Arithmetic, machine, library and code in which runs differ, a line for each; a name may be at several values."""
    lines = []
    for what, value in _CIRCUMSTANCES.items():
        pairs = dict.fromkeys((value(run.result), one.label) for one in variants for run in one.all_runs())
        if len({found for found, _ in pairs}) > 1:
            lines.append(f"{what}: {_by_value(pairs)}")
    commits = {str(run.result.git.commit)[:10] for one in variants for run in one.all_runs()}
    if len(commits) > 1:
        lines.append(f"commit: {some_of(sorted(commits))}")  # a long study goes through several, whatever the strategy
    changed = [run.path.name for one in variants for run in one.all_runs() if run.result.git.dirty]
    if changed:
        lines.append(f"code that was changed and not committed: {some_of(changed)}")
    return lines


_CIRCUMSTANCES: dict[str, Callable[[RunResult], str]] = {
    "precision": lambda result: str(result.hardware.get("precision") or _UNKNOWN),
    "device": lambda result: str(result.hardware.get("gpu") or result.hardware.get("cpu") or _UNKNOWN),
    "torch": lambda result: result.versions.get("torch") or _UNKNOWN,
}


def _by_value(pairs: Iterable[tuple[str, str]]) -> str:
    """Each value with the names that have it."""
    by_value: dict[str, list[str]] = {}
    for value, name in pairs:
        by_value.setdefault(value, []).append(name)
    return some_of([f"{value} ({some_of(names)})" for value, names in sorted(by_value.items())])


def some_of(names: Sequence[str]) -> str:
    """At most four names, and how many more there are."""
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
