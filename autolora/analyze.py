"""What theory says of a model before training: ``python -m autolora.analyze backbone=NAME``; see ``--help``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from autolora.command import carry_out
from autolora.config import PathLike, RunConfig, Section
from autolora.errors import ConfigError, DataError
from autolora.files import replacing_directory, require_empty
from autolora.plan import Budget
from autolora.results import RunDirectory
from autolora.validate import parse, strategy_options

if TYPE_CHECKING:
    from torch import nn

    from autolora.adapters import Adapters
    from autolora.plan import RankPlan
    from autolora.reporting.theory import Analysis
    from autolora.strategies.base import Strategy
    from autolora.training.problem import Problem

SectionT = TypeVar("SectionT", bound=Section)
_HELP = """\
usage: python -m autolora.analyze [backbone=NAME] [task=NAME] [run=DIR] [out=DIR] [group=choice ...] [key=value ...]

Say what theory says of a model's Linears, and which ranks it recommends within a budget; nothing is trained.

  backbone=NAME   whose weights are looked at (default: minilm); backbone.path=DIR, backbone.id=ORG/NAME
  task=NAME       look at training rows too, for the information bottleneck
  run=DIR         a complete run with LoRA adapters: look at its updates too. Backbone, adapter settings, budget and
                  max_rank are the run's, unless they are given; where its budget counts time or operations, the
                  budget is the parameters of its adapter
  budget.rank=4   of the recommended ranks; budget.params=N, budget.fraction=F, budget=none. max_rank=16
  strategy=NAME strategy.KEY=VALUE   options of one of the theories: spectral, marchenko_pastur, information
  out=DIR         a folder that is not there yet, or empty (default: analysis/BACKBONE-TASK, or analysis/RUN)

All other keys are those of autolora.train: data.source, data.dir, data.max_train, adapter.targets, seed, ...

DIR then has analysis.json, figures/ (SVG and PNG), and plans/NAME.json, for
  python -m autolora.train strategy=manual strategy.path=DIR/plans/NAME.json
analysis.json has the singular values of every weight, to six digits (the largest 512 of one with more than 2048 rows
and columns), and of every update. The optima of the information bottleneck are null where inputs say no more about the
labels than about permutations of them: the plan is uniform then.
Exit codes: 0 done, 1 the analysis failed, 2 the command line is wrong.
"""
_FROM_THE_RUN = ("backbone", "adapter", "max_rank", "seed")
_WEIGHTS = ("spectral", "marchenko_pastur")
"""Theories that look at weights alone."""
_ROWS = ("information",)
"""Theories that look at training rows."""


@dataclass(frozen=True)
class Request:
    """What a command line asks for.

    Args:
        out: where the analysis goes.
        run: whose updates are looked at, if any.
        cfg: the configuration that the other keys make.
        typed: sections and groups that they are of: what is left out has its default, or is the run's.
    """

    out: Path
    run: Path | None
    cfg: RunConfig
    typed: frozenset[str]


class Places(Section):
    """What of the command line is not a run's configuration."""

    out: PathLike | None = None
    run: PathLike | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """Check the command line, then analyse, print and write.

    Args:
        argv: arguments in place of ``sys.argv[1:]``.

    Raises:
        SystemExit: 1 for an error that the user can mend, 2 if the command line is wrong.
    """
    carry_out(_analyze, argv, _HELP)


def _analyze(arguments: Sequence[str]) -> None:
    request = read_command_line(arguments)
    require_empty(request.out)
    with replacing_directory(request.out) as folder:
        analysis = analyze(request)
        from autolora.reporting.theory import print_analysis, write_analysis

        write_analysis(analysis, folder)
    print_analysis(analysis)
    print(f"written to {request.out}")


def read_command_line(arguments: Sequence[str]) -> Request:
    """What the arguments ask for.

    Raises:
        ConfigError: with every fault, a line each.
    """
    from autolora.compose import compose

    own = [text for text in arguments if text.partition("=")[0] in Places.model_fields]
    rest = [text for text in arguments if text not in own]
    typed = frozenset(text.partition("=")[0].lstrip("+").partition(".")[0] for text in rest)
    faults: list[str] = []
    places = _or_faults(lambda: parse(Places, own), faults)
    cfg = _or_faults(lambda: compose(rest, beside=tuple(Places.model_fields)), faults)
    # Where the configuration is wrong, what was typed says what else is.
    said = dict(text.lstrip("+").partition("=")[::2] for text in rest)
    name = cfg.strategy.name if cfg else said.get("strategy")
    cost = cfg.budget.cost if cfg else said.get("budget.cost", "parameters")
    theories = (*_WEIGHTS, *_ROWS)
    if "strategy" in typed and name not in theories:
        wrong = f"strategy={name}" if name else "strategy"
        faults.append(f"{wrong}: expected one of the theories, to set its options: {', '.join(theories)}")
    if cost != "parameters":
        faults.append(f"budget.cost={cost}: plans of an analysis are counted in parameters: leave it out")
    if places is None or cfg is None or faults:
        raise ConfigError("\n".join(faults))
    return Request(places.out or _usual_place(places.run, cfg, typed), places.run, cfg, typed)


def _or_faults(read: Callable[[], SectionT], faults: list[str]) -> SectionT | None:
    """What is read, or ``None``, with a line more for each fault."""
    try:
        return read()
    except ConfigError as error:
        faults += str(error).splitlines()
        return None


def _usual_place(run: Path | None, cfg: RunConfig, typed: frozenset[str]) -> Path:
    parts = [run.name] if run is not None else [cfg.backbone.label.replace("/", "_")]
    return Path("analysis", "-".join([*parts, *([cfg.task.name] if "task" in typed else [])]))


def analyze(request: Request) -> Analysis:
    """Analyse the weights; the training rows if a task was typed; and the updates of a run if one was.

    Raises:
        DataError: if the run is not complete, has no LoRA adapters or is of another backbone; or there are no rows.
        BackboneError: if the backbone is nowhere to be found.
        PlanError: if the budget buys nothing, or a weight is no floating-point matrix.
    """
    from autolora.parts import make_problem

    cfg, trained = request.cfg, None
    if request.run is not None:
        trained = read_trained(request.run, cfg.backbone.path)
        theirs = {key: getattr(trained.cfg, key) for key in _FROM_THE_RUN if key not in request.typed}
        cfg = cfg.model_copy(update=theirs)
    problem = make_problem(cfg) if "task" in request.typed else None
    if trained is not None:
        _require_same_backbone(trained, cfg, problem)
    budget, notes = _budget(request, problem, trained)
    analysis = _of_model(cfg, problem, _model(cfg, problem, trained), budget)
    analysis = replace(analysis, notes=(*notes, *analysis.notes))
    return analysis if trained is None else _with_updates(analysis, trained)


# A run ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A complete run: its directory, configuration, and adapters on their backbone."""

    directory: RunDirectory
    cfg: RunConfig
    adapters: Adapters


def read_trained(run: Path, backbone: Path | None) -> Trained:
    """The adapters of a run, on the backbone that they were trained on, which may be in another folder now.

    Raises:
        DataError: if the run is not complete or damaged, or has no LoRA adapters.
        BackboneError: if the backbone is nowhere to be found, or is another one than the run's.
    """
    from autolora.export import kind_of, load, read_run

    directory = RunDirectory(run.parent if run.name == "result.json" else run)
    cfg = read_run(directory, "analysed", backbone)
    kind = kind_of(directory)
    adapters = load(cfg, kind, directory.adapter)[0] if kind == "LORA" else None
    if adapters is None or not adapters.layers:
        raise DataError(f"run={run}: strategy={cfg.strategy.name} has trained no LoRA adapters: name a run that has")
    return Trained(directory, cfg, adapters)


def _require_same_backbone(trained: Trained, cfg: RunConfig, problem: Problem | None) -> None:
    """A backbone or a task that was typed beside a run has to be on the run's weights."""
    from autolora.backbones import locate, weights_fingerprint
    from autolora.parts import compression

    result = trained.directory.read_result()
    theirs, typed = (str(compression(one)) or "neither quantization nor sparsity" for one in (trained.cfg, cfg))
    if typed != theirs:
        raise DataError(
            f"run={trained.directory.path}: it was trained on a backbone with {theirs}, and the one given has {typed}: "
            "say the same of it, or leave backbone out"
        )
    if problem is not None:
        here = problem.backbone_fingerprint
    elif cfg.backbone.name == "none":
        return  # the run's task brings its own model, and no other was typed
    else:
        here = weights_fingerprint(locate(**cfg.backbone.weights).directory)
    if here != result.backbone_fingerprint:
        raise DataError(
            f"run={trained.directory.path}: it was trained on the backbone {result.backbone}, which has other weights "
            f"than {cfg.backbone.label}: leave backbone out, and task if it brings its own model"
        )


def _with_updates(analysis: Analysis, trained: Trained) -> Analysis:
    """The analysis with numbers of the run's updates."""
    from autolora.strategies.spectral import frozen_weight
    from autolora.theory.modules import update_numbers

    updates = {}
    for name, layer in trained.adapters.layers.items():
        weight = frozen_weight(trained.adapters.model, f"{name}.base_layer")
        updates[name] = update_numbers(layer.delta_weight(), weight.T if layer.transposed else weight, layer.rank)
    result = trained.directory.read_result()
    return replace(analysis, run=f"{result.strategy} on {result.task}", updates=updates, found=result.ranks)


# A model --------------------------------------------------------------------------------------------------------------


def _model(cfg: RunConfig, problem: Problem | None, trained: Trained | None) -> nn.Module:
    """The model without adapters: the task's, the run's, or the backbone with a head that is not looked at."""
    if problem is not None:
        problem.build()
        return problem.model
    if trained is not None:
        from autolora.export import build_model

        return build_model(trained.cfg.model_copy(update={"backbone": cfg.backbone}))[0]
    from autolora.backbones import load_backbone
    from autolora.parts import compression

    return load_backbone(**cfg.backbone.weights, num_labels=2, compression=compression(cfg)).model


def _budget(request: Request, problem: Problem | None, trained: Trained | None) -> tuple[Budget, tuple[str, ...]]:
    """What was typed, or else the run's, the task's own, or that of uniform rank 4; and what is to be said of it."""
    if "budget" not in request.typed and trained is not None:
        result = trained.directory.read_result()
        if result.price is None or result.price.budget is None:
            return Budget(params=result.params.budget), ()
        spent = result.params.adapter
        note = (
            f"the run's budget counts {result.price.unit}, and plans of an analysis parameters: theirs is the "
            f"{spent:,} of the run's adapter"
        )
        return Budget(params=spent), (note,)
    given: dict[str, Any] = request.cfg.budget.given()
    default = Budget(rank=4) if problem is None else problem.default_budget
    return (Budget(**given) if given else default) if request.cfg.budget.enabled else Budget(), ()


def _of_model(cfg: RunConfig, problem: Problem | None, model: nn.Module, budget: Budget) -> Analysis:
    """The numbers of every weight, and the plan of each theory."""
    from autolora.adapters import find_sites
    from autolora.parts import adapter_settings
    from autolora.reporting.theory import Analysis
    from autolora.strategies.spectral import frozen_weight
    from autolora.theory.modules import weight_numbers
    from autolora.theory.spectra import spectrum_of

    sites = find_sites(model, adapter_settings(cfg))
    spectra = {name: spectrum_of(frozen_weight(model, name)) for name in sites}
    analysis = Analysis(
        backbone=cfg.backbone.label,
        weights={name: weight_numbers(spectrum) for name, spectrum in spectra.items()},
        spectra=spectra,
        options={name: _options(cfg, name).model_dump() for name in (*_WEIGHTS, *(_ROWS if problem else ()))},
    )
    for name in analysis.options:
        strategy, plan = _plan_of(name, cfg, problem, model, budget)
        notes = (*analysis.notes, *(f"{name}: {note}" for note in strategy.notes))
        analysis = replace(analysis, plans={**analysis.plans, name: plan}, budget=strategy.allowance, notes=notes)
        if name in _ROWS:
            optima = {} if strategy.beta is None else strategy.optima()
            analysis = replace(analysis, codes=strategy.codes, beta=strategy.beta, optima=optima)
    if problem is None:
        return analysis
    notes = (*problem.notes, *analysis.notes)
    return replace(analysis, task=problem.name, data_source=problem.data_source, notes=notes)


def _plan_of(
    name: str, cfg: RunConfig, problem: Problem | None, model: nn.Module, budget: Budget
) -> tuple[Any, RankPlan]:
    """A theory's strategy, as training would use it up to the first step, and its plan; the model is as it was then."""
    from autolora.parts import adapter_settings
    from autolora.run import check_budget
    from autolora.strategies import make_strategy

    strategy: Strategy[Any] = make_strategy(name, _options(cfg, name), budget=budget, max_rank=cfg.max_rank)
    adapters = strategy.attach(model, adapter_settings(cfg))
    try:
        check_budget(strategy)
        if problem is not None:
            strategy.prepare(problem.datamodule.train_dataloader(), problem.loss)
        return strategy, adapters.active_plan()
    finally:
        adapters.detach()


def _options(cfg: RunConfig, name: str) -> Any:
    """The options that were typed for a theory, or its defaults."""
    return cfg.strategy.options if cfg.strategy.name == name else strategy_options(name)()


if __name__ == "__main__":
    main()
