"""Scores against what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from autolora.reporting.figures.canvas import Figure, broken, grid, legend, looks
from autolora.reporting.runs import Run, Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Point:
    """One variant on one task: mean cost, mean score and its standard deviation over seeds."""

    label: str
    cost: float
    score: float
    sd: float
    seeds: int


def points(variants: Sequence[Variant], task: str, cost: Callable[[Run], float]) -> list[Point]:
    """The variants that have the task."""
    found = []
    for variant in variants:
        runs = [run for run in variant.runs.get(task, {}).values() if run.value is not None]
        if runs:
            values = [shown_score(run) for run in runs]
            sd = stdev(values) if len(values) > 1 else 0.0
            found.append(Point(variant.label, fmean(map(cost, runs)), fmean(values), sd, len(values)))
    return found


def shown_score(run: Run) -> float:
    """The primary metric as it is drawn: in points, or an error as it is."""
    value = run.result.metrics.value
    assert value is not None
    return value if run.lower_is_better else 100 * value


def front(found: Sequence[Point], *, lower_is_better: bool) -> list[Point]:
    """The points that no other beats in cost and score at once (Pareto), by cost."""
    best: list[Point] = []
    sign = -1 if lower_is_better else 1
    for point in sorted(found, key=lambda p: (p.cost, -sign * p.score)):
        if not best or sign * point.score > sign * best[-1].score:
            best.append(point)
    return best


def score_against(
    variants: Sequence[Variant], name: str, caption: str, axis: str, cost: Callable[[Run], float]
) -> Figure:
    """Score against a cost, a panel for each task, with the Pareto front."""
    tasks = task_runs(variants)
    drawn, axes = grid(len(tasks))
    styles = looks([variant.label for variant in variants])
    figure = Figure(name, caption, drawn)
    for ax, (task, some) in zip(axes, tasks.items(), strict=True):
        found = points(variants, task, cost)
        on_front = front(found, lower_is_better=some.lower_is_better)
        ax.plot([p.cost for p in on_front], [p.score for p in on_front], color="#888888", linewidth=1, zorder=1)
        for point in found:
            _mark(figure, ax, point, styles[point.label], axis)
        dress(ax, task, some, axis, [p.cost for p in found], log_score=some.lower_is_better)
    legend(drawn, styles)
    return figure


def budget_curves(variants: Sequence[Variant]) -> Figure | None:
    """Score against the budget, a line for what was run at several on one task; ``None`` if nothing was."""
    lines: dict[str, dict[str, list[Point]]] = {}
    for family in dict.fromkeys(variant.family for variant in variants):
        group = [variant for variant in variants if variant.family == family]
        for task in task_runs(group):
            budgeted = [
                one for one in group if all(run.result.params.budget for run in one.runs.get(task, {}).values())
            ]
            found = points(budgeted, task, lambda run: float(run.result.params.budget or 0))
            if len({point.cost for point in found}) > 1:
                lines.setdefault(family, {})[task] = sorted(found, key=lambda point: point.cost)
    tasks = {task: run for task, run in task_runs(variants).items() if any(task in line for line in lines.values())}
    if not tasks:
        return None
    drawn, axes = grid(len(tasks))
    styles = looks(list(lines))
    figure = Figure("budget_curves", "Score against the budget. Bars: one standard deviation over seeds.", drawn)
    for ax, (task, some) in zip(axes, tasks.items(), strict=True):
        here = {family: line[task] for family, line in lines.items() if task in line}
        for family, found in here.items():
            ax.plot([p.cost for p in found], [p.score for p in found], color=styles[family]["color"], linewidth=1)
            for point in found:
                _mark(figure, ax, point, styles[family], "parameters of the budget")
        costs = [point.cost for found in here.values() for point in found]
        dress(ax, task, some, "parameters of the budget", costs, log_score=some.lower_is_better)
    legend(drawn, styles)
    return figure


def panel(variants: Sequence[Variant]) -> Figure:
    """Two by two: score, efficiency, parameters and trade-off, by strategy and task."""
    tasks = task_runs(variants)
    labels = [variant.label for variant in variants]
    rows = 0.9 + sum(0.14 * max(2, len(tasks)) * (1 + broken(label).count("\n")) for label in labels)
    drawn, (score, efficiency, parameters, trade) = grid(4, columns=2, width=4.6, height=min(30.0, max(2.6, rows)))
    colours, markers = looks(list(tasks)), looks(labels)
    caption = (
        "Score, score for each thousand adapter parameters, adapter parameters, and score against parameters "
        "(trade-off), by strategy and task: colours are tasks, and in the last panel marks are strategies."
    )
    figure = Figure("panel", caption, drawn)
    table = {task: {p.label: p for p in points(variants, task, adapter_parameters)} for task in tasks}
    kinds: list[tuple[Any, str, Callable[[Point], float]]] = [
        (score, "score", lambda p: p.score),
        (efficiency, "score / 1,000 parameters", lambda p: p.score / max(p.cost / 1000, 1e-9) if p.cost else 0.0),
        (parameters, "adapter parameters", lambda p: p.cost),
    ]
    for ax, title, length in kinds:
        _bars(figure, ax, title, labels, table, colours, length)
    for ax in (efficiency, trade):
        ax.tick_params(axis="y", labelleft=ax is trade)
    for task, by_label in table.items():
        for label, point in by_label.items():
            style = {"color": colours[task]["color"], "marker": markers[label]["marker"]}
            _mark(figure, trade, point, style, "adapter parameters", task)
    trade.set(xlabel="adapter parameters", ylabel="score")
    _cost_axis(trade, [point.cost for by_label in table.values() for point in by_label.values()])
    shown = {task: {"color": colours[task]["color"], "marker": "s"} for task in tasks}
    legend(drawn, shown | {label: {"color": "#888888", "marker": markers[label]["marker"]} for label in labels})
    return figure


def _bars(
    figure: Figure,
    ax: Axes,
    title: str,
    labels: Sequence[str],
    table: Mapping[str, Mapping[str, Point]],
    colours: Mapping[str, Mapping[str, Any]],
    length: Callable[[Point], float],
) -> None:
    """A group of bars for each variant, the first on top, a bar for each task."""
    width = 0.8 / max(1, len(table))
    for i, (task, by_label) in enumerate(table.items()):
        for y, label in enumerate(labels):
            if label in by_label:
                value = length(by_label[label])
                place = y + (i - (len(table) - 1) / 2) * width
                (bar,) = ax.barh(place, value, width, color=colours[task]["color"])
                figure.tip(bar, f"{label}, {task}: {title} {value:,.4g}")
    ax.set_title(title, fontsize=9)
    ax.set_yticks(range(len(labels)), [broken(label) for label in labels], fontsize=8)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    _few_ticks(ax)
    ax.grid(axis="y", visible=False)


def adapter_parameters(run: Run) -> float:
    """What is trained besides the head: A and B, and whatever else a method has."""
    return float(run.result.params.adapter + run.result.params.extra)


def task_runs(variants: Sequence[Variant]) -> dict[str, Run]:
    """One run of each task, by task in alphabetical order."""
    some = {run.task: run for variant in variants for run in variant.all_runs() if run.value is not None}
    return dict(sorted(some.items()))


def _mark(figure: Figure, ax: Axes, point: Point, style: Mapping[str, Any], axis: str, task: str | None = None) -> None:
    ax.errorbar(
        point.cost, point.score, yerr=point.sd or None, fmt="none", ecolor=style["color"], elinewidth=1, capsize=2
    )
    (mark,) = ax.plot(point.cost, point.score, linestyle="none", markersize=6, **style)
    seeds = f"± {point.sd:.3g} over {point.seeds} seeds" if point.seeds > 1 else "one seed"
    where = f"{point.label}, {task}" if task else point.label
    figure.tip(mark, f"{where}: {point.score:.4g} ({seeds}), {axis} {point.cost:,.0f}")


def dress(ax: Axes, task: str, some: Run, axis: str, costs: Sequence[float], *, log_score: bool) -> None:
    """Title, labels and scales of a panel."""
    ax.set_title(broken(task), fontsize=9)
    ax.set(xlabel=axis, ylabel=some.result.metrics.primary.replace("_", " "))
    _cost_axis(ax, costs)
    if log_score:
        ax.set_yscale("log")


def _cost_axis(ax: Axes, costs: Sequence[float]) -> None:
    """Costs that span more than a factor of 8 have a logarithmic axis, one with a straight part if some are 0."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    positive = [cost for cost in costs if cost > 0]
    if not positive or max(positive) <= 8 * min(positive):
        _few_ticks(ax)
        return
    if len(positive) == len(costs):
        ax.set_xscale("log")
        subs = (1, 2, 5) if max(positive) < 300 * min(positive) else (1,)
        ax.xaxis.set_major_locator(LogLocator(subs=subs))
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        ax.set_xscale("symlog", linthresh=min(positive))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _few_ticks(ax: Axes) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    if ax.get_xlim()[1] >= 1000:  # below, it would write 400m for 0.4
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
