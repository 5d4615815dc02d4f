"""The figure and the tables of the study: ``python experiments/budget_curve/chart.py`` reads its rows."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
RANKS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
TASKS = {"cola": "CoLA, Matthews", "sst2": "SST-2, accuracy", "mrpc": "MRPC, accuracy", "mnli": "MNLI, accuracy"}

# A file of rows and a strategy make a line: what it is called, and how it is drawn.
LINES = {
    ("results.csv", "uniform"): ("pooler trained", "#0072b2"),
    ("frozen_pooler.csv", "uniform"): ("pooler frozen", "#e69f00"),
    ("frozen_pooler.csv", "random"): ("frozen, random modules", "#d55e00"),
}

Line = tuple[str, str]
Scores = dict[tuple[Line, str, float], dict[str, float]]


def main() -> None:
    scores: Scores = defaultdict(dict)
    for name in ("results.csv", "frozen_pooler.csv"):
        with (HERE / name).open(newline="") as stream:
            for row in csv.DictReader(stream):
                place = (name, row["strategy"]), row["task"], float(row["budget_rank"])
                scores[place][row["seed"]] = 100 * float(row["value"])
    tasks = [task for task in TASKS if any(key[1] == task for key in scores)]
    for line, (label, _) in LINES.items():
        print(f"\n| {label} |", " | ".join(f"r = {rank:g}" for rank in RANKS), "|")
        print("|---|" + "---|" * len(RANKS))
        for task in tasks:
            cells = [summary(list(scores[line, task, rank].values())) for rank in RANKS]
            if any(cells):
                print(f"| {TASKS[task]} |", " | ".join(cells), "|")
    draw(scores, tasks)


def summary(values: list[float]) -> str:
    """Mean, standard deviation over seeds, and how many there are if not three."""
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    number = "" if len(values) == 3 else f" ({len(values)})"
    return f"{mean(values):.1f}{spread}{number}" if values else ""


def draw(scores: Scores, tasks: list[str]) -> None:
    mpl.rcParams["svg.hashsalt"] = "budget_curve"  # the same rows give the same file
    figure, axes = plt.subplots(1, len(tasks), figsize=(3.1 * len(tasks), 3.1), layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for line, (label, colour) in LINES.items():
            shown = [rank for rank in RANKS if scores[line, task, rank]]
            for rank in shown:
                values = list(scores[line, task, rank].values())
                axis.plot([rank] * len(values), values, "o", color=colour, alpha=0.5, markersize=4)
            means = [mean(scores[line, task, rank].values()) for rank in shown]
            axis.plot(shown, means, color=colour, label=label if shown else None)
        axis.set_xscale("log", base=2)
        axis.set_xticks(RANKS, [f"{rank:g}" for rank in RANKS])
        axis.set_title(TASKS[task], fontsize=10)
        axis.set_xlabel("budget, in uniform ranks")
        axis.grid(color="#88888844")
    axes[0][0].set_ylabel("dev score, points")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    for kind in ("png", "svg"):
        figure.savefig(HERE / f"budget_curve.{kind}", dpi=130, metadata={"Date": None} if kind == "svg" else None)


if __name__ == "__main__":
    main()
