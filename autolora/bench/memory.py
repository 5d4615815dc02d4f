"""The most memory that a training step needs.

On a CPU torch keeps no peak, and the resident size of a process has the loading of the model, the libraries and the
allocator's habits in it. So torch's profiler records every allocation and release of tensor memory from the building of
the contender on, and the peak is the largest running sum within one step, after some steps that make what lives on
(gradients' buffers, the optimizer's state, copies of weights in another precision). That is exact, repeatable, and
counts weights, adapters, optimizer, activations and temporaries alike; it does not see what libraries below torch
allocate by themselves (oneDNN's scratch). On CUDA the caching allocator keeps the same peak.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from autolora.bench.contenders import Contender
from autolora.strategies.base import Batch

_STEPS_BEFORE = 2
_MARK = "autolora.bench: the step whose memory counts"


def peak_bytes(build: Callable[[], Contender], batch: Batch) -> int:
    """Peak bytes of tensor memory within a step, with everything that the contender keeps; the batch is not counted."""
    gc.collect()  # what an earlier contender left in reference cycles must not be released while this one is watched
    return _on_cuda(build, batch) if batch["labels"].is_cuda else _on_cpu(build, batch)


def _on_cuda(build: Callable[[], Contender], batch: Batch) -> int:
    before = torch.cuda.memory_allocated()
    contender = build()
    for _ in range(_STEPS_BEFORE):
        contender.step(batch)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    contender.step(batch)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _on_cpu(build: Callable[[], Contender], batch: Batch) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        contender = build()
        for _ in range(_STEPS_BEFORE):
            contender.step(batch)
        with record_function(_MARK):
            contender.step(batch)
    return peak_within(recorded.profiler.kineto_results.events(), _MARK)


def peak_within(events: list[Any], mark: str) -> int:
    """The largest running sum of allocated bytes during the event named ``mark``; the sum runs over all events."""
    step = next(event for event in events if event.name() == mark)
    begin, end = step.start_ns(), step.start_ns() + step.duration_ns()
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        if event.start_ns() > end:
            break
        before, held = held, held + event.nbytes()
        if event.start_ns() >= begin:
            peak = max(peak, before, held)
    return peak
