r"""One budget for the adapters of many tasks: which components stay, and how good that choice is. No torch.

Component i of task t's adapter of module m has a value :math:`v_{tmi} \ge 0` (what it is worth on held-out rows) and a
price :math:`c_m`. What is sought is

.. math:: \max_S \sum_{(t,m,i) \in S} v_{tmi} \quad \text{subject to} \quad \sum_{(t,m,i) \in S} c_m \le budget,

a 0/1 knapsack. :func:`merge` removes what has the least value per price until the rest fits (Dantzig,
"Discrete-variable extremum problems", Operations Research 1957), and buys back what fits of the others; :func:`optimum`
solves the problem exactly by dynamic programming over prices (Kellerer, Pferschy & Pisinger, Knapsack Problems, 2004,
section 2.3).

All components of a module cost the same here, so the best k of them are the first k in the order of their values: a
solution is a rank for every task and module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from autolora.errors import PlanError
from autolora.plan import RankPlan, Site, rank_by_score, spend

Values = Mapping[str, Mapping[str, Sequence[float]]]
"""By task and module: what each component is worth, in any order; nothing is below 0."""
Plans = dict[str, RankPlan]


def merge(values: Values, sites: Mapping[str, Site], budget: int, initial: Mapping[str, RankPlan]) -> Plans:
    """Plans within one budget: from the initial ones, the components of the least value per price are removed.

    Args:
        values: of every component on offer, by task and module; the first ranks of a module have the highest.
        sites: the modules, which are the same for every task.
        budget: what all plans may cost together.
        initial: ranks to begin with, by task. What is left of the budget in the end buys other components on offer, the
            most valuable per price first, so that less is left than the cheapest of them costs.

    Raises:
        PlanError: if the budget does not pay for one component for each task, or a value is negative or not finite.
    """
    every, offered = _offered(values, sites)
    require_room(sites, budget, len(values))
    start = RankPlan(every, {_key(t, m): min(r, offered[_key(t, m)]) for t, p in initial.items() for m, r in p.items()})
    ranked = _by_worth(values, every)
    ranks, left = dict(start), start.cost
    for name, component in reversed(ranked):
        if left <= budget:
            break
        if component == ranks[name] - 1:  # the last of its module that is there
            ranks[name] -= 1
            left -= every[name].price(component + 1) - every[name].price(component)
    kept = RankPlan(every, ranks)
    return _by_task(spend([name for name, i in ranked if i >= kept[name]], offered, budget, kept), values, sites)


def optimum(values: Values, sites: Mapping[str, Site], budget: int) -> Plans:
    """The plans of the largest total value within the budget, exactly, in time proportional to components x budget.

    Prices are divided by what they have in common: 768 and 1,920 parameters are 2 and 5.
    """
    every, offered = _offered(values, sites)
    items = [(name, i, values[_task(name)][_module(name)]) for name, rank in offered.items() for i in range(rank)]
    prices = [every[name].price(i + 1) - every[name].price(i) for name, i, _ in items]
    worth = [sorted(own, reverse=True)[i] for _, i, own in items]
    unit = math.gcd(*prices) or 1
    room = budget // unit
    best = np.zeros(room + 1)
    taken = np.zeros((len(items), room + 1), dtype=bool)
    for k, (price, value) in enumerate(zip(prices, worth, strict=True)):
        cost = price // unit
        if cost <= room:
            better = best[: room + 1 - cost] + value
            taken[k, cost:] = better > best[cost:]
            best[cost:] = np.maximum(best[cost:], better)
    ranks, left = dict.fromkeys(every, 0), room
    for k in range(len(items) - 1, -1, -1):
        if taken[k, left]:
            ranks[items[k][0]] += 1
            left -= prices[k] // unit
    return _by_task(RankPlan(every, ranks), values, sites)


def total_value(plans: Mapping[str, RankPlan], values: Values) -> float:
    """What the first components of every module are worth together, as many as its rank."""
    return math.fsum(
        sum(sorted(values[task][module], reverse=True)[:rank])
        for task, plan in plans.items()
        for module, rank in plan.items()
        if rank
    )


def total_cost(plans: Mapping[str, RankPlan]) -> int:
    """What all plans cost together."""
    return sum(plan.cost for plan in plans.values())


def cheapest_left(plans: Mapping[str, RankPlan], values: Values) -> int | None:
    """The price of the cheapest component that is on offer and in no plan; ``None`` if all are in."""
    return min(
        (
            plan.sites[module].step_price(rank)
            for task, plan in plans.items()
            for module, rank in plan.items()
            if rank < len(values[task].get(module, ()))
        ),
        default=None,
    )


def require_room(sites: Mapping[str, Site], budget: int, tasks: int) -> None:
    """Refuse a budget that does not pay for one component for each of so many tasks.

    Raises:
        PlanError: with what that costs.
    """
    cheapest = min(site.step_price(0) for site in sites.values())
    if budget < tasks * cheapest:
        unit = next(iter(sites.values())).unit
        raise PlanError(
            f"the budget of {budget:,} {unit} does not pay for one component for each of {tasks} tasks, which costs at "
            f"least {tasks * cheapest:,}: raise it, or leave tasks out"
        )


def _offered(values: Values, sites: Mapping[str, Site]) -> tuple[dict[str, Site], RankPlan]:
    """A site for every task and module, and what is on offer there."""
    wrong = [
        f"{value} of {module} for {task}"
        for task, modules in values.items()
        for module, own in modules.items()
        for value in own
        if not (math.isfinite(value) and value >= 0)
    ]
    if wrong:
        raise PlanError(f"values of components: expected finite numbers >= 0, got {wrong[0]}")
    every = {_key(task, module): site for task in values for module, site in sites.items()}
    ranks = {_key(task, module): len(own) for task, modules in values.items() for module, own in modules.items()}
    return every, RankPlan(every, ranks)


def _by_worth(values: Values, every: Mapping[str, Site]) -> list[tuple[str, int]]:
    """Every component as its module's name and its place there, by falling value per price."""
    names, scores, places = [], [], []
    for name in every:
        own = sorted(values[_task(name)].get(_module(name), ()), reverse=True)
        names += [name] * len(own)
        scores += [value / every[name].cost for value in own]
    ranked, seen = rank_by_score(names, scores), dict.fromkeys(every, 0)
    for name in ranked:
        places.append((name, seen[name]))
        seen[name] += 1
    return places


def _by_task(plan: RankPlan, values: Values, sites: Mapping[str, Site]) -> Plans:
    return {task: RankPlan(sites, {module: plan[_key(task, module)] for module in sites}) for task in values}


def _key(task: str, module: str) -> str:
    return f"{task}/{module}"


def _task(name: str) -> str:
    return name.partition("/")[0]


def _module(name: str) -> str:
    return name.partition("/")[2]
