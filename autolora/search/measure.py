"""Measured plans: each once, at most so many, and what they say of the search."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

from autolora.plan import RankPlan
from autolora.search.space import Levels, PlanSpace

# Correlations are undefined on constant predictions; none is lower than this.
_UNDEFINED = -1.0
# A search may come back to plans that it knows, which costs no pass over the slice, but not for ever.
_ASKED_PER_EVALUATION = 20


class Measurements:
    r"""What plans are worth to a search, measured on the held-out slice and remembered.

    .. math:: worth(plan) = score(plan) - price \cdot cost(plan) / cost(largest)

    A plan is measured once, however often it is asked for, and at most ``evaluations`` are. The uniform plan at the
    budget is the first: what a search has to beat.

    Args:
        space: where the plans come from.
        evaluate: measures a plan; higher is better. What is not finite counts as -1.
        evaluations: how many plans may be measured, the uniform one included.
        price: of the cost of the largest plan, in units of the score.
        known: scores that another search has measured; they need no pass over the slice, and count as evaluations.

    Attributes:
        scores: of every plan that was measured, in the order of measuring, without the price.
        undefined: how many of them were not finite.
    """

    def __init__(
        self,
        space: PlanSpace,
        evaluate: Callable[[RankPlan], float],
        *,
        evaluations: int,
        price: float = 0.0,
        known: Mapping[Levels, float] | None = None,
    ) -> None:
        self.space, self.evaluate, self.known = space, evaluate, known or {}
        self.evaluations = evaluations
        self._unit_price = price / max(1, space.largest.cost)
        self.scores: dict[Levels, float] = {}
        self.undefined = 0
        self._asked = 0
        self.uniform = space.uniform()
        self(self.uniform)

    def __call__(self, levels: Levels) -> float:
        """The worth of a plan.

        Raises:
            ValueError: if the plan is new and no evaluation is left; ask :attr:`done` or :meth:`knows` before.
        """
        self._asked += 1
        if levels not in self.scores:
            if len(self.scores) >= self.evaluations:
                raise ValueError(f"all {self.evaluations} evaluations are spent")
            score = self.known[levels] if levels in self.known else self.evaluate(self.space.plan(levels))
            self.undefined += not math.isfinite(score)
            self.scores[levels] = score if math.isfinite(score) else _UNDEFINED
        return self.worth(levels)

    def worth(self, levels: Levels) -> float:
        """The score of a plan that has been measured, less the price of its cost."""
        return self.scores[levels] - self._unit_price * self.space.plan(levels).cost

    def knows(self, levels: Levels) -> bool:
        """Whether the plan has been measured."""
        return levels in self.scores

    @property
    def most_steps(self) -> int:
        """How often a search may ask, for plans that are known too."""
        return _ASKED_PER_EVALUATION * self.evaluations

    @property
    def done(self) -> bool:
        """Whether every evaluation is spent, or the search does not come up with new plans any more."""
        return len(self.scores) >= self.evaluations or self._asked >= self.most_steps

    @property
    def best(self) -> Levels:
        """The plan of the highest worth; of equal ones the first, so that a search has to beat what it began with."""
        return max(self.scores, key=self.worth)


def search_at_random(measured: Measurements, seed: int) -> None:
    """Measure random plans (:meth:`autolora.search.space.PlanSpace.random`): what a cleverer search has to beat.

    Args:
        measured: measures plans and remembers them.
        seed: of the draws.
    """
    rng = random.Random(f"{seed}/random search")
    while not measured.done:
        measured(measured.space.random(rng))
