"""What strategies share that score trained components and keep the best: phases, the choice, and its end."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from autolora.errors import ConfigError
from autolora.plan import RankPlan, even_order, spend
from autolora.strategies.base import StrategyOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.optim import Optimizer

    from autolora.adapters import Adapters


class PhaseOptions(StrategyOptions):
    """Shares of the run's steps; what warm-up and prune leave is the settle phase."""

    warmup: float = Field(default=0.25, ge=0, le=1)
    prune: float = Field(default=0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _leave_room(self) -> PhaseOptions:
        if self.warmup + self.prune > 1:
            raise ValueError(f"warmup + prune: expected at most 1, got {self.warmup} + {self.prune}")
        return self

    def shares(self) -> dict[str, float]:
        """The three phases, for :func:`phase_ends`."""
        return {"warmup": self.warmup, "prune": self.prune, "settle": 1 - self.warmup - self.prune}


def phase_ends(key: str, shares: Mapping[str, float], total_steps: int) -> list[int]:
    """The last step of every phase of a run but the last one, which ends with the run.

    Args:
        key: of the shares, for the message.
        shares: of the run, by phase in their order; they add up to 1. A share of 0 is no phase.
        total_steps: of the run.

    Raises:
        ConfigError: if a phase has no step.
    """
    sums = itertools.accumulate(shares.values())
    ends = [min(total_steps, round(share * total_steps)) for share in sums]
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    empty = [name for (name, share), steps in zip(shares.items(), lengths, strict=True) if share > 1e-9 and steps < 1]
    if empty:
        said = ", ".join(f"{name} {steps}" for name, steps in zip(shares, lengths, strict=True))
        raise ConfigError(
            f"{key}: of {total_steps} steps the phases have {said}; expected at least 1 for "
            f"{' and '.join(empty)}: raise trainer.max_steps, or the phase's share"
        )
    return ends[:-1]


def best_components(plan: RankPlan, scores: Tensor, budget: int | None, most: int | None = None) -> Tensor:
    """Buy components by descending score while they fit; equal scores are spread evenly over the model.

    Args:
        plan: the components on offer.
        scores: one for each of them, module by module in the plan's order, shape ``(components,)``.
        budget: what they may cost in all; ``None`` is no limit.
        most: only so many of the highest scores are on offer.

    Returns:
        1 for what was bought and 0 for the rest, in the shape, dtype and device of ``scores``, which the host reads in
        one go.
    """
    owners = [name for name, rank in plan.items() for _ in range(rank)]
    values = scores.tolist()
    ranked = sorted(even_components(plan), key=lambda i: -values[i])
    bought = dict(spend([owners[i] for i in ranked[:most]], plan, budget))
    mask = [0.0] * len(values)
    for i in ranked:
        if bought[owners[i]]:
            bought[owners[i]] -= 1
            mask[i] = 1.0
    return scores.new_tensor(mask)


class Prices:
    """What the components of a plan cost of the budget, as tensors: nothing of it is asked of the device.

    Args:
        plan: the components on offer, module by module.
        device, dtype: of the numbers.

    Attributes:
        each: of every component by itself, which is the mean of its module's, shape ``(components,)``.
    """

    def __init__(self, plan: RankPlan, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        import torch

        sites = [(plan.sites[name], rank) for name, rank in plan.items() if rank]
        longest = max((rank for _, rank in sites), default=0)
        tables = [[site.price(min(k, rank)) for k in range(longest + 1)] for site, rank in sites]
        owners = [i for i, (_, rank) in enumerate(sites) for _ in range(rank)]
        self._owners = torch.tensor(owners, dtype=torch.long, device=device)
        self._tables = torch.tensor(tables, device=device, dtype=dtype).reshape(len(sites), longest + 1)
        each = [float(site.cost) for site, rank in sites for _ in range(rank)]
        self.each = torch.tensor(each, device=device, dtype=dtype)

    def together(self, kept: Tensor) -> Tensor:
        """Of the components that a 0/1 mask keeps, shape ``(components,)``."""
        ranks = self._owners.new_zeros(len(self._tables)).index_add(0, self._owners, kept.long())
        return self._tables.gather(1, ranks[:, None]).sum()

    def running(self, order: Tensor) -> Tensor:
        """Of the first 1, 2, ... components of an order, together; the order has their positions."""
        import torch

        owners = self._owners[order]
        grouped = owners.argsort(stable=True)
        starts = owners.bincount(minlength=len(self._tables)).cumsum(0).roll(1)
        starts[:1] = 0
        turn = torch.empty_like(owners)
        turn[grouped] = torch.arange(len(owners), device=owners.device) - starts[owners[grouped]]
        return (self._tables[owners, turn + 1] - self._tables[owners, turn]).cumsum(0)


def even_components(plan: RankPlan) -> list[int]:
    """All components in the order that keeps ranks even (:func:`autolora.plan.even_order`), by their positions."""
    components = iter(range(plan.components))
    of_module = {name: iter([next(components) for _ in range(rank)]) for name, rank in plan.items()}
    return [next(of_module[name]) for name in even_order(plan)]


def settle(adapters: Adapters, kept: Tensor, optimizer: Optimizer | None) -> None:
    """End selection by gates that scale: they go into B, and the components outside ``kept`` are removed.

    Where training goes on, B keeps its moments in Adam: with ``B <- B diag(g)`` its gradient is divided by g.

    Args:
        adapters: with :class:`~autolora.adapters.LearnedGate` gates.
        kept: 0/1 for every component, module by module.
        optimizer: of a training that goes on.
    """
    import torch

    from autolora.adapters import LearnedGate

    for layer in adapters.layers.values():
        moments = optimizer.state.get(layer.lora_B, {}) if optimizer is not None else {}
        if "exp_avg" in moments and isinstance(layer.gate, LearnedGate):
            gate = layer.gate.value().detach()
            factor = torch.where(gate == 0, 0.0, 1 / gate)
            moments["exp_avg"] *= factor
            moments["exp_avg_sq"] *= factor.square()
    keep(adapters, kept, optimizer)


def keep(adapters: Adapters, kept: Tensor, optimizer: Optimizer | None) -> None:
    """Fix the gates, and remove the components outside ``kept`` with their optimizer state where training goes on.

    Several processes have agreed on the shapes of their gradients, and go on with masks; so does a model with nothing
    left, since a loss needs something that it depends on.

    Args:
        adapters: with gates that can be fixed.
        kept: 0/1 for every component, module by module.
        optimizer: of a training that goes on.
    """
    import torch

    from autolora.adapters import compact

    masks = kept.split([layer.rank for layer in adapters.layers.values()])
    adapters.fix_gates(dict(zip(adapters.layers, masks, strict=True)))
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if optimizer is not None and not several and bool(kept.any()):
        compact(adapters, optimizer)
