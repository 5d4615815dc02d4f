"""What strategies do for themselves, counted in calls of functions instead of seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from autolora.bench.bookkeeping import of_chain, seconds_per_step
from autolora.bench.settings import StrategiesSettings
from autolora.bench.steps import CLOCKS

STEPS = 12
BUSY = ("adalora", "autolora", "autolora_bilevel", "dylora", "dynamic_growth", "sora", "svd_truncate")
"""The others do nothing in a step."""


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
