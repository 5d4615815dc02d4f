"""Uniform ranks: the baseline that every other strategy has to beat (Hu et al., ICLR 2022)."""

from __future__ import annotations

from autolora.plan import RankPlan, even_order, spend
from autolora.strategies.base import Planned, StrategyOptions


class Options(StrategyOptions):
    """Uniform ranks have no options: the budget says it all."""


class Uniform(Planned[Options]):
    """The same rank everywhere, as large as the budget allows; ``max_rank`` without a budget.

    What is left of a budget that no whole rank spends buys one more component for modules spread evenly over the depth.
    """

    Options = Options

    def plan(self) -> RankPlan:
        """Whole levels while they fit, then single components."""
        return spend(even_order(self.largest), self.largest, self.allowance)
