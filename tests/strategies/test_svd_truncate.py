"""Training large and cutting once: what is kept, what training goes on with, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from strategies.handloop import excess_error, fit, mse, planted_batches
from test_resume import Stopper, interrupted_run, outcome, planted, stopper  # noqa: F401  fixture
from torch.optim import AdamW, Optimizer

from autolora.adapters import Adapters, AdapterSettings
from autolora.errors import ConfigError
from autolora.plan import Budget
from autolora.run import run_one
from autolora.strategies.base import GroupRates, Rates
from autolora.strategies.svd_truncate import SVDTruncate
from autolora.tasks.planted import TeacherStudent, exact_fraction, plant

RATES = Rates(adapter=GroupRates(1e-2), gate=GroupRates(None), head=GroupRates(1e-3))


def pair_of() -> TeacherStudent:
    """Four modules; a component costs 24, 24, 40, 40."""
    return plant(dim=16, widths=[8, 24], ranks=(0, 2, 3, 0))


def truncate(budget: Budget, max_rank: int = 4, **options: Any) -> SVDTruncate:
    return SVDTruncate(SVDTruncate.Options(**options), budget=budget, max_rank=max_rank)


def begun(
    strategy: SVDTruncate, steps: int = 10, settings: AdapterSettings | None = None
) -> tuple[Adapters, Optimizer]:
    """Attached and begun, with components that do something and share directions, and optimizer state."""
    adapters = strategy.attach(pair_of().student, settings or AdapterSettings())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in adapters.layers.values():
            layer.lora_B.normal_(generator=generator)
            layer.lora_A.normal_(generator=generator)
    optimizer = AdamW(strategy.param_groups(RATES, steps))
    strategy.begin(steps, optimizer)
    mse(adapters.model, next(planted_batches(pair_of(), 8, seed=3))).backward()
    optimizer.step()
    return adapters, optimizer


def updates(adapters: Adapters) -> dict[str, np.ndarray]:
    return {name: layer.delta_weight().double().numpy() for name, layer in adapters.layers.items()}


# The cut --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn_scale", [False, True])
def test_the_cut_keeps_the_largest_squares_per_parameter(learn_scale: bool) -> None:
    """Against numpy's decomposition of the whole updates; what is left of each is its best approximation."""
    strategy = truncate(Budget(params=200), share=0.5)
    adapters, optimizer = begun(strategy, settings=AdapterSettings(learn_scale=learn_scale))
    if learn_scale:
        with torch.no_grad():
            for i, layer in enumerate(adapters.layers.values()):
                layer.scale.copy_(torch.tensor(0.5 + i))  # type: ignore[union-attr]
    before = updates(adapters)
    strategy.after_step(5, optimizer)

    decomposed = {name: np.linalg.svd(delta) for name, delta in before.items()}
    costs = {name: adapters.sites[name].cost for name in before}
    worth = sorted(((s**2 / costs[name], name) for name, d in decomposed.items() for s in d[1][:4]), reverse=True)
    ranks, left = dict.fromkeys(before, 0), 200
    for _, name in worth:
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    assert adapters.active_plan() == ranks
    for name, delta in updates(adapters).items():
        u, s, vt = decomposed[name]
        k = ranks[name]
        np.testing.assert_allclose(delta, (u[:, :k] * s[:k]) @ vt[:k], rtol=1e-4, atol=1e-4)


def test_a_cut_by_hand() -> None:
    """A component of U0 costs 24, one of V1 40. At equal size U0's goes first, at 1.5 times V1's: 2.25/40 > 1/24."""
    for size, kept in ((1.0, "U0"), (1.5, "V1")):
        strategy = truncate(Budget(params=40), max_rank=1)
        adapters, optimizer = begun(strategy)
        with torch.no_grad():
            for name, layer in adapters.layers.items():
                worth = {"U0": 1.0, "V1": size}.get(name, 0.0)
                layer.lora_A.copy_(torch.eye(layer.site.in_features)[:1])
                layer.lora_B.copy_(worth * torch.eye(layer.site.out_features)[:, :1])
        strategy.after_step(5, optimizer)
        assert [name for name, rank in adapters.active_plan().items() if rank] == [kept]


def test_what_training_goes_on_with() -> None:
    """The survivors alone, physically, in the optimizer too, and without moments of the old basis."""
    strategy = truncate(Budget(params=200))
    adapters, optimizer = begun(strategy)
    assert optimizer.state
    strategy.after_step(4, optimizer)
    assert not strategy.settled
    assert adapters.attached_plan() == strategy.largest
    strategy.after_step(5, optimizer)
    assert strategy.settled
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in adapters.adapter_parameters()}
    assert adapters.attached_plan() == adapters.active_plan()
    assert adapters.count()["adapter"] <= 200
    assert not optimizer.state
    before = adapters.active_plan()
    strategy.after_step(6, optimizer)
    assert strategy.finalize(lambda plan: 0.0) == before


def test_a_model_with_nothing_left_can_still_be_trained() -> None:
    strategy = truncate(Budget(params=3))
    fitted = fit(strategy, pair_of().student, *streams(pair_of()), steps=8)
    assert fitted.plan.params == 0
    assert torch.isfinite(torch.tensor(fitted.losses)).all()


def streams(pair: TeacherStudent) -> tuple[Any, Any]:
    return planted_batches(pair, 32, seed=1), planted_batches(pair, 32, seed=2)


# When -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "steps", "first"), [(0.5, 20, 10), (0.25, 20, 5), (0.01, 20, 1), (1.0, 20, None)])
def test_the_cut_comes_after_its_share_of_the_steps(share: float, steps: int, first: int | None) -> None:
    pair, seen = pair_of(), []
    strategy = truncate(Budget(params=100), share=share)
    fitted = fit(
        strategy, pair.student, *streams(pair), steps=steps, every_step=lambda *_: seen.append(strategy.settled)
    )
    assert seen == [first is not None and step >= first for step in range(1, steps + 1)]
    assert fitted.plan == fitted.adapters.active_plan()
    assert 0 < fitted.plan.params <= 100
    assert strategy.settled
    assert strategy.notes == []


def test_a_cut_that_nothing_follows_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"share=0.5 of 1 steps leaves none after the cut, and the ranks would never"):
        begun(truncate(Budget(params=100)), steps=1)


def test_a_run_that_ended_before_its_cut_says_so() -> None:
    strategy = truncate(Budget(params=100))
    begun(strategy, steps=100)
    assert strategy.finalize(lambda plan: 0.0).params <= 100
    assert strategy.notes == [
        "training ended before the cut: the ranks were cut at its end, and were never trained alone"
    ]


def test_without_a_budget_nothing_is_cut() -> None:
    strategy = truncate(Budget())
    adapters, optimizer = begun(strategy)
    before = updates(adapters)
    strategy.after_step(5, optimizer)
    assert strategy.finalize(lambda plan: 0.0) == strategy.largest
    for name, delta in updates(adapters).items():
        np.testing.assert_allclose(delta, before[name], rtol=1e-4, atol=1e-4)


# Whole runs -----------------------------------------------------------------------------------------------------------


def test_it_recovers_planted_ranks() -> None:
    pair = pair_of()
    strategy = truncate(Budget(params=pair.true_plan.params))
    fitted = fit(strategy, pair.student, *streams(pair), steps=250, lr=1e-2)
    assert exact_fraction(pair.true_plan, fitted.plan) == 1.0
    assert excess_error(pair, fitted.adapters) < 1e-3


def test_an_interrupted_run_ends_as_an_unbroken_one(stopper: Stopper, tmp_path: Path) -> None:  # noqa: F811
    """Interrupted before the cut, right at it, and after it."""
    extra = ("strategy=svd_truncate", "trainer.max_steps=20", "trainer.log_every_n_steps=4")
    unbroken, broken = planted(tmp_path, *extra), planted(tmp_path, *extra, f"run_root={tmp_path / 'broken'}")
    result = run_one(unbroken)
    assert result.params.budget is not None
    assert result.params.adapter <= result.params.budget
    assert interrupted_run(broken, stopper, every=5) >= 3
    assert outcome(broken) == outcome(unbroken)
