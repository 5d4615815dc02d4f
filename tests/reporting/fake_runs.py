"""Run directories as runs leave them, without the runs: scores and predictions are drawn."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from autolora.compose import compose
from autolora.results import RunDirectory, RunResult, config_hash

MODULES = [
    f"bert.encoder.layer.{i}.{name}"
    for i in range(2)
    for name in ("attention.self.query", "attention.self.value", "intermediate.dense")
]


def write_run(
    root: Path,
    *overrides: str,
    task: str = "sst2",
    strategy: str = "uniform",
    seed: int = 0,
    accuracy: float = 0.8,
    examples: int = 200,
    params: int = 1000,
    budget: int | None = 1000,
    source: str = "local",
    noise_seed: int | None = None,
    status: str = "complete",
    ranks: Sequence[int] | None = None,
    **changes: Any,
) -> Path:
    """A run of a classification task with so many dev rows, of which a share of about ``accuracy`` is right.

    Rows are easy or hard alike for every strategy, as those of a real dev set are; ``changes`` are of ``result.json``.
    """
    cfg = compose(
        [f"task={task}", f"strategy={strategy}", f"seed={seed}", "logger=csv", f"run_root={root}", *overrides]
    )
    directory = RunDirectory.of(cfg, source, f"data-{task}", "weights")
    directory.path.mkdir(parents=True, exist_ok=True)
    directory.config.write_text(cfg.to_yaml())

    hardness = np.random.default_rng(crc32(task.encode())).random(examples)
    own = np.random.default_rng([seed, crc32(strategy.encode()), noise_seed or 0]).random(examples)
    right = 0.5 * hardness + 0.5 * own < np.quantile(0.5 * hardness + 0.5 * own, accuracy)
    labels = np.arange(examples) % 2
    predictions = np.where(right, labels, 1 - labels)
    value = float((predictions == labels).mean())
    with directory.predictions.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "id", "label", "prediction", "logit_0", "logit_1"])
        for i, (label, prediction) in enumerate(zip(labels, predictions, strict=True)):
            writer.writerow(["dev", i, label, prediction, 0.5 - prediction, prediction - 0.5])
    each = ranks or [2, 1, 0, 3, 1, 2]
    _write_history(directory.history, each)
    facts: dict[str, Any] = {
        "status": status,
        "task": task,
        "data_source": source,
        "data_fingerprint": f"data-{task}",
        "backbone": cfg.backbone.label,
        "backbone_fingerprint": "weights",
        "strategy": strategy,
        "seed": seed,
        "metrics": {"primary": "accuracy", "value": value, "all": {"accuracy": value}},
        "selection_metrics": {"accuracy": value},
        "params": {
            "adapter": params, "head": 66, "peak_trainable": 4 * params, "budget": budget, "backbone": 10_000,
        },
        "adapter_bytes": 4 * params,
        "ranks": dict(zip(MODULES, each, strict=True)),
        "seconds": {"total": 60.0 + seed, "fit": 50.0},
        "examples_per_second": 100.0,
        "peak_memory_bytes": 10**9,
        "steps": 100,
        "compute": {"fit_steps": 100, "passes": 100},
        "config_hash": config_hash(cfg, source, f"data-{task}", "weights"),
        "git": {},
        "versions": {},
        "hardware": {},
    }  # fmt: skip
    directory.write_result(RunResult.model_validate(facts | changes))
    return directory.path


def _write_history(path: Path, ranks: Sequence[int]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss", *(f"rank:{name}" for name in MODULES)])
        for step in (1, 50, 100):
            writer.writerow([step, 1.0 / step, *(4 if step < 100 else rank for rank in ranks)])


def change_result(directory: Path, **changes: Any) -> None:
    """Rewrite fields of a result."""
    file = directory / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
