"""Real runs that take a second or two, and what they predict."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor

from autolora.compose import compose
from autolora.run import run_one

FIXED = ["data.source=mini", "data.max_train=64", "trainer.max_steps=6", "trainer.accelerator=cpu", "logger=csv"]
FIXED += ["trainer.precision=32-true", "trainer.enable_progress_bar=false", "optim.adapter.lr=0.02", "max_rank=4"]


def ran(folder: Path, *overrides: str) -> Path:
    """The directory of the only run under a folder; what is given wins over what is fixed."""
    given = {override.partition("=")[0] for override in overrides}
    fixed = [override for override in FIXED if override.partition("=")[0] not in given]
    run_one(compose([*fixed, f"run_root={folder}", f"data.cache_dir={folder.parent / 'cache'}", *overrides]))
    (run,) = folder.iterdir()
    return run


def dev_rows(run: Path) -> list[dict[str, str]]:
    """The rows of ``predictions.csv`` on the main dev split."""
    return [row for row in csv.DictReader((run / "predictions.csv").open()) if row["split"] == "dev"]


def dev_logits(run: Path) -> Tensor:
    """The outputs in ``predictions.csv`` on the main dev split."""
    rows = dev_rows(run)
    columns = [column for column in rows[0] if column.startswith("logit_")]
    return torch.tensor([[float(row[column]) for column in columns] for row in rows])
