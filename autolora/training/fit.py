"""Lightning's Trainer as this project uses it, and the fit itself."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import save
from torch import Tensor

from autolora.errors import NonFiniteLossError
from autolora.results import replacing
from autolora.training.callbacks import HeldoutChoice
from autolora.training.module import AdapterModule
from autolora.training.problem import Problem


def resolve_precision(precision: str | int, accelerator: str) -> str | int:
    """``auto`` means bf16 autocast where the hardware multiplies bf16, else float32; anything else stays."""
    if precision != "auto":
        return precision
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"


def make_trainer(arguments: dict[str, Any], *, root: Path, callbacks: Sequence[pl.Callback], logger: Any) -> pl.Trainer:
    """A Trainer from the arguments of the configuration.

    Args:
        arguments: keyword arguments of Lightning's Trainer; ``precision`` may be ``auto``.
        root: where Lightning may write.
        callbacks: besides Lightning's own.
        logger: a Lightning logger, or ``None``.
    """
    _quiet()
    arguments = {key: value for key, value in arguments.items() if value is not None}
    arguments["precision"] = resolve_precision(arguments["precision"], arguments["accelerator"])
    if arguments["strategy"] == "ddp":
        # Selectors take part in the forward pass in some phases only.
        arguments["strategy"] = DDPStrategy(find_unused_parameters=True)
    return pl.Trainer(
        **arguments,
        callbacks=list(callbacks),
        logger=logger or False,
        default_root_dir=root,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # the data module's samplers know about processes
    )


def fit(trainer: pl.Trainer, module: AdapterModule, problem: Problem, choice: HeldoutChoice, checkpoints: Path) -> None:
    """Prepare the strategy on training data, and train.

    Raises:
        NonFiniteLossError: if the loss stops being finite; the last good state is in ``last_good.safetensors`` then.
    """
    problem.model.train()
    module.strategy.prepare(problem.datamodule.train_dataloader(), problem.loss)
    try:
        trainer.fit(module, datamodule=problem.datamodule)
    except NonFiniteLossError as error:
        step, state = module.last_good
        path = checkpoints / "last_good.safetensors"
        save_state(state, path)
        raise NonFiniteLossError(f"{error}; it is kept in {path} (step {step})") from None
    choice.restore(module)
    problem.model.to(trainer.strategy.root_device)


def save_state(state: dict[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors, in place of what was there only when all is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, binary=True) as file:
        file.write(save({name: tensor.contiguous().cpu() for name, tensor in state.items()}))


def _quiet() -> None:
    """Keep Lightning's advertisements and advice off the user's terminal; its errors stay."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*Precision .* is not supported by the model summary.*")
