"""The figure and the table of the study: ``python experiments/budget_curve/chart.py`` reads ``results.csv``."""

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

STRATEGIES = {"uniform": "#0072b2", "random": "#d55e00"}

Scores = dict[tuple[str, str, float], dict[str, float]]


def main() -> None:
    scores: Scores = defaultdict(dict)
    with (HERE / "results.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            scores[row["task"], row["strategy"], float(row["budget_rank"])][row["seed"]] = float(row["value"])
    lines = sorted({key[:2] for key in scores}, key=lambda line: (list(TASKS).index(line[0]), line[1] == "random"))
    print("| task | modules |", " | ".join(f"r = {rank:g}" for rank in RANKS), "|")
    print("|---|---|" + "---|" * len(RANKS))
    for task, strategy in lines:
        cells = [summary(list(scores[task, strategy, rank].values())) for rank in RANKS]
        print(f"| {TASKS[task]} | {strategy} |", " | ".join(cells), "|")
    draw(scores, list(dict.fromkeys(task for task, _ in lines)))


def summary(values: list[float]) -> str:
    """Mean, standard deviation over seeds, and how many there are."""
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread} ({len(values)})" if values else ""


def draw(scores: Scores, tasks: list[str]) -> None:
    figure, axes = plt.subplots(1, len(tasks), figsize=(3.1 * len(tasks), 2.8), layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for strategy, colour in STRATEGIES.items():
            shown = [rank for rank in RANKS if scores[task, strategy, rank]]
            for rank in shown:
                values = [100 * value for value in scores[task, strategy, rank].values()]
                axis.plot([rank] * len(values), values, "o", color=colour, alpha=0.5, markersize=4)
            means = [100 * mean(scores[task, strategy, rank].values()) for rank in shown]
            axis.plot(shown, means, color=colour, label=strategy if shown else None)
        axis.set_xscale("log", base=2)
        axis.set_xticks(RANKS, [f"{rank:g}" for rank in RANKS])
        axis.set_title(TASKS[task], fontsize=10)
        axis.set_xlabel("budget, in uniform ranks")
        axis.grid(color="#88888844")
    axes[0][0].set_ylabel("dev score, points")
    axes[0][0].legend(frameon=False)
    for kind in ("png", "svg"):
        figure.savefig(HERE / f"budget_curve.{kind}", dpi=130, metadata={"Date": None} if kind == "svg" else None)


if __name__ == "__main__":
    main()
