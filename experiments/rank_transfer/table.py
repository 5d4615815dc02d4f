"""The table of the study: ``python experiments/rank_transfer/table.py`` reads ``results.csv``."""

from __future__ import annotations

import csv
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import spearmanr

CONTROLS = ("found", "permuted", "uniform")


def main() -> None:
    with (Path(__file__).parent / "results.csv").open(newline="") as stream:
        cells = {(row["task"], row["seed"], row["retrain"]): row for row in csv.DictReader(stream)}
    print("| task | seeds |", " | ".join(CONTROLS), "| found - permuted | found - uniform | agreement |")
    print("|---|---|" + "---|" * (len(CONTROLS) + 3))
    for task in sorted({task for task, _, _ in cells}):
        seeds = [seed for seed in "012" if all((task, seed, control) in cells for control in CONTROLS)]
        if not seeds:
            continue
        scores = {control: [float(cells[task, seed, control]["value"]) for seed in seeds] for control in CONTROLS}
        apart = [[a - b for a, b in zip(scores["found"], scores[other], strict=True)] for other in CONTROLS[1:]]
        shown = [summary(values) for values in (*scores.values(), *apart)]
        found = [[int(rank) for rank in cells[task, seed, "found"]["ranks"].split()] for seed in seeds]
        agreement = [float(spearmanr(*pair).statistic) for pair in combinations(found, 2)]
        print(f"| {task} | {len(seeds)} |", " | ".join(shown), f"| {summary(agreement)} |")


def summary(values: list[float]) -> str:
    """Mean, standard deviation, and every value."""
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread} ({', '.join(f'{value:.3f}' for value in values)})" if values else ""


if __name__ == "__main__":
    main()
