"""One run from configuration to result: the only place where all rooms meet, and the order in which they do."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autolora.config import GlueTaskConfig, PlantedConfig, RunConfig, WandbConfig
from autolora.plan import Budget, RankPlan
from autolora.results import (
    Metrics,
    Params,
    Planted,
    RunDirectory,
    RunResult,
    Seconds,
    config_hash,
    forget_peak_memory,
)
from autolora.signals import Interrupted, Signals

if TYPE_CHECKING:
    from autolora.adapters import AdapterSettings
    from autolora.strategies.base import Strategy
    from autolora.training.checkpoints import Checkpoint
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
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """The hash of everything that decides the outcome."""
        problem = self.problem
        return config_hash(self.cfg, problem.data_source, problem.data_fingerprint, problem.backbone_fingerprint)


def run_one(cfg: RunConfig) -> RunResult:
    """Train, select, evaluate and record one configuration.

    A configuration that is complete under ``cfg.run_root`` is not run again, and one that was interrupted or killed
    goes on from its last checkpoint, to the same result; with ``cfg.force`` it begins afresh in both cases.

    Raises:
        AutoLoRAError: for everything a user can mend; the run directory then has no ``result.json``.
        Interrupted: after SIGINT or SIGTERM; the ``result.json`` then says so.
    """
    clock = Clock()
    forget_peak_memory()
    with Signals(quiet=not is_main_process()) as signals:
        problem = make_problem(cfg)
        directory = RunDirectory.of(cfg, problem.data_source, problem.data_fingerprint, problem.backbone_fingerprint)
        run = Run(cfg, problem, directory, clock, signals)
        if not is_main_process():
            return carry_out(run)
        with directory.held():
            if directory.is_complete() and not cfg.force:
                say(f"complete already: {directory.path} (force=true runs it again)")
                return directory.read_result()
            try:
                return carry_out(run)
            except Interrupted as stop:
                record_interruption(run, stop)
                raise


def carry_out(run: Run) -> RunResult:
    """The steps of a run, from the beginning or from its last checkpoint."""
    cfg, problem, directory, clock = run.cfg, run.problem, run.directory, run.clock
    checkpoint = begin(run)

    import lightning.pytorch as pl

    from autolora.adapters import compact
    from autolora.training.callbacks import HeldoutChoice, History, ProgressBar
    from autolora.training.checkpoints import Checkpoints
    from autolora.training.fit import fit, make_trainer
    from autolora.training.module import AdapterModule
    from autolora.training.problem import evaluate

    problem.build()
    run.strategy = strategy = make_strategy(cfg, problem)
    adapters = strategy.attach(problem.model, adapter_settings(cfg))
    run.counts = adapters.count()
    say(adapters.summary())

    history = History(directory.history, cfg.trainer.log_every_n_steps)
    choice = HeldoutChoice(keep_best=cfg.trainer.checkpoint == "best", patience=cfg.trainer.early_stopping_patience)
    saving = Checkpoints(
        directory.checkpoints,
        run.identity,
        run.signals,
        clock.so_far,
        every_steps=cfg.trainer.checkpoint_every_n_steps,
        every_minutes=cfg.trainer.checkpoint_every_minutes,
    )
    callbacks: list[pl.Callback] = [history, choice, saving]
    if cfg.trainer.enable_progress_bar:
        callbacks.append(ProgressBar(history, strategy.allowance, cfg.trainer.log_every_n_steps))
    with ExitStack() as stack:
        stack.enter_context(cpu_threads(problem.threads))
        wandb_run = stack.enter_context(open_wandb(run, checkpoint)) if isinstance(cfg.logger, WandbConfig) else None
        logger = wandb_run.logger if wandb_run else None
        trainer = make_trainer(cfg.trainer.arguments(), root=directory.path, callbacks=callbacks, logger=logger)
        run.precision = str(trainer.precision)
        run.module = module = AdapterModule(problem, strategy, **optimization(cfg))
        pl.seed_everything(seed_for(cfg.seed, "training"), verbose=False)

        with clock.measure("fit"):
            fit(trainer, module, problem, choice, directory.checkpoints, checkpoint.path if checkpoint else None)

        def score(plan: RankPlan) -> float:
            with adapters.masked(plan):
                return problem.scores({"heldout": evaluate(problem, problem.model, "heldout")}).utility()

        with clock.measure("select"):
            plan = strategy.finalize(score)
            compact(adapters)
            selection = problem.scores({"heldout": evaluate(problem, problem.model, "heldout")})
        with clock.measure("evaluate"):
            outputs = {split: evaluate(problem, problem.model, split) for split in problem.dev_splits}
            scores = problem.scores(outputs)
        result = describe(run, plan, selection, scores)
        if wandb_run is not None:
            wandb_run.finish_with({f"dev/{name}": value for name, value in scores.all.items()}, plan)
    if trainer.is_global_zero:
        save_adapter(run)
        directory.write_ranks(plan)
        directory.write_predictions(*prediction_rows(problem, outputs))
        directory.write_result(result)
        if not cfg.trainer.keep_checkpoints:
            saving.discard()
    return result


def begin(run: Run) -> Checkpoint | None:
    """Prepare the run directory, and find the checkpoint to go on from, if an earlier attempt has left one.

    Raises:
        CheckpointError: if there is one that must not be read.
    """
    from autolora.training.checkpoints import newest

    directory = run.directory
    if not is_main_process():  # the first process, which has started this one, has done the rest
        return newest(directory.checkpoints, run.identity, say)
    if run.cfg.force:
        directory.clear()
    checkpoint = newest(directory.checkpoints, run.identity, say)
    if checkpoint is not None:
        say(f"resuming at step {checkpoint.step} of {checkpoint.total_steps} in {directory.path}")
        run.clock.go_on(checkpoint.seconds)
    elif directory.config.exists() and not run.cfg.force:
        say(f"an earlier attempt left no checkpoint; starting again in {directory.path}")
    directory.start(run.cfg)
    return checkpoint


def is_main_process() -> bool:
    """Whether this is the process that speaks and writes; Lightning sets ``LOCAL_RANK`` in those that it starts."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def say(line: str) -> None:
    """Tell the user, once."""
    if is_main_process():
        print(line, flush=True)


# The parts, from the configuration -----------------------------------------------------------------------------------


def seed_for(seed: int, stream: str) -> int:
    """The seed of one random stream of a run: data order, head, adapters, training.

    Streams are separate, so that two strategies with one seed see the same batches and the same head, however much
    randomness each draws for itself.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:4], "big")


def make_problem(cfg: RunConfig) -> Problem:
    """Read the data of the configured task; the model is loaded later, by ``build``."""
    return _planted_problem(cfg, cfg.task) if isinstance(cfg.task, PlantedConfig) else _text_problem(cfg, cfg.task)


def _planted_problem(cfg: RunConfig, task: PlantedConfig) -> Problem:
    from autolora.tasks.planted import plant
    from autolora.training.planted import PlantedRegression

    settings = task.model_dump(exclude={"name", "teacher_seed", "eval_size"})
    teacher_seed = cfg.seed if task.teacher_seed is None else task.teacher_seed
    written = json.dumps(settings | {"teacher_seed": teacher_seed}, sort_keys=True)
    return PlantedRegression(
        plant(**settings, seed=teacher_seed),
        fingerprint=hashlib.sha256(written.encode()).hexdigest()[:12],
        batch_size=cfg.data.batch_size,
        eval_size=task.eval_size,
        seed=seed_for(cfg.seed, "data"),
    )


def _text_problem(cfg: RunConfig, task: GlueTaskConfig) -> Problem:
    from autolora.backbones import locate, weights_fingerprint
    from autolora.paths import cache_root
    from autolora.tasks.glue import GLUE
    from autolora.tasks.sources import fingerprint, load, resolve, size_notes
    from autolora.tasks.splits import hold_out, subsample

    glue, data = GLUE[task.name], cfg.data
    resolved = resolve(data.source, glue, data.dir)
    say(f"data: {resolved.detail}")
    splits = load(resolved, glue)
    notes = size_notes(resolved, glue, splits)
    for note in notes:
        say(f"note: {note}")
    data_hash = fingerprint(splits)
    train = splits.pop("train")
    seed = seed_for(cfg.seed, "data")
    if data.max_train is not None:
        train = subsample(train, data.max_train, seed)
    fit_rows, heldout = hold_out(train, data.heldout, data.max_heldout, seed)
    weights = cfg.backbone.model_dump(include={"name", "id", "path"})
    from autolora.training.text import TextProblem, TextSettings

    return TextProblem(
        glue,
        {"fit": fit_rows, "heldout": heldout, **splits},
        source=resolved.kind,
        fingerprint=data_hash,
        data_notes=notes,
        backbone=cfg.backbone.label,
        backbone_fingerprint=weights_fingerprint(locate(**weights).directory),
        weights=weights,
        settings=TextSettings(
            batch_size=data.batch_size,
            eval_batch_size=data.eval_batch_size,
            max_length=data.max_length,
            num_workers=data.num_workers,
            cache_dir=data.cache_dir or cache_root() / "tokens",
            data_seed=seed,
            head_seed=seed_for(cfg.seed, "head"),
        ),
    )


def make_strategy(cfg: RunConfig, problem: Problem) -> Strategy[Any]:
    """The configured strategy with its budget."""
    from autolora import strategies

    given = cfg.budget.given()
    budget = Budget(**given) if given else problem.default_budget  # type: ignore[arg-type]
    return strategies.make_strategy(
        cfg.strategy.name,
        cfg.strategy.options,
        budget=budget if cfg.budget.enabled else Budget(),
        max_rank=cfg.max_rank,
    )


def adapter_settings(cfg: RunConfig) -> AdapterSettings:
    """What is the same for every strategy."""
    from autolora.adapters import AdapterSettings, Targets

    adapter = cfg.adapter
    return AdapterSettings(
        targets=Targets(adapter.targets, adapter.exclude, adapter.layers_to_transform, adapter.layers_pattern),
        scale=adapter.effective_scale(),
        init=adapter.init,
        init_std=adapter.init_std,
        dropout=adapter.dropout,
        learn_scale=adapter.learn_scale,
        fan_in_fan_out=adapter.fan_in_fan_out,
        rank_pattern=adapter.rank_pattern,
        modules_to_save=adapter.modules_to_save,
        bias=adapter.bias,
        seed=seed_for(cfg.seed, "adapters"),
    )


def optimization(cfg: RunConfig) -> dict[str, Any]:
    """Keyword arguments of the training module: rates, AdamW and its schedule."""
    from autolora.strategies.base import GroupRates, Rates

    optim = cfg.optim
    return {
        "rates": Rates(
            adapter=GroupRates(optim.adapter.lr, optim.adapter.weight_decay),
            gate=GroupRates(optim.gate.lr, optim.gate.weight_decay),
            head=GroupRates(optim.head.lr, optim.head.weight_decay),
        ),
        "betas": optim.betas,
        "eps": optim.eps,
        "schedule": optim.schedule,
        "warmup": optim.warmup,
    }


def open_wandb(run: Run, checkpoint: Checkpoint | None) -> Any:
    """A W&B run in the run directory; one that is resumed keeps its identifier."""
    from autolora.training.loggers import WandbRun

    path, cfg = run.directory.path, run.cfg
    settings = cfg.logger.model_dump(exclude={"name"})
    resume = checkpoint.logger if checkpoint else None
    return WandbRun(path, path.name, settings, cfg.model_dump(mode="json"), resume)


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Inside this context torch uses so many CPU threads; ``None`` changes nothing."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# What is written -----------------------------------------------------------------------------------------------------


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
    """Write the adapter as PEFT reads it, and beside it what identifies the run."""
    from autolora.adapters.peft_format import save_peft
    from autolora.backbones import hub_name
    from autolora.training.text import TextProblem

    assert run.strategy is not None
    cfg, problem = run.cfg, run.problem
    text = isinstance(problem, TextProblem)
    save_peft(
        run.strategy.adapters,
        run.directory.adapter,
        base_model=hub_name(**cfg.backbone.model_dump(include={"name", "id", "path"})) if text else "planted",
        task_type="SEQ_CLS" if text else None,
        fresh=problem.pretrained.fresh if isinstance(problem, TextProblem) else (),
        metadata={
            "strategy": cfg.strategy.name,
            "task": problem.name,
            "data_source": problem.data_source,
            "data_fingerprint": problem.data_fingerprint,
            "budget": run.strategy.allowance,
            "seed": cfg.seed,
            "config_hash": run.identity,
        },
    )


def describe(run: Run, plan: RankPlan, selection: Scores, scores: Scores) -> RunResult:
    """Everything about a complete run that ``result.json`` holds."""
    assert run.strategy is not None
    notes = (
        *run.problem.notes, *run.strategy.notes, *scores.notes, *budget_notes(plan, run.strategy.allowance)
    )  # fmt: skip
    return RunResult(
        status="complete",
        metrics=Metrics(primary=scores.primary, value=scores.value, all=scores.all),
        selection_metrics=selection.all,
        ranks=dict(plan),
        planted=_planted_record(run.problem, plan, scores),
        notes=notes,
        **facts(run),
    )


def record_interruption(run: Run, stop: Interrupted) -> None:
    """Write a ``result.json`` that says how far the run came, and tell the user how it goes on."""
    if run.directory.is_complete():  # too late
        return
    steps = run.module.steps_done if run.module else 0
    checkpoints = sorted(run.directory.checkpoints.glob("step-*.ckpt"))
    metrics = Metrics(primary=run.problem.primary)
    note = f"{stop} at step {steps}"
    run.directory.write_result(RunResult(status="interrupted", metrics=metrics, ranks={}, notes=(note,), **facts(run)))
    where = f"goes on from {checkpoints[-1].name}" if checkpoints else "begins again"
    say(f"{note}; the same command {where} in {run.directory.path}")


def facts(run: Run) -> dict[str, Any]:
    """The fields of a result that do not depend on how the run ended."""
    from autolora import results

    cfg, problem = run.cfg, run.problem
    gpu, gpu_peak = _gpu_use(run)
    adapters = run.strategy.adapters if run.strategy and run.counts else None
    count = adapters.count() if adapters else dict.fromkeys(("adapter", "scale", "bias", "head", "gate", "total"), 0)
    seconds = Seconds(**run.clock.so_far())
    examples = run.module.examples_seen if run.module else 0
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
            extra=count["scale"] + count["bias"],
            head=count["head"],
            peak_trainable=run.counts.get("trainable", 0),
            budget=run.strategy.allowance if run.strategy and adapters else None,
            backbone=count["total"] - count["adapter"] - count["scale"] - count["gate"] - count["head"],
        ),
        "adapter_bytes": sum(p.numel() * p.element_size() for p in adapters.adapter_parameters()) if adapters else 0,
        "seconds": seconds,
        "examples_per_second": examples / max(seconds.fit, 1e-9),
        "peak_memory_bytes": results.peak_memory_bytes() if gpu_peak is None else gpu_peak,
        "steps": run.module.steps_done if run.module else 0,
        "config_hash": run.identity,
        "git": results.git_state(),
        "versions": results.versions(),
        "hardware": results.hardware(gpu) | {"precision": run.precision},
    }


def _gpu_use(run: Run) -> tuple[str | None, int | None]:
    """Name of the accelerator that the model is on, and the most of its memory that was allocated in bytes."""
    device = next(run.problem.model.parameters()).device if run.module else None
    if device is None or device.type != "cuda":
        return None, None
    import torch

    return torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device)


def budget_notes(plan: RankPlan, allowance: int | None) -> list[str]:
    """A note where the plan leaves more than 2 % of the budget unspent."""
    if not allowance or plan.params >= 0.98 * allowance:
        return []
    unspent, cheapest = allowance - plan.params, min(site.cost for site in plan.sites.values())
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


def _planted_record(problem: Problem, plan: RankPlan, scores: Scores) -> Planted | None:
    from autolora.tasks.planted import exact_fraction
    from autolora.training.planted import PlantedRegression

    if not isinstance(problem, PlantedRegression):
        return None
    true = problem.true_plan
    return Planted(
        true=dict(true), found=dict(plan), exact_fraction=exact_fraction(true, plan), excess_error=scores.value
    )
