r"""A toy bilevel method: selectors that learn on held-out batches, through one look-ahead step of the weights.

With weights w, logits :math:`\theta` and a step :math:`\xi`, the logits descend on
:math:`L_{val}(w - \xi \nabla_w L_{train}(w, \theta), \theta)` (the one-step form of Liu et al., ICLR 2019). Each level
has its own optimizer, and no gradient of one reaches the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from autolora.adapters import Adapters, AdapterSettings, Gate, SelectorGate
from autolora.plan import RankPlan, rank_by_score, spend
from autolora.strategies.base import Batch, Evaluate, LossFn, Strategy, StrategyOptions


class Options(StrategyOptions):
    """Rate of the selectors, step of the look-ahead, and the share of the run after which the ranks are fixed."""

    lr: float = 0.03
    lookahead: float = 0.05
    settle_at: float = 0.7


class LookAhead(nn.Module):
    """The model with other values for some parameters, through which gradients flow."""

    def __init__(self, model: nn.Module, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.values = model, values

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.model, self.values, args, kwargs)


class OneStepBilevel(Strategy[Options]):
    """Sigmoid selectors, ranked by what the held-out loss makes of them."""

    Options = Options
    wants_heldout = True

    def make_gate(self, name: str, rank: int) -> Gate:
        return SelectorGate(rank, "sigmoid")

    def attach(self, model: nn.Module, settings: AdapterSettings) -> Adapters:
        adapters = super().attach(model, settings)
        self.logits = adapters.gate_parameters()
        self._train_logits(False)
        self.optimizer = torch.optim.Adam(self.logits, lr=self.options.lr)
        return adapters

    def begin(self, total_steps: int, optimizer: torch.optim.Optimizer) -> None:
        self.settle_from = round(self.options.settle_at * total_steps)

    def heldout_step(self, batch: Batch, heldout: Batch, loss_fn: LossFn) -> None:
        if self.settled:
            return
        for logit, gradient in zip(self.logits, self.hypergradient(batch, heldout, loss_fn), strict=True):
            logit.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()

    def hypergradient(self, batch: Batch, heldout: Batch, loss_fn: LossFn) -> tuple[Tensor, ...]:
        """The gradient of the held-out loss after one step on ``batch``, with respect to the logits alone."""
        model = self.adapters.model
        self._train_logits(True)
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad and ".gate." not in name}
        slopes = torch.autograd.grad(loss_fn(model, batch), list(weights.values()), create_graph=True)
        ahead = {name: p - self.options.lookahead * g for (name, p), g in zip(weights.items(), slopes, strict=True)}
        gradients = torch.autograd.grad(loss_fn(LookAhead(model, ahead), heldout), self.logits)
        self._train_logits(False)
        return gradients

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        if step >= self.settle_from and not self.settled:
            self._settle()

    @property
    def settled(self) -> bool:
        return not any(layer.gate.learning for layer in self.adapters.layers.values())

    def finalize(self, evaluate: Evaluate) -> RankPlan:
        if not self.settled:
            self._settle()
        return self.adapters.active_plan()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])

    def _settle(self) -> None:
        layers = self.adapters.layers
        owners = [name for name, layer in layers.items() for _ in range(layer.rank)]
        scores = {name: layer.gate.probability().detach() for name, layer in layers.items()}
        plan = spend(rank_by_score(owners, torch.cat(list(scores.values())).tolist()), self.largest, self.allowance)
        self.adapters.fix_gates({name: top(score, plan[name]) for name, score in scores.items()})

    def _train_logits(self, on: bool) -> None:
        """The logits need a gradient inside ``heldout_step`` alone, so that the training loss cannot reach them."""
        for logit in self.logits:
            logit.requires_grad_(on)


def top(scores: Tensor, count: int) -> Tensor:
    mask = torch.zeros(len(scores))
    mask[scores.argsort(descending=True, stable=True)[:count].cpu()] = 1
    return mask
