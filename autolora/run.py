"""One run from configuration to result: the only place where all rooms meet, and the order in which they do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from autolora.config import RunConfig, WandbConfig
from autolora.parts import adapter_settings, is_main_process, make_problem, make_strategy, optimization, say, seed_for
from autolora.plan import RankPlan
from autolora.record import Clock, Run, describe, prediction_rows, record_interruption, save_adapter
from autolora.results import RunDirectory, RunResult, forget_peak_memory
from autolora.signals import Interrupted, Signals

if TYPE_CHECKING:
    from autolora.training.checkpoints import Checkpoint


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
