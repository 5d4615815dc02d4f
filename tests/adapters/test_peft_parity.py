"""Our layer against PEFT's LoRA layer with the same weights: outputs, gradients and merged weights are equal."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from autolora.adapters import LoRALinear
from autolora.config import AdapterConfig

IN, OUT, RANK, ALPHA = 10, 6, 4, 6


def pair(kind: str, rslora: bool) -> tuple[LoRALinear, nn.Module]:
    """Our layer and PEFT's over equal bases, with equal A and B, in double precision."""
    base: nn.Module = Conv1D(OUT, IN) if kind == "conv1d" else nn.Linear(IN, OUT)
    scale = AdapterConfig(alpha=float(ALPHA), reference_rank=RANK, rslora=rslora).effective_scale()
    ours = LoRALinear(copy.deepcopy(base), RANK, scale=scale)
    ours.base_layer.requires_grad_(False)
    model = nn.Sequential()
    model.add_module("linear", base)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, use_rslora=rslora, target_modules=["linear"], fan_in_fan_out=kind == "conv1d"
    )
    theirs = get_peft_model(model, config).base_model.model.linear
    with torch.no_grad():
        ours.lora_B.normal_()
        theirs.lora_A["default"].weight.copy_(ours.lora_A)
        theirs.lora_B["default"].weight.copy_(ours.lora_B)
    return ours.double(), theirs.double()


def gradients(layer: nn.Module, x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(layer(x).sin().sum(), [x, *parameters]))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_gradients_and_merged_weights_are_equal(kind: str, rslora: bool) -> None:
    ours, theirs = pair(kind, rslora)
    x = torch.randn(3, 5, IN, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    assert not torch.allclose(ours(x), ours.base_layer(x))
    factors = [theirs.lora_A["default"].weight, theirs.lora_B["default"].weight]
    for mine, reference in zip(
        gradients(ours, x, [ours.lora_A, ours.lora_B]), gradients(theirs, x, factors), strict=True
    ):
        torch.testing.assert_close(mine, reference)
    ours.merge()
    theirs.merge()
    torch.testing.assert_close(ours.weight, theirs.base_layer.weight)


def test_scale_by_hand() -> None:
    assert AdapterConfig(alpha=16.0, reference_rank=8).effective_scale() == 2
    assert AdapterConfig(alpha=16.0, reference_rank=4, rslora=True).effective_scale() == 8
    assert AdapterConfig(scale=0.5).effective_scale() == 0.5
