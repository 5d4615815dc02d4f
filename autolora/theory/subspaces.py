"""How two subspaces lie to each other: what an update shares with the directions of the weight it is added to."""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal(matrix: Tensor) -> Tensor:
    """An orthonormal basis of what the columns of ``(n, k)`` span, shape ``(n, rank)``, float64 on the CPU."""
    left, values, _ = torch.linalg.svd(matrix.detach().cpu().double(), full_matrices=False)
    if not len(values):
        return left
    return left[:, values > values[0] * max(matrix.shape) * torch.finfo(torch.float32).eps]


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    r"""Angles between the column spaces of a ``(n, j)`` and b ``(n, k)``, ascending, in radians.

    Their cosines are the singular values of :math:`Q_a^T Q_b`, with Q orthonormal bases, and their sines those of
    :math:`(I - Q_a Q_a^T) Q_b`; each angle is taken from the one of the two that is well conditioned there (Björck &
    Golub, Mathematics of Computation 1973, algorithm 1; Knyazev & Argentati, SIAM J. Scientific Computing 2002).

    Returns:
        ``min(rank a, rank b)`` angles from 0 to pi/2, float64.
    """
    first, second = sorted((orthonormal(a), orthonormal(b)), key=lambda basis: -basis.shape[1])
    cosines = torch.linalg.svdvals(first.T @ second)
    sines = torch.linalg.svdvals(second - first @ (first.T @ second)).flip(0)
    return torch.where(cosines.square() > 0.5, sines.clamp(max=1).asin(), cosines.clamp(max=1).acos())


def overlap(a: Tensor, b: Tensor) -> float:
    r"""The mean squared cosine of the principal angles, :math:`\|Q_a^T Q_b\|_F^2 / \min(j, k)`, from 0 to 1.

    (The similarity of Hu et al., "LoRA", ICLR 2022, section 7.2.) Between random subspaces of n dimensions it is
    :math:`\max(j, k) / n` on average. 0 if either has no direction.
    """
    angles = principal_angles(a, b)
    return float(angles.cos().square().mean()) if len(angles) else 0.0
