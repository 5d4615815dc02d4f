"""Table and figure of the study: ``python experiments/search_cost/chart.py`` reads its rows, and those of the studies
whose cells it shares."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
STUDIES = ("budget_curve", "glue_strategies", "search_cost")
TASK = "cola"
COLUMNS = ("adapter_params", "peak_trainable", "passes", "plans_measured", "total_seconds")
SUMMED = ("passes", "total_seconds")

Row = dict[str, str]


def main() -> None:
    cells = {row["config_hash"]: row for row in rows()}
    ways: dict[str, list[Row]] = defaultdict(list)
    for row in cells.values():
        ways[name_of(row)].append(row)
    ranks = [found for found in ways.values() if found[0]["strategy"] == "uniform"]
    target = max(ranks, key=heldout)  # over all seeds
    ways["uniform, rank chosen by hand"] = by_hand([row for found in ranks for row in found])
    print(f"target: {name_of(target[0])}, {points(target)}\n")
    print("| way | adapter | at its peak | passes | plans | seconds | score | from the target |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for way, found in sorted(ways.items(), key=lambda item: -value(item[1])):
        print(f"| {way} |", " | ".join(columns(found, target)), "|")
    draw(ways, value(target))


def rows() -> Iterator[Row]:
    for study in STUDIES:
        with (HERE.parent / study / "results.csv").open(newline="") as stream:
            yield from (row for row in csv.DictReader(stream) if row["task"] == TASK)


def name_of(row: Row) -> str:
    rank = f" {float(row['budget_rank']):g}" if row["strategy"] == "uniform" else ""
    return row["strategy"] + rank + ("" if row["retrain"] == "none" else ", trained afresh")


def by_hand(curve: Sequence[Row]) -> list[Row]:
    """Every rank is trained, and each seed takes the one that is best on its held-out rows, as one person would."""
    chosen = []
    for seed in sorted({row["seed"] for row in curve}):
        tried = [row for row in curve if row["seed"] == seed]
        best = max(tried, key=lambda row: float(row["heldout_value"]))
        cost = {key: str(sum(float(row[key]) for row in tried)) for key in SUMMED}
        chosen.append(best | cost | {"plans_measured": str(len(tried))})
    return chosen


def columns(found: Sequence[Row], target: Sequence[Row]) -> list[str]:
    aims = {row["seed"]: float(row["value"]) for row in target}
    apart = [100 * (float(row["value"]) - aims[row["seed"]]) for row in found if row["seed"] in aims]
    difference = f"{mean(apart):+.1f} ± {stdev(apart):.1f}" if len(apart) > 1 else ""
    return [*(f"{mean(float(row[key]) for row in found):,.0f}" for key in COLUMNS), points(found), difference]


def heldout(found: Sequence[Row]) -> float:
    return mean(float(row["heldout_value"]) for row in found)


def value(found: Sequence[Row]) -> float:
    return 100 * mean(float(row["value"]) for row in found)


def points(found: Sequence[Row]) -> str:
    spread = f" ± {100 * stdev(float(row['value']) for row in found):.1f}" if len(found) > 1 else ""
    return f"{value(found):.1f}{spread} ({len(found)})"


def draw(ways: dict[str, list[Row]], target: float) -> None:
    mpl.rcParams["svg.hashsalt"] = "search_cost"  # the same rows give the same file
    ordered = sorted(ways, key=lambda way: value(ways[way]))
    figure, axis = plt.subplots(figsize=(8.0, 0.28 * len(ordered) + 1.2), layout="constrained")
    axis.axvline(target, color="#777777", linestyle="--", linewidth=1)
    for place, way in enumerate(ordered):
        colour = "#0072b2" if way.startswith("uniform") else "#d55e00"
        scores = [100 * float(row["value"]) for row in ways[way]]
        axis.plot(scores, [place] * len(scores), "o", color=colour, alpha=0.4, markersize=4)
        axis.plot(mean(scores), place, "|", color=colour, markersize=12, markeredgewidth=2)
    axis.set_yticks(range(len(ordered)), ordered, fontsize=8)
    batches = axis.secondary_yaxis("right")
    passes = [f"{mean(float(row['passes']) for row in ways[way]):,.0f}" for way in ordered]
    batches.set_yticks(range(len(ordered)), passes, fontsize=8)
    batches.set_ylabel("training batches through the network")
    axis.set_xlabel("dev Matthews, points; dashed: the best uniform rank, were it known")
    axis.grid(color="#88888844")
    for kind in ("png", "svg"):
        figure.savefig(HERE / f"search_cost.{kind}", dpi=130, metadata={"Date": None} if kind == "svg" else None)


if __name__ == "__main__":
    main()
