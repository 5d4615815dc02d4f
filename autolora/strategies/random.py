"""A random plan: what any choice of ranks has to beat, and the spread that a choice by chance would have."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from pydantic import Field

from autolora.plan import RankPlan, spend
from autolora.strategies.base import Planned, StrategyOptions

if TYPE_CHECKING:
    from torch import nn

    from autolora.adapters import Adapters, AdapterSettings


_DRAWS = 100


class Options(StrategyOptions):
    """``seed`` of the plan; by default the run's own, so that every seed draws another plan."""

    seed: int | None = Field(default=None, ge=0)


class Random(Planned[Options]):
    """Components drawn without replacement from all those on offer, each equally likely, while they fit.

    On offer are ``max_rank`` components of every module, so that all modules have the same expected rank until one is
    full. What does not fit is passed over: less is left than the cheapest component that remains. Where that is more
    than 2 % of the budget, the plan is drawn anew, up to a hundred times. Without a budget there is nothing to draw:
    everything on offer is bought.
    """

    Options = Options

    def attach(self, model: nn.Module, settings: AdapterSettings) -> Adapters:
        """Attach the plan."""
        self.seed = settings.seed if self.options.seed is None else self.options.seed
        return super().attach(model, settings)

    def plan(self) -> RankPlan:
        """The seed's plan: the first that spends 98 % of the budget, or the one that spends most."""
        draw, plans = random.Random(self.seed), []
        offered = [name for name, rank in self.largest.items() for _ in range(rank)]
        for _ in range(_DRAWS):
            draw.shuffle(offered)
            plans.append(spend(offered, self.largest, self.allowance))
            if self.allowance is None or plans[-1].cost >= 0.98 * self.allowance:
                return plans[-1]
        return max(plans, key=lambda plan: plan.cost)
