"""The figure and the tables of the study: ``python experiments/data_size/chart.py`` reads its rows."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
SIZES = (500, 5_000, 50_000)
COLOURS = {0.5: "#0072b2", 2.0: "#e69f00", 8.0: "#009e73"}

# What a run is read for: its column, the factor it is shown with, and its digits.
COLUMNS = {
    "value": ("dev accuracy, points", 100, 1),
    "dev_log_loss": ("log loss on dev, nats", 1, 3),
}

Cells = dict[tuple[str, int, float], list[float]]


def main() -> None:
    cells: Cells = defaultdict(list)
    with (HERE / "results.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            for column, (_, factor, _) in COLUMNS.items():
                cells[column, int(row["max_train"]), float(row["budget_rank"])].append(factor * float(row[column]))
    for column, (label, _, digits) in COLUMNS.items():
        print(f"\n| {label} |", " | ".join(f"r = {rank:g}" for rank in COLOURS), "|")
        print("|---|" + "---:|" * len(COLOURS))
        for size in SIZES:
            print(f"| {size:,} rows |", " | ".join(summary(cells[column, size, r], digits) for r in COLOURS), "|")
    draw(cells)


def summary(values: list[float], digits: int) -> str:
    """Mean, standard deviation over seeds, and how many there are if not three."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    number = "" if len(values) == 3 else f" ({len(values)})"
    return f"{mean(values):.{digits}f}{spread}{number}" if values else ""


def draw(cells: Cells) -> None:
    mpl.rcParams["svg.hashsalt"] = "data_size"  # the same rows give the same file
    figure, axes = plt.subplots(1, len(COLUMNS), figsize=(6.6, 3.2), layout="constrained")
    for axis, (column, (label, _, _)) in zip(axes, COLUMNS.items(), strict=True):
        for rank, colour in COLOURS.items():
            shown = [size for size in SIZES if cells[column, size, rank]]
            for size in shown:
                values = cells[column, size, rank]
                axis.plot([size] * len(values), values, "o", color=colour, alpha=0.5, markersize=4)
            means = [mean(cells[column, size, rank]) for size in shown]
            axis.plot(shown, means, color=colour, label=f"uniform rank {rank:g}")
        axis.set_xscale("log")
        axis.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
        axis.minorticks_off()
        axis.set_xlabel("training rows of MNLI")
        axis.set_title(label, fontsize=10)
        axis.grid(color="#88888844")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    for kind in ("png", "svg"):
        figure.savefig(HERE / f"data_size.{kind}", dpi=130, metadata={"Date": None} if kind == "svg" else None)


if __name__ == "__main__":
    main()
