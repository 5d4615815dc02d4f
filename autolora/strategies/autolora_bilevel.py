r"""autolora as meta-learning: the weights learn on the rows of the fit, the selectors on rows that are held out.

The phases, the price of parameters and the way to the plan are those of :mod:`autolora.strategies.autolora`. What
differs is who teaches the selectors: before every step of the weights on a training batch they make one of their own on
a held-out batch, with their own optimizer, along

.. math:: \nabla_\theta L_{val} + \lambda \, \nabla_\theta \frac{\sum_i c_i \, p(\theta_i)}{\sum_i c_i},

where the first term is the hypergradient of :mod:`autolora.strategies.bilevel`, to first or second order. So a
component that only helps to memorise the training rows is not missed when it is closed. Listening, too, is to held-out
batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from autolora.strategies.autolora import AutoLoRA
from autolora.strategies.autolora import Options as AutoLoRAOptions
from autolora.strategies.base import Batch, GroupRates, LossFn, Rates

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


class BilevelOptions(AutoLoRAOptions):
    """Options of :class:`AutoLoRABilevel`: those of autolora, and the hypergradient.

    ``order``: first: the weights as they are; second: after one gradient step. ``lookahead``: the length of that step,
    by default the adapters' learning rate at its highest, for all weights and steps.
    """

    order: Literal["first", "second"] = "first"
    lookahead: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _differentiable(self) -> BilevelOptions:
        if self.order == "second" and self.selector.form == "straight_through":
            raise ValueError(
                "order=second: expected a selector that is differentiable; the gradient of straight_through is a "
                "stand-in, and what it changes by says nothing: choose strategy.selector.form=sigmoid, hard_concrete, "
                "gumbel, gumbel_softmax or simplex, or order=first"
            )
        return self


Options = BilevelOptions


class AutoLoRABilevel(AutoLoRA):
    """Selectors learned on held-out batches under a price on parameters; the module's docstring gives the method."""

    Options = Options
    wants_heldout = True
    options: BilevelOptions

    def param_groups(self, rates: Rates, total_steps: int) -> list[dict[str, Any]]:
        """The weights alone; the rate that autolora has for its selectors goes to their own optimizer."""
        groups = super().param_groups(rates, total_steps)
        (gate,) = (group for group in groups if group["name"] == "gate")
        self.rates = GroupRates(gate["lr"], gate["weight_decay"])
        self.lookahead = self.options.lookahead or rates.adapter.lr or 0.0
        return [group for group in groups if group is not gate]

    @property
    def trainable(self) -> int:
        """The selectors too, which require a gradient only where they are asked for one."""
        return super().trainable + self.adapters.count()["gate"]

    def begin(self, total_steps: int, optimizer: Optimizer) -> None:
        """Lay out the phases over the run.

        Raises:
            ConfigError: if there is no room for the selectors to learn.
        """
        from autolora.strategies.bilevel import UpperLevel

        self.upper = UpperLevel(
            self.adapters,
            order=self.options.order,
            lookahead=self.lookahead,
            rates=self.rates,
            like=optimizer,
            noise=self.noise,
        )
        super().begin(total_steps, optimizer)

    def heldout_step(self, batch: Batch, heldout: Batch, loss_fn: LossFn) -> None:
        """Listen to the selectors' gradient on a held-out batch, or step along it and against the price."""
        import torch

        if self.phase not in ("listen", "prune"):
            return
        gradient = self.upper.hypergradient(batch, heldout, loss_fn)
        if self.phase == "listen":
            self.squared_gradient += gradient.square()
            return
        with self.upper.asked() as selectors:
            push = torch.cat(torch.autograd.grad(self._expected_share(), selectors))
        self.upper.step(gradient + self.price * push)

    def penalty(self, loss: Tensor) -> None:
        """The training loss has none: the price is the selectors' business, who are not taught by it."""
        super().penalty(loss)  # the initial loss, which the price is in units of

    def _begin_pruning(self, optimizer: Optimizer) -> None:
        with self.upper.asked():
            super()._begin_pruning(optimizer)
        self.upper.forget()

    def state_dict(self) -> dict[str, Any]:
        """That of autolora, and the selectors' moments."""
        return super().state_dict() | {"upper": self.upper.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the phase that was saved."""
        super().load_state_dict(state)
        self.upper.load_state_dict(state["upper"])
