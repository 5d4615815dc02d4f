"""Ways to serve several tasks with one budget, each trained and scored as ordinary runs.

*separate*: every task its share of the budget, uniform ranks, by itself. *isolated*: ranks by the merged plans
(:mod:`autolora.multitask.allocate`), every task its own components; with ``orthogonality`` each keeps out of the
subspaces of those before it. *merged*: one adapter for all tasks, with as many components in a module as the isolated
plans have there together, trained on all tasks at once. Isolated and merged have the same parameters, module by module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autolora.compose import compose, in_quotes
from autolora.config import RunConfig
from autolora.files import write_json_atomic
from autolora.multitask.probe import Probe, component_values
from autolora.plan import Budget, RankPlan, Site
from autolora.results import RunDirectory, RunResult

if TYPE_CHECKING:
    from autolora.training.problem import Problem

Arm = Literal["separate", "isolated", "merged"]
_UNWRITTEN = ("strategy.path=plan.json", "strategy.fingerprint=none yet")  # of a plan that is made later


@dataclass(frozen=True)
class Outcome:
    """A task under an arm.

    Args:
        run: the directory of the run; that of a merged arm is the same for all tasks.
        result: of that run.
        task: its name.
    """

    run: Path
    result: RunResult
    task: str

    @property
    def metric(self) -> str:
        """The task's primary metric."""
        from autolora.tasks.glue import GLUE

        return GLUE[self.task].primary

    @property
    def value(self) -> float | None:
        """It on dev."""
        return self.result.metrics.all[f"{self._prefix}{self.metric}"]

    @property
    def adapter(self) -> Path:
        """The task's own adapter, as stock PEFT reads it."""
        return RunDirectory(self.run).adapter / self._prefix

    @property
    def split(self) -> str:
        """The name of its dev rows among the run's predictions."""
        return f"{self._prefix}dev"

    @property
    def _prefix(self) -> str:
        """What is before the names of all that a run on several tasks has for this one."""
        return f"{self.task}/" if self.result.task == "mixture" else ""


@dataclass(frozen=True)
class Bench:
    """What all arms share.

    Args:
        tasks: their names.
        overrides: of ``python -m autolora.train``, without tasks, strategies and budgets.
        budget: overrides that say how much there is to spend.
        orthogonality: weight of the overlap with the tasks before; 0 for none.
    """

    tasks: Sequence[str]
    overrides: Sequence[str]
    budget: Sequence[str] = ()
    orthogonality: float = 0.0

    def config(self, task: str, *more: str) -> RunConfig:
        """The configuration of a run on one task, or on ``mixture``; what an arm says goes before the overrides."""
        mixture = [f"task.tasks=[{','.join(self.tasks)}]"] if task == "mixture" else []
        said = {one.partition("=")[0] for one in more}
        kept = [one for one in self.overrides if one.lstrip("+").partition("=")[0] not in said]
        return compose([f"task={task}", *mixture, *kept, *more])

    def check(self, arms: Sequence[Arm], probe_steps: int, probe_rank: int) -> None:
        """Make a configuration of every kind that the arms will use, before anything heavy loads.

        Raises:
            ConfigError: with every fault of the first that has any.
        """
        task = self.tasks[0]
        self._budgeted()
        self._of_probe(task, probe_steps, probe_rank)
        for arm in arms:
            if arm == "separate":
                self._of_separate(task, 0)
            elif arm == "isolated":
                self._of_isolated(task, *_UNWRITTEN, others=[])
            else:
                self._of_merged(*_UNWRITTEN)

    def _budgeted(self) -> RunConfig:
        """A run with the budget, which the arms share."""
        return self.config(self.tasks[0], "strategy=uniform", *self.budget)

    def _of_probe(self, task: str, steps: int, rank: int) -> RunConfig:
        return self.config(
            task, "strategy=uniform", "budget=none", f"max_rank={rank}", "trainer.max_epochs=-1",
            f"trainer.max_steps={steps}",
        )  # fmt: skip

    def _of_separate(self, task: str, share: int) -> RunConfig:
        return self.config(task, "strategy=uniform", f"budget.params={share}")

    def _of_isolated(self, task: str, *plan: str, others: Sequence[Path]) -> RunConfig:
        strategy = ["strategy=manual"]
        if self.orthogonality:
            named = ",".join(map(in_quotes, others))
            strategy = ["strategy=o_lora", f"strategy.weight={self.orthogonality}", f"strategy.others=[{named}]"]
        return self.config(task, *strategy, *plan, "budget=none")

    def _of_merged(self, *plan: str) -> RunConfig:
        return self.config("mixture", "strategy=manual", *plan, "budget=none")

    def read_rows(self) -> None:
        """Read the rows of all tasks, so that what is missing is found before the first training.

        Raises:
            DataError: if there are none of a task.
            BackboneError: if the backbone is nowhere to be found.
        """
        from autolora.parts import make_problem

        make_problem(self.config("mixture", "strategy=uniform"))

    def sites(self) -> dict[str, Site]:
        """The modules of the backbone that have adapters."""
        from autolora.adapters import find_sites
        from autolora.export import build_model
        from autolora.parts import adapter_settings

        cfg = self._budgeted()
        return find_sites(build_model(cfg)[0], adapter_settings(cfg))

    def separate(self, budget: int) -> dict[str, Outcome]:
        """Every task by itself: an equal share of the budget, uniform ranks."""
        share = budget // len(self.tasks)
        return {task: _outcome(self._of_separate(task, share), task) for task in self.tasks}

    def isolated(self, plans: Mapping[str, RankPlan], folder: Path) -> dict[str, Outcome]:
        """Every task at its own plan, which is written to the folder."""
        found: dict[str, Outcome] = {}
        for task in self.tasks:
            file = folder / f"{task}.json"
            write_json_atomic(file, dict(plans[task]))
            others = [outcome.adapter for outcome in found.values()]
            found[task] = _outcome(self._of_isolated(task, f"strategy.path={in_quotes(file)}", others=others), task)
        return found

    def merged(self, plans: Mapping[str, RankPlan], folder: Path) -> dict[str, Outcome]:
        """One adapter with the components of all plans, trained on all tasks."""
        file = folder / "merged.json"
        write_json_atomic(file, dict(together(plans)))
        first = _outcome(self._of_merged(f"strategy.path={in_quotes(file)}"), self.tasks[0])
        return {task: Outcome(first.run, first.result, task) for task in self.tasks}

    def probe(self, task: str, steps: int, rank: int) -> Probe:
        """Train for some steps at a rank everywhere, and value the components on the held-out rows."""
        from autolora.export import load

        cfg = self._of_probe(task, steps, rank)
        outcome = _outcome(cfg, task)
        problem = rows_of(cfg)
        adapters, _ = load(cfg, "LORA", outcome.adapter)
        values = component_values(adapters, problem, single_rows(problem))
        scale = constant_loss(problem)
        ordered = {name: sorted((own / scale).tolist(), reverse=True) for name, own in values.items()}
        return Probe(dict(adapters.sites), {name: tuple(own) for name, own in ordered.items()})

    def total_budget(self, sites: Mapping[str, Site]) -> int:
        """Parameters of all tasks: what ``budget.params`` says, or that of uniform ranks for each of them."""
        cfg = self._budgeted()
        if cfg.budget.params is not None:
            return int(cfg.budget.params)
        each = Budget(rank=cfg.budget.rank or 4.0).resolve(RankPlan.uniform(sites, cfg.max_rank))
        assert each is not None
        return each * len(self.tasks)


def together(plans: Mapping[str, RankPlan]) -> RankPlan:
    """The sum of the ranks of all plans, module by module, as far as a module goes."""
    sites = next(iter(plans.values())).sites
    return RankPlan(sites, {m: min(site.full_rank, sum(p[m] for p in plans.values())) for m, site in sites.items()})


def _outcome(cfg: RunConfig, task: str) -> Outcome:
    """Run a configuration, unless it is complete."""
    from autolora.run import run_one

    result = run_one(cfg)
    of = RunDirectory.of(cfg, result.data_source, result.data_fingerprint, result.backbone_fingerprint)
    return Outcome(of.path, result, task)


def rows_of(cfg: RunConfig) -> Problem:
    """The problem of a run, built: its held-out rows and its loss."""
    from autolora.parts import make_problem

    problem = make_problem(cfg)
    problem.build()
    return problem


def single_rows(problem: Problem, limit: int = 256) -> Any:
    """At most so many held-out rows, one by one, ready for :func:`component_values`."""
    from autolora.training.problem import read

    for batch, labels in read(problem, problem.model, "heldout", limit):
        for i in range(len(labels)):
            yield {key: value[i : i + 1] for key, value in batch.items()}, labels[i : i + 1]


def constant_loss(problem: Problem, limit: int = 256) -> float:
    """The loss of the best constant predictor on those rows: their entropy, or the variance of scores."""
    import torch

    labels = torch.cat([labels for _, labels in single_rows(problem, limit)])
    if labels.is_floating_point():
        return float(labels.var(correction=0))
    shares = labels.bincount() / len(labels)
    return float(-(shares * shares.clamp(min=1e-12).log()).sum())
