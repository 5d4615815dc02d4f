"""What all contenders have in common: the model, its batches, and which modules are adapted."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autolora.adapters import find_sites
from autolora.backbones import Backbone, head_modules, load_backbone
from autolora.config import BackboneConfig, RunConfig, StrategyConfig
from autolora.parts import adapter_settings
from autolora.strategies.base import Batch
from autolora.validate import strategy_options

NUM_LABELS = 2
Precision = Literal["float32", "bf16"]


@dataclass(frozen=True)
class Subject:
    """A pretrained classifier, of which every contender gets a copy.

    Args:
        backbone: as it is loaded; its model is never trained.
        device: where contenders run.
        targets: full names of the adapted modules, in model order: what ``all-linear`` selects.
        heads: names of the modules that are trained in full.
    """

    backbone: Backbone
    device: torch.device
    targets: tuple[str, ...]
    heads: tuple[str, ...]

    @classmethod
    def load(cls, config: BackboneConfig, device: torch.device) -> Subject:
        """Load the backbone and find its targets.

        Raises:
            BackboneError: if it cannot be loaded.
        """
        backbone = load_backbone(**config.weights, num_labels=NUM_LABELS)
        targets = tuple(find_sites(backbone.model, adapter_settings(run_config("uniform"))))
        return cls(backbone, device, targets, tuple(head_modules(backbone.model)))

    def copy(self) -> nn.Module:
        """A model of one's own, on the device, in training mode: with the backbone's own dropout."""
        model: nn.Module = copy.deepcopy(self.backbone.model)
        return model.to(self.device).train()

    def batch(self, shape: tuple[int, int], generator: torch.Generator) -> Batch:
        """Rows of random tokens and labels; no row is padded.

        Args:
            shape: rows, and tokens in each.
            generator: a CPU random stream. Batches are drawn anew for every round: on the same one, training would
                soon work on vanishing gradients.
        """
        vocabulary = self.backbone.model.config.vocab_size
        tokens = torch.randint(vocabulary // 2, vocabulary, shape, generator=generator)
        labels = torch.randint(NUM_LABELS, shape[:1], generator=generator)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
        return {key: value.to(self.device) for key, value in batch.items()}

    def autocast(self, precision: Precision) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")


def run_config(strategy: str) -> RunConfig:
    """The configuration of a run in which nothing but the strategy was chosen."""
    return RunConfig(strategy=StrategyConfig(name=strategy, options=strategy_options(strategy)()))


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss, in float32."""
    loss: Tensor = model(**batch).loss
    return loss.float()


def first_adapted(model: nn.Module, targets: Sequence[str], batch: Batch) -> list[str]:
    """Those targets whose input does not depend on the output of another target, found in one forward pass.

    Raises:
        RuntimeError: if a parameter of the model requires a gradient, which would hide the dependence.
    """
    if any(p.requires_grad for p in model.parameters()):
        raise RuntimeError("first_adapted: expected a frozen model")
    found: list[str] = []
    handles = []
    for name in targets:

        def mark(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
            if not output.requires_grad:
                found.append(name)
                output.requires_grad_()

        handles.append(model.get_submodule(name).register_forward_hook(mark))
    model(**batch)
    for handle in handles:
        handle.remove()
    return found
