"""The table of the study: ``python experiments/rank_transfer/table.py`` reads ``results.csv``."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import mean, stdev

CONTROLS = ("found", "permuted", "uniform")


def main() -> None:
    with (Path(__file__).parent / "results.csv").open(newline="") as stream:
        scores = {(row["task"], row["retrain"], row["seed"]): float(row["value"]) for row in csv.DictReader(stream)}
    print("| task | seeds |", " | ".join(CONTROLS), "| found - permuted | found - uniform |")
    print("|---|---|" + "---|" * (len(CONTROLS) + 2))
    for task in sorted({task for task, _, _ in scores}):
        seeds = [seed for seed in "012" if all((task, control, seed) in scores for control in CONTROLS)]
        by = {control: [scores[task, control, seed] for seed in seeds] for control in CONTROLS}
        apart = [[a - b for a, b in zip(by["found"], by[other], strict=True)] for other in CONTROLS[1:]]
        cells = [summary(values) for values in (*by.values(), *apart)]
        print(f"| {task} | {len(seeds)} |", " | ".join(cells), "|")


def summary(values: list[float]) -> str:
    """Mean, standard deviation over seeds, and every value."""
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread} ({', '.join(f'{value:.3f}' for value in values)})" if values else ""


if __name__ == "__main__":
    main()
