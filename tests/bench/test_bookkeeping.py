"""What strategies do for themselves, counted in calls of functions instead of seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from autolora.bench.bookkeeping import of_chain, seconds_per_step
from autolora.bench.settings import StrategiesSettings
from autolora.bench.steps import CLOCKS

STEPS = 12
BUSY = ("adalora", "autolora", "autolora_bilevel", "dylora", "dynamic_growth", "rl_search", "sora", "svd_truncate")
"""Of searches one, since in training they do the same; the others do nothing in a step."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The clock of the CPU shows how many functions were called."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    monkeypatch.setitem(CLOCKS, "cpu", lambda: float(count))
    before = sys.getprofile()
    sys.setprofile(profile)
    yield
    sys.setprofile(before)


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("name", BUSY)
def test_bookkeeping_grows_at_most_linearly_with_the_modules(name: str) -> None:
    settings = StrategiesSettings(steps=STEPS, clock="cpu")
    few, more, most = (STEPS * seconds_per_step(name, of_chain(count), settings) for count in (8, 16, 32))
    assert most - more <= 1.1 * 2 * (more - few)


def test_losses_and_their_gradients_are_not_bookkeeping(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only losses and their gradients move, whatever a strategy asks for."""
    seconds = 0.0

    def slow(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seconds
            seconds += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setitem(CLOCKS, "cpu", lambda: seconds)
    monkeypatch.setattr(torch.autograd, "grad", slow(torch.autograd.grad))
    settings = StrategiesSettings(steps=STEPS, clock="cpu")
    spent = {}
    for name in ("rl_search", "dynamic_growth", "autolora_bilevel"):
        learner = of_chain(3)
        spent[name] = STEPS * seconds_per_step(name, replace(learner, loss=slow(learner.loss)), settings)
    # The gradient of the price: at each of the 5 steps of pruning, and once for its unit.
    assert spent == {"rl_search": 0, "dynamic_growth": 0, "autolora_bilevel": pytest.approx(6)}
    assert seconds > 4 * STEPS
