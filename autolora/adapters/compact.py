"""Physically remove the components that a mask has switched off."""

from __future__ import annotations

import torch
from torch import nn

from autolora.adapters.attach import Adapters
from autolora.adapters.gates import FixedGate


@torch.no_grad()
def compact(adapters: Adapters) -> None:
    """Remove every component whose evaluation gate is 0 and fold the other gates into B.

    Afterwards all gates are 1, a module's rank is its number of components, and a module of rank 0 is the original
    one. Evaluation is the same as before, to rounding; A and B are new, smaller parameters, so an optimizer has to be
    made anew.
    """
    for name, layer in list(adapters.layers.items()):
        layer.fix_gate(layer.gate.evaluation_gate())
        kept = layer.gate.evaluation_gate().nonzero().flatten()
        if len(kept) == 0:
            adapters.remove(name)
            continue
        layer.lora_A = nn.Parameter(layer.lora_A[kept].clone())
        layer.lora_B = nn.Parameter(layer.lora_B[:, kept].clone())
        layer.gate = FixedGate(len(kept)).to(layer.lora_A.device)
