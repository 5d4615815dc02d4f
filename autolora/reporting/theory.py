"""What theory said of a model: the record of an analysis, its table in the terminal, and its files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from autolora.files import write_json_atomic
from autolora.plan import RankPlan
from autolora.roles import ROLE_ORDER, depth_of, role_of

if TYPE_CHECKING:
    from rich.console import Console

    from autolora.theory.information import Code
    from autolora.theory.modules import UpdateNumbers, WeightNumbers
    from autolora.theory.spectra import Spectrum


_LEGEND = (
    "Stable and effective rank; directions for 80, 90 and 95 % of the energy, above the edge of noise, and above the "
    "hard threshold"
)
_IB_LEGEND = "; IB: rank at the information bottleneck's optimum"
_UPDATE_LEGEND = (
    "rank, effective rank, components for 90 % of its energy, and how much of its outputs and inputs lies in W's "
    "largest directions, over what chance has."
)
_DIGITS = 6
"""Of singular values in ``analysis.json``: they are most of the file."""


@dataclass(frozen=True)
class Analysis:
    """What :mod:`autolora.analyze` has found.

    Args:
        backbone: its name.
        task, data_source: of the training rows that were looked at; ``None`` without.
        weights, spectra: of every Linear that may carry an adapter, by its name.
        options: of the theories, by theory.
        plans: the ranks that each recommends.
        budget: in the unit of the plans; ``None`` without one.
        codes, beta, optima: what codes of modules' inputs say, the multiplier, and the rank at each one's optimum;
            ``None`` and empty where they say no more about the labels than about permutations of them.
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
        """The content of ``analysis.json``; the parts that were not asked for are null.

        Singular values of weights are those that are known, the largest :data:`autolora.theory.spectra.LARGEST` of a
        large one, to :data:`_DIGITS` significant digits. Where inputs say no more about the labels than about
        permutations of them, ``beta`` and every ``optimum`` are null, and the plan is uniform.
        """
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
            "weight": {
                **asdict(self.weights[name]),
                "singular_values": [float(f"{value:.{_DIGITS}g}") for value in self.spectra[name].values.tolist()],
            },
            "information": None if code is None else {**asdict(code), "optimum": self.optima.get(name)},
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
    console.print(f"{_LEGEND}{_IB_LEGEND if analysis.beta is not None else ''}.", highlight=False)
    columns = columns_of(analysis)
    console.print(_table("W, means by role", list(analysis.weights), [one for one in columns if one.of == "weight"]))
    if analysis.updates:
        console.print(f"\nThe update by {analysis.run}: {_UPDATE_LEGEND}", highlight=False)
        console.print(
            _table("ΔW, means by role", list(analysis.updates), [one for one in columns if one.of == "update"])
        )
    for name, plan in analysis.plans.items():
        limit = "" if analysis.budget is None else f" of {analysis.budget:,}"
        console.print(f"\nstrategy={name}: {plan.cost:,}{limit} {plan.unit}", highlight=False)
        table = heat_table(plan)
        table.title = None
        console.print(table)
    for note in analysis.notes:
        console.print(f"  note: {note}", highlight=False)


def _table(title: str, names: Sequence[str], columns: Sequence[Column]) -> Any:
    """Means over the modules of each role."""
    from rich.table import Table

    table = Table("role", title=title, title_justify="left")
    for column in columns:
        table.add_column(column.short, justify="right")
    by_role: dict[str, list[str]] = {}
    for name in names:
        by_role.setdefault(role_of(name).value, []).append(name)
    for role in (role.value for role in ROLE_ORDER if role.value in by_role):
        table.add_row(role, *(_mean(column.values.get(name) for name in by_role[role]) for column in columns))
    return table


class Column(NamedTuple):
    """A number of every module: what it is of, its name in a table and in a figure, and the values that are known."""

    of: Literal["weight", "update"]
    short: str
    label: str
    values: dict[str, float | None]


def columns_of(analysis: Analysis) -> list[Column]:
    """The numbers that are shown."""
    weights, updates = analysis.weights, analysis.updates

    def of_weight(short: str, label: str, value: Callable[[WeightNumbers], float | None]) -> Column:
        return Column("weight", short, label, {name: value(one) for name, one in weights.items()})

    def of_update(short: str, label: str, value: Callable[[UpdateNumbers], float]) -> Column:
        return Column("update", short, label, {name: value(one) for name, one in updates.items()})

    columns = [
        of_weight("stable", "stable rank", lambda one: one.stable_rank),
        of_weight("effect.", "effective rank", lambda one: one.effective_rank),
        of_weight("80 %", "directions for 80 % of the energy", lambda one: one.needed[0]),
        of_weight("90 %", "directions for 90 % of the energy", lambda one: one.needed[1]),
        of_weight("95 %", "directions for 95 % of the energy", lambda one: one.needed[2]),
        of_weight("edge", "directions above the edge of noise", lambda one: one.above_edge),
        of_weight("hard", "directions above the hard threshold", lambda one: one.above_hard),
    ]
    if analysis.beta is not None:
        columns.append(Column("weight", "IB", "rank at the bottleneck's optimum", dict(analysis.optima)))
    if updates:
        ranks: dict[str, float | None] = {name: analysis.found.get(name, 0) for name in weights}
        columns += [
            Column("update", "ΔW", "rank of the update", ranks),
            of_update("effect.", "effective rank of the update", lambda one: one.effective_rank),
            of_update("90 %", "components for 90 % of the update", lambda one: one.needed),
            of_update(
                "out", "overlap with W over chance, outputs", lambda one: _over(one.output_overlap, one.output_chance)
            ),
            of_update(
                "in", "overlap with W over chance, inputs", lambda one: _over(one.input_overlap, one.input_chance)
            ),
        ]
    return columns


def _over(value: float, chance: float) -> float:
    return value / chance if chance else 0.0


def _mean(values: Iterable[float | None]) -> str:
    """The mean, or a dash where a value is not known."""
    known = list(values)
    there = [value for value in known if value is not None]
    if not there:
        return "-"
    mean = fmean(there)
    return f"{mean:.0f}" if mean >= 10 or not mean % 1 else f"{mean:.2f}"
