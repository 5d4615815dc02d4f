r"""AutoLoRA as published: Zhang, Qiang, Somayajula & Xie, NAACL 2024 (arXiv 2403.09113), section 3.

The update of a module is a weighted sum of k = 8 rank-1 matrices, whose weights lie on a simplex:

.. math:: \Delta W = s \sum_{i=1}^k \alpha_i \, b_i a_i^T, \qquad \alpha = \mathrm{softmax}(\theta).

Query and value projections have one. Half of the training rows teach A, B and the head, the other half teaches the
selectors :math:`\theta`, in turns: the selectors step along the gradient of the held-out loss after one gradient step
of the weights (:mod:`autolora.strategies.bilevel`, second order, with a look-ahead of the weights' learning rate), then
the weights step. In the end a module keeps the components with :math:`\alpha_i \geq 1/k`, and a second training on all
rows starts afresh at these ranks. There is no budget.

conf/strategy/autolora_paper.yaml sets what else the paper says: k, the split 1:1, AdamW with a rate of 1e-4 for the
weights and 1e-3 for the selectors, batches of 16, and the second training. The command line overrules all of it.

The authors' code (github.com/ruz048/AutoLoRA, commit 25edb97) differs in some places, and here the paper is followed:
it leaves the head as it was initialised while ranks are searched, holds out 30 %, uses a rate of 3e-4 for both levels,
thresholds :math:`\theta_i / \sum_j \theta_j`, and takes the mixed second derivative at the weights after the step,
without the factor :math:`\xi` (``darts`` of the library Betty).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from autolora.errors import ConfigError, TargetError
from autolora.plan import Budget, RankPlan
from autolora.roles import SUFFIXES, Role, role_of
from autolora.strategies.base import Batch, Evaluate, GroupRates, LossFn, Rates, Strategy, StrategyOptions

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from autolora.adapters import Adapters, AdapterSettings, Gate

_ROLES = (Role.query, Role.value)
QUERY_AND_VALUE = rf"(.*\.)?({'|'.join(re.escape(suffix) for suffix, role in SUFFIXES if role in _ROLES)})"
"""The pattern of names that query and value projections have, in every family of models that is known here."""

_SELECTOR_LR = 1e-3


class Options(StrategyOptions):
    """The hypergradient, as :mod:`autolora.strategies.bilevel` has it.

    ``lookahead``: the step of the weights, by default their learning rate.
    """

    order: Literal["first", "second"] = "second"
    lookahead: float | None = Field(default=None, gt=0)


class AutoLoRAPaper(Strategy[Options]):
    """Softmax selectors learned on half of the rows, then a threshold; the module's docstring gives the method."""

    Options = Options
    wants_heldout = True

    def attach(self, model: nn.Module, settings: AdapterSettings) -> Adapters:
        """Adapters of rank k.

        Raises:
            ConfigError: if there is a budget.
            TargetError: if the model has no query or value projections, and the targets are still these.
        """
        from autolora.adapters.select import linear_modules

        if self.budget != Budget():
            raise ConfigError(
                "strategy=autolora_paper has no budget, its threshold decides: leave budget.* out, or take "
                "strategy=autolora_bilevel"
            )
        names = list(linear_modules(model))
        missing = " and no ".join(role.value for role in _ROLES if role not in map(role_of, names))
        if settings.targets.targets == QUERY_AND_VALUE and missing:
            raise TargetError(
                f"strategy=autolora_paper adapts query and value projections, and the model has no {missing} among its "
                f"linear modules ({', '.join(names[:6])}{', ...' if len(names) > 6 else ''}): take another backbone, "
                "or say which modules to adapt with adapter.targets"
            )
        return super().attach(model, settings)

    def make_gate(self, name: str, rank: int) -> Gate:
        """Equal weights 1/k, which learn from the first step; k is the module's rank."""
        from autolora.adapters import SelectorGate

        return SelectorGate(rank, "simplex")

    def param_groups(self, rates: Rates, total_steps: int) -> list[dict[str, Any]]:
        """The weights: A, B and the head."""
        self.rates = GroupRates(rates.gate.lr or _SELECTOR_LR, rates.gate.weight_decay)
        self.lookahead = self.options.lookahead or rates.adapter.lr or 0.0
        return super().param_groups(rates, total_steps)

    @property
    def trainable(self) -> int:
        """The selectors too, which require a gradient only where they are asked for one."""
        return super().trainable + self.adapters.count()["gate"]

    def begin(self, total_steps: int, optimizer: Optimizer) -> None:
        """Give the selectors an optimizer of their own."""
        from autolora.strategies.bilevel import UpperLevel

        self.upper = UpperLevel(
            self.adapters, order=self.options.order, lookahead=self.lookahead, rates=self.rates, like=optimizer
        )

    def heldout_step(self, batch: Batch, heldout: Batch, loss_fn: LossFn) -> None:
        """A step of the selectors."""
        self.upper.step(self.upper.hypergradient(batch, heldout, loss_fn))

    @property
    def settled(self) -> bool:
        """Whether the threshold has been applied: after training."""
        return not any(layer.gate.learning for layer in self.adapters.layers.values())

    def finalize(self, evaluate: Evaluate) -> RankPlan:
        """Keep the components with at least their equal share."""
        self.adapters.fix_gates({name: layer.gate.evaluation_gate() for name, layer in self.adapters.layers.items()})
        return self.adapters.active_plan()

    def state_dict(self) -> dict[str, Any]:
        """The selectors' moments; they themselves are parameters."""
        return {"upper": self.upper.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self.upper.load_state_dict(state["upper"])
