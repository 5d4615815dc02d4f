"""The singular basis of an adapter's own update, against scipy on the dense product."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from autolora.adapters import FixedGate, LoRALinear, SelectorGate, canonicalize, singular_values

IN, OUT, RANK = 20, 14, 5


def layer_of(gate: FixedGate | SelectorGate | None = None, *, true_rank: int = RANK, n_out: int = OUT) -> LoRALinear:
    """An adapter whose product has the given rank, with components that share directions."""
    layer = LoRALinear(nn.Linear(IN, n_out), RANK, scale=1.3, gate=gate)
    with torch.no_grad():
        layer.lora_A.copy_(torch.randn(RANK, IN) * torch.tensor([1.0, 5.0, 0.1, 2.0, 1.0])[:, None])
        layer.lora_B.copy_(torch.randn(n_out, true_rank) @ torch.randn(true_rank, RANK))
    return layer


def reference(layer: LoRALinear) -> np.ndarray:
    """Singular values of the dense product without s, in double precision."""
    product = (layer.lora_B * layer.gate.evaluation_gate()).double() @ layer.lora_A.double()
    return scipy.linalg.svdvals(product.detach().numpy())[: layer.rank]


def off_diagonal(matrix: Tensor) -> Tensor:
    return matrix - matrix.diagonal().diag()


def test_output_stays_and_components_are_orthogonal_and_balanced() -> None:
    layer, x = layer_of(), torch.randn(6, IN)
    before, expected = layer(x), reference(layer)
    sigma = canonicalize(layer)
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sigma.numpy(), expected, rtol=1e-5)
    b, a = layer.lora_B.detach(), layer.lora_A.detach()
    assert off_diagonal(b.T @ b).abs().max() < 1e-4
    assert off_diagonal(a @ a.T).abs().max() < 1e-4
    torch.testing.assert_close(b.norm(dim=0), sigma.sqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close(a.norm(dim=1), sigma.sqrt(), rtol=1e-4, atol=0)
    assert (sigma.diff() <= 0).all()


def test_dropping_the_last_components_is_the_best_approximation() -> None:
    """Eckart and Young: what is lost is the root of the sum of the squared singular values left out."""
    layer = layer_of()
    full = layer.delta_weight()
    sigma = canonicalize(layer)
    layer.fix_gate(torch.tensor([1, 1, 0, 0, 0]))
    lost = (full - layer.delta_weight()).norm() / layer.scale
    torch.testing.assert_close(lost, sigma[2:].norm(), rtol=1e-4, atol=0)


def test_a_second_rotation_changes_nothing() -> None:
    layer = layer_of()
    sigma = canonicalize(layer)
    product = layer.delta_weight()
    torch.testing.assert_close(canonicalize(layer), sigma, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.delta_weight(), product, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("true_rank", [0, 2])
def test_a_direction_without_value_can_still_be_learned(true_rank: int) -> None:
    layer, x = layer_of(true_rank=true_rank), torch.randn(6, IN)
    with torch.no_grad():
        if true_rank == 0:
            layer.lora_B.zero_()
    typical, before = layer.lora_A.norm(dim=1).mean(), layer(x)
    sigma = canonicalize(layer)
    assert (sigma[true_rank:] <= 1e-5 * max(1.0, float(sigma[0]))).all()
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-4)
    assert (layer.lora_B[:, true_rank:] == 0).all()
    torch.testing.assert_close(layer.lora_A[true_rank:].norm(dim=1), typical.expand(RANK - true_rank))
    layer(x).sin().sum().backward()
    assert layer.lora_B.grad is not None
    assert (layer.lora_B.grad.norm(dim=0) > 0).all()


@pytest.mark.parametrize("kind", ["fixed", "selector"])
def test_gates_are_folded_in_and_opened(kind: str) -> None:
    if kind == "fixed":
        layer = layer_of(FixedGate(RANK, torch.tensor([0, 1, 0, 1, 1])))
    else:
        layer = layer_of(SelectorGate(RANK, "sigmoid"))
        with torch.no_grad():
            layer.gate.logits.copy_(torch.tensor([-1.0, 0.5, -2.0, 1.0, 3.0]))
    layer.eval()
    x = torch.randn(6, IN)
    before, expected = layer(x), reference(layer)
    np.testing.assert_allclose(singular_values(layer).numpy(), expected, rtol=1e-4, atol=1e-4)
    sigma = canonicalize(layer)
    np.testing.assert_allclose(sigma.numpy(), expected, rtol=1e-4, atol=1e-4)
    assert (sigma > 1e-3).sum() == 3
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-4)
    assert layer.gate.evaluation_gate().tolist() == [1] * RANK


def test_full_rank_and_narrow_modules() -> None:
    """As many components as the module is narrow."""
    layer, x = layer_of(n_out=RANK), torch.randn(3, IN)
    before = layer(x)
    canonicalize(layer)
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-4)


def test_precision_is_that_of_float32_under_autocast_and_for_a_model_in_half() -> None:
    layer = layer_of()
    expected = reference(layer)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_allclose(canonicalize(layer).numpy(), expected, rtol=1e-5)
    half = layer_of().to(torch.bfloat16)
    expected = reference(half)
    np.testing.assert_allclose(canonicalize(half).numpy(), expected, rtol=1e-4)
    assert half.lora_A.dtype == torch.bfloat16
