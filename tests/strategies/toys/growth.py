"""A toy growth method: components are opened one after the other, evenly, on a schedule that ends at the budget."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from autolora.adapters import FixedGate, Gate
from autolora.plan import RankPlan, even_order, spend
from autolora.strategies.base import Evaluate, Strategy, StrategyOptions


class Options(StrategyOptions):
    """Number of growth events and the share of the run that they are spread over."""

    events: int = 4
    until: float = 0.5


class Growth(Strategy[Options]):
    """Every event opens its share of the budget. The column of B of a new component is 0: the output never jumps."""

    Options = Options

    def make_gate(self, name: str, rank: int) -> Gate:
        return FixedGate(rank, torch.zeros(rank))

    def begin(self, total_steps: int, optimizer: Optimizer) -> None:
        span = self.options.until * total_steps / max(1, self.options.events - 1)
        self.events = [round(i * span) for i in range(self.options.events)]
        self._grow(0, optimizer)

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        self._grow(step, optimizer)

    @property
    def settled(self) -> bool:
        return not self.events

    def finalize(self, evaluate: Evaluate) -> RankPlan:
        return self.adapters.active_plan()

    def _grow(self, step: int, optimizer: Optimizer) -> None:
        while self.events and step >= self.events[0]:
            self.events.pop(0)
            done = 1 - len(self.events) / self.options.events
            everything = self.largest.params if self.allowance is None else self.allowance
            self._open(spend(even_order(self.largest), self.largest, round(done * everything)), optimizer)

    def _open(self, plan: RankPlan, optimizer: Optimizer) -> None:
        before = self.adapters.active_plan()
        for name, layer in self.adapters.layers.items():
            new = torch.arange(before[name], plan[name], device=layer.lora_A.device)
            forget(optimizer, layer.lora_A, 0, new)
            forget(optimizer, layer.lora_B, 1, new)
        masks = {name: torch.arange(layer.rank) < plan[name] for name, layer in self.adapters.layers.items()}
        self.adapters.fix_gates(masks)


def forget(optimizer: Optimizer, parameter: torch.Tensor, dim: int, index: torch.Tensor) -> None:
    """Reset the moments of some rows or columns, as for a parameter that is new."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            value.index_fill_(dim, index, 0.0)
