"""One run from configuration to result: the only place where all rooms meet, and the order in which they do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from autolora.config import RunConfig, WandbConfig
from autolora.errors import PlanError
from autolora.parts import (
    adapter_settings,
    is_main_process,
    make_control,
    make_prices,
    make_problem,
    make_strategy,
    optimization,
    say,
    seed_for,
)
from autolora.plan import RankPlan
from autolora.record import (
    Clock,
    Run,
    describe,
    prediction_rows,
    record_failure,
    record_interruption,
    record_selection,
    save_adapter,
)
from autolora.results import RunDirectory, RunResult, forget_peak_memory
from autolora.signals import Interrupted, Signals
from autolora.strategies.base import Planned, Strategy

if TYPE_CHECKING:
    from autolora.training.checkpoints import Checkpoint
    from autolora.training.problem import Labelled, Outputs, Scores


def run_one(cfg: RunConfig) -> RunResult:
    """Train, select, evaluate and record one configuration.

    A configuration that is complete under ``cfg.run_root`` is not run again, and one that was interrupted or killed
    goes on from its last checkpoint, to the same result; with ``cfg.force`` it begins afresh in both cases.

    Raises:
        AutoLoRAError: for everything a user can mend.
        Interrupted: after SIGINT or SIGTERM.

    After these and any other error ``result.json`` says so, unless data or weights were not even found.
    """
    forget_peak_memory()
    with Signals(quiet=not is_main_process()) as signals:
        problem = make_problem(cfg)
        directory = RunDirectory.of(cfg, problem.data_source, problem.data_fingerprint, problem.backbone_fingerprint)
        # From here on: the imports that came with the problem are of a process, and its first run has no more to do.
        run = Run(cfg, problem, directory, Clock(), signals)
        if not is_main_process():
            return carry_out(run)
        with directory.held():
            if directory.is_complete() and not cfg.force:
                signals.check()
                say(f"complete already: {directory.path} (force=true runs it again)")
                return directory.read_result()
            try:
                return carry_out(run)
            except Interrupted as stop:
                record_interruption(run, stop)
                raise
            except Exception as error:
                record_failure(run, error)
                raise


def carry_out(run: Run) -> RunResult:
    """The steps of a run, from the beginning or from its last checkpoint."""
    cfg, problem, clock = run.cfg, run.problem, run.clock
    checkpoint = begin(run)
    run.signals.check()

    from autolora.training.fit import processes_of_one_run
    from autolora.training.problem import evaluate

    with ExitStack() as stack:
        stack.enter_context(processes_of_one_run())
        stack.enter_context(cpu_threads(problem.threads))
        wandb_run = stack.enter_context(open_wandb(run, checkpoint)) if isinstance(cfg.logger, WandbConfig) else None
        logger = wandb_run.logger if wandb_run else None
        selection = None
        if run.selection is None:
            problem.build()
            run.signals.check()
            train(run, make_strategy(cfg, problem), checkpoint, logger)
            plan, selection = select(run)
            if cfg.retrain != "none":
                record_selection(run, plan, selection, str(logger.version) if logger else None)
                checkpoint = None
        if run.selection is not None:
            run.signals.deferred = True
            problem.build(all_rows=cfg.retrain_on == "all")
            run.signals.check()
            train(run, make_control(cfg, problem, run.selection.ranks), checkpoint, logger)
            held_out = cfg.retrain_on == "fit"
            selection = problem.scores({"heldout": evaluate(problem, problem.model, "heldout")}) if held_out else None
        with clock.measure("evaluate"):
            outputs = {split: evaluate(problem, problem.model, split) for split in problem.dev_splits}
            scores = problem.scores(outputs)
        run.signals.check()
        result = describe(run, selection, scores)
        if wandb_run is not None:
            wandb_run.finish_with(result)
    if is_main_process():
        write(run, result, outputs)
    return result


def begin(run: Run) -> Checkpoint | None:
    """Prepare the run directory, and find the checkpoint to go on from, if an earlier attempt has left one.

    Raises:
        CheckpointError: if there is one that must not be read.
    """
    from autolora.training.checkpoints import newest

    directory = run.directory
    if is_main_process() and run.cfg.force:
        run.signals.check()  # before anything is lost
        directory.clear()
    wants_selection = run.cfg.retrain != "none"
    if wants_selection:
        run.selection = directory.read_selection()
    checkpoint = newest(run.checkpoints, run.identity, say)
    run.resumed_at = checkpoint.step if checkpoint else 0
    if not is_main_process():  # the first process, which has started this one, does the rest
        return checkpoint
    training = "" if run.stage == "fit" else "the second training "
    if checkpoint is not None:
        say(f"resuming {training}at step {checkpoint.step} of {checkpoint.total_steps} in {directory.path}")
        run.clock.go_on(checkpoint.seconds)
    elif run.selection is not None:
        say(f"resuming at the beginning of the second training in {directory.path}")
        run.clock.go_on(run.selection.seconds)
    elif wants_selection and not run.cfg.force and (other := directory.adopt_selection(run.search)):
        say(f"the same search has ended in {other}: training begins with what it found")
        run.selection = directory.read_selection()
        assert run.selection is not None
        run.clock.go_on(run.selection.seconds)
    elif directory.config.exists() and not run.cfg.force:
        say(f"an earlier attempt left no checkpoint to go on from; starting again in {directory.path}")
    directory.start(run.cfg)
    return checkpoint


def train(run: Run, strategy: Strategy[Any], checkpoint: Checkpoint | None, logger: Any) -> None:
    """Train the problem's model under a strategy; or go on from a checkpoint."""
    import lightning.pytorch as pl

    from autolora.training.callbacks import HeldoutChoice, History, ProgressBar
    from autolora.training.checkpoints import Checkpoints
    from autolora.training.fit import fit, make_trainer
    from autolora.training.module import AdapterModule

    cfg, problem, directory, settings = run.cfg, run.problem, run.directory, run.cfg.trainer
    second = run.stage == "retrain"
    run.strategy = strategy
    with run.warnings_as_notes():
        adapters = strategy.attach(problem.model, adapter_settings(cfg, prices_of(run)))
    check_budget(strategy)
    problem.model = adapters.model
    say(adapters.summary())

    steps_before = run.compute.fit_steps if second else 0
    file = directory.retrain_history if second else directory.history
    history = History(file, settings.log_every_n_steps, logged_before=steps_before, say=say)
    choice = HeldoutChoice(keep_best=settings.checkpoint == "best", patience=settings.early_stopping_patience)
    saving = Checkpoints(
        run.checkpoints,
        run.identity,
        run.signals,
        run.clock.so_far,
        every_steps=settings.checkpoint_every_n_steps,
        every_minutes=settings.checkpoint_every_minutes,
    )
    callbacks: list[pl.Callback] = [history, choice, saving]
    if settings.enable_progress_bar:
        counted = strategy.allowance if strategy.largest.unit == "parameters" else None
        callbacks.append(ProgressBar(history, counted, settings.log_every_n_steps))
    trainer = make_trainer(settings.arguments(), root=directory.path, callbacks=callbacks, logger=logger)
    run.precision = str(trainer.precision)
    run.module = module = AdapterModule(problem, strategy, **optimization(cfg))
    pl.seed_everything(seed_for(cfg.seed, "training"), verbose=False)
    run.signals.at_once()
    with run.clock.measure(run.stage):
        fit(trainer, module, problem, choice, run.checkpoints, checkpoint.path if checkpoint else None)


def prices_of(run: Run) -> dict[str, tuple[int, ...]]:
    """What ranks cost where the budget does not count parameters: as the run began with, or made now."""
    prices = run.directory.read_prices()
    if prices is None:
        prices = make_prices(run.cfg, run.problem)
        if prices:
            run.directory.write_prices(prices)
    return prices


def check_budget(strategy: Strategy[Any]) -> None:
    """Refuse a budget that is there and buys nothing, and a plan above it; a budget of 0 asks for the head alone.

    Raises:
        PlanError: if it does not pay for a single component, or for the plan of a strategy that is to keep to it.
    """
    if isinstance(strategy, Planned):
        check_plan(strategy, strategy.adapters.attached_plan())
    if not strategy.allowance:
        return
    largest = strategy.largest
    first = {name: largest.sites[name].step_price(0) for name, rank in largest.items() if rank}
    cheapest = min(first, key=lambda name: first[name], default=None)
    if cheapest is not None and strategy.allowance < first[cheapest]:
        what = "a single component" if largest.sites[cheapest].multiple == 1 else "the first multiple of a module"
        raise PlanError(
            f"the budget of {strategy.allowance:,} {largest.unit} does not pay for {what}: the cheapest, of "
            f"{cheapest}, costs {first[cheapest]:,}; raise it"
        )


def check_plan(strategy: Strategy[Any], plan: RankPlan) -> None:
    """Hold a strategy to what it says.

    Raises:
        PlanError: if it is no plan, is not that of the gates, or costs more than the budget.
    """
    name, active = type(strategy).__name__, strategy.adapters.active_plan()
    if not isinstance(plan, RankPlan):
        raise PlanError(
            f"{name}: expected a RankPlan from finalize(), got {type(plan).__name__}: return the plan "
            "(self.adapters.active_plan() is that of the gates)"
        )
    if plan != active:
        different = [module for module in plan if plan[module] != active[module]]
        raise PlanError(
            f"{name}: the plan that it gives is not what its gates are, at {len(different)} modules: {different[0]} "
            f"has rank {plan[different[0]]} in the plan, and {active[different[0]]} components are on: fix them in "
            "finalize()"
        )
    if strategy.allowance is not None and plan.cost > strategy.allowance:
        raise PlanError(
            f"{name}: its plan costs {plan.cost:,} {plan.unit} and the budget is {strategy.allowance:,}: it has to "
            "keep to self.allowance (autolora.plan.spend does), whenever training ends"
        )
    odd = [module for module, rank in plan.items() if rank % plan.sites[module].multiple]
    if odd:
        raise PlanError(
            f"{name}: rank_multiple={plan.sites[odd[0]].multiple}, but the plan has {len(odd)} other ranks: "
            f"{plan[odd[0]]} for {odd[0]}; autolora.plan.spend keeps to multiples"
        )


def select(run: Run) -> tuple[RankPlan, Scores]:
    """The plan that the strategy settles on, with what it does not use removed, and its score on the held-out slice."""
    from autolora.adapters import compact
    from autolora.training.problem import evaluate, read

    problem, strategy = run.problem, run.strategy
    assert strategy is not None
    rows: list[Labelled] = []

    def score(plan: RankPlan) -> float:
        if not rows:
            rows.extend(read(problem, problem.model, "heldout", strategy.scored_rows))
        with strategy.adapters.masked(plan), strategy.adapters.merged():
            outputs = evaluate(problem, problem.model, "heldout", rows)
        if strategy.scored_by == "loss":
            return -float(problem.criterion(outputs.logits, outputs.labels))
        return problem.scores({"heldout": outputs}).utility()

    def to_choose(plan: RankPlan) -> float:
        run.plans_measured += 1
        return score(plan)

    def to_compare(plan: RankPlan) -> float:
        run.plans_compared += 1
        return score(plan)

    with run.clock.measure("select"):
        plan = strategy.finalize(to_choose)
        check_plan(strategy, plan)
    with run.clock.measure("compare"):
        strategy.compare(to_compare)
    with run.clock.measure("select"):
        compact(strategy.adapters)
        return plan, problem.scores({"heldout": evaluate(problem, problem.model, "heldout")})


def write(run: Run, result: RunResult, outputs: dict[str, Outputs]) -> None:
    """Write the run directory, the result last."""
    from autolora.training.checkpoints import discard

    save_adapter(run)
    run.directory.write_ranks(result.ranks)
    run.directory.write_predictions(*prediction_rows(run.problem, outputs))
    run.directory.write_result(result)
    if not run.cfg.trainer.keep_checkpoints:
        discard(run.directory.retrain_checkpoints)
        discard(run.directory.checkpoints)


def open_wandb(run: Run, checkpoint: Checkpoint | None) -> Any:
    """A W&B run in the run directory; one that is resumed keeps its identifier. What the user says of it wins."""
    from autolora.training.loggers import WandbRun, labels

    path, cfg, problem = run.directory.path, run.cfg, run.problem
    settings = cfg.logger.model_dump(exclude={"name"})
    ours = labels(problem.name, problem.data_source, problem.backbone, cfg.strategy.name, cfg.seed)
    settings |= {key: settings[key] or ours[key] for key in ("group", "job_type")}
    settings["tags"] = list(dict.fromkeys([*settings["tags"], *ours["tags"]]))
    resume = (checkpoint or run.selection).logger if checkpoint or run.selection else None  # type: ignore[union-attr]
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
