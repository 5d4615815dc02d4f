"""Rotate adapters into the singular basis of their own update."""

from __future__ import annotations

import torch
from torch import Tensor

from autolora.adapters.layer import LoRALinear


@torch.no_grad()
def singular_values(layer: LoRALinear) -> Tensor:
    """Singular values of ``B diag(g) A`` (without s), descending, shape ``(r,)``, from the small core only."""
    return _decompose(layer)[1]


@torch.no_grad()
def canonicalize(layer: LoRALinear) -> Tensor:
    r"""Make the components of one adapter canonical: no two share a direction, and they are ordered by size.

    With thin QR decompositions :math:`B\,\mathrm{diag}(g) = Q_B R_B` and :math:`A^T = Q_A R_A` and the singular value
    decomposition of the small core :math:`R_B R_A^T = U \Sigma V^T`, the factors become

    .. math:: B \leftarrow Q_B U \Sigma^{1/2}, \qquad A \leftarrow \Sigma^{1/2} V^T Q_A^T, \qquad g \leftarrow 1.

    The product that evaluation applies, and with it the output, stays the same to rounding: the values of the gate go
    into B, and the gate is fixed open. The caller resets the optimizer state of A and B, which is of the old basis.

    A direction whose singular value is zero keeps a row of A of the usual size, and a zero column of B: with both at
    zero it could never be learned.

    Returns:
        The singular values, descending, shape ``(r,)``.
    """
    layer.fix_gate(layer.gate.evaluation_gate())
    left, sigma, right = _decompose(layer)
    root = sigma.sqrt()
    dead = sigma <= sigma[0] * 1e-6
    typical = layer.lora_A.norm(dim=1).mean().to(root.dtype)
    layer.lora_B.copy_(left * torch.where(dead, 0.0, root))
    layer.lora_A.copy_(torch.where(dead, typical, root)[:, None] * right)
    layer.fix_gate(torch.ones(layer.rank))
    return sigma


def _decompose(layer: LoRALinear) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), singular values (r,) and V^T (r, in) of ``B diag(g) A``, with the evaluation gate."""
    with torch.autocast(layer.lora_A.device.type, enabled=False):
        q_b, r_b = torch.linalg.qr(_at_least_float32(layer.lora_B * layer.gate.evaluation_gate()))
        q_a, r_a = torch.linalg.qr(_at_least_float32(layer.lora_A.T))
        u, sigma, vh = torch.linalg.svd(r_b @ r_a.T)
        return q_b @ u, sigma, vh @ q_a.T


def _at_least_float32(matrix: Tensor) -> Tensor:
    """Decompositions take no half precision, which a model may be cast to."""
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))
