"""Uniform ranks: the baseline that every other strategy has to beat (Hu et al., ICLR 2022)."""

from __future__ import annotations

from autolora.plan import RankPlan, even_order, spend
from autolora.strategies.base import Evaluate, Strategy, StrategyOptions


class Options(StrategyOptions):
    """Uniform ranks have no options: the budget says it all."""


class Uniform(Strategy[Options]):
    """The same rank everywhere, as large as the budget allows; ``max_rank`` without a budget.

    What is left of a budget that no whole rank spends buys one more component for modules spread evenly over the depth.
    """

    Options = Options

    def initial_plan(self) -> RankPlan:
        """The plan is fixed before training."""
        return spend(even_order(self.largest), self.largest, self.allowance)

    def finalize(self, evaluate: Evaluate) -> RankPlan:
        """The plan it began with."""
        return self.adapters.active_plan()
