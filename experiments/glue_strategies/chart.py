"""The tables and the figure of the study: ``python experiments/glue_strategies/chart.py`` reads ``results.csv``."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
TASKS = {"cola": "CoLA", "mrpc": "MRPC", "sst2": "SST-2", "mnli": "MNLI"}
CONTROL = "uniform"
LOSSES = {"last_epoch_loss": "training loss of the last epoch", "dev_log_loss": "log loss on dev"}

Runs = dict[str, dict[str, str]]  # rows by seed
Cells = dict[str, dict[str, Runs]]  # by method and task


def main() -> None:
    cells: Cells = defaultdict(lambda: defaultdict(dict))
    afresh: Cells = defaultdict(lambda: defaultdict(dict))
    with (HERE / "results.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            wide = row["strategy"] == CONTROL and float(row["budget_rank"]) > 0.5
            group = cells if row["retrain"] == "none" else afresh
            group[f"{CONTROL}, rank 2" if wide else row["strategy"]][row["task"]][row["seed"]] = row
    print("score on dev, points")
    table(cells, score)
    for column, name in LOSSES.items():
        print(f"\n{name}, less that of {CONTROL}, in hundredths of a nat, by seed")
        table(cells, partial(apart, column))
    if afresh:
        tables_afresh(cells, afresh)
    draw(cells)


def tables_afresh(cells: Cells, afresh: Cells) -> None:
    """What was trained afresh at the ranks that were found, beside the same as they were found, and the control."""
    shown: Cells = {f"{method}, afresh": tasks for method, tasks in afresh.items()}
    for method in (*afresh, CONTROL):
        shown[method] = {task: cells[method][task] for tasks in afresh.values() for task in tasks}
    print("\nscore on dev, points, also trained afresh")
    table(shown, score)
    print(
        f"\n{LOSSES['last_epoch_loss']}, less that of {CONTROL}, in hundredths of a nat, by seed, also trained afresh"
    )
    table(shown, partial(apart, "last_epoch_loss"))


def table(cells: Cells, show: Callable[[Runs, Runs], str]) -> None:
    print("| method |", " | ".join(TASKS.values()), "| adapter parameters |")
    print("|---|" + "---:|" * (len(TASKS) + 1))
    for method, tasks in sorted(cells.items(), key=lambda item: -worth(item[1])):
        shown = [show(tasks[task], cells[CONTROL][task]) if tasks.get(task) else "" for task in TASKS]
        parameters = mean(float(row["adapter_params"]) for runs in tasks.values() for row in runs.values())
        print(f"| {method} |", " | ".join(shown), f"| {parameters:,.0f} |")


def draw(cells: Cells) -> None:
    """Scores of all seeds and their means, a panel for each task, with a line at uniform ranks of the same budget."""
    mpl.rcParams["svg.hashsalt"] = "glue_strategies"  # the same rows give the same file
    methods = sorted(cells, key=lambda method: worth(cells[method]))
    figure, axes = plt.subplots(1, len(TASKS), figsize=(2.6 * len(TASKS) + 1, 3.4), sharey=True, layout="constrained")
    for axis, (task, name) in zip(axes, TASKS.items(), strict=True):
        for y, method in enumerate(methods):
            values = [100 * float(row["value"]) for row in cells[method][task].values()]
            axis.plot(values, [y] * len(values), "o", color="#0072b2", alpha=0.5, markersize=4)
            if values:
                axis.plot(mean(values), y, "|", color="#d55e00", markersize=13, markeredgewidth=2)
        control = [100 * float(row["value"]) for row in cells[CONTROL][task].values()]
        axis.axvline(mean(control), color="#888888", linewidth=0.8)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("dev score, points")
        axis.set_yticks(range(len(methods)), methods)
        axis.grid(axis="x", color="#88888844")
    for kind in ("png", "svg"):
        figure.savefig(HERE / f"scores.{kind}", dpi=130, metadata={"Date": None} if kind == "svg" else None)


def worth(tasks: dict[str, Runs]) -> float:
    return mean(mean(float(row["value"]) for row in runs.values()) for runs in tasks.values() if runs)


def score(runs: Runs, _: Runs) -> str:
    return summary([100 * float(row["value"]) for row in runs.values()])


def summary(values: list[float]) -> str:
    """Mean, standard deviation, and how many there are if not three."""
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}" + ("" if len(values) == 3 else f" ({len(values)})")


def apart(column: str, runs: Runs, control: Runs) -> str:
    seeds = sorted(runs.keys() & control.keys())
    return ", ".join(f"{100 * (float(runs[seed][column]) - float(control[seed][column])):+.1f}" for seed in seeds)


if __name__ == "__main__":
    main()
