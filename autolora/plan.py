"""Rank plans and the parameter budget that every strategy honours. No torch.

A *component* is one rank-1 term of an adapter. In a module with ``in`` inputs and ``out`` outputs it costs
``in + out`` parameters (a row of A and a column of B), so plans are compared in parameters, never in components.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from autolora.errors import PlanError


@dataclass(frozen=True)
class Site:
    """A linear-like module that an adapter can sit on."""

    in_features: int
    out_features: int

    @property
    def cost(self) -> int:
        """Parameters of one component: ``in + out``."""
        return self.in_features + self.out_features

    @property
    def full_rank(self) -> int:
        """The largest rank an update of this module can have: ``min(in, out)``."""
        return min(self.in_features, self.out_features)


class RankPlan(Mapping[str, int]):
    """A rank for each module: an immutable mapping ``{module name: rank}`` that knows what it costs.

    Rank 0 is legal and means that the module is left as it was.

    Args:
        sites: every module that may carry an adapter, in model order.
        ranks: rank per module; a module that is left out has rank 0.

    Raises:
        PlanError: if ``ranks`` names a module that is not in ``sites``, or a rank is not a whole number from 0 to
            ``min(in, out)``.
    """

    def __init__(self, sites: Mapping[str, Site], ranks: Mapping[str, int]) -> None:
        unknown = [name for name in ranks if name not in sites]
        if unknown:
            raise PlanError(
                f"the plan names {len(unknown)} modules that the model does not adapt: {_some(unknown)}; "
                f"expected names among: {_some(list(sites))}"
            )
        for name, rank in ranks.items():
            highest = sites[name].full_rank
            if rank % 1 or not 0 <= rank <= highest:
                raise PlanError(f"rank of {name}: expected a whole number 0 to {highest} (min(in, out)), got {rank}")
        self.sites = dict(sites)
        self._ranks = {name: int(ranks.get(name, 0)) for name in sites}

    @classmethod
    def uniform(cls, sites: Mapping[str, Site], rank: int) -> RankPlan:
        """The same rank everywhere, clipped to each module's ``min(in, out)``.

        Raises:
            PlanError: if the rank is negative.
        """
        return cls(sites, {name: min(rank, site.full_rank) for name, site in sites.items()})

    def __getitem__(self, name: str) -> int:
        return self._ranks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranks)

    def __len__(self) -> int:
        return len(self._ranks)

    def __repr__(self) -> str:
        return f"RankPlan({self._ranks}, params={self.params})"

    @property
    def params(self) -> int:
        """Adapter parameters: the sum of ``rank * (in + out)``."""
        return sum(rank * self.sites[name].cost for name, rank in self._ranks.items())

    @property
    def components(self) -> int:
        """The sum of all ranks."""
        return sum(self._ranks.values())


@dataclass(frozen=True)
class Budget:
    """How many adapter parameters a plan may have; at most one of the three is given.

    Args:
        rank: as many parameters as uniform rank ``rank`` on the same modules, each clipped to its ``min(in, out)``;
            fractions are allowed.
        params: a number of parameters.
        fraction: a share of the parameters of the largest plan, 0 to 1.

    Nothing given means no budget.

    Raises:
        PlanError: if more than one is given, or one is negative, not finite, or a fraction above 1.
    """

    rank: float | None = None
    params: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in vars(self).items() if v is not None}
        if len(given) > 1:
            raise PlanError(f"a budget takes one of rank, params, fraction; got {', '.join(given)}: keep one")
        for key, value in given.items():
            if not (math.isfinite(value) and value >= 0):
                raise PlanError(f"budget.{key}: expected a number >= 0, got {value}")
        if self.fraction is not None and self.fraction > 1:
            raise PlanError(f"budget.fraction: expected 0 to 1, got {self.fraction}")

    def resolve(self, largest: RankPlan) -> int | None:
        """The budget in parameters, rounded down, or ``None`` without one.

        Args:
            largest: the plan with the maximum rank of every module. A budget above its cost is clamped, with a warning.
        """
        if self.rank is not None:
            uniform = sum(min(self.rank, site.full_rank) * site.cost for site in largest.sites.values())
            wanted = _floor(uniform)
        elif self.params is not None:
            wanted = _floor(self.params)
        elif self.fraction is not None:
            wanted = _floor(self.fraction * largest.params)
        else:
            return None
        if wanted > largest.params:
            warnings.warn(
                f"the budget of {wanted:,} parameters is above the {largest.params:,} of the largest plan and is "
                "clamped to it; raise max_rank to spend more",
                stacklevel=2,
            )
        return min(wanted, largest.params)


def spend(order: Iterable[str], largest: RankPlan, budget: int | None) -> RankPlan:
    """Buy components in the given order while they fit.

    Args:
        order: module names of ``largest``, one entry for each component on offer, most wanted first. A component that
            does not fit in what is left is passed over, so that the slack at the end is below the cost of every
            component left on offer.
        largest: no module gets more than its rank here.
        budget: parameters that may be spent; ``None`` buys everything on offer.
    """
    left = math.inf if budget is None else budget
    ranks = dict.fromkeys(largest, 0)
    for name in order:
        cost = largest.sites[name].cost
        if ranks[name] < largest[name] and cost <= left:
            ranks[name] += 1
            left -= cost
    return RankPlan(largest.sites, ranks)


def even_order(largest: RankPlan) -> list[str]:
    """Components level by level, and inside a level spread evenly over the model's depth.

    The first quarter of a level are modules a quarter of the model apart, and so on (bit-reversal order), so that
    :func:`spend` at a fractional rank does not favour the first layers.
    """
    names = list(largest)
    bits = max(1, (len(names) - 1).bit_length())
    spread = sorted(range(len(names)), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))
    levels = max(largest.values(), default=0)
    return [names[i] for level in range(levels) for i in spread if largest[names[i]] > level]


def proportional_order(weights: Mapping[str, float], largest: RankPlan) -> list[str]:
    """Components in the order in which they keep ranks as close as whole numbers can be to a given shape.

    The k-th component of a module with weight w comes at ``(k - 1/2) / w`` (Webster's method of apportionment, with
    which ``round(c * w)`` is bought after the budget of any c), so that :func:`spend` scales the shape to a budget. A
    module of weight 0 is offered nothing.

    Args:
        weights: the shape: ranks, or anything that ranks shall be proportional to; one for each module of ``largest``.
        largest: no module is offered more than its rank here.

    Raises:
        PlanError: if a weight is negative or not finite, or not every module has one.
    """
    if set(weights) != set(largest):
        raise PlanError(f"weights: expected one for each of the {len(largest)} modules, got {len(weights)}")
    wrong = [name for name, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)]
    if wrong:
        raise PlanError(f"weight of {wrong[0]}: expected a finite number >= 0, got {weights[wrong[0]]}")
    offered = [(name, k) for name in largest if weights[name] > 0 for k in range(largest[name])]
    offered.sort(key=lambda component: (component[1] + 0.5) / weights[component[0]])
    return [name for name, _ in offered]


def rank_by_score(names: Sequence[str], scores: Sequence[float]) -> list[str]:
    """Module names sorted by descending score of their components; ties keep their order."""
    assert len(names) == len(scores)
    return [names[i] for i in sorted(range(len(scores)), key=lambda i: -scores[i])]


def _floor(value: float) -> int:
    """The whole part, where what lies a rounding error below a whole number counts as that number."""
    return math.floor(value + 1e-6)


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
