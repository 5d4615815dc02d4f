"""One run from configuration to result: the only place where all rooms meet, and the order in which they do."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from autolora.config import GlueTaskConfig, PlantedConfig, RunConfig, WandbConfig
from autolora.plan import Budget, RankPlan
from autolora.results import Metrics, Params, Planted, RunDirectory, RunResult, Seconds

if TYPE_CHECKING:
    from autolora.adapters import AdapterSettings
    from autolora.strategies.base import Strategy
    from autolora.training.module import AdapterModule
    from autolora.training.problem import Outputs, Problem, Scores


def run_one(cfg: RunConfig) -> RunResult:
    """Train, select, evaluate and record one configuration.

    A configuration that is complete under ``cfg.run_root`` is not run again, unless ``cfg.force``.

    Raises:
        AutoLoRAError: for everything a user can mend; the run directory then has no ``result.json``.
    """
    clock = Clock()
    problem = make_problem(cfg)
    directory = RunDirectory.of(cfg, problem.data_source, problem.data_fingerprint)
    if directory.is_complete() and not cfg.force:
        say(f"complete already: {directory.path} (force=true runs it again)")
        return directory.read_result()
    if directory.config.exists() and not cfg.force:
        say(f"an earlier attempt did not finish; starting again in {directory.path}")
    directory.start(cfg)

    import lightning.pytorch as pl

    from autolora.adapters import compact
    from autolora.training.callbacks import HeldoutChoice, History, ProgressBar
    from autolora.training.fit import fit, make_trainer, save_state
    from autolora.training.module import AdapterModule
    from autolora.training.problem import evaluate

    problem.build()
    strategy = make_strategy(cfg, problem)
    adapters = strategy.attach(problem.model, adapter_settings(cfg))
    counts = adapters.count()
    say(adapters.summary())

    history = History(directory.history, cfg.trainer.log_every_n_steps)
    choice = HeldoutChoice(keep_best=cfg.trainer.checkpoint == "best", patience=cfg.trainer.early_stopping_patience)
    callbacks: list[pl.Callback] = [history, choice]
    if cfg.trainer.enable_progress_bar:
        callbacks.append(ProgressBar(history, strategy.allowance, cfg.trainer.log_every_n_steps))
    with ExitStack() as stack:
        stack.enter_context(cpu_threads(problem.threads))
        wandb_run = stack.enter_context(open_wandb(cfg, directory)) if isinstance(cfg.logger, WandbConfig) else None
        logger = wandb_run.logger if wandb_run else None
        trainer = make_trainer(cfg.trainer.arguments(), root=directory.path, callbacks=callbacks, logger=logger)
        module = AdapterModule(problem, strategy, **optimization(cfg))
        pl.seed_everything(seed_for(cfg.seed, "training"), verbose=False)

        with clock.measure("fit"):
            fit(trainer, module, problem, choice, directory.checkpoints)

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
        result = describe(cfg, problem, strategy, module, counts, plan, selection, scores, clock, directory)
        if wandb_run is not None:
            wandb_run.finish_with({f"dev/{name}": value for name, value in scores.all.items()}, plan)
    if trainer.is_global_zero:
        save_state(adapters.trainable_state(), directory.checkpoints / "final.safetensors")
        directory.write_ranks(plan)
        directory.write_predictions(*prediction_rows(problem, outputs))
        directory.write_result(result)
    return result


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
    from autolora.paths import cache_root
    from autolora.tasks.glue import GLUE
    from autolora.tasks.sources import fingerprint, load, resolve
    from autolora.tasks.splits import hold_out, subsample

    glue, data = GLUE[task.name], cfg.data
    resolved = resolve(data.source, glue, data.dir)
    say(f"data: {resolved.detail}")
    splits = load(resolved, glue)
    data_hash = fingerprint(splits)
    train = splits.pop("train")
    seed = seed_for(cfg.seed, "data")
    if data.max_train is not None:
        train = subsample(train, data.max_train, seed)
    fit_rows, heldout = hold_out(train, data.heldout, data.max_heldout, seed)
    from autolora.training.text import TextProblem, TextSettings

    return TextProblem(
        glue,
        {"fit": fit_rows, "heldout": heldout, **splits},
        source=resolved.kind,
        fingerprint=data_hash,
        backbone=cfg.backbone.label,
        weights=cfg.backbone.model_dump(include={"name", "id", "path"}),
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


def open_wandb(cfg: RunConfig, directory: RunDirectory) -> Any:
    """A W&B run in the run directory."""
    from autolora.training.loggers import WandbRun

    settings = cfg.logger.model_dump(exclude={"name"})
    return WandbRun(directory.path, directory.path.name, settings, cfg.model_dump(mode="json"))


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
    """Wall-clock seconds of the parts of a run."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.parts: dict[str, float] = {}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time that the block takes to a part."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - started

    def seconds(self) -> Seconds:
        """The parts and the total so far."""
        return Seconds(total=time.perf_counter() - self._started, **self.parts)


def describe(
    cfg: RunConfig,
    problem: Problem,
    strategy: Strategy[Any],
    module: AdapterModule,
    counts: dict[str, int],
    plan: RankPlan,
    selection: Scores,
    scores: Scores,
    clock: Clock,
    directory: RunDirectory,
) -> RunResult:
    """Everything about the run that ``result.json`` holds."""
    from autolora import results

    adapters = strategy.adapters
    final = adapters.count()
    seconds = clock.seconds()
    return RunResult(
        status="complete",
        task=problem.name,
        data_source=problem.data_source,
        data_fingerprint=problem.data_fingerprint,
        backbone=problem.backbone,
        strategy=cfg.strategy.name,
        seed=cfg.seed,
        metrics=Metrics(primary=scores.primary, value=scores.value, all=scores.all),
        selection_metrics=selection.all,
        params=Params(
            adapter=final["adapter"],
            head=final["head"],
            peak_trainable=counts["trainable"],
            budget=strategy.allowance,
            backbone=final["total"] - final["adapter"] - final["gate"] - final["head"],
        ),
        adapter_bytes=sum(p.numel() * p.element_size() for p in adapters.adapter_parameters()),
        ranks=dict(plan),
        seconds=seconds,
        examples_per_second=module.examples_seen / max(seconds.fit, 1e-9),
        peak_memory_bytes=results.peak_memory_bytes(),
        steps=module.steps_done,
        config_hash=results.config_hash(cfg, problem.data_source, problem.data_fingerprint),
        git=results.git_state(),
        versions=results.versions(),
        hardware=results.hardware(),
        planted=_planted_record(problem, plan, scores),
        notes=(*problem.notes, *scores.notes, *budget_notes(plan, strategy.allowance)),
    )


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
