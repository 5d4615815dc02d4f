"""Problems that train in a moment, and a Trainer for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from autolora.adapters import AdapterSettings
from autolora.plan import Budget
from autolora.strategies.base import GroupRates, Rates, Strategy
from autolora.tasks.planted import plant
from autolora.training.callbacks import HeldoutChoice, History
from autolora.training.checkpoints import Checkpoints
from autolora.training.fit import fit, make_trainer
from autolora.training.module import AdapterModule
from autolora.training.planted import PlantedRegression

RATES = Rates(GroupRates(3e-3), GroupRates(None), GroupRates(1e-3))


def small_planted(batch_size: int = 32, seed: int = 0) -> PlantedRegression:
    """Two modules of width 12 and 8, ranks 2 and 1."""
    pair = plant(dim=12, widths=[8], ranks=[2, 1], seed=seed)
    problem = PlantedRegression(pair, fingerprint="0", batch_size=batch_size, eval_size=64, seed=seed)
    problem.build()
    return problem


def train(
    problem: PlantedRegression,
    strategy: Strategy[Any],
    folder: Path,
    *,
    steps: int,
    rates: Rates = RATES,
    saving: Checkpoints | None = None,
    resume: Path | None = None,
    **trainer: Any,
) -> tuple[pl.Trainer, AdapterModule]:
    """Attach and fit through Lightning, from a checkpoint where one is given."""
    strategy.attach(problem.model, AdapterSettings(seed=0))
    arguments = {
        "accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true",
        "max_epochs": -1, "max_steps": steps, "enable_progress_bar": False, "gradient_clip_val": 1.0,
    }  # fmt: skip
    history = History(folder / "history.csv", every=1)
    choice = HeldoutChoice(keep_best=False, patience=None)
    callbacks = [history, choice, *([saving] if saving else [])]
    lightning = make_trainer(arguments | trainer, root=folder, callbacks=callbacks, logger=None)
    module = AdapterModule(problem, strategy, rates)
    fit(lightning, module, problem, choice, folder / "checkpoints", resume)
    return lightning, module


def autolora(budget: Budget | None = None, **options: Any) -> Strategy[Any]:
    """The strategy with its defaults."""
    from autolora.strategies.autolora import AutoLoRA, Options

    return AutoLoRA(Options(**options), budget=budget or Budget(rank=1), max_rank=4)


def uniform(budget: Budget | None = None) -> Strategy[Any]:
    """Uniform ranks."""
    from autolora.strategies.uniform import Options, Uniform

    return Uniform(Options(), budget=budget or Budget(rank=2), max_rank=4)
