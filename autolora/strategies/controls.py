"""Plans to train again at after a selection: the one that was found, and what it has to be compared with.

Training afresh at the found ranks, at the same ranks in other places, and at uniform ranks of the same cost tells ranks
and training dynamics apart: if the permuted plan does as well as the found one, it was not the ranks.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Literal

from autolora.plan import Budget, RankPlan, even_order, spend
from autolora.strategies.base import Planned, StrategyOptions

Control = Literal["found", "permuted", "uniform"]


class NoOptions(StrategyOptions):
    """The plan says it all."""


class AtPlan(Planned[NoOptions]):
    """Trains at ranks that were found, or at a control of equal cost (:func:`control_plan`).

    Args:
        found: rank by module.
        control: which plan.
        seed: of a permutation.
        budget: of the run.
        max_rank: the largest rank of any module.
    """

    Options = NoOptions

    def __init__(self, found: Mapping[str, int], control: Control, seed: int, *, budget: Budget, max_rank: int) -> None:
        super().__init__(NoOptions(), budget=budget, max_rank=max_rank)
        self.found, self.control, self.seed = dict(found), control, seed

    def plan(self) -> RankPlan:
        """The control."""
        found = RankPlan(self.largest.sites, self.found)
        usual = RankPlan.uniform(found.sites, self.max_rank)
        highest = {name: max(rank, found[name]) for name, rank in self.largest.items() if rank != usual[name]}
        return control_plan(self.control, found, self.seed, highest)

    @property
    def notes(self) -> list[str]:
        """Whether the control is the plan that it was to be compared with."""
        same = self.control != "found" and self.plan() == RankPlan(self.largest.sites, self.found)
        return [f"retrain={self.control} is the plan that was found: it is no control"] if same else []


def control_plan(control: Control, found: RankPlan, seed: int, highest: Mapping[str, int]) -> RankPlan:
    """The plan of a control; all cost the same as ``found``, uniform ranks at most so much.

    ``found`` is the plan itself. ``permuted`` hands the ranks out at random among modules of the same widths and the
    same highest rank, and so that something changes, where such modules differ.
    ``uniform`` is the same rank everywhere, the rest spread evenly over the depth.

    Args:
        control: which.
        found: what a strategy has selected.
        seed: of the permutation.
        highest: ranks that single modules must not exceed, where they have less than all could have.
    """
    if control == "found":
        return found
    if control == "uniform":
        largest = RankPlan(found.sites, {name: site.full_rank for name, site in found.sites.items()} | dict(highest))
        return spend(even_order(largest), largest, found.cost)
    draw = random.Random(seed)
    alike: dict[tuple[float, int, int | None], list[str]] = {}
    for name, site in found.sites.items():
        alike.setdefault((site.cost, site.full_rank, highest.get(name)), []).append(name)
    groups = [names for _, names in sorted(alike.items(), key=lambda item: item[0][:2])]
    possible = any(len({found[name] for name in names}) > 1 for names in groups)
    while True:
        ranks = dict(found)
        for names in groups:
            ranks |= {name: found[other] for name, other in zip(names, draw.sample(names, len(names)), strict=True)}
        if ranks != dict(found) or not possible:
            return RankPlan(found.sites, ranks)
