"""Gates and ranks over training, from the histories of runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autolora.reporting.figures.canvas import Figure, broken, grid, legend, looks
from autolora.reporting.figures.scores import task_runs
from autolora.reporting.runs import Run, Variant
from autolora.results import RunDirectory
from autolora.roles import role_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

_MOST = 24
_GATE = "mean gate"
_GATE_LINE: dict[str, Any] = {"color": "#888888", "linestyle": "--"}


def over_training(variants: Sequence[Variant]) -> Figure | None:
    """Open gates by role over training, a panel for each strategy that changes them.

    One run of each: the first task and seed. A line is the mean number of active components of the modules of a role,
    which is their rank at that step; the broken line, with the axis on the right, is the mean of the gates themselves
    while they learn.
    """
    tasks = list(task_runs(variants))
    histories = {}
    for variant in variants:
        run = next((run for task in tasks for _, run in sorted(variant.runs.get(task, {}).items())), None)
        table = read_history(run) if run else None
        if run is not None and table is not None and _changes(table):
            histories[variant.label] = (run, table)
    left_out = len(histories) - _MOST
    histories = dict(list(histories.items())[:_MOST])
    if not histories:
        return None
    drawn, axes = grid(len(histories), width=3.4, height=2.4)
    figure = Figure(
        "over_training",
        "Active components (open gates) of a module over training, mean by role, and the mean of all gates while they "
        "learn: probabilities of selectors, sizes of others. One run for each strategy."
        + (
            f" {left_out} more {'strategy is' if left_out == 1 else 'strategies are'} not shown."
            if left_out > 0
            else ""
        ),
        drawn,
    )
    roles = sorted({role for _, table in histories.values() for role in _by_role(table)})
    styles = looks(roles)
    learned = False
    for ax, (label, (run, table)) in zip(axes, histories.items(), strict=True):
        for role, values in _by_role(table).items():
            (line,) = ax.plot(table["step"], values, color=styles[role]["color"], linewidth=1.4)
            figure.tip(
                line, f"{label}, {role}: {values.iloc[0]:.3g} components at first, {values.iloc[-1]:.3g} at last"
            )
        ax.set_title(broken(f"{label} ({run.task}, seed {run.result.seed})"), fontsize=8)
        ax.set(xlabel="step", ylabel="components per module")
        learned |= _draw_gates(figure, ax, label, table)
    shown: dict[str, dict[str, Any]] = {role: {"color": styles[role]["color"], "linestyle": "-"} for role in roles}
    legend(drawn, shown | ({_GATE: _GATE_LINE} if learned else {}))
    return figure


def _draw_gates(figure: Figure, ax: Axes, label: str, table: DataFrame) -> bool:
    """The mean gate on an axis of its own, where it was written down."""
    if "mean_gate" not in table or table["mean_gate"].isna().all():
        return False
    gates = table[["step", "mean_gate"]].dropna()
    right = ax.twinx()
    (line,) = right.plot(gates["step"], gates["mean_gate"], linewidth=1, **_GATE_LINE)
    first, last = gates["mean_gate"].iloc[0], gates["mean_gate"].iloc[-1]
    figure.tip(line, f"{label}: {_GATE} {first:.3g} at first, {last:.3g} at last")
    right.set_ylim(bottom=0)
    right.set_ylabel(_GATE)
    right.spines["right"].set_visible(True)
    right.grid(visible=False)
    return True


def read_history(run: Run) -> DataFrame | None:
    """The history of the training in which ranks were chosen, or ``None`` if it cannot be read or is empty."""
    import pandas as pd

    try:
        table = pd.read_csv(RunDirectory(run.path).history)
    except (OSError, ValueError):
        return None
    return table if len(table) and "step" in table else None


def _changes(table: DataFrame) -> bool:
    ranks = table[[column for column in table if str(column).startswith("rank:")]]
    return bool((ranks.nunique() > 1).any())


def _by_role(table: DataFrame) -> dict[str, Any]:
    groups: dict[str, list[str]] = {}
    for column in map(str, table):
        if column.startswith("rank:"):
            groups.setdefault(str(role_of(column.removeprefix("rank:")).value), []).append(column)
    return {role: table[columns].mean(axis=1) for role, columns in groups.items()}
