"""Table and figure of the study: ``python experiments/multitask/chart.py`` reads results.json and orthogonal.json."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import stdev
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
COLOURS = {"mrpc": "#0072b2", "rte": "#d55e00", "cola": "#009e73"}


def main() -> None:
    plain, orthogonal = (json.loads((HERE / name).read_text()) for name in ("results.json", "orthogonal.json"))
    arms = plain["arms"] | {"isolated, orthogonal": orthogonal["arms"]["isolated"]}
    tasks = plain["tasks"]
    print(f"| arm | {' | '.join(tasks)} |")
    print(f"|---|{'---:|' * len(tasks)}")
    for arm, by_task in arms.items():
        print(f"| {arm} |", " | ".join(cell(by_task[task]) for task in tasks), "|")
    print(f"\n| seed | {' | '.join(f'complexity of {task}' for task in tasks)} | parameters | gap | cosines |")
    print(f"|---|{'---:|' * len(tasks)}---:|---:|---|")
    for record in plain["seeds"]:
        print(f"| {record['seed']} |", " | ".join(allocation(record, tasks)), "|")
    draw(arms, tasks)


def cell(entry: dict[str, Any]) -> str:
    """Mean ± standard deviation in points, and the interval of the difference to separate adapters."""
    score = f"{100 * entry['mean']:.1f} ± {100 * stdev(entry['values']):.1f}"
    if "difference" not in entry:
        return score
    apart = entry["difference"]
    return f"{score}; {100 * apart['mean']:+z.1f} [{100 * apart['low']:+z.1f}, {100 * apart['high']:+z.1f}]"


def allocation(record: dict[str, Any], tasks: list[str]) -> list[str]:
    """What was measured before the training, and what was spent."""
    complexity = [f"{record['complexity'][task]:.1f}" for task in tasks]
    shares = ", ".join(f"{record['params'][task]:,}" for task in tasks)
    cosines = "; ".join(f"{pair} {cosine:+.2f}" for pair, cosine in record["gradient_cosines"].items())
    return [*complexity, f"{shares} of {record['budget']:,}", f"{record['gap']:.2%}", cosines]


def draw(arms: dict[str, Any], tasks: list[str]) -> None:
    mpl.rcParams["svg.hashsalt"] = "multitask"  # the same rows give the same file
    figure, axes = plt.subplots(1, len(tasks), figsize=(3.2 * len(tasks), 2.4), sharey=True, layout="constrained")
    for axis, task in zip(axes, tasks, strict=True):
        for place, (_, by_task) in enumerate(reversed(arms.items())):
            scores = [100 * value for value in by_task[task]["values"]]
            axis.plot(scores, [place] * len(scores), "o", color=COLOURS[task], alpha=0.5, markersize=5)
            axis.plot(100 * by_task[task]["mean"], place, "|", color=COLOURS[task], markersize=14, markeredgewidth=2)
        axis.set_title(f"{task}: dev {next(iter(arms.values()))[task]['metric']}, points", fontsize=9)
        axis.grid(color="#88888844")
    axes[0].set_yticks(range(len(arms)), [*reversed(arms)])
    for kind in ("png", "svg"):
        figure.savefig(HERE / f"scores.{kind}", dpi=130, metadata={"Date": None} if kind == "svg" else None)


if __name__ == "__main__":
    main()
