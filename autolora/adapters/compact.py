"""Physically remove the components that a mask has switched off."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autolora.adapters.attach import Adapters
from autolora.adapters.gates import FixedGate
from autolora.adapters.layer import LoRALinear


@torch.no_grad()
def compact(adapters: Adapters, optimizer: Optimizer | None = None) -> None:
    """Remove every component whose evaluation gate is 0 and fold the other gates into B.

    Afterwards all gates are 1, a module's rank is its number of components, and a module of rank 0 is the original
    one. Evaluation is the same as before, to rounding.

    A and B are new parameters. Where training goes on, they take the place of the old ones in the optimizer, with the
    state of the components that stay; what is gone leaves its groups.

    Args:
        adapters: of one model.
        optimizer: of a training that goes on.
    """
    successors: dict[nn.Parameter, nn.Parameter | None] = {}
    emptied = []
    for name, layer in adapters.layers.items():
        layer.fix_gate(layer.gate.evaluation_gate())
        kept = layer.gate.evaluation_gate().nonzero().flatten()
        successors |= dict.fromkeys(layer.gate.parameters())
        if len(kept) == 0:
            successors |= dict.fromkeys(layer.parameters(recurse=False))
            emptied.append(name)
        else:
            successors |= _keep(layer, kept, optimizer)
    adapters.remove(*emptied)
    if optimizer is not None:
        _succeed(optimizer, successors)


def _keep(layer: LoRALinear, kept: Tensor, optimizer: Optimizer | None) -> dict[nn.Parameter, nn.Parameter]:
    """Give a layer the components of its that stay; which parameter takes the place of which."""
    successors = {}
    for name, dim in (("lora_A", 0), ("lora_B", 1)):
        old = layer.get_parameter(name)
        new = nn.Parameter(_taken(old.detach(), dim, kept))
        setattr(layer, name, new)
        successors[old] = new
        if optimizer is not None and old in optimizer.state:  # moments are cut; a count of steps stays
            optimizer.state[new] = {
                key: _taken(value, dim, kept) if isinstance(value, Tensor) and value.shape == old.shape else value
                for key, value in optimizer.state[old].items()
            }
    layer.gate = FixedGate(len(kept)).to(layer.lora_A.device)
    return successors


def _succeed(optimizer: Optimizer, successors: Mapping[nn.Parameter, nn.Parameter | None]) -> None:
    for group in optimizer.param_groups:
        params = [successors.get(parameter, parameter) for parameter in group["params"]]
        group["params"] = [parameter for parameter in params if parameter is not None]
    for parameter in successors:
        optimizer.state.pop(parameter, None)


def _taken(matrix: Tensor, dim: int, kept: Tensor) -> Tensor:
    return matrix.index_select(dim, kept).contiguous()
