"""Budgets that do not count parameters, and ranks in multiples: kept by every strategy that has a budget."""

from __future__ import annotations

import random

import pytest
import torch
from strategies.checks import pair_of
from strategies.checks import run as run_small
from strategies.test_every_strategy import RANKED, SMALLER

from autolora.adapters import AdapterSettings
from autolora.compose import compose
from autolora.plan import Budget, RankPlan, Site
from autolora.strategies import make_strategy
from autolora.strategies.pruning import Prices

# The first component of a module is the dear one; U1 is slow.
TABLES = {
    name: tuple(0 if rank == 0 else charge + 3 * rank for rank in range(9))
    for name, charge in {"U0": 100, "V0": 120, "U1": 300, "V1": 80}.items()
}


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("name", RANKED)
def test_no_strategy_spends_more_than_the_tables_allow(name: str, multiple: int) -> None:
    fewer = ("strategy.min_rank=0",) if name == "dynamic_growth" else SMALLER.get(name, ())
    options = compose([f"strategy={name}", *fewer]).strategy.options
    settings = AdapterSettings(prices=TABLES, unit="ns", rank_multiple=multiple)
    strategy = make_strategy(name, options, budget=Budget(fraction=0.55), max_rank=8)
    plan = run_small(strategy, pair_of(), 24, settings=settings).plan
    assert strategy.allowance == int(0.55 * sum(table[8] for table in TABLES.values()))
    above = {name: max(0, rank - 8) for name, rank in plan.items()}  # hierarchical goes on above max_rank, at 3 each
    by_hand = sum(TABLES[name][rank - above[name]] + 3 * above[name] for name, rank in plan.items())
    assert 0 < plan.cost == by_hand <= strategy.allowance
    assert all(rank % multiple == 0 for rank in plan.values())


def test_prices_of_masks_and_orders_are_those_of_the_plans() -> None:
    sites = {name: Site(9, 9, prices=table) for name, table in TABLES.items()} | {"none": Site(4, 4, prices=(0, 1))}
    plan = RankPlan(sites, {"U0": 3, "V0": 0, "U1": 8, "V1": 2, "none": 0})
    prices = Prices(plan)
    owners = [name for name, rank in plan.items() for _ in range(rank)]
    assert prices.each.tolist() == pytest.approx([sites[name].cost for name in owners])
    draw = random.Random(0)
    for _ in range(20):
        order = draw.sample(range(len(owners)), len(owners))
        running = prices.running(torch.tensor(order)).tolist()
        for count in range(1, len(owners) + 1):
            chosen = [owners[i] for i in order[:count]]
            expected = RankPlan(sites, {name: chosen.count(name) for name in sites}).cost
            kept = torch.zeros(len(owners), dtype=torch.bool)
            kept[order[:count]] = True
            assert running[count - 1] == expected == prices.together(kept) == prices.together(kept.float())
