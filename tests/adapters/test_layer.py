"""The adapted layer against its equation, written out densely, and its invariants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from autolora.adapters import FixedGate, LoRALinear, SelectorGate
from autolora.adapters.layer import init_a
from autolora.errors import TargetError

IN, OUT, RANK, SCALE = 12, 7, 4, 1.7


class CustomLinear(nn.Module):
    """Linear-like by ``in_features`` and ``out_features`` alone; keeps its weight under another name."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.kernel = nn.Parameter(torch.randn(in_features, out_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel


def bases() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "linear": nn.Linear(IN, OUT),
        "no_bias": nn.Linear(IN, OUT, bias=False),
        "conv1d": Conv1D(OUT, IN),
        "custom": CustomLinear(IN, OUT),
    }


def adapted(base: nn.Module | None = None, seed: int = 0, **kwargs: object) -> LoRALinear:
    """An adapter with gaussian B."""
    generator = torch.Generator().manual_seed(seed)
    base = nn.Linear(IN, OUT) if base is None else base
    layer = LoRALinear(base, RANK, **{"scale": SCALE, "generator": generator} | kwargs)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(OUT, RANK, generator=generator))
    return layer.requires_grad_(True)


# The equation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "no_bias", "conv1d", "custom"])
def test_step_0_is_the_identity(kind: str) -> None:
    base = bases()[kind]
    x = torch.randn(5, IN)
    expected = base(x)
    assert torch.equal(LoRALinear(base, RANK)(x), expected)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 0), (2, 3, 4)])
@pytest.mark.parametrize("kind", ["linear", "no_bias", "conv1d", "custom"])
@pytest.mark.parametrize("mask", [None, [1, 0, 1, 1], [0, 0, 0, 0]])
def test_equation(kind: str, shape: tuple[int, ...], mask: list[int] | None) -> None:
    gate = None if mask is None else FixedGate(RANK, torch.tensor(mask))
    layer = adapted(bases()[kind], gate=gate)
    x = torch.randn(*shape, IN)
    g = torch.ones(RANK) if mask is None else torch.tensor(mask, dtype=torch.float)
    dense = SCALE * layer.lora_B @ torch.diag(g) @ layer.lora_A
    y = layer(x)
    assert y.shape == (*shape, OUT)
    torch.testing.assert_close(y, layer.base_layer(x) + x @ dense.T)
    torch.testing.assert_close(layer.delta_weight(), dense)


def test_gradients_are_those_of_the_dense_formula() -> None:
    layer = adapted(gate=SelectorGate(RANK, "sigmoid", init=0.3), learn_scale=True)
    x, cotangent = torch.randn(5, IN, requires_grad=True), torch.randn(5, OUT)
    parameters = [x, layer.lora_A, layer.lora_B, layer.gate.logits, layer.scale]
    ours = torch.autograd.grad(layer(x), parameters, cotangent)
    a, b, logits, s = (p.detach().clone().requires_grad_() for p in parameters[1:])
    base = layer.base_layer
    dense = F.linear(x, base.weight, base.bias) + x @ (s * b @ torch.diag(torch.sigmoid(logits)) @ a).T
    for mine, reference in zip(ours, torch.autograd.grad(dense, [x, a, b, logits, s], cotangent), strict=True):
        torch.testing.assert_close(mine, reference)


def test_scale_does_not_depend_on_the_rank() -> None:
    """Cutting an adapter down to its first components leaves what they contribute as it was."""
    layer = adapted(gate=FixedGate(RANK, torch.tensor([1, 1, 0, 0])))
    small = LoRALinear(layer.base_layer, 2, scale=SCALE)
    with torch.no_grad():
        small.lora_A.copy_(layer.lora_A[:2])
        small.lora_B.copy_(layer.lora_B[:, :2])
    x = torch.randn(5, IN)
    torch.testing.assert_close(small(x), layer(x))


def test_learn_scale_makes_one_more_parameter() -> None:
    layer = adapted(learn_scale=True)
    assert dict(layer.named_parameters())["scale"].item() == pytest.approx(SCALE)
    layer(torch.randn(3, IN)).sum().backward()
    assert layer.scale.grad is not None
    assert layer.scale.grad.abs() > 0
    assert "scale" not in dict(adapted().named_parameters())


def test_dropout_only_in_training_and_only_on_the_adapter() -> None:
    layer = adapted(dropout=0.5).train()
    x = torch.randn(64, IN)
    plain = adapted(layer.base_layer)(x)
    assert not torch.allclose(layer(x), plain)
    mean = layer(x.expand(3000, 64, IN)).mean(0)
    assert (mean - plain).abs().mean() < 0.05 * (plain - layer.base_layer(x)).abs().mean()
    torch.testing.assert_close(layer.eval()(x), plain)
    with torch.no_grad():
        layer.lora_B.zero_()
    assert torch.equal(layer.train()(x), layer.base_layer(x))


def test_bad_arguments() -> None:
    linear = nn.Linear(4, 3)
    for rank in (0, 4):
        with pytest.raises(ValueError, match=rf"rank: expected 1 to 3 \(min\(in, out\)\), got {rank}"):
            LoRALinear(linear, rank)
    with pytest.raises(ValueError, match=r"dropout: expected 0 <= p < 1, got 1"):
        LoRALinear(linear, 1, dropout=1.0)
    with pytest.raises(ValueError, match=r"expected a linear-like module .* got LayerNorm"):
        LoRALinear(nn.LayerNorm(4), 1)
    with pytest.raises(ValueError, match=r"without an adapter, got LoRALinear"):
        LoRALinear(LoRALinear(linear, 1), 1)
    with pytest.raises(ValueError, match=r"init of A: expected one of kaiming, gaussian, orthogonal, got 'xavier'"):
        LoRALinear(linear, 1, init="xavier")  # type: ignore[arg-type]


# Precision ------------------------------------------------------------------------------------------------------------


def test_float32_adapter_under_bfloat16_autocast() -> None:
    layer = adapted()
    x = torch.randn(64, IN)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.15)
    y.float().square().mean().backward()
    assert layer.lora_A.grad is not None
    assert layer.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(dtype: torch.dtype) -> None:
    """The update is computed in float32 and rounded once."""
    layer = adapted(nn.Linear(IN, OUT).to(dtype))
    assert layer.lora_A.dtype == torch.float32
    x = torch.randn(9, IN).to(dtype)
    update = (x.float() @ layer.delta_weight().T).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, layer.base_layer(x) + update)


def test_a_model_cast_to_half_as_a_whole_still_runs() -> None:
    layer = adapted(gate=FixedGate(RANK, torch.tensor([1, 0, 1, 1]))).to(torch.bfloat16)
    assert layer(torch.randn(3, IN, dtype=torch.bfloat16)).dtype == torch.bfloat16


# Merging --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "no_bias", "conv1d"])
@pytest.mark.parametrize("square", [False, True])
def test_merged_is_unmerged_and_unmerge_is_exact(kind: str, square: bool) -> None:
    n_in = OUT if square else IN
    base: nn.Module = Conv1D(OUT, n_in) if kind == "conv1d" else nn.Linear(n_in, OUT, bias=kind == "linear")
    gate = SelectorGate(RANK, "sigmoid", init=0.5)
    with torch.no_grad():
        gate.logits[1] = -3.0
    layer = adapted(base, gate=gate).eval()
    before, x = base.weight.detach().clone(), torch.randn(3, n_in)
    parameter, expected = base.weight, layer(x)
    layer.merge()
    layer.merge()  # a second time does nothing
    assert layer.merged
    assert not torch.equal(base.weight, before)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(base(x), expected)
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged
    assert base.weight is parameter
    assert torch.equal(base.weight, before)
    assert torch.equal(layer(x), expected)


def test_merging_a_tied_weight_leaves_the_embedding_alone() -> None:
    embedding, base = nn.Embedding(OUT, IN), nn.Linear(IN, OUT, bias=False)
    base.weight = embedding.weight
    layer, before = adapted(base), embedding.weight.detach().clone()
    layer.merge()
    assert torch.equal(embedding.weight, before)
    layer.unmerge()
    assert base.weight is embedding.weight


def test_merging_keeps_the_dtype_of_the_weight() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        layer = adapted(nn.Linear(IN, OUT).to(dtype))
        before = layer.weight.detach().clone()
        layer.merge()
        assert layer.weight.dtype == dtype
        reference = (before.double() + layer.delta_weight().double()).to(dtype)
        torch.testing.assert_close(layer.weight.detach(), reference)


def test_merging_under_autocast_is_not_rounded() -> None:
    layer = adapted()
    exact = layer.delta_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.delta_weight(), exact)


@pytest.mark.parametrize("weight", ["absent", "integer", "computed"])
def test_a_base_that_cannot_be_merged(weight: str) -> None:
    base: nn.Module = CustomLinear(IN, OUT) if weight == "absent" else nn.Linear(IN, OUT)
    if weight == "integer":
        base.weight = nn.Parameter(torch.ones(OUT, IN, dtype=torch.int8), requires_grad=False)
    if weight == "computed":
        torch.nn.utils.parametrizations.orthogonal(base)
    with pytest.raises(TargetError, match=r"merge: expected a floating-point weight matrix, got"):
        LoRALinear(base, RANK).merge()


def test_wrong_layout_is_not_merged_into_a_square_weight() -> None:
    """fan_in_fan_out cannot turn a Linear's weight around, where it would go unnoticed."""
    base = nn.Linear(OUT, OUT)
    with pytest.warns(UserWarning, match=r"fan_in_fan_out=True is ignored for Linear, whose weight is \(out, in\)"):
        layer = adapted(base, fan_in_fan_out=True)
    x = torch.randn(3, OUT)
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)


# Initialisation -------------------------------------------------------------------------------------------------------


def drawn(rank: int, n_in: int, init: str, seed: int = 0, std: float = 0.02) -> Tensor:
    weight = torch.empty(rank, n_in)
    init_a(weight, init, std, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    return weight


def test_kaiming_fills_its_bounds_evenly() -> None:
    scaled = drawn(200, 400, "kaiming") * 400**0.5
    assert 0.999 < scaled.abs().max() <= 1
    histogram = torch.histc(scaled, 10, -1, 1) / scaled.numel()
    torch.testing.assert_close(histogram, torch.full((10,), 0.1), rtol=0, atol=0.005)


def test_kaiming_has_the_bounds_of_torch() -> None:
    reference = torch.empty(200, 400)
    nn.init.kaiming_uniform_(reference, a=5**0.5)
    assert drawn(200, 400, "kaiming").std() == pytest.approx(reference.std().item(), rel=0.01)


@pytest.mark.parametrize("std", [0.02, 1.0])
def test_gaussian_std(std: float) -> None:
    weight = drawn(200, 400, "gaussian", std=std)
    assert weight.std() == pytest.approx(std, rel=0.01)
    assert weight.mean().abs() < 0.02 * std
    assert (weight.abs() > 3 * std).float().mean() == pytest.approx(0.0027, rel=0.3)


def test_orthogonal_rows_are_orthonormal() -> None:
    weight = drawn(7, 10, "orthogonal")
    torch.testing.assert_close(weight @ weight.T, torch.eye(7), rtol=0, atol=1e-6)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
@pytest.mark.parametrize("n_in", [10, 37, 64])
def test_a_smaller_rank_gets_the_first_rows(init: str, n_in: int) -> None:
    torch.testing.assert_close(drawn(3, n_in, init), drawn(8, n_in, init)[:3], rtol=0, atol=1e-6)
    assert not torch.allclose(drawn(3, n_in, init), drawn(3, n_in, init, seed=1))


def test_initialisation_leaves_the_global_random_stream_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    base = nn.Linear(IN, OUT)
    state = torch.get_rng_state()
    adapted(base)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), expected)


# Standing in for the base ---------------------------------------------------------------------------------------------


def test_it_looks_like_the_base_from_outside() -> None:
    base = nn.Linear(IN, OUT)
    layer = LoRALinear(base, RANK)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    assert LoRALinear(nn.Linear(IN, OUT, bias=False), 1).bias is None
    assert "rank=4" in repr(layer)


def test_further_arguments_reach_the_base() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:  # type: ignore[override]
            return super().forward(x) * factor

    base = Scaled(IN, OUT)
    x = torch.randn(2, IN)
    assert torch.equal(LoRALinear(base, 1)(x, factor=3.0), base(x, factor=3.0))
