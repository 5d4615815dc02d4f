"""Add the runs under a folder to a study's rows: ``python experiments/collect.py RUN_ROOT results.csv``.

Rows of the same configuration are replaced, so that a study can be continued where its run directories are gone.
Studies that share cells share a folder, and say which of its runs are theirs: ``strategy=uniform``,
``budget_rank=None,0.5,2.0``.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from autolora.reporting.runs import load_runs
from autolora.reporting.tables import row_of, write_results


def main(root: Path, out: Path, wanted: dict[str, list[str]]) -> None:
    rows: dict[object, dict[str, object]] = {}
    if out.exists():
        with out.open(newline="") as stream:
            rows = {row["config_hash"]: dict(row) for row in csv.DictReader(stream)}
    found = [row_of(run) for run in load_runs([root]).runs]
    found = [row for row in found if all(str(row[column]) in values for column, values in wanted.items())]
    rows |= {row["config_hash"]: row for row in found}
    columns = list(found[0])
    ordered = sorted(rows.values(), key=lambda row: [str(row[key]) for key in ("task", "strategy", "budget", "seed")])
    write_results(out, [{key: row.get(key) for key in columns} for row in ordered])
    print(f"{len(found)} results, {len(rows)} rows in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_root", type=Path, help="folder of run directories")
    parser.add_argument("rows", type=Path, help="the study's results.csv; made if it is not there")
    parser.add_argument("wanted", nargs="*", metavar="column=value,...", help="rows with one of these values only")
    arguments = parser.parse_args()
    pairs = (each.partition("=") for each in arguments.wanted)
    main(arguments.run_root, arguments.rows, {column: values.split(",") for column, _, values in pairs})
