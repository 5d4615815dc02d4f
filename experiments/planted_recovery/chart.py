"""The chart and the tables of the study: ``python experiments/planted_recovery/chart.py`` reads ``results.csv``.

``other_processor.csv`` or ``early_pruning.csv`` as an argument: its tables alone.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from itertools import accumulate
from statistics import mean, median

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from run import (
    CEILING,
    DRAWN,
    EARLY,
    ENCODER,
    EVERYWHERE,
    FOR_OTHERS,
    HERE,
    IN_ENCODER,
    OTHERS,
    PROFILES,
    REGIMES,
    rows_of,
)

from autolora.tasks.planted import plant

Row = Mapping[str, str]
Key = tuple[str, str, str]


def misplaced(row: Row) -> int:
    """Components that are wrong and need not be.

    Spurious or missed ones, whichever are more; where the total is too large and has to be spent, only missed ones;
    where it is too small as many missed ones as would have fit in the place of spurious ones and in what was left over.
    """
    spurious, missed = int(row["spurious"]), int(row["missed"])
    if row["regime"] == "total_too_large" and row["method"] != CEILING:
        return missed
    return exchangeable(row) if row["regime"] == "total_too_small" else max(spurious, missed)


def exchangeable(row: Row) -> int:
    """How many missed components, the cheapest first, the spurious ones and what was not spent would have paid for."""
    true, found = ([int(rank) for rank in row[key].split()] for key in ("true_ranks", "found_ranks"))
    costs = [site.cost for site in plant(ranks=true).true_plan.sites.values()]
    wrong = [(cost, rank - real) for cost, rank, real in zip(costs, found, true, strict=True)]
    purse = int(row["told_params"]) - int(row["params"]) + sum(cost * more for cost, more in wrong if more > 0)
    prices = sorted(cost for cost, more in wrong for _ in range(-more))
    return sum(spent <= purse for spent in accumulate(prices))


def main(name: str = "results.csv") -> None:
    runs: dict[Key, list[Row]] = defaultdict(list)
    for row in rows_of(HERE / name):
        runs[row["method"], row["regime"], row["total"]].append(row)
    everywhere = {regime: [(regime, total) for total in PROFILES] for regime in REGIMES}
    table("regime", everywhere, [*EVERYWHERE, *EARLY], runs, by_method=False)
    others = {regime: [(regime, total) for total in totals] for regime, totals in FOR_OTHERS.items()}
    table("method", others, [*EVERYWHERE, *OTHERS], runs)
    table("method", {ENCODER: [(ENCODER, DRAWN)]}, [*IN_ENCODER], runs, error_as=".3f")
    if name == "results.csv":
        draw(runs)


def table(
    corner: str,
    groups: Mapping[str, list[tuple[str, str]]],
    methods: list[str],
    runs: Mapping[Key, list[Row]],
    *,
    by_method: bool = True,
    error_as: str = ".0e",
) -> None:
    """Print runs without a misplaced component, the mean number of them, and the median excess error."""
    cells = {
        (name, method): cell([row for problem in problems for row in runs.get((method, *problem), [])], error_as)
        for name, problems in groups.items()
        for method in methods
    }
    methods = [method for method in methods if any(cells[name, method] for name in groups)]
    if not methods:
        return
    rows, columns = (methods, list(groups)) if by_method else (list(groups), methods)
    print(f"| {corner} |", " | ".join(columns), "|")
    print("|---|" + "---|" * len(columns))
    for row in rows:
        print(f"| {row} |", " | ".join(cells[(c, row) if by_method else (row, c)] for c in columns), "|")
    print()


def cell(rows: list[Row], error_as: str) -> str:
    if not rows:
        return ""
    wrong = [misplaced(row) for row in rows]
    error = median(float(row["excess_error"]) for row in rows)
    return f"{wrong.count(0)}/{len(rows)}, {mean(wrong):.1f}, {error:{error_as}}"


def draw(runs: Mapping[Key, list[Row]]) -> None:
    """Methods by problems: the mean number of misplaced components, and as colour the share of runs without one."""
    mpl.rcParams["svg.hashsalt"] = "planted recovery"  # the same rows give the same file
    columns = [(regime, total) for regime in REGIMES for total in PROFILES]
    methods = [method for method in (*EVERYWHERE, *OTHERS) if any(runs.get((method, *column)) for column in columns)]
    counts = [[[misplaced(row) for row in runs.get((method, *column), [])] for column in columns] for method in methods]
    shares = [[wrong.count(0) / len(wrong) if wrong else float("nan") for wrong in row] for row in counts]
    figure, axes = plt.subplots(figsize=(13, 0.42 * len(methods) + 2.2), layout="constrained")
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(counts):
        for x, wrong in enumerate(row):
            if wrong:
                color = "black" if shares[y][x] > 0.6 else "white"
                axes.text(x, y, f"{mean(wrong):.1f}", ha="center", va="center", color=color)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_xticks(range(len(columns)), [total for _, total in columns])
    axes.set_xlabel("true components in all six modules")
    regimes = axes.secondary_xaxis("top")
    regimes.set_xticks([1 + 3 * i for i in range(len(REGIMES))], [name.replace("_", " ") for name in REGIMES])
    regimes.tick_params(length=0)
    for edge in range(3, len(columns), 3):
        axes.axvline(edge - 0.5, color="white", linewidth=2)
    figure.colorbar(image, label="share of runs without a misplaced component", pad=0.01)
    axes.set_title("Planted ranks: mean number of misplaced components (colour: share of runs without one)", pad=28)
    for kind in ("svg", "png"):
        figure.savefig(HERE / f"recovery.{kind}", dpi=150, metadata={"Date": None} if kind == "svg" else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
