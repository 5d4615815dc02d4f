r"""Magnitude pruning of frozen weights: the entries of smallest magnitude become 0.

* ``unstructured``: the share ``amount`` of the entries of each module (Han et al., NeurIPS 2015, section 3.1).
* ``2:4``: two of every four consecutive inputs of each output, the pattern that sparse tensor cores multiply (Mishra et
  al., arXiv 2104.08378, section 2).

Weights stay stored as they were, zeros included: pruning saves no memory and, on hardware without kernels for it, no
time.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from autolora.errors import BackboneError

Pattern = Literal["unstructured", "2:4"]


def kept(weight: Tensor, pattern: Pattern, amount: float = 0.5) -> Tensor:
    """Which entries of a weight ``(out, in)`` stay; of equal magnitudes the later ones.

    Args:
        weight: the matrix.
        pattern: where zeros may be.
        amount: share of the entries that ``unstructured`` makes 0, rounded to a whole number of them.

    Returns:
        A mask of booleans, of the same shape.

    Raises:
        BackboneError: if the inputs are not a multiple of four, for ``2:4``.
    """
    if pattern == "unstructured":
        return _largest(weight.flatten(), weight.numel() - round(amount * weight.numel())).view_as(weight)
    if weight.shape[1] % 4:
        raise BackboneError(
            f"backbone.sparsity.method=2:4: expected a multiple of 4 inputs, got {weight.shape[1]}; use "
            "method=unstructured on this backbone"
        )
    return _largest(weight.reshape(-1, 4), 2).view_as(weight)


def _largest(rows: Tensor, count: int) -> Tensor:
    """The ``count`` largest magnitudes of each row, as a mask."""
    order = rows.abs().argsort(dim=-1, stable=True)
    chosen = order[..., order.shape[-1] - count :]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, chosen, True)
