"""Scores against what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

from autolora.reporting.figures.canvas import Figure, broken, grid, legend, looks
from autolora.reporting.runs import Run, Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LESS = " (less is better)"


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
        dress(ax, task, some, axis, found)
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
        dress(ax, task, some, "parameters of the budget", [point for found in here.values() for point in found])
    legend(drawn, styles)
    return figure


def panels(variants: Sequence[Variant]) -> Iterator[Figure]:
    """Two by two: score, efficiency, parameters and trade-off, by strategy and task.

    Points and errors share no axis: where there are tasks of both kinds, each kind has a figure.
    """
    tasks = task_runs(variants)
    colours, markers = looks(list(tasks)), looks([variant.label for variant in variants])
    in_points = {task: run for task, run in tasks.items() if not run.lower_is_better}
    errors = {task: run for task, run in tasks.items() if run.lower_is_better}
    if in_points:
        yield _panel("panel", variants, in_points, colours, markers)
    if errors:
        yield _panel("panel_errors" if in_points else "panel", variants, errors, colours, markers)


@dataclass(frozen=True)
class _Quantity:
    """What one of the panels shows of each variant; ``None`` where a variant has no such number."""

    title: str
    of: Callable[[Point], float | None]
    form: str = ",.4g"
    is_error: bool = False


def _panel(
    name: str,
    variants: Sequence[Variant],
    tasks: Mapping[str, Run],
    colours: Mapping[str, Mapping[str, Any]],
    markers: Mapping[str, Mapping[str, Any]],
) -> Figure:
    """One of :func:`panels`, of tasks that are all in points or all errors."""
    table = {task: {p.label: p for p in points(variants, task, adapter_parameters)} for task in tasks}
    labels = [one.label for one in variants if any(one.label in by_label for by_label in table.values())]
    rows = 0.9 + sum(0.14 * max(2, len(tasks)) * (1 + broken(label).count("\n")) for label in labels)
    drawn, (score, efficiency, parameters, trade) = grid(4, columns=2, width=4.6, height=min(30.0, max(2.6, rows)))
    errors = any(run.lower_is_better for run in tasks.values())
    quantities, said = _of_errors(tasks) if errors else _of_points()
    caption = (
        f"{said}, by strategy and task: colours are tasks, and in the last panel marks are strategies. What has no "
        "adapter parameters is not in the second panel."
    )
    figure = Figure(name, caption, drawn)
    for ax, quantity in zip((score, efficiency, parameters), quantities, strict=True):
        _by_strategy(figure, ax, quantity, labels, table, colours)
    for ax in (efficiency, trade):
        ax.tick_params(axis="y", labelleft=ax is trade)
    found = [(task, point) for task, by_label in table.items() for point in by_label.values()]
    for task, point in found:
        style = {"color": colours[task]["color"], "marker": markers[point.label]["marker"]}
        _mark(figure, trade, point, style, "adapter parameters", task)
    trade.set(xlabel="adapter parameters", ylabel=quantities[0].title)
    _cost_axis(trade, [point.cost for _, point in found])
    if errors:
        _error_axis(trade, "y", [point.score for _, point in found])
    shown = {task: {"color": colours[task]["color"], "marker": "s"} for task in tasks}
    legend(drawn, shown | {label: {"color": "#888888", "marker": markers[label]["marker"]} for label in labels})
    return figure


_PARAMETERS = _Quantity("adapter parameters", lambda p: p.cost, ",.0f")


def _of_points() -> tuple[tuple[_Quantity, ...], str]:
    """Score, efficiency and parameters, and what they and the trade-off are."""
    efficiency = _Quantity("score / 1,000 parameters", lambda p: 1000 * p.score / p.cost if p.cost else None)
    return (_Quantity("score", lambda p: p.score), efficiency, _PARAMETERS), (
        "Score, score for each thousand adapter parameters, adapter parameters, and score against parameters "
        "(trade-off)"
    )


def _of_errors(tasks: Mapping[str, Run]) -> tuple[tuple[_Quantity, ...], str]:
    """The same of errors, which are multiplied with parameters: divided, the largest error would be the best."""
    what = ", ".join(sorted({_metric(run) for run in tasks.values()}))
    error = _Quantity(what + _LESS, lambda p: p.score, ".4g", is_error=True)
    product = f"{what} × adapter parameters{_LESS}"
    efficiency = _Quantity(product, lambda p: p.score * p.cost if p.cost else None, ".4g", is_error=True)
    return (error, efficiency, _PARAMETERS), (
        "Error, error times adapter parameters (half the error with twice the parameters comes to the same), adapter "
        "parameters, and error against parameters (trade-off); less is better in each"
    )


def _by_strategy(
    figure: Figure,
    ax: Axes,
    quantity: _Quantity,
    labels: Sequence[str],
    table: Mapping[str, Mapping[str, Point]],
    colours: Mapping[str, Mapping[str, Any]],
) -> None:
    """A group of bars for each variant, the first on top, a bar for each task.

    Errors may differ by powers of ten. On a logarithmic axis a bar would begin anywhere, so that they are squares.
    """
    width = 0.8 / max(1, len(table))
    values = {
        (task, label): value
        for task, by_label in table.items()
        for label, point in by_label.items()
        if (value := quantity.of(point)) is not None
    }
    for (task, label), value in values.items():
        place = labels.index(label) + (list(table).index(task) - (len(table) - 1) / 2) * width
        colour = colours[task]["color"]
        (mark,) = (
            ax.plot(value, place, "s", markersize=5, color=colour)
            if quantity.is_error
            else ax.barh(place, value, width, color=colour)
        )
        figure.tip(mark, f"{label}, {task}: {quantity.title} {value:{quantity.form}}")
    ax.set_title(quantity.title, fontsize=9)
    ax.set_yticks(range(len(labels)), [broken(label) for label in labels], fontsize=8)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    _few_ticks(ax)
    ax.grid(axis="y", visible=quantity.is_error)
    if quantity.is_error:
        _error_axis(ax, "x", list(values.values()))


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


def dress(ax: Axes, task: str, some: Run, axis: str, found: Sequence[Point]) -> None:
    """Title, labels and scales of a panel."""
    ax.set_title(broken(task), fontsize=9)
    ax.set(xlabel=axis, ylabel=_metric(some) + _LESS * some.lower_is_better)
    _cost_axis(ax, [point.cost for point in found])
    if some.lower_is_better:
        _error_axis(ax, "y", [point.score for point in found])


def _metric(run: Run) -> str:
    return run.result.metrics.primary.replace("_", " ")


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


def _error_axis(ax: Axes, side: Literal["x", "y"], errors: Sequence[float]) -> None:
    """Errors that span more than a factor of 8 have a logarithmic axis, if none is 0: there it would not be seen."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if not errors or min(errors) <= 0 or max(errors) <= 8 * min(errors):
        return
    ax.set(**{f"{side}scale": "log"})
    axis = ax.xaxis if side == "x" else ax.yaxis
    if max(errors) < 300 * min(errors):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _few_ticks(ax: Axes) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    if ax.get_xlim()[1] >= 1000:  # below, it would write 400m for 0.4
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
