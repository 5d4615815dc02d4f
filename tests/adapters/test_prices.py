"""Prices in operations against torch's own counter, and prices in time on a clock that is set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from adapters.tiny_models import FAMILIES, inputs_for, make, output, randomize
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autolora.adapters import AdapterSettings, attach, find_sites
from autolora.adapters.prices import Call, Measured, calls_of, flops, latency, least_times
from autolora.errors import TargetError
from autolora.plan import RankPlan, Site


def counted(model: nn.Module, family: str) -> int:
    with FlopCounterMode(display=False) as counter:
        output(model.eval().requires_grad_(False), inputs_for(family))
    return counter.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_what_torch_counts_beside_the_bare_model(family: str) -> None:
    model, settings = make(family), AdapterSettings()
    sites = find_sites(model, settings)
    calls = calls_of(model, sites, lambda: output(model, inputs_for(family)))
    prices = flops(RankPlan.uniform(sites, 5), calls)
    bare = counted(model, family)
    ranks = {name: i % 6 for i, name in enumerate(sites)}
    priced = find_sites(model, AdapterSettings(prices=prices, unit="FLOPs"))
    adapters = attach(model, settings, RankPlan(priced, ranks))
    randomize(adapters)
    for layer in adapters.layers.values():  # torch's counter does not see products that are added in place
        layer.base_layer.register_forward_hook(lambda *_: None)
    assert adapters.attached_plan().unit == "FLOPs"
    assert counted(model, family) - bare == adapters.attached_plan().cost > 0


def test_what_reads_one_vector_a_row_is_cheaper_than_what_reads_every_token() -> None:
    model = make("bert")
    sites = find_sites(model, AdapterSettings())
    rows, tokens = inputs_for("bert")["input_ids"].shape
    prices = flops(RankPlan.uniform(sites, 1), calls_of(model, sites, lambda: output(model, inputs_for("bert"))))
    assert prices["bert.pooler.dense"] == (0, 2 * rows * 32)
    assert prices["bert.encoder.layer.0.attention.self.query"] == (0, 2 * rows * tokens * 32)


def test_a_model_is_asked_in_evaluation_mode_and_left_as_it_was() -> None:
    model, modes = make("bert").train(), []
    names = list(find_sites(model, AdapterSettings()))
    calls_of(model, names, lambda: modes.append(model.training))
    assert modes == [False]
    assert model.training
    assert not any(model.get_submodule(name)._forward_pre_hooks for name in names)


Functions = Sequence[Callable[[Tensor], Tensor]]


def clock(rank_time: float = 2e-6, charge: float = 40e-6) -> tuple[Callable[[Functions, Tensor], list[float]], list]:
    """A bare module takes 1 ms; an adapter takes a charge, and something for every component."""
    asked: list[tuple[int, ...]] = []

    def time(functions: Functions, x: Tensor) -> list[float]:
        for function in functions:
            assert function(x).shape[:-1] == x.shape[:-1]
        ranks = [getattr(function, "rank", 0) for function in functions]
        asked.append((*x.shape, *ranks))
        return [1e-3 + (charge + rank * rank_time if rank else 0.0) for rank in ranks]

    return time, asked


class Twice(nn.Module):
    """One module called twice, one of the same kind, one of another, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.c, self.idle = nn.Linear(6, 9, bias=False), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(self.a(x))))


CPU = torch.device("cpu")
SITES = {"a": Site(6, 6), "b": Site(6, 6), "c": Site(6, 9)}


def measured(monkeypatch: pytest.MonkeyPatch, cache: Path | None = None, **kwargs: float) -> tuple[dict, list]:
    time, asked = clock(**kwargs)
    monkeypatch.setattr("autolora.adapters.prices.least_times", time)
    model, largest = Twice(), RankPlan(SITES, {"a": 5, "b": 3, "c": 0})
    calls = calls_of(model, SITES, lambda: model(torch.randn(4, 6)))
    assert calls["a"] == [Call((4, 6), torch.float32)] * 2
    return latency(model, largest, calls, CPU, cache), asked


def test_time_is_measured_once_for_each_kind_of_module_and_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    prices, asked = measured(monkeypatch)
    assert asked == [(4, 6, 0, 1, 2, 4, 5), (4, 6, 0, 1, 2, 3)]  # ranks 1, 2, 4 and the highest; rank 3 for b
    assert prices["a"] == (0, 84_000, 88_000, 92_000, 96_000, 100_000)  # called twice
    assert prices["b"] == (0, 42_000, 44_000, 46_000)
    assert prices["c"] == (0,)


def test_more_components_never_cost_less(monkeypatch: pytest.MonkeyPatch) -> None:
    prices, _ = measured(monkeypatch, rank_time=-1e-6, charge=3e-6)
    assert prices["a"] == (0, 4_000, 4_001, 4_002, 4_003, 4_004)


def test_measurements_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, _ = measured(monkeypatch, tmp_path)
    again, asked = measured(monkeypatch, tmp_path, charge=1.0)
    assert (again, asked) == (first, [])
    (file,) = tmp_path.iterdir()
    file.write_text("[1, 2")
    anew, asked = measured(monkeypatch, tmp_path, charge=1.0)
    assert asked
    assert anew != first
    assert measured(monkeypatch, tmp_path)[0] == anew


def test_measurements_of_another_number_of_threads_are_others(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    files = set()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            files.add(Measured(CPU, tmp_path).file)
    finally:
        torch.set_num_threads(before)
    assert len(files) == 2


@pytest.mark.parametrize("counted", ["flops", "latency"])
def test_a_module_that_is_not_called_has_no_price(counted: str) -> None:
    model, largest = Twice(), RankPlan.uniform({"a": SITES["a"], "idle": Site(6, 6)}, 2)
    calls = calls_of(model, largest, lambda: model(torch.randn(4, 6)))
    prices = {"flops": lambda: flops(largest, calls), "latency": lambda: latency(model, largest, calls, CPU)}
    with pytest.raises(TargetError, match=r"1 modules are not called in a forward pass.*: idle; leave them out"):
        prices[counted]()


def test_the_real_clock_gives_a_time_for_each() -> None:
    layers = [nn.Linear(8, 8), nn.Linear(8, 16)]
    with torch.no_grad():
        times = least_times(layers, torch.randn(2, 8))
    assert len(times) == 2
    assert all(0 < seconds < 1 for seconds in times)
