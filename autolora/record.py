"""What a run knows of itself while it is under way, and what it writes down."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autolora import results
from autolora.config import PlantedConfig, RunConfig
from autolora.errors import AutoLoRAError
from autolora.parts import compression, say
from autolora.plan import RankPlan
from autolora.results import (
    Compute,
    Metrics,
    Params,
    Planted,
    Price,
    RunDirectory,
    RunResult,
    Seconds,
    Selection,
    config_hash,
)
from autolora.signals import Interrupted, Signals

if TYPE_CHECKING:
    from autolora.strategies.base import Strategy
    from autolora.training.module import AdapterModule
    from autolora.training.problem import Outputs, Problem, Scores


@dataclass
class Run:
    """One run under way: what its steps share."""

    cfg: RunConfig
    problem: Problem
    directory: RunDirectory
    clock: Clock
    signals: Signals
    strategy: Strategy[Any] | None = None
    module: AdapterModule | None = None
    precision: str | None = None
    selection: Selection | None = None
    plans_measured: int = 0
    plans_compared: int = 0
    warned: list[str] = field(default_factory=list)
    resumed_at: int = 0

    @property
    def identity(self) -> str:
        """The hash of everything that decides the outcome."""
        return self._hash(self.cfg)

    @property
    def search(self) -> str:
        """The hash of everything that decides what is selected: runs that only differ in what follows share it."""
        return self._hash(self.cfg.model_copy(update={"retrain": "found", "retrain_on": "fit"}))

    def _hash(self, cfg: RunConfig) -> str:
        problem = self.problem
        return config_hash(cfg, problem.data_source, problem.data_fingerprint, problem.backbone_fingerprint)

    @property
    def stage(self) -> Literal["fit", "retrain"]:
        """Which training is under way; the second begins with what the first has selected."""
        return "fit" if self.selection is None else "retrain"

    @property
    def checkpoints(self) -> Path:
        """Where the training that is under way keeps its checkpoints."""
        return self.directory.checkpoints if self.stage == "fit" else self.directory.retrain_checkpoints

    @property
    def steps(self) -> int:
        """Steps of the training that is under way; until it goes on, those of the checkpoint."""
        return max(self.resumed_at, self.module.steps_done if self.module else 0)

    @property
    def passes(self) -> int:
        """Batches that went through the model in the training that is under way, over all processes."""
        return self.module.passes * self.module.processes if self.module else 0

    @property
    def examples(self) -> int:
        """Rows that the training that is under way has read, over all processes."""
        return self.module.examples_seen * self.module.processes if self.module else 0

    @property
    def compute(self) -> Compute:
        """What it took so far."""
        if self.selection is None:
            return Compute(
                fit_steps=self.steps,
                passes=self.passes,
                plans_measured=self.plans_measured,
                plans_compared=self.plans_compared,
            )
        before = self.selection.compute
        passes = None if before.passes is None else before.passes + self.passes
        return before.model_copy(update={"retrain_steps": self.steps, "passes": passes})

    @property
    def peak_trainable(self) -> int:
        """The most parameters that were trained at once."""
        return max(
            self.module.peak_trainable if self.module else 0, self.selection.peak_trainable if self.selection else 0
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the data, of the selection, and of the training that is under way."""
        selected = self.selection.notes if self.selection else ()
        notes = (*self.problem.notes, *selected, *self.warned, *(self.strategy.notes if self.strategy else ()))
        return tuple(dict.fromkeys(notes))

    @contextmanager
    def warnings_as_notes(self) -> Iterator[None]:
        """Inside this context a warning of the library is said in a line, and becomes a note; also if it fails."""
        caught: list[warnings.WarningMessage] = []
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                yield
        finally:
            for one in caught:
                if one.category is not UserWarning:
                    warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
                elif str(one.message) not in self.warned:
                    self.warned.append(str(one.message))
                    say(f"warning: {one.message}")


class Clock:
    """Wall-clock seconds of the parts of a run, over all attempts."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._parts: dict[str, float] = {}
        self._running: dict[str, float] = {}
        self._earlier = 0.0

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time that the block takes to a part."""
        self._running[part] = started = time.perf_counter()
        try:
            yield
        finally:
            del self._running[part]
            self._parts[part] = self._parts.get(part, 0.0) + time.perf_counter() - started

    def go_on(self, seconds: Mapping[str, float]) -> None:
        """Count from what :meth:`so_far` gave in an earlier attempt."""
        self._parts = {part: spent for part, spent in seconds.items() if part not in ("total", "earlier")}
        self._earlier = seconds["total"]

    def so_far(self) -> dict[str, float]:
        """The parts, one that is being measured included, the total, and how much of it is of earlier attempts."""
        now = time.perf_counter()
        running = {part: self._parts.get(part, 0.0) + now - started for part, started in self._running.items()}
        total = self._earlier + now - self._started
        return {**self._parts, **running, "total": total, "earlier": self._earlier}


def save_adapter(run: Run) -> None:
    """Write the adapter as PEFT reads it, or a model that was trained in full as transformers does, and beside it what
    identifies the run.
    """
    from autolora.adapters.peft_format import save_peft
    from autolora.adapters.whole import WholeModel, save_whole
    from autolora.adapters.wrapped import Wrapped, save_wrapped
    from autolora.backbones import hub_name, save_pretrained
    from autolora.training.mixture import Mixture
    from autolora.training.text import TextProblem

    assert run.strategy is not None
    cfg, problem, adapters, directory = run.cfg, run.problem, run.strategy.adapters, run.directory.adapter
    text = problem if isinstance(problem, TextProblem) else None
    about: dict[str, Any] = {
        "base_model": "planted" if isinstance(cfg.task, PlantedConfig) else hub_name(**cfg.backbone.weights),
        "metadata": {
            "strategy": cfg.strategy.name,
            "task": problem.name,
            "data_source": problem.data_source,
            "data_fingerprint": problem.data_fingerprint,
            "budget": run.strategy.allowance,
            "seed": cfg.seed,
            "compression": str(compression(cfg)),
            "config_hash": run.identity,
        },
    }
    if text is not None and text.tokenizer is None:
        about["metadata"]["labels"] = list(text.task.labels or ())
    if isinstance(problem, Mixture):
        for i in range(len(problem.parts)):  # what is shared is in each, so that each stands by itself
            with problem.alone(i) as part:
                save_peft(adapters, directory / part.name, task_type=part.peft_task_type, fresh=part.fresh, **about)
    elif isinstance(adapters, WholeModel):
        write = partial(save_pretrained, adapters.model, text.tokenizer) if text else None
        save_whole(adapters, directory, write=write, **about)
    elif isinstance(adapters, Wrapped):
        save_wrapped(adapters, directory, fresh=problem.fresh, **about)
    else:
        save_peft(adapters, directory, task_type=problem.peft_task_type, fresh=problem.fresh, **about)


def record_selection(run: Run, plan: RankPlan, scores: Scores, logger: str | None) -> None:
    """Write down what was selected: from here on the run is in its second training, also after an interruption."""
    run.selection = Selection(
        search=run.search,
        ranks=dict(plan),
        metrics=scores.all,
        notes=(*run.warned, *(run.strategy.notes if run.strategy else ())),
        compute=run.compute,
        examples=run.examples,
        peak_trainable=run.peak_trainable,
        seconds=run.clock.so_far(),
        logger=logger,
    )
    run.strategy, run.module, run.resumed_at = None, None, 0
    run.directory.write_selection(run.selection)


def describe(run: Run, selection: Scores | None, scores: Scores) -> RunResult:
    """Everything about a complete run that ``result.json`` holds."""
    assert run.strategy is not None
    plan = run.strategy.adapters.active_plan()
    return RunResult(
        status="complete",
        metrics=Metrics(primary=scores.primary, value=scores.value, all=scores.all),
        selection_metrics=selection.all if selection else {},
        ranks=dict(plan),
        planted=_planted_record(run, plan, scores),
        notes=(*run.notes, *scores.notes, *budget_notes(plan, run.strategy.allowance)),
        **facts(run),
    )


def record_interruption(run: Run, stop: Interrupted) -> None:
    """Write a ``result.json`` that says how far the run came, and tell the user how it goes on."""
    if run.directory.is_complete():  # too late
        return
    checkpoints = sorted(run.checkpoints.glob("step-*.ckpt"))
    metrics = Metrics(primary=run.problem.primary)
    note = f"{stop} at step {run.steps}{' of the second training' if run.stage == 'retrain' else ''}"
    run.directory.write_result(RunResult(status="interrupted", metrics=metrics, ranks={}, notes=(note,), **facts(run)))
    where = f"goes on from {checkpoints[-1].name}" if checkpoints else "begins again"
    say(f"{note}; the same command {where} in {run.directory.path}")


def record_failure(run: Run, error: Exception) -> None:
    """Write a ``result.json`` that says how the run failed, and how far it had come; note its place on the error."""
    told = "".join(traceback.format_exception(error))
    metrics = Metrics(primary=run.problem.primary)
    result = RunResult(status="failed", metrics=metrics, ranks={}, notes=run.notes, error=told, **facts(run))
    with suppress(AutoLoRAError, OSError):  # a full disk may be what it failed of
        run.directory.write_result(result)
        error.add_note(f"see {run.directory.result}")


def facts(run: Run) -> dict[str, Any]:
    """The fields of a result that do not depend on how the run ended."""
    cfg, problem = run.cfg, run.problem
    gpu, gpu_peak = _gpu_use(run)
    adapters = getattr(run.strategy, "adapters", None)  # not before they are attached
    count = adapters.count() if adapters else dict.fromkeys(("adapter", "added", "own", "head", "gate", "total"), 0)
    priced = _price(run) if adapters else None
    seconds = Seconds(**run.clock.so_far())
    compute = run.compute
    examples = run.examples + (run.selection.examples if run.selection else 0)
    return {
        "task": problem.name,
        "data_source": problem.data_source,
        "data_fingerprint": problem.data_fingerprint,
        "backbone": problem.backbone,
        "backbone_fingerprint": problem.backbone_fingerprint,
        "strategy": cfg.strategy.name,
        "seed": cfg.seed,
        "params": Params(
            adapter=count["adapter"],
            extra=count["added"] + count["own"],
            head=count["head"],
            peak_trainable=run.peak_trainable,
            budget=run.strategy.allowance if run.strategy and adapters and not priced else None,
            backbone=count["total"] - count["adapter"] - count["added"] - count["gate"] - count["head"],
        ),
        "price": priced,
        "adapter_bytes": sum(tensor.nbytes for tensor in adapters.kept()) if adapters else 0,
        "backbone_bytes": problem.backbone_bytes,
        "seconds": seconds,
        "examples_per_second": examples / max(seconds.fit + seconds.retrain, 1e-9),
        "peak_memory_bytes": results.peak_memory_bytes() if gpu_peak is None else gpu_peak,
        "steps": compute.fit_steps + compute.retrain_steps,
        "compute": compute,
        "retrain": cfg.retrain,
        "found": run.selection.ranks if run.selection else None,
        "config_hash": run.identity,
        "git": results.git_state(),
        "versions": results.versions(),
        "hardware": results.hardware(gpu) | {"precision": run.precision, "threads": _threads()},
    }


def _price(run: Run) -> Price | None:
    """What the budget counted, if not parameters."""
    assert run.strategy is not None
    plan = run.strategy.adapters.active_plan()
    if plan.unit == "parameters":
        return None
    return Price(unit=plan.unit, budget=run.strategy.allowance, plan=plan.cost)


def _gpu_use(run: Run) -> tuple[str | None, int | None]:
    """Name of the accelerator that the model is on, and the most of its memory that was allocated in bytes."""
    device = next(run.problem.model.parameters()).device if run.module else None
    if device is None or device.type != "cuda":
        return None, None
    import torch

    return torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device)


def _threads() -> int:
    """CPU threads of torch's operators."""
    import torch

    return torch.get_num_threads()


def budget_notes(plan: RankPlan, allowance: int | None) -> list[str]:
    """A note where the plan leaves more than 2 % of the budget unspent."""
    if not allowance or plan.cost >= 0.98 * allowance:
        return []
    unspent = allowance - plan.cost
    cheapest = min(site.step_price(0) for site in plan.sites.values())
    return [f"{unspent:,} of the budget of {allowance:,} are unspent; the cheapest component costs {cheapest:,}"]


def prediction_rows(problem: Problem, outputs: dict[str, Outputs]) -> tuple[list[str], Iterator[list[object]]]:
    """Header and rows of ``predictions.csv``."""
    columns = max(1, max(output.logits.shape[1] for output in outputs.values()))
    shown = columns if columns <= 8 else 0
    header = ["split", "id", "label", "prediction", *(f"logit_{i}" for i in range(shown))]

    def rows() -> Iterator[list[object]]:
        for split, output in outputs.items():
            ids = problem.ids(split, len(output.labels))
            labels = output.labels.tolist() if output.labels.dim() == 1 else [""] * len(output.labels)
            for row in zip(ids, labels, problem.predictions(output), output.logits[:, :shown].tolist(), strict=True):
                yield [split, *row[:3], *row[3]]

    return header, rows()


def _planted_record(run: Run, plan: RankPlan, scores: Scores) -> Planted | None:
    """How the ranks that were selected compare with the true ones, and the error in the end."""
    from autolora.strategies.outside import Outside
    from autolora.tasks.planted import exact_fraction

    true = run.problem.true_plan
    if true is None:
        return None
    if isinstance(run.strategy, Outside):
        return Planted(true=dict(true), found=None, exact_fraction=None, excess_error=scores.value)
    found = plan if run.selection is None else RankPlan(plan.sites, run.selection.ranks)
    return Planted(
        true=dict(true), found=dict(found), exact_fraction=exact_fraction(true, found), excess_error=scores.value
    )
