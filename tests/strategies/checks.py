"""What strategies that prune while they train have to keep, checked on a small planted task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from strategies.handloop import Fitted, fit, mse, planted_batches
from torch import Tensor
from torch.optim import AdamW, Optimizer

from autolora.adapters import Adapters, AdapterSettings
from autolora.strategies.base import Batch, GroupRates, Rates, Strategy
from autolora.tasks.planted import TeacherStudent, plant

RATES = Rates(adapter=GroupRates(1e-2), gate=GroupRates(None), head=GroupRates(1e-3))
Make = Callable[[], Strategy[Any]]


def pair_of() -> TeacherStudent:
    """Four modules; a component costs 24, 24, 40, 40."""
    return plant(dim=16, widths=[8, 24], ranks=(0, 2, 3, 0))


def streams(pair: TeacherStudent) -> tuple[Iterator[Batch], Iterator[Batch]]:
    return planted_batches(pair, 32, seed=1), planted_batches(pair, 32, seed=2)


def run(strategy: Strategy[Any], pair: TeacherStudent, steps: int = 40, **kwargs: Any) -> Fitted:
    return fit(strategy, pair.student, *streams(pair), steps=steps, lr=1e-2, **kwargs)


def begun(
    strategy: Strategy[Any], pair: TeacherStudent, steps: int, settings: AdapterSettings | None = None
) -> tuple[Adapters, Optimizer]:
    adapters = strategy.attach(pair.student, settings or AdapterSettings())
    strategy.prepare(planted_batches(pair, 32, seed=3), mse)
    optimizer = AdamW(strategy.param_groups(RATES, steps))
    strategy.begin(steps, optimizer)
    return adapters, optimizer


def train(
    strategy: Strategy[Any], optimizer: Optimizer, batches: Iterator[Batch], first: int, last: int, parts: int = 1
) -> None:
    """Steps ``first`` to ``last``, each with the gradients of ``parts`` equal parts of its batch summed up."""
    model = strategy.adapters.model.train()
    heldout = planted_batches(pair_of(), 32, seed=2)
    for step in range(first, last + 1):
        batch = next(batches)
        if strategy.wants_heldout:
            strategy.heldout_step(batch, next(heldout), mse)
        optimizer.zero_grad()
        for part in zip(*(tensor.chunk(parts) for tensor in batch.values()), strict=True):
            loss = strategy.training_loss(model, dict(zip(batch, part, strict=True)), mse)
            penalty = strategy.penalty(loss)
            ((loss if penalty is None else loss + penalty) / parts).backward()
        strategy.after_backward()
        optimizer.step()
        strategy.after_step(step, optimizer)


def state_of(strategy: Strategy[Any]) -> dict[str, Tensor]:
    return strategy.adapters.trainable_state()


def assert_resumed_is_uninterrupted(make: Make, stop: int, steps: int = 40) -> None:
    """Stopped after a step and begun anew from what a checkpoint holds: the rest is the same, bit for bit."""
    whole, pair = make(), pair_of()
    _, optimizer = begun(whole, pair, steps)
    train(whole, optimizer, streams(pair)[0], 1, steps)

    first, pair = make(), pair_of()
    batches = streams(pair)[0]
    _, optimizer = begun(first, pair, steps)
    train(first, optimizer, batches, 1, stop)
    saved = state_of(first), first.state_dict(), optimizer.state_dict()
    second = make()
    begun(second, pair_of(), steps)
    second.adapters.load_trainable_state(saved[0])
    second.load_state_dict(saved[1])
    optimizer = AdamW(second.param_groups(RATES, steps))
    optimizer.load_state_dict(saved[2])
    assert second.settled == first.settled
    assert second.adapters.attached_plan() == first.adapters.attached_plan()
    assert second.adapters.active_plan() == first.adapters.active_plan()
    assert second.progress() == first.progress()
    train(second, optimizer, batches, stop + 1, steps)

    expected, found = state_of(whole), state_of(second)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert whole.finalize(lambda plan: 0.0) == second.finalize(lambda plan: 0.0)


def assert_accumulation_of_2_is_one_double_batch(make: Make, steps: int = 40) -> None:
    """The same plan, and the same tensors to rounding."""
    states, plans = [], []
    for parts in (1, 2):
        strategy, pair = make(), pair_of()
        _, optimizer = begun(strategy, pair, steps)
        train(strategy, optimizer, streams(pair)[0], 1, steps, parts)
        plans.append(strategy.finalize(lambda plan: 0.0))
        states.append(state_of(strategy))
    assert plans[0] == plans[1]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-5, atol=1e-5)
