"""Figures of an analysis: numbers of weights by role and layer, their bulk, bits, updates and plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import sqrt
from typing import TYPE_CHECKING, Any

from autolora.reporting.figures.canvas import Figure, broken, grid, legend, looks
from autolora.reporting.figures.ranks import heatmap
from autolora.roles import Role, depth_of, mean_cells, rank_grid, role_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from autolora.reporting.theory import Analysis
    from autolora.theory.information import Code
    from autolora.theory.modules import WeightNumbers
    from autolora.theory.spectra import Spectrum

Numbers = Mapping[str, float | None]
_MOST = 6
"""Modules of which a figure shows each by itself."""


def figures_of(analysis: Analysis) -> Iterator[Figure]:
    """Every figure that the analysis has something for."""
    from autolora.reporting.theory import columns_of

    columns = columns_of(analysis)
    of_weights: dict[str, Numbers] = {column.label: column.values for column in columns if column.of == "weight"}
    of_updates: dict[str, Numbers] = {column.label: column.values for column in columns if column.of == "update"}
    yield heatmaps("weights", "Numbers of the pretrained weights by role and layer.", of_weights)
    if any(depth_of(name) is not None for name in analysis.weights):
        yield over_depth(of_weights)
    yield bulk(analysis)
    if analysis.codes:
        yield bits(analysis)
    if of_updates:
        yield heatmaps("updates", "Numbers of the run's updates by role and layer.", of_updates)
        yield update_spectra(analysis)
    plans: dict[str, Numbers] = {name: dict(plan) for name, plan in analysis.plans.items()}
    if analysis.found:
        plans[f"the run: {analysis.run}"] = dict(analysis.found)
    yield heatmaps("plans", "Recommended ranks by role and layer.", plans, together=True)


def heatmaps(name: str, caption: str, columns: Mapping[str, Numbers], *, together: bool = False) -> Figure:
    """Role × layer, a panel for each column; of one scale if they are ``together``, else each of its own."""
    cells = {label: mean_cells(_known(values)) for label, values in columns.items()}
    drawn, axes = grid(len(cells), width=3.0, height=2.1)
    figure = Figure(name, caption, drawn)
    largest = {label: max(found.values(), default=0.0) for label, found in cells.items()}
    for ax, (label, found) in zip(axes, cells.items(), strict=True):
        heatmap(figure, ax, label, found, max(largest.values()) if together else largest[label], label)
    return figure


def over_depth(columns: Mapping[str, Numbers]) -> Figure:
    """The same numbers over the layers, a line for each role; modules outside the layers are left out."""
    from matplotlib.ticker import MaxNLocator

    drawn, axes = grid(len(columns), width=3.0, height=2.1)
    figure = Figure("over_depth", "Numbers of the pretrained weights over the layers, by role.", drawn)
    roles = rank_grid({name: 0 for values in columns.values() for name in values if depth_of(name) is not None})[0]
    styles = looks(roles)
    for ax, (label, values) in zip(axes, columns.items(), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for (role, depth), value in mean_cells(_known(values)).items():
            if depth != "-":
                lines.setdefault(role, []).append((int(depth), value))
        for role, points in lines.items():
            (line,) = ax.plot(*zip(*sorted(points), strict=True), linewidth=1.2, markersize=3.5, **styles[role])
            figure.tip(line, f"{role}: {label} {', '.join(f'{value:.3g}' for _, value in sorted(points))}")
        ax.set_title(broken(label), fontsize=8)
        ax.set(xlabel="layer")
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(drawn, {role: {**styles[role], "linestyle": "-"} for role in roles})
    return figure


def bulk(analysis: Analysis) -> Figure:
    """Singular values of a few weights against the law of pure noise, with both thresholds."""
    names = some_of_each_role(list(analysis.weights))
    drawn, axes = grid(len(names), width=3.0, height=2.3)
    caption = (
        "Singular values of some weights, and the Marchenko-Pastur law of noise as large as their median says: what is "
        "right of the lines is signal, as far as the bars follow the curve; where they do not, weights are not noise "
        "and a few directions."
    )
    figure = Figure("bulk", caption, drawn)
    for ax, name in zip(axes, names, strict=True):
        _bulk(figure, ax, name, analysis.spectra[name], analysis.weights[name])
    law, edge, hard = _LINES
    legend(drawn, {"noise (Marchenko-Pastur)": law, "edge": edge, "hard threshold": hard})
    return figure


_LINES: tuple[dict[str, Any], dict[str, Any], dict[str, Any]] = (
    {"color": "#d55e00", "linestyle": "-"},
    {"color": "#009e73", "linestyle": "--"},
    {"color": "#cc79a7", "linestyle": "-."},
)


def _bulk(figure: Figure, ax: Axes, name: str, spectrum: Spectrum, numbers: WeightNumbers) -> None:
    import numpy as np

    from autolora.theory.random_matrix import mp_density

    values = spectrum.values.numpy()
    counts, edges = np.histogram(values, bins=min(60, max(10, len(values) // 6)))
    bars = ax.bar(edges[:-1], counts, np.diff(edges), align="edge", color="#0072b2", alpha=0.55)
    for count, left, right, bar in zip(counts, edges[:-1], edges[1:], bars, strict=True):
        figure.tip(bar, f"{name}: {count} singular values from {left:.3g} to {right:.3g}")
    p, q = sorted(spectrum.shape)
    unit = numbers.noise * sqrt(q)
    if unit > 0:
        x = np.linspace(max(0.0, 1 - sqrt(p / q)), 1 + sqrt(p / q), 400)[1:-1]
        expected = p * (edges[1] - edges[0]) / unit * 2 * x * mp_density(x**2, p / q)
        ax.plot(unit * x, expected, linewidth=1.4, **_LINES[0])
        for place, style in ((numbers.edge, _LINES[1]), (numbers.hard, _LINES[2])):
            ax.axvline(place, linewidth=1.2, **style)
    ax.set_title(broken(short(name)), fontsize=8)
    ax.set_xlabel(f"singular value; {numbers.above_edge} and {numbers.above_hard} above", fontsize=7)
    ax.set_ylabel("count", fontsize=7)


def bits(analysis: Analysis) -> Figure:
    """What codes of modules' inputs say, over their rank, and the criterion with its optimum."""
    owners: dict[int, list[str]] = {}
    for name, code in analysis.codes.items():
        owners.setdefault(id(code), []).append(name)  # who reads one tensor has one code
    names = some_of_each_role([group[0] for group in owners.values()])
    labels = {name: short(*owners[id(analysis.codes[name])]) for name in names}
    beta = analysis.beta
    curves: list[tuple[str, Callable[[Code], tuple[float, ...]]]] = [
        ("I(X; Z), bits", lambda code: code.about_inputs),
        ("I(Z; Y) in excess of chance, bits", lambda code: code.about_labels),
    ]
    if beta is not None:
        curves.append((f"I(X; Z) - {beta:.3g} I(Z; Y)", lambda code: code.criterion(beta)))
    drawn, axes = grid(len(curves), width=3.2, height=2.6)
    caption = (
        "What a code of r principal directions of a module's inputs says about the inputs and, in excess of chance, "
        "about the labels, and the information bottleneck's criterion, over the rank; marks are the optima."
    )
    figure = Figure("bits", caption, drawn)
    styles = looks(names)
    for ax, (label, values) in zip(axes, curves, strict=True):
        for name in names:
            code = analysis.codes[name]
            (line,) = ax.plot(code.ranks, values(code), color=styles[name]["color"], linewidth=1.2)
            figure.tip(line, f"{labels[name]}: {label}")
            best = analysis.optima.get(name)
            if best and label == curves[-1][0] and beta is not None:
                (mark,) = ax.plot(best, values(code)[code.ranks.index(best)], markersize=6, **styles[name])
                figure.tip(mark, f"{labels[name]}: optimum at rank {best}")
        ax.axhline(0, color="#888888", linewidth=0.8)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.set_title(broken(label), fontsize=8)
        ax.set(xlabel="rank of the code")
    legend(drawn, {labels[name]: {**styles[name], "linestyle": "-"} for name in names})
    return figure


def update_spectra(analysis: Analysis) -> Figure:
    """Singular values of every update over the largest one, and overlaps with the weight over what chance has."""
    from matplotlib.ticker import MaxNLocator

    drawn, (spectra, overlaps) = grid(2, width=3.8, height=2.9)
    caption = (
        "Singular values of the run's updates over the largest of each, a line for each module; and how much of an "
        "update's row space (in) and column space (out) lies in the weight's largest directions, against what random "
        "directions have: on the line there is nothing to it."
    )
    figure = Figure("update_spectra", caption, drawn)
    styles = looks(list(dict.fromkeys(role_of(name).value for name in analysis.updates)))
    chance: list[float] = []
    for name, one in analysis.updates.items():
        style = styles[role_of(name).value]
        largest = one.singular_values[0] or 1.0
        ranks = range(1, one.rank + 1)
        (line,) = spectra.plot(ranks, [v / largest for v in one.singular_values], color=style["color"], linewidth=1)
        figure.tip(line, f"{name}: {one.needed} of {one.rank} components explain 90 %")
        for side, x, y, filled in (
            ("out", one.output_chance, one.output_overlap, True),
            ("in", one.input_chance, one.input_overlap, False),
        ):
            face = style["color"] if filled else "none"
            (mark,) = overlaps.plot(x, y, linestyle="none", markersize=5, markerfacecolor=face, **style)
            figure.tip(mark, f"{name}: overlap {y:.3g} on the side of its {side}puts, by chance {x:.3g}")
            chance.append(x)
    overlaps.plot([0, max(chance)], [0, max(chance)], color="#888888", linewidth=0.8)
    spectra.set(xlabel="component", ylabel="singular value over the largest", ylim=(0, 1.02))
    overlaps.xaxis.set_major_locator(MaxNLocator(4))
    spectra.xaxis.set_major_locator(MaxNLocator(integer=True))
    overlaps.set(xlabel="overlap by chance", ylabel="overlap with W (open: in, filled: out)")
    legend(drawn, styles)
    return figure


def some_of_each_role(names: list[str], most: int = _MOST) -> list[str]:
    """A module of each role, from the middle of the model, at most so many; of modules without roles the first ones."""
    by_role: dict[str, list[str]] = {}
    for name in names:
        by_role.setdefault(role_of(name).value, []).append(name)
    chosen = [group[len(group) // 2] for group in by_role.values()] if len(by_role) > 1 else names
    return chosen[:most]


def short(*names: str) -> str:
    """Roles and layer of modules of one layer; a module without a role has its name."""
    roles = [role_of(name) for name in names]
    if Role.other in roles:
        return ", ".join(names)
    depth = depth_of(names[0])
    return ", ".join(role.value for role in roles) + ("" if depth is None else f", layer {depth}")


def _known(values: Numbers) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}
