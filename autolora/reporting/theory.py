"""What theory said of a model: the record of an analysis, its table in the terminal, and its files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from autolora.files import write_json_atomic
from autolora.plan import RankPlan
from autolora.roles import ROLE_ORDER, depth_of, role_of

if TYPE_CHECKING:
    from rich.console import Console

    from autolora.theory.information import Code
    from autolora.theory.modules import UpdateNumbers, WeightNumbers
    from autolora.theory.spectra import Spectrum


@dataclass(frozen=True)
class Analysis:
    """What :mod:`autolora.analyze` has found.

    Args:
        backbone: its name.
        task, data_source: of the training rows that were looked at; ``None`` without.
        weights, spectra: of every Linear that may carry an adapter, by its name.
        options: of the theories, by theory.
        plans: the ranks that each recommends.
        budget: in parameters; ``None`` without one.
        codes, beta, optima: what codes of modules' inputs say, the multiplier, and the rank at each one's optimum.
        run, updates, found: strategy and task of the run, its updates, and its ranks.
        notes: what the user should know.
    """

    backbone: str
    weights: Mapping[str, WeightNumbers]
    spectra: Mapping[str, Spectrum]
    options: Mapping[str, Mapping[str, Any]]
    task: str | None = None
    data_source: str | None = None
    plans: Mapping[str, RankPlan] = field(default_factory=dict)
    budget: int | None = None
    codes: Mapping[str, Code] = field(default_factory=dict)
    beta: float | None = None
    optima: Mapping[str, int] = field(default_factory=dict)
    run: str | None = None
    updates: Mapping[str, UpdateNumbers] = field(default_factory=dict)
    found: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The content of ``analysis.json``; the parts that were not asked for are null."""
        return {
            "backbone": self.backbone,
            "task": self.task,
            "data_source": self.data_source,
            "run": self.run,
            "budget": self.budget,
            "beta": self.beta,
            "options": {name: dict(options) for name, options in self.options.items()},
            "plans": {name: {"params": plan.params, "ranks": dict(plan)} for name, plan in self.plans.items()},
            "modules": {name: self._module(name) for name in self.weights},
            "notes": list(self.notes),
        }

    def _module(self, name: str) -> dict[str, Any]:
        code, update = self.codes.get(name), self.updates.get(name)
        return {
            "role": role_of(name).value,
            "depth": depth_of(name),
            "weight": asdict(self.weights[name]),
            "information": None if code is None else {**asdict(code), "optimum": self.optima[name]},
            "update": None if update is None else asdict(update),
        }


def write_analysis(analysis: Analysis, folder: Path) -> None:
    """Write ``analysis.json``, a plan of each theory as ``strategy=manual`` reads it, and the figures."""
    from autolora.reporting.figures.canvas import styled
    from autolora.reporting.figures.theory import figures_of

    write_json_atomic(folder / "analysis.json", analysis.to_json())
    for part in ("plans", "figures"):
        (folder / part).mkdir()
    for name, plan in analysis.plans.items():
        write_json_atomic(folder / "plans" / f"{name}.json", dict(plan))
    with styled():
        for figure in figures_of(analysis):
            figure.write(folder / "figures")
            figure.close()


def print_analysis(analysis: Analysis, console: Console | None = None) -> None:
    """Print a row for each role, and the ranks that are recommended."""
    from rich.console import Console

    from autolora.reporting.summary import heat_table

    console = console or Console()
    rows = f", {analysis.task} ({analysis.data_source})" if analysis.task else ""
    console.print(f"\n{analysis.backbone}{rows}: {len(analysis.weights)} Linears", highlight=False)
    console.print(_table(analysis))
    budget = "without a budget" if analysis.budget is None else f"budget {analysis.budget:,}"
    for name, plan in analysis.plans.items():
        table = heat_table(plan)
        table.title = f"ranks by strategy={name} ({plan.params:,} parameters, {budget})"
        console.print(table)
    for note in analysis.notes:
        console.print(f"  note: {note}", highlight=False)


def _table(analysis: Analysis) -> Any:
    """Means over the modules of a role."""
    from rich.table import Table

    table = Table(title="means by role", title_justify="left")
    for column in ("role", "Linears", *(label for label, _ in columns_of(analysis))):
        table.add_column(column, justify="left" if column == "role" else "right")
    by_role: dict[str, list[str]] = {}
    for name in analysis.weights:
        by_role.setdefault(role_of(name).value, []).append(name)
    for role in (role.value for role in ROLE_ORDER if role.value in by_role):
        names = by_role[role]
        means = (_mean(values.get(name) for name in names) for _, values in columns_of(analysis))
        table.add_row(role, str(len(names)), *means)
    return table


def columns_of(analysis: Analysis) -> list[tuple[str, dict[str, float | None]]]:
    """What is shown of every module, by a short name."""
    weights, updates = analysis.weights, analysis.updates
    columns: list[tuple[str, dict[str, float | None]]] = [
        ("stable rank", {name: one.stable_rank for name, one in weights.items()}),
        ("effective rank", {name: one.effective_rank for name, one in weights.items()}),
        ("above MP edge", {name: one.above_edge for name, one in weights.items()}),
        ("above hard threshold", {name: one.above_hard for name, one in weights.items()}),
    ]
    for i, share in enumerate((80, 90, 95)):
        columns.insert(2 + i, (f"{share} % of energy", {name: one.needed[i] for name, one in weights.items()}))
    if analysis.optima:
        columns.append(("bottleneck rank", dict(analysis.optima)))
    if updates:
        columns += [
            ("ΔW: rank", {name: updates[name].rank if name in updates else 0 for name in weights}),
            ("ΔW: effective rank", {name: one.effective_rank for name, one in updates.items()}),
            ("ΔW: overlap with W, out", {name: one.output_overlap for name, one in updates.items()}),
            ("ΔW: overlap with W, in", {name: one.input_overlap for name, one in updates.items()}),
        ]
    return columns


def _mean(values: Iterable[float | None]) -> str:
    """The mean, or a dash where a value is not known."""
    known = list(values)
    there = [value for value in known if value is not None]
    if not there:
        return "-"
    mean = fmean(there)
    return f"{mean:.2f}" if mean < 10 else f"{mean:.0f}"
