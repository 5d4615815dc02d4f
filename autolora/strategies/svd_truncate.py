r"""Train large, then cut: the spectra of all updates are truncated together to the budget.

Every module trains at its maximum rank for a share of the run. Then each update is written in its singular basis,
:math:`s B A = \sum_i s \sigma_i u_i v_i^T`, and component i of a module whose components cost c parameters is worth

.. math:: s^2 \sigma_i^2 / c.

Leaving components out changes the weights of the model by :math:`\|\Delta W - \Delta W'\|_F^2`, the sum of their
:math:`s^2 \sigma_i^2` (Eckart & Young, Psychometrika 1936). To keep as much as possible of it within a number of
parameters is a knapsack, which is filled by value per parameter; the order is that of the exact solution but for the
last few components. The survivors then train on, with fresh optimizer state, since their basis is new.

It is the cheapest serious baseline: nothing is learned but the adapter itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from autolora.errors import ConfigError
from autolora.plan import RankPlan
from autolora.strategies.base import Evaluate, Strategy, StrategyOptions, reset_optimizer_state
from autolora.strategies.pruning import best_components, keep

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from autolora.adapters import Adapters, AdapterSettings


class Options(StrategyOptions):
    """``share`` of the run's steps before the cut; at 1 it comes at the very end, and nothing trains on."""

    share: float = Field(default=0.5, gt=0, le=1)


class SVDTruncate(Strategy[Options]):
    """Maximum ranks, truncated once; the module's docstring gives the value of a component.

    Without a budget nothing is cut, and the ranks stay at ``max_rank``.
    """

    Options = Options

    def attach(self, model: nn.Module, settings: AdapterSettings) -> Adapters:
        """Adapters of maximum rank."""
        self.truncated = self._cut_short = False
        return super().attach(model, settings)

    def begin(self, total_steps: int, optimizer: Optimizer) -> None:
        """Find the step of the cut; with ``share=1`` it is left to :meth:`finalize`.

        Raises:
            ConfigError: if there is no step after the cut.
        """
        step = max(1, round(self.options.share * total_steps))
        self.cut_after = step if self.options.share < 1 else None
        if self.cut_after == total_steps:
            raise ConfigError(
                f"strategy.share={self.options.share} of {total_steps} steps leaves none after the cut, and the ranks "
                "would never be trained alone: raise trainer.max_steps, or take strategy.share=1 to mean that"
            )

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Cut when it is time."""
        if self.cut_after is not None and step >= self.cut_after and not self.truncated:
            self._truncate(optimizer)

    def _truncate(self, optimizer: Optimizer | None = None) -> None:
        """Make components canonical and keep the most valuable that the budget pays for.

        Where training goes on, the others are removed (:func:`~autolora.strategies.pruning.keep`), and what stays
        begins with fresh optimizer state.
        """
        import torch

        from autolora.adapters import canonicalize

        layers = self.adapters.layers.values()
        worth = [(canonicalize(layer) * layer.scale).detach().square() / layer.site.cost for layer in layers]
        keep(self.adapters, best_components(self.adapters.attached_plan(), torch.cat(worth), self.allowance), optimizer)
        self.truncated = True
        if optimizer is not None:
            reset_optimizer_state(optimizer, self.adapters.adapter_parameters())

    @property
    def settled(self) -> bool:
        """Whether the cut is made."""
        return self.truncated

    @property
    def notes(self) -> list[str]:
        """Whether training ended before the cut."""
        late = "training ended before the cut: the ranks were cut at its end, and were never trained alone"
        return [late] if self._cut_short else []

    def finalize(self, evaluate: Evaluate) -> RankPlan:
        """What the cut has left."""
        if not self.truncated:
            self._cut_short = self.cut_after is not None
            self._truncate()
        return self.adapters.active_plan()

    def state_dict(self) -> dict[str, Any]:
        """Whether the cut is made; what it left is in the parameters."""
        return {"truncated": self.truncated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on before or after the cut."""
        self.truncated = state["truncated"]
