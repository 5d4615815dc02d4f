"""What a run leaves behind: its identity, its directory, and ``result.json``. No torch.

A run is identified by its configuration together with the *resolved* source and the fingerprint of its data, so that
numbers on embedded data never meet numbers on GLUE. Every file is replaced atomically, ``result.json`` last: where it
stands, the rest is complete.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from autolora.config import RunConfig
from autolora.errors import DataError
from autolora.files import dump_json, read_json, replacing, write_json_atomic, write_text_atomic, writing

SCHEMA = 1
_PACKAGES = (
    "autolora", "torch", "lightning", "transformers", "tokenizers", "datasets", "torchmetrics", "safetensors", "numpy",
    "hydra-core", "pydantic", "wandb", "peft", "bitsandbytes",
)  # fmt: skip
# What says where a run is kept and how it is watched, not what it computes. The data themselves are in the fingerprint.
NOT_IDENTITY = (
    "run_root", "force", "logger", "data.source", "data.dir", "data.cache_dir", "data.num_workers", "backbone.path",
    "trainer.enable_progress_bar", "trainer.checkpoint_every_n_steps", "trainer.checkpoint_every_minutes",
    "trainer.keep_checkpoints",
)  # fmt: skip
# Keys that came when there were runs already, and the value that means what those did: they keep their identity.
LATER = {
    "backbone.quantization": "none", "backbone.sparsity": {"method": "none", "amount": 0.5},
    "budget.cost": "parameters", "budget.rows": 32, "rank_multiple": 1,
}  # fmt: skip
_GIT_SECONDS = 5.0
_OPTIONAL = ("planted", "found", "price", "error")


_Name = Annotated[str, Field(pattern=r"^[^\r\n]+$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Metrics(_Record):
    """Scores on dev: the primary metric's name and value, and all of them."""

    primary: str
    value: float | None = None
    all: dict[str, float | None] = Field(default_factory=dict)


class Params(_Record):
    """Parameter counts: final adapters (A and B: what the budget counts), what is left besides them and the head
    (``extra``: biases and scales, prompts, or the backbone itself), fully trained head, the most ever trained at once
    (with a network that prefixes came out of), the budget, the backbone.
    """

    adapter: int
    extra: int = 0
    head: int
    peak_trainable: int
    budget: int | None
    backbone: int


class Price(_Record):
    """What the budget counted, where that is not parameters: the unit, the budget, and what the final plan costs."""

    unit: str
    budget: int | None
    plan: int


class Seconds(_Record):
    """Wall-clock seconds of the parts of a run, over all attempts, without imports and reading the rows.

    ``earlier`` is the share of ``total`` that attempts before the last had spent when they wrote the checkpoint that
    was gone on from. What a killed attempt did after its last checkpoint is lost, and counts nowhere.
    """

    total: float = 0.0
    earlier: float = 0.0
    fit: float = 0.0
    select: float = 0.0
    compare: float = 0.0
    retrain: float = 0.0
    evaluate: float = 0.0


class Compute(_Record):
    """What a run took besides seconds: optimizer steps before selection and after it, batches that went through the
    model for the sake of both (several a step where a strategy trains several plans, scores, or learns from held-out
    rows; ``None`` in results of versions that did not count them), and plans that were measured on the held-out slice,
    each once, however often a search came back to it: to choose, and after the choice, only to compare it with them.
    """

    fit_steps: int = 0
    retrain_steps: int = 0
    passes: int | None = None
    plans_measured: int = 0
    plans_compared: int = 0


class Selection(_Record):
    """The content of ``selection.json``: what a run knows when the ranks are chosen and training begins again.

    ``search`` is the hash of all that led to it; ``ranks`` is the plan found, ``metrics`` its score on the held-out
    slice; the rest goes into the result in the end.
    """

    search: str
    ranks: dict[str, int]
    metrics: dict[str, float | None]
    notes: tuple[str, ...]
    compute: Compute
    examples: int
    peak_trainable: int
    seconds: dict[str, float]
    logger: str | None


class Planted(_Record):
    """True and found ranks, the share of modules that are exact, and the error relative to no adapter.

    A method that has no ranks has found none.
    """

    true: dict[str, int]
    found: dict[str, int] | None
    exact_fraction: float | None
    excess_error: float | None


class Git(_Record):
    """The state of the code; ``None`` where there is no repository."""

    commit: str | None = None
    dirty: bool | None = None


class RunResult(_Record):
    """The content of ``result.json``. NaN and infinities become null, and a note says so.

    ``ranks`` are those of the adapter that is evaluated and written. Where a run trains again after its selection,
    ``retrain`` says at which plan, and ``found`` is the one that was selected. ``backbone_bytes`` is the memory of the
    backbone's weights as they are stored, its head left out (``None`` where there is none, or in results of versions
    that did not count it). ``error`` is the traceback of a run that failed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_version: int = Field(default=SCHEMA, alias="schema")
    status: Literal["complete", "failed", "interrupted"]
    task: _Name
    data_source: _Name
    data_fingerprint: str
    backbone: _Name
    backbone_fingerprint: str = ""
    strategy: _Name
    seed: int
    metrics: Metrics
    selection_metrics: dict[str, float | None] = Field(default_factory=dict)
    params: Params
    price: Price | None = None
    adapter_bytes: int
    backbone_bytes: int | None = None
    ranks: dict[str, int]
    seconds: Seconds
    examples_per_second: float
    peak_memory_bytes: int
    steps: int
    compute: Compute = Compute()
    retrain: str = "none"
    found: dict[str, int] | None = None
    config_hash: str
    git: Git
    versions: dict[str, str]
    hardware: dict[str, str | int | None]
    planted: Planted | None = None
    notes: tuple[str, ...] = ()
    error: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_nan(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        notes: list[str] = []
        clean = {key: _finite(value, key, notes) for key, value in data.items()}
        return {**clean, "notes": (*clean.get("notes", ()), *notes)}

    @property
    def budget(self) -> tuple[str, int] | None:
        """What the budget counted, and how much of it there was."""
        unit, amount = (self.price.unit, self.price.budget) if self.price else ("parameters", self.params.budget)
        return None if amount is None else (unit, amount)

    def to_json(self) -> str:
        """Strict JSON; ``planted``, ``found``, ``price`` and ``error`` only where there is such a thing."""
        data = self.model_dump(mode="json", by_alias=True)
        return dump_json({key: value for key, value in data.items() if key not in _OPTIONAL or value is not None})


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run."""

    path: Path

    @classmethod
    def of(cls, cfg: RunConfig, data_source: str, data_fingerprint: str, backbone_fingerprint: str) -> RunDirectory:
        """The directory of a configuration on the data and the weights that it was resolved to."""
        digest = config_hash(cfg, data_source, data_fingerprint, backbone_fingerprint)
        name = run_name(cfg.task.name, data_source, cfg.backbone.label, cfg.strategy.name, cfg.seed, digest)
        return cls(cfg.run_root / name)

    @property
    def config(self) -> Path:
        """The configuration, every key written out."""
        return self.path / "config.yaml"

    @property
    def result(self) -> Path:
        """The result, written last."""
        return self.path / "result.json"

    @property
    def ranks(self) -> Path:
        """The final rank of every module."""
        return self.path / "ranks.json"

    @property
    def prices(self) -> Path:
        """What the ranks of every module cost, where the budget does not count parameters."""
        return self.path / "prices.json"

    @property
    def history(self) -> Path:
        """Losses, ranks and rates over training."""
        return self.path / "history.csv"

    @property
    def selection(self) -> Path:
        """What was selected, where training begins again after that."""
        return self.path / "selection.json"

    @property
    def retrain_history(self) -> Path:
        """The history of the second training."""
        return self.path / "retrain_history.csv"

    @property
    def predictions(self) -> Path:
        """One row for each example of dev."""
        return self.path / "predictions.csv"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of the training loop."""
        return self.path / "checkpoints"

    @property
    def retrain_checkpoints(self) -> Path:
        """Checkpoints of the second training."""
        return self.checkpoints / "retrain"

    @property
    def adapter(self) -> Path:
        """The trained adapter."""
        return self.path / "adapter"

    @property
    def wandb(self) -> Path:
        """Files of Weights & Biases."""
        return self.path / "wandb"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside this context the directory is there, and no other process works on it.

        Raises:
            BusyError: if one does.
        """
        from autolora.locking import exclusive

        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with exclusive(self.path):
            yield

    def clear(self) -> None:
        """Take away what an earlier run has left, its result first, so that the rest never looks complete."""
        written = (self.ranks, self.prices, self.predictions, self.selection, self.history, self.retrain_history)
        for path in (self.result, *written):
            path.unlink(missing_ok=True)
        for folder in (self.adapter, self.checkpoints):
            shutil.rmtree(folder, ignore_errors=True)

    def start(self, cfg: RunConfig) -> None:
        """Take away an older result and what a killed process was writing, and write the configuration.

        Call it while the directory is :meth:`held`: what looks half-written is nobody's then.
        """
        self.result.unlink(missing_ok=True)
        for folder in (self.path, self.checkpoints, self.retrain_checkpoints):
            for rest in folder.glob(".*.tmp"):
                shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        write_text_atomic(self.config, cfg.to_yaml())

    def write_ranks(self, ranks: Mapping[str, int]) -> None:
        """Write ``ranks.json``."""
        write_json_atomic(self.ranks, dict(ranks))

    def write_prices(self, prices: Mapping[str, Sequence[int]]) -> None:
        """Write ``prices.json``: measured time has to be the same when a run is resumed."""
        write_json_atomic(self.prices, {name: list(table) for name, table in prices.items()})

    def read_prices(self) -> dict[str, tuple[int, ...]] | None:
        """What :meth:`write_prices` wrote, or ``None``."""
        if not self.prices.exists():
            return None
        return {name: tuple(table) for name, table in read_json(self.prices, "").items()}

    def write_predictions(self, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Write ``predictions.csv``."""
        with replacing(self.predictions) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)

    def write_selection(self, selection: Selection) -> None:
        """Write ``selection.json``."""
        write_json_atomic(self.selection, selection.model_dump(mode="json"))

    def read_selection(self) -> Selection | None:
        """What :meth:`write_selection` wrote, or ``None``; a damaged one counts as none."""
        try:
            return Selection.model_validate(read_json(self.selection, "", ""))
        except (DataError, ValidationError):
            return None

    def adopt_selection(self, search: str) -> Path | None:
        """Take over what another run under the same root has selected by the same search, with the history of that.

        Returns:
            The directory of that run, or ``None`` if there is none.
        """
        for file in sorted(self.path.parent.glob("*/selection.json")):
            other = RunDirectory(file.parent)
            selection = other.read_selection()
            if selection is not None and selection.search == search and other.history.exists():
                for ours, theirs in ((self.history, other.history), (self.prices, other.prices)):
                    if theirs.exists():
                        write_text_atomic(ours, theirs.read_text())
                self.write_selection(selection.model_copy(update={"logger": None}))
                return other.path
        return None

    def write_result(self, result: RunResult) -> None:
        """Write ``result.json``: call it when everything else is written."""
        write_text_atomic(self.result, result.to_json())

    def read_result(self) -> RunResult:
        """The result.

        Raises:
            DataError: if there is none, or it cannot be read.
        """
        return read_result(self.result)

    def is_complete(self) -> bool:
        """Whether a readable result says so; a damaged one does not count."""
        try:
            return self.read_result().status == "complete"
        except DataError:
            return False


def read_result(path: Path) -> RunResult:
    """Read a ``result.json``, given itself or its run directory.

    Raises:
        DataError: if it is missing, not JSON, of another schema, or lacks fields.
    """
    file = path / "result.json" if path.is_dir() else path
    missing = f"{file}: there is no result; expected a run directory with result.json"
    data = read_json(file, missing, "; run again with force=true")
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise DataError(f"{file}: expected a result of schema {SCHEMA}, got {found}; run again with force=true")
    try:
        return RunResult.model_validate(data)
    except ValidationError as error:
        fields = ", ".join(sorted({".".join(map(str, entry["loc"])) for entry in error.errors()}))
        raise DataError(f"{file}: missing or malformed fields: {fields}; run again with force=true") from None


def config_hash(cfg: RunConfig, data_source: str, data_fingerprint: str, backbone_fingerprint: str) -> str:
    """sha256 of what decides the outcome of a run: its configuration, and the data and weights it was resolved to.

    Where runs go and how they are logged takes no part; nor do the ways to the data (``data.source``, ``data.dir``,
    ``data.cache_dir``), to the weights (``backbone.path``) and to a plan (``strategy.path``), since the fingerprints
    say what they are.
    """
    tree = cfg.model_dump(mode="json")
    if tree["strategy"].get("fingerprint"):
        del tree["strategy"]["path"]
    for key in (*NOT_IDENTITY, *(key for key, usual in LATER.items() if _at(tree, key) == usual)):
        parent, _, last = key.rpartition(".")
        del _at(tree, parent)[last]
    identity = {
        "config": tree,
        "data_source": data_source,
        "data_fingerprint": data_fingerprint,
        "backbone_fingerprint": backbone_fingerprint,
    }
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _at(tree: Mapping[str, Any], key: str) -> Any:
    """What stands at a dotted key; the tree itself at none."""
    for part in filter(None, key.split(".")):
        tree = tree[part]
    return tree


def run_name(task: str, source: str, backbone: str, strategy: str, seed: int, digest: str) -> str:
    """Name of a run directory: readable, safe as a file name, unique by the hash."""
    parts = (task, source, backbone, strategy, f"seed{seed}", digest[:10])
    return "-".join(re.sub(r"[^\w.]+", "_", part) for part in parts)


def _finite(value: Any, where: str, notes: list[str]) -> Any:
    """The value with None for every number that JSON has no word for, and a note on each."""
    if isinstance(value, BaseModel):
        value = value.model_dump(by_alias=True)
    if isinstance(value, Mapping):
        return {key: _finite(item, f"{where}.{key}", notes) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        notes.append(f"{where} was {value}: stored as null")
        return None
    return value


# Where it ran --------------------------------------------------------------------------------------------------------


def git_state(directory: Path | None = None) -> Git:
    """Commit, and whether tracked files differ from it.

    Args:
        directory: inside the repository; by default the checkout that this package runs from, if it is one.
    """
    if directory is None:
        directory = Path(__file__).resolve().parents[1]
        if not (directory / ".git").exists():
            return Git()
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return Git()
    changed = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return Git(commit=commit, dirty=None if changed is None else bool(changed))


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number, without importing any."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(gpu: str | None = None) -> dict[str, str | int | None]:
    """Platform, processor, usable cores and memory in bytes; ``gpu`` is the name of the accelerator in use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = None
    return {"platform": platform.platform(), "cpu": _cpu(), "cores": cores, "memory_bytes": memory, "gpu": gpu}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def forget_peak_memory() -> None:
    """Start :meth:`peak_memory_bytes` anew, where the platform lets it: the runs of a sweep share a process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_bytes() -> int:
    """The most memory that this process has had resident; 0 where the platform does not tell."""
    with suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
