"""Lightning's Trainer as this project uses it, and the fit itself."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import save
from torch import Tensor

from autolora.adapters.quantized import check_device
from autolora.errors import ConfigError, NonFiniteLossError
from autolora.files import replacing
from autolora.training.callbacks import HeldoutChoice
from autolora.training.checkpoints import SafeFiles
from autolora.training.module import AdapterModule
from autolora.training.problem import Problem

_GROUP_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


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

    Raises:
        ConfigError: if this machine cannot do what the arguments ask for.
    """
    _quiet()
    arguments = {key: value for key, value in arguments.items() if value is not None}
    arguments["precision"] = resolve_precision(arguments["precision"], arguments["accelerator"])
    if arguments["strategy"] == "ddp" or (arguments["strategy"] == "auto" and _several(arguments)):
        # Selectors take part in the forward pass in some phases only.
        arguments["strategy"] = DDPStrategy(find_unused_parameters=True)
    try:
        return pl.Trainer(
            **arguments,
            callbacks=list(callbacks),
            logger=logger or False,
            default_root_dir=root,
            plugins=[SafeFiles()],
            enable_checkpointing=False,  # Lightning's own callback for them
            enable_model_summary=False,
            use_distributed_sampler=False,  # the data module's samplers know about processes
        )
    except (MisconfigurationException, ValueError) as error:
        raise ConfigError(f"trainer: {str(error).splitlines()[0]}") from None


@contextmanager
def processes_of_one_run() -> Iterator[None]:
    """What Lightning leaves behind of training in several processes goes at the end of this context.

    The next run in this process would take itself for one of them, and wait for others that have ended.
    """
    if torch.distributed.is_initialized():  # they were started by somebody else
        yield
        return
    before = {name: os.environ.get(name) for name in _GROUP_VARIABLES}
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _several(arguments: dict[str, Any]) -> bool:
    """Whether training is on more than one device."""
    devices = arguments["devices"]
    if devices in ("auto", -1):
        devices = 1 if arguments["accelerator"] == "cpu" else torch.cuda.device_count()
    count = len(devices) if isinstance(devices, list) else devices
    return count * arguments["num_nodes"] > 1


def fit(
    trainer: pl.Trainer,
    module: AdapterModule,
    problem: Problem,
    choice: HeldoutChoice,
    checkpoints: Path,
    resume: Path | None = None,
) -> None:
    """Prepare the strategy on training data, and train; or go on from the checkpoint ``resume``.

    Raises:
        BackboneError: if the weights of the model are quantised, and the device cannot compute with them.
        CheckpointError: if the checkpoint does not fit.
        Interrupted: if a signal asks to stop; there is a checkpoint then.
        NonFiniteLossError: if the loss stops being finite; the last good state is in ``last_good.safetensors`` then.
    """
    check_device(problem.model, trainer.strategy.root_device)
    problem.model.train()
    if resume is None:
        module.strategy.prepare(problem.datamodule.train_dataloader(), module.loss)
    try:
        trainer.fit(module, datamodule=problem.datamodule, ckpt_path=resume)
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
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")  # our sampler is
    warnings.filterwarnings("ignore", message=".*Precision .* is not supported by the model summary.*")
