r"""The plans that a search chooses from: a grid of ranks under a budget.

Module i may have the ranks

.. math:: r_i = f_i + k \, l_i, \qquad l_i = 0, 1, \dots, t_i

with floor :math:`f_i` (``min_rank``, or less where the module's maximum is lower), step k and the module's *level*
:math:`l_i`. One level costs :math:`k (in_i + out_i)` parameters, or what a table says, and what all levels may cost
together is the budget less the cost of the floors. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from autolora.errors import PlanError
from autolora.plan import RankPlan, even_order, proportional_order, spend

Levels = tuple[int, ...]


class PlanSpace:
    """The grid, with what searchers do on it. Whatever it returns is within the budget, but for ``top``.

    Args:
        largest: the plan of maximum ranks.
        allowance: the budget; ``None`` allows everything.
        min_rank: no module gets less, where it can have so much.
        step: distance of ranks on the grid; where ranks come in multiples, the next distance that keeps to them.

    Attributes:
        names: the modules, in model order.
        top: the largest level of each.
        costs: of one level of each, the mean where levels differ.
        limit: what all levels may cost together.
        bounded: whether there is a budget: plans that are drawn then spend it.

    Raises:
        PlanError: if the budget does not pay for the floors.
    """

    def __init__(self, largest: RankPlan, allowance: int | None, *, min_rank: int = 0, step: int = 1) -> None:
        self.largest = largest
        self.names = list(largest)
        sites = largest.sites.values()
        self.step = step = math.lcm(step, *(site.multiple for site in sites))
        lowest = [min_rank - min_rank % site.multiple for site in sites]
        self.floor = [min(low, rank) for low, rank in zip(lowest, largest.values(), strict=True)]
        self.top: Levels = tuple((rank - low) // step for rank, low in zip(largest.values(), self.floor, strict=True))
        self._prices = [
            tuple(site.price(low + step * level) - site.price(low) for level in range(top + 1))
            for site, low, top in zip(sites, self.floor, self.top, strict=True)
        ]
        # A level is a component of a coarser model, so that plans are shared out there as everywhere.
        coarse = {
            name: replace(site, multiple=1, prices=prices)
            for (name, site), prices in zip(largest.sites.items(), self._prices, strict=True)
        }
        self._coarse = RankPlan(coarse, dict(zip(self.names, self.top, strict=True)))
        self.costs = [site.cost or step * full.cost for site, full in zip(coarse.values(), sites, strict=True)]
        self.bounded = allowance is not None
        floors = RankPlan(largest.sites, dict(zip(self.names, self.floor, strict=True))).cost
        allowed = largest.cost if allowance is None else allowance
        if floors > allowed:
            raise PlanError(
                f"the budget of {allowed:,} {largest.unit} does not pay for rank {min_rank} everywhere, which costs "
                f"{floors:,}: raise the budget or lower strategy.min_rank"
            )
        self.limit = min(allowed - floors, self.cost(self.top))
        even = even_order(RankPlan(coarse, dict.fromkeys(self.names, 1)))
        self._turn = {name: i for i, name in enumerate(even)}

    def plan(self, levels: Sequence[int]) -> RankPlan:
        """The ranks of these levels."""
        ranks = {
            name: low + self.step * int(level) for name, low, level in zip(self.names, self.floor, levels, strict=True)
        }
        return RankPlan(self.largest.sites, ranks)

    def cost(self, levels: Sequence[int]) -> int:
        """What all levels cost, floors not counted."""
        return sum(prices[int(level)] for prices, level in zip(self._prices, levels, strict=True))

    def _dearer(self, i: int, level: int) -> int:
        """What the level above this one costs a module more."""
        return self._prices[i][level + 1] - self._prices[i][level]

    # Plans to begin with ---------------------------------------------------------------------------------------------

    def uniform(self) -> Levels:
        """The same rank everywhere, as far as the budget goes, the rest spread evenly over the depth."""
        return tuple(spend(even_order(self._coarse), self._coarse, self.limit).values())

    def smallest(self) -> Levels:
        """The least that every module can have and still be adapted, whatever the budget: at least one component."""
        return tuple(0 if low else min(1, top) for low, top in zip(self.floor, self.top, strict=True))

    def random(self, rng: Random) -> Levels:
        """Spend the budget at random: the modules' shares of it are uniform on the simplex.

        Shares are exponential variates (normalised, they are uniform on the simplex), as far as whole levels and
        maximum ranks allow. Without a budget the sum to spend is uniform too.
        """
        limit = self.limit if self.bounded else rng.randint(0, self.limit)
        weights = {name: rng.expovariate(1) / cost for name, cost in zip(self.names, self.costs, strict=True)}
        return tuple(spend(proportional_order(weights, self._coarse), self._coarse, limit).values())

    # Plans out of plans ----------------------------------------------------------------------------------------------

    def moved(self, levels: Levels, wishes: Sequence[int]) -> Levels:
        """Each module a level down (-1), as it was (0) or up (1); what the budget does not pay for is not done.

        The repair of infeasible wishes is deterministic: first everything that goes down does; then modules go up while
        that fits, those of the lowest level first and, where levels are equal, spread evenly over the depth.
        """
        new = [max(0, level + min(0, int(wish))) for level, wish in zip(levels, wishes, strict=True)]
        left = self.limit - self.cost(new)
        ups = [i for i, wish in enumerate(wishes) if wish > 0 and new[i] < self.top[i]]
        for i in sorted(ups, key=lambda i: (new[i], self._turn[self.names[i]])):
            price = self._dearer(i, new[i])
            if price <= left:
                new[i] += 1
                left -= price
        return tuple(new)

    def mutated(self, levels: Levels, rng: Random, modules: int = 2) -> Levels:
        """Some modules a few levels up or down; :meth:`repaired` at the cost of the others.

        The distance is geometric: one level half of the time, two a quarter of it.
        """
        new = list(levels)
        for i in rng.sample(range(len(new)), min(modules, len(new))):
            distance = 1
            while rng.random() < 0.5:
                distance += 1
            new[i] = min(self.top[i], max(0, new[i] + rng.choice((-1, 1)) * distance))
        return self.repaired(new, rng)

    def crossed(self, one: Levels, other: Levels, rng: Random) -> Levels:
        """Each module's level from one of two plans; :meth:`repaired`."""
        return self.repaired([rng.choice(pair) for pair in zip(one, other, strict=True)], rng)

    def repaired(self, levels: Sequence[int], rng: Random) -> Levels:
        """Levels taken away at random until the plan is within the limit, then, with a budget, bought at random while
        one fits.
        """
        new = list(levels)
        left = self.limit - self.cost(new)
        while left < 0:
            i = rng.choice([i for i, level in enumerate(new) if level])
            new[i] -= 1
            left += self._dearer(i, new[i])
        while self.bounded:
            fits = [i for i, top in enumerate(self.top) if new[i] < top and self._dearer(i, new[i]) <= left]
            if not fits:
                break
            i = rng.choice(fits)
            left -= self._dearer(i, new[i])
            new[i] += 1
        return tuple(new)
