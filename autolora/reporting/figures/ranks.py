"""Where the ranks went: layer × role for each strategy, and found against true ranks where those are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from autolora.reporting.figures.canvas import Figure, broken, grid, looks
from autolora.reporting.runs import Run, Variant
from autolora.roles import rank_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST = 24


def rank_heatmaps(variants: Sequence[Variant]) -> Figure | None:
    """Ranks by role and depth, a panel for each strategy, averaged over tasks and seeds; ``None`` if nobody has any."""
    grids = {variant.label: mean_grid(variant.all_runs()) for variant in variants}
    shown = {label: cells for label, cells in list(grids.items()) if cells and max(cells.values()) > 0}
    shown = dict(list(shown.items())[:_MOST])
    if not shown:
        return None
    left_out = sum(1 for cells in grids.values() if cells and max(cells.values()) > 0) - len(shown)
    more = f" {left_out} more {'strategy is' if left_out == 1 else 'strategies are'} not shown." if left_out else ""
    drawn, axes = grid(len(shown), width=3.0, height=2.1)
    caption = f"Ranks by role and layer, averaged over modules of a cell, tasks and seeds.{more}"
    figure = Figure("ranks", caption, drawn)
    largest = max(max(cells.values()) for cells in shown.values())
    for ax, (label, cells) in zip(axes, shown.items(), strict=True):
        heatmap(figure, ax, label, cells, largest, "rank")
    return figure


def mean_grid(runs: Sequence[Run]) -> dict[tuple[str, str], float]:
    """Mean rank by role and depth over runs."""
    sums: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        if run.result.ranks:
            for cell, rank in rank_grid(run.result.ranks)[2].items():
                sums.setdefault(cell, []).append(float(rank))
    return {cell: fmean(values) for cell, values in sums.items()}


def heatmap(
    figure: Figure, ax: Axes, label: str, cells: Mapping[tuple[str, str], float], largest: float, what: str
) -> None:
    """One panel of role × layer, the brightest where a cell has the ``largest`` value; ``what`` a value is."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = list(dict.fromkeys(column for _, column in cells))
    colours = colormaps["viridis"]
    for (row, column), value in cells.items():
        x, y = columns.index(column), rows.index(row)
        shade = value / largest if largest else 0.0
        patch = ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colours(shade), edgecolor="none"))
        figure.tip(patch, f"{label}: {row}, layer {column}: {what} {_short(value)}")
        ink = "black" if shade > 0.6 else "white"
        ax.text(x, y, _short(value), ha="center", va="center", fontsize=6, color=ink, gid="label")
    ax.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    ax.set_xticks(range(len(columns)), columns, fontsize=7)
    ax.set_yticks(range(len(rows)), rows, fontsize=7)
    ax.set_title(broken(label), fontsize=8)
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _short(value: float) -> str:
    """Two digits, or the whole part where that has more."""
    return f"{value:.2g}" if abs(value) < 99.5 else f"{value:.0f}"


def found_against_true(variants: Sequence[Variant]) -> Figure | None:
    """Found against true ranks, a point for each module and run; ``None`` without planted tasks."""
    by_label: dict[str, list[tuple[int, int]]] = {}
    for variant in variants:
        for run in variant.all_runs():
            planted = run.result.planted
            if planted is not None and planted.found is not None:
                pairs = [(true, planted.found.get(name, 0)) for name, true in planted.true.items()]
                by_label.setdefault(variant.label, []).extend(pairs)
    if not by_label:
        return None
    drawn, axes = grid(len(by_label), width=2.6, height=2.5)
    figure = Figure(
        "planted", "Found against true ranks of planted tasks; the larger a mark, the more modules are there.", drawn
    )
    styles: dict[str, dict[str, Any]] = looks(list(by_label))
    top = max(max(pair) for pairs in by_label.values() for pair in pairs)
    for ax, (label, pairs) in zip(axes, by_label.items(), strict=True):
        ax.plot([0, top], [0, top], color="#888888", linewidth=0.8, zorder=1)
        for true, found in sorted(set(pairs)):
            count = pairs.count((true, found))
            (mark,) = ax.plot(
                true,
                found,
                "o",
                color=styles[label]["color"],
                alpha=0.7,
                markersize=4 + 10 * (count / len(pairs)) ** 0.5,
            )
            figure.tip(mark, f"{label}: true rank {true}, found {found}: {count} of {len(pairs)} modules")
        exact = sum(true == found for true, found in pairs) / len(pairs)
        ax.set_title(broken(f"{label}: {exact:.0%} exact"), fontsize=8)
        ax.set(xlabel="true rank", ylabel="found rank", aspect="equal")
    return figure
