"""Runs whose budget counts operations or time: what is written, and that measured prices hold as long as a run."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_resume import Stopper, directory_in, interrupted_run, outcome, planted, stopper  # noqa: F401  fixture
from test_run import configure, directory_of, sst2  # noqa: F401  fixtures
from torch import Tensor

from autolora.errors import PlanError
from autolora.run import run_one
from autolora.signals import Interrupted

STEPS = ("trainer.max_steps=24", "trainer.max_epochs=-1", "max_rank=8")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A clock on which adapters take another time whenever they are measured, and a cache of our own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measured = itertools.count(1)

    def time(functions: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> list[float]:
        slow = next(measured)
        return [1e-3 + (40e-6 + 2e-6 * slow * f.rank if hasattr(f, "rank") else 0.0) for f in functions]

    monkeypatch.setattr("autolora.adapters.prices.least_times", time)


@pytest.mark.parametrize("strategy", ["uniform", "autolora"])
def test_a_run_keeps_to_a_budget_of_time(clock: None, tmp_path: Path, strategy: str) -> None:
    cfg = planted(
        tmp_path, *STEPS, f"strategy={strategy}", "budget.cost=latency", "budget.rank=null", "budget.fraction=0.6"
    )
    result = run_one(cfg)
    price, prices = result.price, directory_in(cfg.run_root).read_prices()
    assert price is not None
    assert prices is not None
    assert price.unit == "ns"
    assert result.params.budget is None
    assert result.budget == ("ns", price.budget)
    assert price.budget == int(0.6 * sum(table[-1] for table in prices.values()))
    assert price.plan == sum(prices[name][rank] for name, rank in result.ranks.items()) <= price.budget
    assert sum(result.ranks.values()) > 0


def test_a_run_goes_on_with_the_prices_that_it_began_with(
    clock: None,
    stopper: Stopper,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Though the cache is lost, and they would be others if they were measured anew."""
    extra = (*STEPS, "strategy=autolora", "budget.cost=latency", "budget.rank=2")
    whole, broken = planted(tmp_path, *extra), planted(tmp_path, *extra, f"run_root={tmp_path / 'broken'}")
    run_one(whole)
    stopper.count, stopper.at = 0, 7
    with pytest.raises(Interrupted):
        run_one(broken)
    shutil.rmtree(tmp_path / "cache")
    assert interrupted_run(broken, stopper, 7) >= 2
    assert not (tmp_path / "cache").exists()
    assert outcome(broken) == outcome(whole)


def test_operations_of_an_encoder_and_multiples(configure: Any) -> None:  # noqa: F811
    """The pooler reads one row an example, so its components cost next to nothing, and it is full."""
    cfg = configure(
        "strategy=autolora", "budget.cost=flops", "budget.rank=2", "budget.rows=8", "max_rank=8", "rank_multiple=4"
    )
    result = run_one(cfg)
    assert result.price is not None
    assert result.price.unit == "FLOPs"
    prices = directory_of(cfg, result).read_prices()
    assert prices is not None
    on_offer = [prices[name][rank + 4] - prices[name][rank] for name, rank in result.ranks.items() if rank < 8]
    assert 0 <= result.price.budget - result.price.plan < min(on_offer)
    assert all(rank % 4 == 0 for rank in result.ranks.values())
    assert result.ranks["bert.pooler.dense"] == 8


def test_a_second_training_has_the_prices_of_the_first(clock: None, tmp_path: Path) -> None:
    extra = (*STEPS, "strategy=svd_truncate", "budget.cost=latency", "budget.rank=2", "retrain=found")
    result = run_one(planted(tmp_path, *extra))
    assert result.ranks == result.found
    other = run_one(planted(tmp_path, *extra, "retrain=uniform"))
    assert other.found == result.found
    assert result.price is not None
    assert other.price is not None
    assert other.price.budget == result.price.budget
    assert other.price.plan <= result.price.plan


def test_a_default_budget_of_parameters_is_no_budget_of_time(tmp_path: Path) -> None:
    cfg = planted(tmp_path, *STEPS, "strategy=uniform", "budget.cost=latency", "budget.rank=null")
    with pytest.raises(PlanError, match=r"task=planted has a number of parameters as its default budget"):
        run_one(cfg)


def test_a_strategy_that_does_not_keep_to_multiples_is_refused(tmp_path: Path) -> None:
    ranks = tmp_path / "ranks.json"
    ranks.write_text('{"U0": 3}')
    cfg = planted(tmp_path, *STEPS, "strategy=manual", f"strategy.path={ranks}", "rank_multiple=2", "budget.rank=2")
    with pytest.raises(PlanError, match="rank_multiple=2, but the plan has 1 other ranks: 3 for U0"):
        run_one(cfg)
