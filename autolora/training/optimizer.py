"""The optimizer that trains adapters: one place for the training module, the benchmark and whoever has a loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import AdamW

from autolora.errors import ConfigError


def make_optimizer(
    groups: Sequence[dict[str, Any]], *, betas: tuple[float, float], eps: float, fused: bool = True
) -> AdamW:
    """AdamW over a strategy's parameter groups (:meth:`autolora.strategies.base.Strategy.param_groups`).

    Adapters are many small tensors: ``fused`` updates them all in one call, where the default of torch on a CPU makes a
    dozen calls for each.

    Raises:
        ConfigError: if there is nothing to train.
    """
    if not groups:
        raise ConfigError("there is nothing to train: every rank is 0, and no head or other module is trained")
    return AdamW(list(groups), betas=betas, eps=eps, fused=fused)
