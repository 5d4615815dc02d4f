"""Timing things against each other on a machine that does other things too.

Contenders take turns in shuffled rounds. What disturbs the machine for longer than a round disturbs all of them, so the
ratio of two times of one round is steady where the times are not; the median over rounds drops the rounds in which a
disturbance hit one of the two.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

CONFIDENCE = 0.95


class Interval(BaseModel):
    """A median with its 95 % interval."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    median: float
    low: float
    high: float


def median_interval(values: Sequence[float]) -> Interval:
    """The median, between the order statistics that cover the true one with 95 % or more, whatever the distribution.

    The k-th smallest and the k-th largest of n values do so when P(Bin(n, 1/2) < k) <= 2.5 % (David & Nagaraja, Order
    Statistics, section 7.1). Below six values no pair does, and the interval is from the smallest to the largest.
    """
    ordered, n = sorted(values), len(values)
    tail, k = 0.5**n, 0
    while tail <= (1 - CONFIDENCE) / 2:
        k += 1
        tail += math.comb(n, k) * 0.5**n
    k = max(k, 1)
    return Interval(median=statistics.median(ordered), low=ordered[k - 1], high=ordered[n - k])


def ratio(times: Sequence[float], reference: Sequence[float]) -> Interval:
    """The median over rounds of time over reference, both of the same round."""
    return median_interval([a / b for a, b in zip(times, reference, strict=True)])


def against(
    times: Mapping[str, Sequence[float]], name: str, references: Mapping[str, str | None]
) -> dict[str, Interval]:
    """Ratios of one contender to others, by what they are to it.

    Args:
        times: of every contender that was timed, by its name.
        name: the contender.
        references: names of contenders; those that are ``None``, the contender itself, or were not timed are left out.
    """
    return {
        what: ratio(times[name], times[other])
        for what, other in references.items()
        if other is not None and other != name and other in times
    }


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 0,
    seed: int = 0,
    synchronize: Callable[[], object] | None = None,
    before_round: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    max_seconds: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of every contender in every round.

    Args:
        contenders: what to time, by name.
        rounds: how often each is timed.
        warmup: rounds before those, which are not counted.
        seed: of the order, which is drawn anew for every round.
        synchronize: waits for a device that works on its own; called before and after each.
        before_round: called at the beginning of every round, untimed.
        clock: gives seconds.
        max_seconds: no further round begins when so much time has passed since the first, whatever the clock.
    """
    order, shuffler = list(contenders), random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    wait = synchronize or (lambda: None)
    began = time.monotonic()
    for index in range(-warmup, rounds):
        if index > 0 and time.monotonic() - began > max_seconds:
            break
        if before_round is not None:
            before_round()
        shuffler.shuffle(order)
        for name in order:
            wait()
            started = clock()
            contenders[name]()
            wait()
            if index >= 0:
                times[name].append(clock() - started)
    return times
