"""What a training in the Trainer of transformers leaves on disk: adapters for PEFT, and the strategy's state."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from autolora.adapters import Adapters
from autolora.adapters.peft_format import save_peft
from autolora.adapters.whole import WholeModel, save_whole
from autolora.errors import CheckpointError
from autolora.files import replacing

STATE = "autolora_state.pt"
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def peft_task_type(model: nn.Module) -> str | None:
    """What PEFT calls the task of a model of transformers, from the name of its class.

    ``None`` for models that do not read tokens: what PEFT puts around a model for a task gives it ``input_ids``.
    """
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    return next((task for ending, task in _TASKS.items() if type(model).__name__.endswith(ending)), None)


def save_adapter(adapters: Adapters, directory: Path, metadata: Mapping[str, Any]) -> None:
    """Write an adapter, or a model that was trained in full, into a folder, and leave what else is there."""
    model = adapters.model
    about: dict[str, Any] = {"base_model": getattr(model, "name_or_path", "") or "", "metadata": metadata}
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory) as scratch:
        written = Path(scratch) / "adapter"
        if isinstance(adapters, WholeModel):
            write = getattr(model, "save_pretrained", None)
            save_whole(adapters, written, write=None if write is None else partial(write), **about)
        else:
            save_peft(adapters, written, task_type=peft_task_type(model), **about)
        for file in written.iterdir():
            os.replace(file, directory / file.name)


def save_state(directory: Path, state: Mapping[str, Any]) -> None:
    """Write what a resumed training needs besides the Trainer's own files: tensors, numbers, text."""
    with replacing(directory / STATE, binary=True) as file:
        torch.save(dict(state), file)


def load_state(directory: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Read what :func:`save_state` wrote, without running code.

    Raises:
        CheckpointError: if there is none, it cannot be read, or it is of another strategy or other options.
    """
    path = directory / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: expected {STATE}, which checkpoints of AutoLoRACallback have") from None
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; take an earlier checkpoint") from None
    if state["about"] != about:
        raise CheckpointError(
            f"{directory} is of {state['about']}, and this is {dict(about)}: give the options of then"
        )
    return state
