"""EVA: A and ranks from the variance of inputs, by hand, against PEFT's and against plain decompositions."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import pytest
import torch
from adapters.tiny_models import make
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from autolora.adapters import AdapterSettings
from autolora.errors import NonFiniteLossError
from autolora.plan import Budget
from autolora.strategies.base import Batch
from autolora.strategies.eva import EVA, inputs_of


class Branches(nn.Module):
    """Linears side by side, each on its own part of the input."""

    def __init__(self, widths: list[int], out: int = 10) -> None:
        super().__init__()
        self.widths = widths
        for i, width in enumerate(widths):
            self.add_module(f"branch{i}", nn.Linear(width, out, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.widths, dim=-1)
        return sum(self.get_submodule(f"branch{i}")(part) for i, part in enumerate(parts))  # type: ignore[return-value]


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["x"]).square().mean()


def spread(rows: int, scales: list[float], seed: int = 0) -> Tensor:
    """Rows whose variance along random orthogonal directions is exactly ``scales`` squared, about a mean of 3."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(rows, len(scales), generator=generator)
    codes = torch.linalg.qr(codes - codes.mean(0)).Q * torch.tensor(scales)
    return codes @ torch.linalg.qr(torch.randn(len(scales), len(scales), generator=generator)).Q + 3.0


def prepared(
    model: nn.Module, data: Any, budget: Budget, max_rank: int = 4, loss: Any = outputs, **options: Any
) -> EVA:
    strategy = EVA(EVA.Options(**options), budget=budget, max_rank=max_rank)
    strategy.attach(model, AdapterSettings())
    strategy.prepare(data, loss)
    return strategy


# By hand --------------------------------------------------------------------------------------------------------------


def test_ranks_and_a_by_hand() -> None:
    """Shares of variance 0.8, 0.2 and 0.5, 0.3, 0.2 at equal cost: left, right, right, then what is 0.2."""
    left, right = spread(50, [0.8**0.5, 0.2**0.5, 0, 0], 1), spread(50, [0.5**0.5, 0.3**0.5, 0.2**0.5, 0], 2)
    batch = {"x": torch.cat([7 * left, right], dim=1)}  # how large an input is does not matter
    for components, ranks in ((1, [1, 0]), (2, [1, 1]), (3, [1, 2]), (5, [2, 3])):
        strategy = prepared(Branches([4, 4]), [batch], Budget(params=components * 14))
        assert list(strategy.finalize(lambda plan: 0.0).values()) == ranks
    for layer, rows in zip(strategy.adapters.layers.values(), (left, right), strict=True):
        a = layer.lora_A.detach()
        directions = torch.linalg.svd(rows - rows.mean(0)).Vh[: len(a)]
        torch.testing.assert_close((a * directions).sum(1).abs(), torch.ones(len(a)), rtol=1e-4, atol=0)
        torch.testing.assert_close(a.norm(dim=1), torch.ones(len(a)))
        assert not layer.lora_B.any()


def test_the_budget_counts_parameters() -> None:
    """0.6 of the variance for 10 + 30 parameters is a worse buy than 0.5 for 10 + 10."""
    wide = spread(60, [0.6**0.5, 0.4**0.5] + [0.0] * 28, 1)
    small = spread(60, [0.5**0.5, 0.5**0.5] + [0.0] * 8, 2)
    strategy = prepared(Branches([30, 10]), [{"x": torch.cat([wide, small], dim=1)}], Budget(params=40))
    assert list(strategy.finalize(lambda plan: 0.0).values()) == [0, 2]


def test_what_few_rows_do_not_say_stays_random() -> None:
    """Three rows have two directions: the other rows of A are those of an adapter without data."""
    model, batch = Branches([8]), {"x": torch.randn(3, 8)}
    strategy = prepared(model, [batch], Budget(), max_rank=4)
    plain = EVA(EVA.Options(), budget=Budget(), max_rank=4).attach(Branches([8]), AdapterSettings())
    a, before = strategy.adapters.layers["branch0"].lora_A, plain.layers["branch0"].lora_A
    assert strategy.finalize(lambda plan: 0.0) == {"branch0": 4}
    assert torch.equal(a[2:], before[2:])
    assert not torch.isclose(a[:2], before[:2]).any(1).all()


# References -----------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Equal Linears one after the other, whose inputs lose directions on the way."""

    def __init__(self, depth: int = 5, n: int = 24) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.layers = nn.ModuleList(nn.Linear(n, n, bias=False) for _ in range(depth))
        for i, layer in enumerate(self.layers):
            with torch.no_grad():
                layer.weight.normal_(0, n**-0.5, generator=generator)
                layer.weight *= 0.75 ** (i * torch.arange(n) / 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(2 * layer(x))
        return x


@pytest.mark.parametrize(("rank", "rho"), [(4, 2.0), (2, 3.0), (3, 4.0)])
def test_ranks_and_a_are_those_of_peft_where_all_modules_cost_the_same(rank: int, rho: float) -> None:
    """PEFT looks at a batch until nothing moves; here it is the same one, so that it has seen it twice at the end."""
    x = torch.randn(400, 24, generator=torch.Generator().manual_seed(0)) * 0.9 ** torch.arange(24)
    config = LoraConfig(
        r=rank, target_modules=r"layers\.\d", init_lora_weights="eva", eva_config=EvaConfig(rho=rho, tau=0.99)
    )
    peft_model = get_peft_model(Chain(), config)
    initialize_lora_eva_weights(
        peft_model, [{"x": x}], forward_fn=lambda model, inputs: model(inputs["x"]),
        prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False,
    )  # fmt: skip
    expected = {
        name.removeprefix("base_model.model."): module.lora_A["default"].weight.detach()
        for name, module in peft_model.named_modules()
        if isinstance(module, LoraLayer)
    }
    strategy = prepared(Chain(), repeat({"x": x}), Budget(rank=rank), max_rank=round(rank * rho), batches=2)
    ranks = {name: rank for name, rank in strategy.finalize(lambda plan: 0.0).items() if rank}
    assert ranks == {name: len(a) for name, a in expected.items()}
    assert len(set(ranks.values())) > 1
    for name, a in expected.items():
        cosines = (strategy.adapters.layers[name].lora_A.detach() * a).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones(len(a)), rtol=1e-3, atol=0)


def test_several_batches_are_as_good_as_one_large_one() -> None:
    x = spread(90, [3.0, 2.0, 1.0, 0.5, 0.2, 0.1])
    apart, together = (
        prepared(Branches([6]), [{"x": part} for part in x.split(rows)], Budget(), max_rank=6) for rows in (25, 90)
    )
    a, b = (strategy.adapters.layers["branch0"].lora_A.detach() for strategy in (apart, together))
    torch.testing.assert_close((a * b).sum(1).abs(), torch.ones(6), rtol=1e-4, atol=0)


# Encoders -------------------------------------------------------------------------------------------------------------


def classify(model: Any, batch: Batch) -> Tensor:
    return model(**batch).logits.square().mean()


def sentences(padding: int, fill: int = 0) -> Batch:
    ids = torch.randint(1, 64, (5, 7), generator=torch.Generator().manual_seed(0))
    pad = torch.full((5, padding), fill)
    return {
        "input_ids": torch.cat([ids, pad], dim=1),
        "attention_mask": torch.cat([torch.ones_like(ids), torch.zeros_like(pad)], dim=1),
    }


def test_padding_does_not_count() -> None:
    plain, padded, other = (
        prepared(make("bert"), [batch], Budget(rank=2), max_rank=6, loss=classify)
        for batch in (sentences(0), sentences(9), sentences(9, fill=3))
    )
    assert plain.adapters.attached_plan() == padded.adapters.attached_plan() == other.adapters.attached_plan()
    for name, layer in plain.adapters.layers.items():
        for strategy in (padded, other):
            cosines = (layer.lora_A * strategy.adapters.layers[name].lora_A).sum(1).abs()
            torch.testing.assert_close(cosines, torch.ones(layer.rank), rtol=1e-3, atol=0)


def test_modules_that_read_one_tensor_start_alike() -> None:
    strategy = prepared(make("bert"), [sentences(2), sentences(0)], Budget(), max_rank=3, loss=classify)
    layers = strategy.adapters.layers
    q, k, v = (layers[f"bert.encoder.layer.1.attention.self.{name}"].lora_A for name in ("query", "key", "value"))
    assert torch.equal(q, k)
    assert torch.equal(k, v)
    assert not torch.equal(q, layers["bert.encoder.layer.0.attention.self.query"].lora_A)


@pytest.mark.parametrize("budget", [Budget(rank=5), Budget(params=3001)])
def test_a_budget_is_spent_and_never_exceeded(budget: Budget) -> None:
    strategy = prepared(make("bert"), [sentences(1)] * 3, budget, max_rank=8, loss=classify)
    assert strategy.allowance is not None
    assert 0.98 * strategy.allowance <= strategy.finalize(lambda plan: 0.0).params <= strategy.allowance
    assert strategy.adapters.attached_plan() == strategy.adapters.active_plan()


def test_looking_leaves_the_model_as_it_was() -> None:
    model = make("bert").train()
    expected = make("bert")(**sentences(0)).logits
    strategy = prepared(model, [sentences(3)], Budget(rank=2), loss=classify)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model.eval()(**sentences(0)).logits, expected)
    assert all(p.grad is None for p in strategy.adapters.adapter_parameters())


def test_a_module_that_is_called_twice_and_one_that_is_never_called() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.never = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.twice(self.twice(x))

    strategy = EVA(EVA.Options(), budget=Budget(params=8), max_rank=2)
    adapters = strategy.attach(Odd(), AdapterSettings())
    batch = {"x": torch.randn(9, 4)}
    assert {name: len(tensors) for name, tensors in inputs_of(adapters, batch, outputs).items()} == {"twice": 2}
    strategy.prepare([batch], outputs)
    assert strategy.finalize(lambda plan: 0.0) == {"twice": 1, "never": 0}


def test_only_so_many_batches_are_taken() -> None:
    def stream() -> Iterator[Batch]:
        for _ in range(5):
            yield {"x": torch.randn(20, 4)}

    batches = stream()
    prepared(Branches([4]), batches, Budget(), batches=3)
    assert len(list(batches)) == 2


def test_a_model_that_is_broken_already_is_refused() -> None:
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan before training has begun"):
        prepared(Branches([4]), [{"x": torch.full((3, 4), torch.nan)}], Budget())


def test_where_rows_say_nothing_ranks_are_even() -> None:
    """Two rows have one direction: the components after the first are worth nothing in either module."""
    strategy = prepared(Branches([4, 4]), [{"x": torch.randn(2, 8)}], Budget(params=6 * 14))
    assert list(strategy.finalize(lambda plan: 0.0).values()) == [3, 3]
