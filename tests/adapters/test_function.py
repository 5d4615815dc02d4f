"""The fused function against autograd of the same equation, and when layers share it."""

from __future__ import annotations

import copy

import pytest
import torch
from adapters.tiny_models import inputs_for, make, output, randomize
from torch import Tensor, nn

from autolora.adapters import AdapterSettings, LoRALinear, SelectorGate, attach, find_sites
from autolora.adapters.function import Adapted, _merging_pays, adapted_linear
from autolora.plan import RankPlan

IN = 5
SHAPES = ((4, 3), (6, 2), (4, 1))  # (out, r) of maps of one input


def maps_of(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Adapted]]:
    torch.manual_seed(0)
    maps = []
    for i, (out, rank) in enumerate(SHAPES[:count]):
        a, b = torch.randn(rank, IN, dtype=dtype), torch.randn(out, rank, dtype=dtype)
        bias = torch.randn(out, dtype=dtype) if i != 1 else None
        maps.append(Adapted(torch.randn(out, IN, dtype=dtype), bias, a, b))
    return torch.randn(2, 3, IN, dtype=dtype), maps


def dense(x: Tensor, maps: list[Adapted]) -> tuple[Tensor, ...]:
    """The equation, left to autograd."""
    return tuple(x @ (one.weight + one.b @ one.a).T + (0 if one.bias is None else one.bias) for one in maps)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_gradients_are_those_of_autograd(count: int) -> None:
    x, maps = maps_of(count)
    leaves = [x, *(tensor for one in maps for tensor in one if tensor is not None)]
    for leaf in leaves:
        leaf.requires_grad_(True)
    found, expected = adapted_linear(x, maps, x.dtype), dense(x, maps)
    for y, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(y, reference)
    losses = (torch.cat([y.sin().flatten() for y in ys]).sum() for ys in (found, expected))
    gradients = [torch.autograd.grad(loss, leaves) for loss in losses]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("count", [1, 3])
def test_gradcheck_first_and_second_order(count: int) -> None:
    x, maps = maps_of(count)
    factors = [tensor.requires_grad_(True) for one in maps for tensor in (one.a, one.b)]

    def outputs(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        return adapted_linear(x, [one._replace(a=a, b=b) for one, (a, b) in zip(maps, pairs, strict=True)], x.dtype)

    assert torch.autograd.gradcheck(outputs, (x.requires_grad_(True), *factors))
    assert torch.autograd.gradgradcheck(outputs, (x, *factors))


@pytest.mark.parametrize("rows", [1, 40])
def test_without_gradients_the_outputs_are_the_same(rows: int) -> None:
    _, maps = maps_of(3)
    x = torch.randn(rows, IN, dtype=torch.float64)
    for one in maps:
        one.a.requires_grad_(True)
    trained = adapted_linear(x, maps, x.dtype)
    with torch.no_grad():
        evaluated = adapted_linear(x, maps, x.dtype)
    merges = _merging_pays(x, [one.weight for one in maps])
    assert merges == (rows == 40)
    torch.testing.assert_close(evaluated, trained)
    # To the last bit only where both are computed in one way.
    assert all(map(torch.equal, evaluated, trained)) != merges


def test_outputs_that_nobody_used_have_no_part_in_the_gradient() -> None:
    x, maps = maps_of(3)
    leaves = [x.requires_grad_(True), maps[0].a.requires_grad_(True), maps[2].a.requires_grad_(True)]
    found = torch.autograd.grad(adapted_linear(x, maps, x.dtype)[2].sin().sum(), leaves, allow_unused=True)
    expected = torch.autograd.grad(dense(x, maps)[2].sin().sum(), leaves, allow_unused=True)
    assert found[1] is expected[1] is None
    torch.testing.assert_close((found[0], found[2]), (expected[0], expected[2]))


def test_second_derivatives_under_autocast_are_refused() -> None:
    layer = LoRALinear(nn.Linear(4, 4), 2)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x).float().square().sum()
    with pytest.raises(RuntimeError, match="expected one dtype, and no autocast"):
        torch.autograd.grad(y, x, create_graph=True)


# Layers ---------------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, family: str) -> dict[str, Tensor]:
    model.zero_grad()
    output(model, inputs_for(family)).sin().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def adapted_model(family: str, gated: bool) -> nn.Module:
    model = make(family)
    sites = find_sites(model, AdapterSettings())
    adapters = attach(
        model,
        AdapterSettings(),
        RankPlan.uniform(sites, 4),
        (lambda name, rank: SelectorGate(rank)) if gated else None,  # type: ignore[arg-type, return-value]
    )
    randomize(adapters)
    if gated:
        with torch.no_grad():
            for layer in adapters.layers.values():
                layer.gate.logits.copy_(torch.tensor([1.0, -1.0, 0.5, -0.5]))
    return model.double().train()  # rounding in float32 is more than differences that matter


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("family", ["bert", "deberta_v2", "llama", "gpt2", "t5_encoder"])
def test_a_model_trains_the_same_however_its_layers_are_computed(family: str, gated: bool) -> None:
    """Fused and shared, fused alone, and written out in separate products (which a forward hook on the base forces)."""
    shared = adapted_model(family, gated)
    alone, separate = copy.deepcopy(shared), copy.deepcopy(shared)
    for layer in (m for m in alone.modules() if isinstance(m, LoRALinear)):
        layer.shared = None
    for layer in (m for m in separate.modules() if isinstance(m, LoRALinear)):
        layer.base_layer.register_forward_hook(lambda module, inputs, result: None)
        assert layer.fused_dtype(torch.zeros(1)) is None
    expected = gradients(separate, family)
    for model in (shared, alone):
        for _ in range(2):
            found = gradients(model, family)
            assert set(found) == set(expected)
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient)


def test_query_key_and_value_are_computed_together() -> None:
    model = adapted_model("bert", gated=False)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear) and m.shared is not None}
    assert {name.rpartition(".")[2] for name in layers} == {"query", "key", "value"}
    y = output(model, inputs_for("bert"))
    seen, nodes = set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    fused = [node for node in seen if "AdaptedLinear" in node.name()]
    modules = sum(isinstance(m, LoRALinear) for m in model.modules())
    assert len(fused) == modules - len(layers) * 2 // 3


def test_modules_that_read_different_inputs_go_separate_ways() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return self.query(x) + self.key(memory) * self.value(memory)

    model = Cross()
    expected = copy.deepcopy(model)
    sites = find_sites(model, AdapterSettings())
    attach(model, AdapterSettings(), RankPlan.uniform(sites, 2))
    x, memory = torch.randn(2, 3, 4)
    for _ in range(3):
        assert torch.equal(model.train()(x, memory), expected(x, memory))
    assert all(m.shared is None for m in model.modules() if isinstance(m, LoRALinear))


def test_frozen_weights_are_cast_once_and_never_stale() -> None:
    layer = LoRALinear(nn.Linear(4, 4), 2)
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        layer.base_layer.requires_grad_(False)
        first, cast = layer(x), layer._weight_as(torch.bfloat16)
        assert layer._weight_as(torch.bfloat16) is cast
        with torch.no_grad():
            layer.base_layer.weight.mul_(2)
        assert torch.equal(layer._weight_as(torch.bfloat16), layer.base_layer.weight.bfloat16())
        assert not torch.equal(layer(x), first)
