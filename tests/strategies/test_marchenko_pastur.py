"""Ranks from random matrix theory: planted directions, counted and scaled to the budget."""

from __future__ import annotations

import pytest
import torch
from strategies.trees import tree
from torch import nn

from autolora.adapters import AdapterSettings
from autolora.plan import Budget
from autolora.strategies.marchenko_pastur import MarchenkoPastur

N = 100
"""Width of every Linear; a component costs 200."""


def planted(counts: dict[str, int], strength: float = 2.5) -> nn.Module:
    """Linears of noise with so many directions each, ``strength`` times as large as the noise's ``sigma sqrt(q)``."""
    model, generator = tree(dict.fromkeys(counts, (N, N))), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for i, (name, count) in enumerate(counts.items()):
            left, right = (torch.linalg.qr(torch.randn(N, N, generator=generator)).Q[:, :count] for _ in range(2))
            noise = torch.randn(N, N, generator=generator)
            model.get_submodule(name).weight.copy_((i + 1) * (noise + strength * N**0.5 * left @ right.T))
    return model


def made(model: nn.Module, budget: Budget, max_rank: int = 8, **options: str) -> MarchenkoPastur:
    strategy = MarchenkoPastur(MarchenkoPastur.Options(**options), budget=budget, max_rank=max_rank)
    strategy.attach(model, AdapterSettings())
    return strategy


def ranks(strategy: MarchenkoPastur) -> list[int]:
    plan = strategy.finalize(lambda plan: 0.0)
    assert strategy.adapters.attached_plan() == plan
    return list(plan.values())


@pytest.mark.parametrize("threshold", ["hard", "edge"])
def test_planted_directions_are_counted_whatever_the_scale_and_ranks_are_proportional(threshold: str) -> None:
    counts = {"a": 1, "b": 4, "c": 2, "d": 0}
    for times in (1, 2):
        strategy = made(planted(counts), Budget(params=7 * times * 2 * N), threshold=threshold)
        assert strategy.signals == counts
        assert ranks(strategy) == [times, 4 * times, 2 * times, 0]
        assert strategy.notes == []
    assert ranks(made(planted(counts), Budget(), threshold=threshold)) == [2, 8, 4, 0]


def test_the_threshold_decides_what_counts() -> None:
    """Between the edge and √3 times the noise directions are seen, and not worth keeping: here two or three of them."""
    edge, hard = (
        made(planted({"a": 0, "b": 3}, strength=1.6), Budget(params=2 * N), threshold=kind).signals
        for kind in ("edge", "hard")
    )
    assert edge == {"a": 0, "b": 3}
    assert hard["b"] <= 1


def test_what_others_cannot_take_goes_to_modules_without_signal() -> None:
    strategy = made(planted({"a": 6, "b": 0, "c": 0}), Budget(params=7 * 2 * N), max_rank=3)
    assert ranks(strategy) == [3, 2, 2]


@pytest.mark.parametrize(("budget", "expected"), [(Budget(rank=2), [2, 2, 2]), (Budget(), [8, 8, 8])])
def test_without_any_signal_ranks_are_uniform_and_it_is_said(budget: Budget, expected: list[int]) -> None:
    strategy = made(planted({"a": 0, "b": 0, "c": 0}), budget)
    assert ranks(strategy) == expected
    assert strategy.notes == ["no weight has a direction above its noise: ranks are uniform"]
