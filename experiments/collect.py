"""Add the runs under a folder to a study's rows: ``python experiments/collect.py RUN_ROOT results.csv``.

Rows of the same configuration are replaced, so that a study can be continued where its run directories are gone.
Studies that share cells share a folder, and say which of its runs are theirs: ``strategy=uniform``,
``budget_rank=None,0.5,2.0``.

Two columns are not in a run's result: ``last_epoch_loss``, the mean of the training losses that the history has of the
last epoch, and ``dev_log_loss``, the mean cross-entropy of the predictions of a classifier, in nats. Runs of one seed
see the same batches and rows, so both are closely paired.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from statistics import fmean

import numpy as np

from autolora.errors import DataError
from autolora.reporting.runs import load_runs
from autolora.reporting.tables import row_of, write_results


def main(root: Path, out: Path, wanted: dict[str, list[str]]) -> None:
    rows: dict[object, dict[str, object]] = {row["config_hash"]: dict(row) for row in read(out)}
    every = [(row_of(run), run.path) for run in load_runs([root]).runs]
    unknown = wanted.keys() - every[0][0].keys()
    if unknown:
        raise DataError(f"{', '.join(sorted(unknown))}: expected columns of a result ({', '.join(every[0][0])})")
    found = [
        row | losses(path)
        for row, path in every
        if all(str(row[column]) in values for column, values in wanted.items())
    ]
    if not found:
        raise DataError(f"{root}: none of its {len(every)} complete runs has {wanted}")
    rows |= {row["config_hash"]: row for row in found}
    columns = list(found[0])
    ordered = sorted(rows.values(), key=lambda row: [str(row[key]) for key in ("task", "strategy", "budget", "seed")])
    write_results(out, [{key: row.get(key) for key in columns} for row in ordered])
    print(f"{len(found)} results, {len(rows)} rows in {out}")


def losses(run: Path) -> dict[str, object]:
    history = read(run / "retrain_history.csv") or read(run / "history.csv")  # of the training that the score is of
    steps = [(int(row["epoch"]), float(row["loss"])) for row in history if row["loss"]]
    rows = [row for row in read(run / "predictions.csv") if row["split"] == "dev"]
    columns = [name for name in (rows[0] if rows else ()) if name.startswith("logit_")]
    log_loss = None
    if len(columns) > 1:
        logits = np.array([[float(row[name]) for name in columns] for row in rows])
        labels = [int(row["label"]) for row in rows]
        log_loss = float(np.mean(np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(rows)), labels]))
    last = max((epoch for epoch, _ in steps), default=None)
    return {
        "last_epoch_loss": fmean(loss for epoch, loss in steps if epoch == last) if steps else None,
        "dev_log_loss": log_loss,
    }


def read(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_root", type=Path, help="folder of run directories")
    parser.add_argument("rows", type=Path, help="the study's results.csv; made if it is not there")
    parser.add_argument("wanted", nargs="*", metavar="column=value,...", help="rows with one of these values only")
    arguments = parser.parse_args()
    pairs = (each.partition("=") for each in arguments.wanted)
    try:
        main(arguments.run_root, arguments.rows, {column: values.split(",") for column, _, values in pairs})
    except DataError as error:
        sys.exit(f"error: {error}")
