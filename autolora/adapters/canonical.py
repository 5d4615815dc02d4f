"""Rotate adapters into the singular basis of their own update."""

from __future__ import annotations

import torch
from torch import Tensor

from autolora.adapters.layer import LoRALinear


@torch.no_grad()
def singular_values(layer: LoRALinear) -> Tensor:
    """Singular values of ``B diag(g) A`` (without s), descending, shape ``(r,)``, from the small core only."""
    return _decompose(layer.lora_B * layer.gate.evaluation_gate(), layer.lora_A)[1]


@torch.no_grad()
def canonicalize(layer: LoRALinear) -> Tensor:
    r"""Make the components of one adapter canonical: no two share a direction, and they are ordered by size.

    With thin QR decompositions :math:`B\,\mathrm{diag}(g) = Q_B R_B` and :math:`A^T = Q_A R_A` and the singular value
    decomposition of the small core :math:`R_B R_A^T = U \Sigma V^T`, the factors become

    .. math:: B \leftarrow Q_B U \Sigma^{1/2}, \qquad A \leftarrow \Sigma^{1/2} V^T Q_A^T, \qquad g \leftarrow 1.

    The product that evaluation applies, and with it the output, stays the same to rounding: the values of the gate go
    into B, and the gate is fixed open. The caller resets the optimizer state of A and B, which is of the old basis.

    Returns:
        The singular values, descending, shape ``(r,)``.
    """
    layer.fix_gate(layer.gate.evaluation_gate())
    a, b, sigma = canonical_factors(layer.lora_A, layer.lora_B * layer.gate.evaluation_gate())
    layer.lora_A.copy_(a)
    layer.lora_B.copy_(b)
    layer.fix_gate(torch.ones(layer.rank))
    return sigma


@torch.no_grad()
def canonical_factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A and B of :func:`canonicalize`, and the singular values, for A ``(r, in)`` and B ``(out, r)`` of any rank.

    There are ``k = min(r, in, out)`` components. A direction whose singular value is zero keeps a row of A of the usual
    size, and a zero column of B: with both at zero it could never be learned.

    Returns:
        A ``(k, in)``, B ``(out, k)`` and the singular values, descending, ``(k,)``; at least in float32.
    """
    left, sigma, right = _decompose(b, a)
    root = sigma.sqrt()
    dead = sigma <= sigma[0] * 1e-6
    typical = a.norm(dim=1).mean().to(root.dtype)
    return torch.where(dead, typical, root)[:, None] * right, left * torch.where(dead, 0.0, root), sigma


def _decompose(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), singular values (k,) and V^T (k, in) of ``B A``."""
    with torch.autocast(a.device.type, enabled=False):
        q_b, r_b = torch.linalg.qr(_at_least_float32(b))
        q_a, r_a = torch.linalg.qr(_at_least_float32(a.T))
        u, sigma, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        return q_b @ u, sigma, vh @ q_a.T


def _at_least_float32(matrix: Tensor) -> Tensor:
    """Decompositions take no half precision, which a model may be cast to."""
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))
