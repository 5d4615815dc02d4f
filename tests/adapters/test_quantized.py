"""Quantised Linears: the codes of bitsandbytes, the right product and gradient, and adapters on top."""

from __future__ import annotations

import copy
import math
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from adapters.tiny_models import FAMILIES, Shared, inputs_for, make, output, randomize, snapshot
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from autolora.adapters import AdapterSettings, LoRALinear, attach, compact, find_sites
from autolora.adapters.bare import merged
from autolora.adapters.compress import Compression, compress, restore
from autolora.adapters.fingerprint import check_fingerprint, fingerprint
from autolora.adapters.quantized import (
    BLOCK,
    Kind,
    QuantizedLinear,
    check_device,
    count_weights,
    quantized_modules,
)
from autolora.errors import BackboneError, TargetError
from autolora.plan import RankPlan, Site

KINDS: tuple[Kind, ...] = ("int8", "nf4")
LARGEST_ERROR = {"int8": 0.5 / 127, "nf4": (1 - 0.6961928009986877) / 2}  # of a scale: half the widest gap of levels


def quantized(family: str, kind: Kind) -> nn.Module:
    model, head = make(family), FAMILIES[family][2]
    compress(model, Compression(quantization=kind), [head] if head else [])
    return model


def linear(n_in: int, n_out: int, bias: bool = True) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_in", "n_out"), [(384, 96), (24, 16), (7, 5), (65, 3)])
def test_codes_are_those_of_bitsandbytes_and_close_to_the_weight(kind: Kind, n_in: int, n_out: int) -> None:
    base = linear(n_in, n_out)
    weight, module = base.weight.detach().clone(), QuantizedLinear(base, kind)
    theirs: Any
    if kind == "int8":
        theirs = bnb.nn.Linear8bitLt(n_in, n_out, has_fp16_weights=False)
        theirs.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False)
        codes, scales = theirs.to("cpu").weight.CB, theirs.weight.SCB
        largest = weight.abs().amax(1, keepdim=True)
    else:
        theirs = bnb.nn.Linear4bit(n_in, n_out, quant_type="nf4", compress_statistics=False)
        theirs.weight = bnb.nn.Params4bit(weight.clone(), quant_type="nf4", compress_statistics=False)
        codes, scales = theirs.to("cpu").weight.data, theirs.weight.quant_state.absmax
        blocks = nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
        largest = blocks.abs().amax(1).repeat_interleave(BLOCK)[: weight.numel()].view_as(weight)
    assert torch.equal(module.weight, codes)
    assert torch.equal(module.scales, scales)
    error = (module.dequantized() - weight).abs()
    assert bool((error <= LARGEST_ERROR[kind] * largest * 1.001 + 2**-11 * weight.abs()).all())
    assert float(error.max()) > 0


def test_int8_by_hand() -> None:
    base = linear(4, 2, bias=False)
    base.weight.data = torch.tensor([[1.27, -0.638, 0.0, 0.01], [0.0, 0.0, 254.0, 3.2]])
    module = QuantizedLinear(base, "int8")
    assert module.weight.tolist() == [[127, -64, 0, 1], [0, 0, 127, 2]]
    torch.testing.assert_close(module.dequantized()[1], torch.tensor([0.0, 0.0, 254.0, 4.0]))


def test_nf4_levels_by_hand() -> None:
    """A block that holds its own 16 levels is stored without an error: those of the table in appendix E of QLoRA."""
    levels = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    base = linear(16, 4, bias=False)
    base.weight.data = 3 * torch.tensor([levels] * 4)
    torch.testing.assert_close(QuantizedLinear(base, "nf4").dequantized(), base.weight.data, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_product_and_gradient_are_those_of_the_dequantised_weight(kind: Kind, conv1d: bool, dtype: torch.dtype) -> None:
    base: nn.Module = Conv1D(12, 20) if conv1d else linear(20, 12)
    nn.init.normal_(base.bias)
    module = QuantizedLinear(base, kind)
    assert (module.in_features, module.out_features) == (20, 12)
    x = torch.randn(2, 3, 20, dtype=dtype, requires_grad=True)
    y, weight = module(x) if dtype == torch.float32 else module.double()(x), module.dequantized(dtype)
    assert y.dtype == dtype
    torch.testing.assert_close(y, x @ weight.T + module.bias)
    upstream = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, upstream, create_graph=True)
    torch.testing.assert_close(gradient, upstream @ weight)
    restored = module.restored()
    assert type(restored) is (Conv1D if conv1d else nn.Linear)
    torch.testing.assert_close(restored.to(dtype)(x), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_to_the_second_order(kind: Kind) -> None:
    module = QuantizedLinear(linear(6, 4), kind).double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(module, (x,))
    torch.autograd.gradgradcheck(lambda x: module(x).tanh(), (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_products_are_in_its_dtype(kind: Kind) -> None:
    module, x = QuantizedLinear(linear(32, 8), kind), torch.randn(5, 32, requires_grad=True)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    y.sum().backward()
    torch.testing.assert_close(x.grad, module.dequantized().sum(0).expand(5, -1), rtol=0.05, atol=0.05)
    assert module.bias.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_keeps_a_dequantised_weight(kind: Kind) -> None:
    """Saved for the gradient of many layers, they would take the memory of the float model."""
    module, saved = QuantizedLinear(linear(64, 64), kind), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(torch.randn(2, 64, requires_grad=True))
    assert all(tensor.numel() < 64 * 64 for tensor in saved)


# Models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_on_a_quantised_model(family: str, kind: Kind) -> None:
    _, expected_sites, head = FAMILIES[family]
    original, model, batch = make(family), quantized(family, kind), inputs_for(family)
    settings = AdapterSettings()
    assert find_sites(model, settings) == find_sites(original, settings)  # true widths, not those of packed codes
    assert 0 < len(quantized_modules(model)) <= expected_sites
    assert not head or type(model.get_submodule(head)) is type(original.get_submodule(head))
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.LayerNorm)]
    assert {p.dtype for m in embeddings for p in m.parameters()} <= {torch.float32}
    assert count_weights(model) == sum(p.numel() for p in original.parameters())

    before, bare = snapshot(model), output(model, batch).detach()
    adapters = attach(model, settings, RankPlan.uniform(find_sites(model, settings), 2))
    assert adapters.count()["total"] - adapters.count()["adapter"] == count_weights(original)
    with torch.no_grad():
        torch.testing.assert_close(output(model, batch), bare)
    randomize(adapters)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(2):
        model.eval()  # and back: evaluation must not change how training goes on
        with torch.no_grad():
            output(model, batch)
        model.train()
        optimizer.zero_grad()
        output(model, batch).sin().sum().backward()
        assert [name for name, layer in adapters.layers.items() if layer.lora_A.grad.abs().sum() == 0] == []
        optimizer.step()
    model.eval()
    with torch.no_grad():
        trained = output(model, batch)
    adapters.fix_gates({name: torch.tensor([1, 0]) for name in list(adapters.layers)[::2]})
    with torch.no_grad():
        masked = output(model, batch)
        compact(adapters)
        torch.testing.assert_close(output(model, batch), masked)
    assert not torch.allclose(masked, trained)
    adapters.detach()
    after = snapshot(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_merging_is_refused_until_weights_are_restored(family: str, kind: Kind) -> None:
    model, batch = quantized(family, kind), inputs_for(family)
    adapters = attach(model, AdapterSettings(), RankPlan.uniform(find_sites(model, AdapterSettings()), 2))
    randomize(adapters)
    with torch.no_grad():
        expected = output(model, batch)
        with adapters.merged():  # where merging is not exact, nothing is merged
            assert torch.equal(output(model, batch), expected)
        with pytest.raises(TargetError, match=r"got QuantizedLinear without one.*compress\.restore"):
            adapters.merge()
        restore(model)
        assert quantized_modules(model) == {}
        torch.testing.assert_close(output(model, batch), expected, rtol=1e-4, atol=1e-5)
        with merged(adapters) as plain:
            assert not any(isinstance(module, LoRALinear) for module in plain.modules())
            assert list(plain.state_dict()) == list(make(family).state_dict())
            torch.testing.assert_close(output(plain, batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_is_of_codes_and_scales(kind: Kind) -> None:
    model = quantized("bert", kind)
    expected = fingerprint(model)
    check_fingerprint(expected, copy.deepcopy(model), [], "tiny")
    for other in (make("bert"), quantized("bert", "int8" if kind == "nf4" else "nf4")):
        with pytest.raises(BackboneError, match="other modules or shapes"):
            check_fingerprint(expected, other, [], "tiny")
    for changed in ("weight", "scales"):
        other = copy.deepcopy(model)
        getattr(next(iter(quantized_modules(other).values())), changed).data.flatten()[0] += 1
        with pytest.raises(BackboneError, match="other weights"):
            check_fingerprint(expected, other, [], "tiny")


def test_what_is_written_in_full_or_held_twice_stays_float() -> None:
    model = quantized("distilbert", "int8")
    assert type(model.get_submodule("pre_classifier")) is nn.Linear  # PEFT takes it for the classifier
    assert type(quantized("t5_encoder", "nf4").get_submodule("encoder.block.0.layer.1.DenseReluDense.wo")) is nn.Linear
    shared = Shared()
    compress(shared, Compression(quantization="int8"), [])
    assert list(quantized_modules(shared)) == ["inner.1"]
    tied = nn.ModuleDict({"embedding": nn.Embedding(8, 8), "out": nn.Linear(8, 8), "free": nn.Linear(8, 8)})
    tied["out"].weight = tied["embedding"].weight
    compress(tied, Compression(quantization="int8"), [])
    assert list(quantized_modules(tied)) == ["free"]
    pooled = make("bert")
    compress(pooled, Compression(quantization="int8", trained=["pooler"]), ["classifier"])
    assert "bert.pooler.dense" not in quantized_modules(pooled)
    assert len(quantized_modules(pooled)) == 12


def test_nothing_to_compress_is_an_error() -> None:
    with pytest.raises(BackboneError, match=r"backbone\.quantization=int8: the backbone has no Linear outside"):
        compress(nn.Sequential(nn.Linear(4, 4)), Compression(quantization="int8"), ["0"])


def test_weights_that_are_not_finite_are_refused() -> None:
    base = linear(8, 8)
    base.weight.data[0, 0] = math.nan
    with pytest.raises(BackboneError, match="expected finite weights"):
        QuantizedLinear(base, "int8")


def test_a_device_without_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized("bert", "nf4")
    check_device(model, torch.device("cpu"))
    check_device(make("bert"), torch.device("cuda", 9))  # nothing quantised, nothing to refuse

    def missing(*_: Any) -> Tensor:
        raise NotImplementedError("Could not run 'bitsandbytes::dequantize_4bit'\nmore")

    monkeypatch.setattr(QuantizedLinear, "dequantized", missing)
    with pytest.raises(BackboneError) as caught:
        check_device(model, torch.device("cpu"))
    assert str(caught.value) == (
        "backbone.quantization=nf4: bitsandbytes cannot do this on cpu (Could not run 'bitsandbytes::dequantize_4bit')"
        ": use trainer.accelerator=cpu, or backbone.quantization=none"
    )


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(BackboneError, match=r"pip install 'autolora\[quantization\]'"):
        quantized("bert", "int8")


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.25), ("nf4", 0.125)])
def test_memory(kind: Kind, share: float) -> None:
    """A byte of four for int8, and a scale for each row; half a byte for nf4, and a scale for 64 entries."""
    base = linear(384, 1536, bias=False)
    full, module = base.weight.nbytes, QuantizedLinear(base, kind)
    stored = sum(p.nbytes for p in module.parameters())
    overhead = 4 * 1536 if kind == "int8" else 4 * 384 * 1536 // BLOCK
    assert stored == share * full + overhead
    assert stored / full == pytest.approx({"int8": 0.2526, "nf4": 0.1406}[kind], abs=1e-4)
    assert Site(module.in_features, module.out_features) == Site(384, 1536)


# Why the product is ours: what bitsandbytes' own modules do on a CPU -------------------------------------------------


def test_their_int8_module_evaluates_something_else_than_it_trains() -> None:
    base, x = linear(64, 32, bias=False), torch.randn(8, 64)
    theirs = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    theirs.weight = bnb.nn.Int8Params(base.weight.detach().clone(), requires_grad=False)
    theirs, ours = theirs.to("cpu"), QuantizedLinear(base, "int8")
    torch.testing.assert_close(theirs.train()(x), ours.train()(x))
    torch.testing.assert_close(ours.eval()(x), ours.train()(x), rtol=0, atol=0)
    assert (theirs.eval()(x) - theirs.train()(x)).abs().max() > 1e-3


@pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="bitsandbytes repacks nf4 weights on CPUs with AVX512-BF16 alone"
)
def test_their_nf4_module_has_no_gradient_after_an_evaluation() -> None:
    base, x = linear(64, 32, bias=False), torch.randn(8, 64)
    theirs = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compress_statistics=False)
    theirs.weight = bnb.nn.Params4bit(base.weight.detach().clone(), quant_type="nf4", compress_statistics=False)
    theirs, ours = theirs.to("cpu"), QuantizedLinear(base, "nf4")
    torch.testing.assert_close(theirs.train()(x), ours(x))
    for module in (theirs, ours):
        with torch.no_grad():
            module.eval()(x)
    (expected,) = torch.autograd.grad(ours.train()(x.requires_grad_()).sum(), x)
    assert expected.abs().sum() > 0
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        theirs.train()(x).sum().backward()
    assert x.grad is None
