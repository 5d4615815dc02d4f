r"""What the ranks of every module cost in anything but parameters: floating-point operations, or measured time.

Both are those of the adapter alone, in the forward pass of an evaluation over given batches: what the model does
without it costs the same whatever the ranks. With T rows that a module reads in all its calls (tokens, most often),
rank r takes

.. math:: 2 T r (in + out)

operations, a product and a sum each (Hu et al., ICLR 2022, section 4.1, has the two products; scaling and adding are
left out). Time is no such product: most of it is there at rank 1, since two kernels are called and the input is read,
so that it matters more which modules have an adapter than what rank. It is measured for every kind of module at some
ranks, and interpolated.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.benchmark.utils.timer import timer

from autolora.adapters.layer import LoRALinear
from autolora.errors import DataError, TargetError
from autolora.files import read_json, write_json_atomic
from autolora.plan import RankPlan
from autolora.results import hardware

_ROUNDS = 15
_SECONDS_A_BLOCK = 4e-3  # shorter than the slice of time that a busy system gives a process at once


class Call(NamedTuple):
    """What a module was called with: the shape ``(..., in)`` of its input, and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """Vectors that it reads."""
        return torch.Size(self.shape[:-1]).numel()


def calls_of(model: nn.Module, names: Iterable[str], run: Callable[[], object]) -> dict[str, list[Call]]:
    """The calls of each module while ``run`` computes with the model; a module that is not called has none.

    Args:
        model: without adapters; it computes in evaluation mode.
        names: of its modules.
        run: a forward pass over what shall be counted.
    """
    calls: dict[str, list[Call]] = {name: [] for name in names}

    def watching(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: calls[name].append(Call(tuple(args[0].shape), args[0].dtype))

    handles = [model.get_submodule(name).register_forward_pre_hook(watching(name)) for name in calls]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        run()
    model.train(was_training)
    for handle in handles:
        handle.remove()
    return calls


def flops(largest: RankPlan, calls: Mapping[str, Sequence[Call]]) -> dict[str, tuple[int, ...]]:
    """Operations of the ranks 0, 1, 2, ... of every module, up to its rank in ``largest``.

    Raises:
        TargetError: if a module is not called.
    """
    _require_calls(largest, calls)
    each = {
        name: 2 * sum(call.rows for call in calls[name]) * (site.in_features + site.out_features)
        for name, site in largest.sites.items()
    }
    return {name: tuple(rank * each[name] for rank in range(top + 1)) for name, top in largest.items()}


def latency(
    model: nn.Module,
    largest: RankPlan,
    calls: Mapping[str, Sequence[Call]],
    device: torch.device,
    cache: Path | None = None,
) -> dict[str, tuple[int, ...]]:
    """Nanoseconds of the ranks 0, 1, 2, ... of every module, up to its rank in ``largest``, as measured here.

    Modules of one kind (class, widths, bias, and what they were called with) share a measurement: of powers of two and
    the highest rank, the least of several short blocks, less that of the bare module. In between it is interpolated,
    and a rank costs at least a nanosecond more than the one below.

    Args:
        model: without adapters.
        largest: the highest rank of every module.
        calls: of :func:`calls_of`.
        device: to measure on.
        cache: folder in which measurements are kept, a file for each machine and number of threads.

    Raises:
        TargetError: if a module is not called.
    """
    _require_calls(largest, calls)
    known = Measured(device, cache)
    prices = {}
    for name, top in largest.items():
        ranks = _ranks_to_measure(top)
        points = [0.0] * len(ranks)
        for call in calls[name]:
            for i, seconds in enumerate(known.overhead(model.get_submodule(name), call, ranks)):
                points[i] += seconds
        prices[name] = _table(top, ranks, points)
    known.save()
    return prices


class Measured:
    """Seconds that adapters add to modules, measured once for each kind of module.

    Args:
        device: to measure on.
        cache: folder of the files in which measurements are kept; nothing is kept without one.
        time: gives the seconds of one call for each of some functions of an input.
    """

    def __init__(
        self,
        device: torch.device,
        cache: Path | None = None,
        time: Callable[[Sequence[Callable[[Tensor], Tensor]], Tensor], list[float]] | None = None,
    ) -> None:
        self.device, self.time = device, time or least_times
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        place = f"{hardware(gpu)} {torch.__version__} {torch.get_num_threads()}"
        self.file = cache / f"{hashlib.sha256(place.encode()).hexdigest()[:12]}.json" if cache else None
        self._seconds: dict[str, dict[str, float]] = {}
        self._new = False
        if self.file is not None and self.file.exists():
            try:
                self._seconds = dict(read_json(self.file, ""))
            except (DataError, TypeError, ValueError):  # half a file of another version: measured again
                self._seconds = {}

    def overhead(self, module: nn.Module, call: Call, ranks: Sequence[int]) -> list[float]:
        """Seconds that adapters of these ranks add to one call of a module."""
        bias = getattr(module, "bias", None) is not None
        key = f"{type(module).__name__} {call.shape} {call.dtype} bias={bias} {tuple(_widths(module))}"
        known = self._seconds.setdefault(key, {})
        if not all(str(rank) in known for rank in ranks):
            known |= dict(zip(map(str, ranks), self._measure(module, call, ranks), strict=True))
            self._new = True
        return [known[str(rank)] for rank in ranks]

    def _measure(self, module: nn.Module, call: Call, ranks: Sequence[int]) -> list[float]:
        bare = copy.deepcopy(module).to(self.device).eval().requires_grad_(False)
        adapted = [LoRALinear(bare, rank).to(self.device).eval() for rank in ranks]
        for layer in adapted:
            nn.init.normal_(layer.lora_B)
        x = torch.randn(call.shape, device=self.device).to(call.dtype)
        with torch.no_grad():
            without, *times = self.time([bare, *adapted], x)
        return [max(0.0, seconds - without) for seconds in times]

    def save(self) -> None:
        """Keep what was measured."""
        if self.file is not None and self._new:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self.file, self._seconds)


def least_times(functions: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> list[float]:
    """Seconds of one call of each function, which take turns: the least over several short blocks of calls.

    What else the machine does only ever adds to a time, so the least is the nearest to what the call takes.
    """
    threads = torch.get_num_threads()
    # Where one thread does it all, its own time is the wall-clock time of a quiet machine.
    clock = time.thread_time if threads == 1 and x.device.type == "cpu" else timer
    timers = [Timer("f(x)", globals={"f": f, "x": x}, num_threads=threads, timer=clock) for f in functions]
    blocks = [max(1, round(_SECONDS_A_BLOCK / max(1e-6, one.timeit(1).median))) for one in timers]
    times: list[list[float]] = [[] for _ in timers]
    for _ in range(_ROUNDS):
        for one, block, found in zip(timers, blocks, times, strict=True):
            found.append(one.timeit(block).median)
    return [min(found) for found in times]


def _widths(module: nn.Module) -> tuple[int, ...]:
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else ()


def _ranks_to_measure(top: int) -> list[int]:
    return sorted({*(2**k for k in range(top.bit_length())), top} - {0})


def _table(top: int, ranks: Sequence[int], points: Sequence[float]) -> tuple[int, ...]:
    """Whole nanoseconds of every rank up to the highest: through the points, from 0, and always upwards."""
    xs, ys = [0, *ranks], [0.0, *(1e9 * seconds for seconds in points)]
    table = [0]
    for rank in range(1, top + 1):
        above = next(i for i, x in enumerate(xs) if x >= rank)
        share = (rank - xs[above - 1]) / (xs[above] - xs[above - 1])
        table.append(max(table[-1] + 1, round(ys[above - 1] + share * (ys[above] - ys[above - 1]))))
    return tuple(table)


def _require_calls(sites: Mapping[str, object], calls: Mapping[str, Sequence[Call]]) -> None:
    idle = [name for name in sites if not calls[name]]
    if idle:
        raise TargetError(
            f"{len(idle)} modules are not called in a forward pass, so that they have no price: {', '.join(idle[:5])}; "
            "leave them out with adapter.exclude"
        )
