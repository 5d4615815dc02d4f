"""Rank plans and the budget that every strategy honours. No torch.

A *component* is one rank-1 term of an adapter. In a module with ``in`` inputs and ``out`` outputs it has
``in + out`` parameters (a row of A and a column of B), so plans are compared in parameters, never in components; or in
what a table says that each rank of a module costs: floating-point operations, or measured time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from autolora.errors import PlanError


@dataclass(frozen=True)
class Site:
    """A linear-like module that an adapter can sit on, and what its ranks cost.

    Args:
        in_features, out_features: of the module.
        multiple: ranks that are bought are multiples of this.
        prices: of rank 0, 1, 2, ..., from 0 upwards; without them, parameters.
        unit: what prices count.
    """

    in_features: int
    out_features: int
    multiple: int = 1
    prices: tuple[int, ...] | None = None
    unit: str = "parameters"

    def price(self, rank: int) -> int:
        """What a rank costs of the budget: ``rank * (in + out)`` parameters, or what the table says.

        Above its end a table goes on as steeply as it ends.
        """
        if self.prices is None:
            return rank * (self.in_features + self.out_features)
        last = len(self.prices) - 1
        if rank <= last:
            return self.prices[rank]
        return self.prices[last] + (rank - last) * (self.prices[last] - self.prices[max(0, last - 1)])

    @property
    def cost(self) -> float:
        """What one component costs of the budget: ``in + out`` parameters, or the mean over the table."""
        if self.prices is not None:
            return self.prices[-1] / max(1, len(self.prices) - 1)
        return self.in_features + self.out_features

    def step_price(self, rank: int) -> int:
        """What the next ``multiple`` components cost a module that has this rank."""
        return self.price(rank + self.multiple) - self.price(rank)

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
        return sum(
            rank * (self.sites[name].in_features + self.sites[name].out_features) for name, rank in self._ranks.items()
        )

    @property
    def cost(self) -> int:
        """What the plan costs of the budget: parameters, or what the tables of its sites say."""
        return sum(self.sites[name].price(rank) for name, rank in self._ranks.items())

    @property
    def unit(self) -> str:
        """What :attr:`cost` counts."""
        return next((site.unit for site in self.sites.values()), "parameters")

    @property
    def components(self) -> int:
        """The sum of all ranks."""
        return sum(self._ranks.values())


@dataclass(frozen=True)
class Budget:
    """How much a plan may cost; at most one of the first three is given.

    Args:
        rank: as much as uniform rank ``rank`` costs on the same modules, each clipped to its ``min(in, out)``;
            fractions are allowed.
        params: a number of parameters.
        fraction: a share of the cost of the largest plan, 0 to 1.

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
        """The budget in the unit of the plan's sites, rounded down, or ``None`` without one.

        Args:
            largest: the plan with the maximum rank of every module. A budget above its cost is clamped, with a warning.
        """
        if self.rank is not None:
            wanted = _floor(sum(_uniform_price(self.rank, site) for site in largest.sites.values()))
        elif self.params is not None:
            wanted = _floor(self.params)
        elif self.fraction is not None:
            wanted = _floor(self.fraction * largest.cost)
        else:
            return None
        if wanted > largest.cost:
            warnings.warn(
                f"the budget of {wanted:,} {largest.unit} is above the {largest.cost:,} of the largest plan and is "
                "clamped to it; raise max_rank to spend more",
                stacklevel=2,
            )
        return min(wanted, largest.cost)


def _uniform_price(rank: float, site: Site) -> float:
    """The price of a rank that need not be whole, up to the module's highest."""
    rank = min(rank, site.full_rank)
    below = int(rank)
    return site.price(below) + (rank - below) * (site.price(below + 1) - site.price(below))


def spend(
    order: Iterable[str],
    largest: RankPlan,
    budget: int | None,
    start: RankPlan | None = None,
    pass_over: bool = True,
) -> RankPlan:
    """Buy components in the given order while they fit.

    Args:
        order: module names of ``largest``, one entry for each component on offer, most wanted first. Where the ranks of
            a module come in multiples, the entry in the middle of a multiple buys the whole of it.
        largest: no module gets more than its rank here.
        budget: what the plan may cost in all; ``None`` buys everything on offer.
        start: what is there already; nothing by default.
        pass_over: whether a component that does not fit in what is left is passed over, so that the slack at the end is
            below the cost of every component left on offer; if not, it is the end.
    """
    ranks = dict.fromkeys(largest, 0) if start is None else dict(start)
    left = math.inf if budget is None else budget - (start.cost if start is not None else 0)
    seen = dict.fromkeys(largest, 0)
    for name in order:
        site = largest.sites[name]
        middle = seen[name] % site.multiple == site.multiple // 2
        seen[name] += 1
        if not middle or ranks[name] + site.multiple > largest[name]:
            continue
        price = site.step_price(ranks[name])
        if price <= left:
            ranks[name] += site.multiple
            left -= price
        elif not pass_over:
            break
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
