"""Gather the results of runs into one CSV: ``python experiments/collect.py RUN_ROOT OUT.csv``."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from autolora.results import RunResult, read_result

COLUMNS = [
    "task", "data_source", "data_fingerprint", "backbone", "strategy", "seed", "metric", "value", "adapter_params",
    "budget", "head_params", "steps", "fit_seconds", "total_seconds", "true_ranks", "found_ranks", "exact_fraction",
    "excess_error", "max_train", "config_hash", "commit", "retrain", "fit_steps", "retrain_steps", "plans_measured",
    "passes", "ranks",
]  # fmt: skip


def row_of(result: RunResult, max_train: int | None) -> dict[str, object]:
    planted = result.planted
    return {
        "task": result.task,
        "data_source": result.data_source,
        "data_fingerprint": result.data_fingerprint,
        "backbone": result.backbone,
        "strategy": result.strategy,
        "seed": result.seed,
        "metric": result.metrics.primary,
        "value": result.metrics.value,
        "adapter_params": result.params.adapter,
        "budget": result.params.budget,
        "head_params": result.params.head,
        "steps": result.steps,
        "fit_seconds": round(result.seconds.fit, 1),
        "total_seconds": round(result.seconds.total, 1),
        "true_ranks": text_of(planted.true) if planted else None,
        "found_ranks": text_of(planted.found if planted else result.found),
        "exact_fraction": planted.exact_fraction if planted else None,
        "excess_error": planted.excess_error if planted else None,
        "max_train": max_train,
        "config_hash": result.config_hash,
        "commit": result.git.commit,
        "retrain": result.retrain,
        "fit_steps": result.compute.fit_steps,
        "retrain_steps": result.compute.retrain_steps,
        "plans_measured": result.compute.plans_measured,
        "passes": result.compute.passes,
        "ranks": text_of(result.ranks),
    }


def text_of(ranks: Mapping[str, int] | None) -> str | None:
    """Ranks in the order of the modules."""
    return None if ranks is None else " ".join(map(str, ranks.values()))


def main(root: Path, out: Path) -> None:
    rows = []
    for file in sorted(root.glob("*/result.json")):
        result = read_result(file)
        if result.status == "complete":
            config = yaml.safe_load((file.parent / "config.yaml").read_text())
            rows.append(row_of(result, config["data"]["max_train"]))
    with out.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} results in {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
