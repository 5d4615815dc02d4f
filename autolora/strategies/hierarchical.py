"""Ranks by role and depth, from a table: what one can choose without looking at weights or data.

========================  ===  ======  ====
role                      low  medium  high
========================  ===  ======  ====
query, key, value           4       8    16
attention output            8      16    32
MLP up and gate             8      16    32
MLP down                   16      32    64
========================  ===  ======  ====

Fused query, key and value count as query, and so does every module of no known role (poolers, projections of
embeddings). A rank is never above min(in, out) of its module, nor above what ``adapter.rank_pattern`` says.

The ranks of a block are multiplied with a factor f of its relative depth, t = d / (D - 1) for block d = 0 ... D - 1 of
its stack (encoder and decoder each have their own), and rounded:

=============  ===============
depth_profile  f
=============  ===============
flat           1
increasing     1/2 + t
decreasing     3/2 - t
hourglass      1/2 + abs(2t - 1), wide at both ends
=============  ===============

All four have mean 1 over t. Modules outside blocks, and the only block of a stack, keep f = 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from autolora.plan import RankPlan, proportional_order, spend
from autolora.roles import Role, depth_of, role_of
from autolora.strategies.base import Planned, StrategyOptions

if TYPE_CHECKING:
    from torch import nn

    from autolora.adapters import Adapters, AdapterSettings

Complexity = Literal["low", "medium", "high"]
DepthProfile = Literal["flat", "increasing", "decreasing", "hourglass"]

_QUERY_LIKE: dict[Complexity, int] = {"low": 4, "medium": 8, "high": 16}
_TIMES: Mapping[Role, int] = {Role.attention_output: 2, Role.mlp_up: 2, Role.mlp_gate: 2, Role.mlp_down: 4}


class Options(StrategyOptions):
    """Options of :class:`Hierarchical`.

    ``complexity`` sets the size without a budget. With one it has no effect: the three columns have one shape.
    """

    complexity: Complexity = "medium"
    depth_profile: DepthProfile = "flat"


class Hierarchical(Planned[Options]):
    """Ranks by role and depth; the module's docstring has the table.

    Without a budget the table as it stands; ``max_rank`` does not cut it, since the table says itself how large a
    module may be. With a budget its shape, scaled: ranks as close to proportional as whole numbers get. There
    ``max_rank`` does not cut either (MLP down would meet it first, and the shape would be lost), but it bounds the
    budget as for every strategy.
    """

    Options = Options

    def attach(self, model: nn.Module, settings: AdapterSettings) -> Adapters:
        """Attach the plan."""
        self.settings = settings
        return super().attach(model, settings)

    def plan(self) -> RankPlan:
        """The table, or its shape scaled to the budget."""
        options, largest = self.options, self._largest_of_all()
        depths = relative_depths(largest, (name for name, _ in self.model.named_modules()))
        wanted = {
            name: table_rank(role_of(name), options.complexity) * depth_factor(options.depth_profile, depths[name])
            for name in largest
        }
        if self.allowance is not None:
            return spend(proportional_order(wanted, largest), largest, self.allowance)
        return RankPlan(largest.sites, {name: min(round(wanted[name]), largest[name]) for name in largest})

    def _largest_of_all(self) -> RankPlan:
        """What a module can have without ``max_rank``: min(in, out), or what ``rank_pattern`` says."""
        from autolora.adapters.select import match_ranks

        sites = self.largest.sites
        unlimited = max(site.full_rank for site in sites.values())
        limits = match_ranks(list(sites), self.settings.rank_pattern, unlimited)
        return RankPlan(sites, {name: min(limits[name], site.full_rank) for name, site in sites.items()})


def table_rank(role: Role, complexity: Complexity) -> int:
    """The rank that the table gives to a role."""
    return _QUERY_LIKE[complexity] * _TIMES.get(role, 1)


def depth_factor(profile: DepthProfile, depth: float | None) -> float:
    """The factor of a profile at a relative depth from 0 to 1; 1 where there is no depth."""
    if depth is None or profile == "flat":
        return 1.0
    return {"increasing": 0.5 + depth, "decreasing": 1.5 - depth, "hourglass": 0.5 + abs(2 * depth - 1)}[profile]


def relative_depths(names: Iterable[str], modules: Iterable[str]) -> dict[str, float | None]:
    """The relative depth of each of ``names``: 0 in the first block of its stack, 1 in the last.

    ``None`` outside blocks, and in a stack of one block.

    Args:
        names: modules to place.
        modules: all modules of the model, which say how deep each stack is.
    """
    deepest: dict[str, int] = {}
    for name in modules:
        depth = depth_of(name)
        if depth is not None:
            stack = _stack(name)
            deepest[stack] = max(deepest.get(stack, 0), depth)

    def place(name: str) -> float | None:
        depth = depth_of(name)
        return depth / deepest[_stack(name)] if depth is not None and deepest[_stack(name)] else None

    return {name: place(name) for name in names}


def _stack(name: str) -> str:
    """What stands before the number of the block."""
    parts = name.split(".")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdecimal())])
