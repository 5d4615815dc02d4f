r"""The adapted linear maps of one input as a single autograd function, with the products it needs and no others.

For an input X of N rows and one or more frozen weights :math:`W_i` that read it, with factors :math:`A_i` of shape
``(r_i, in)`` and :math:`B_i` of shape ``(out_i, r_i)`` (gates and scale are part of B):

.. math:: Y_i = X W_i^T + b_i + H_i B_i^T, \qquad H_i = X A_i^T

and, with :math:`D_i = \partial Y_i \, B_i`,

.. math::

    \partial B_i^T = H_i^T \, \partial Y_i, \qquad \partial A_i = D_i^T X, \qquad
    \partial X = \sum_i \partial Y_i \, W_i + D_i A_i.

What makes it fast: the low-rank terms are accumulated into the outputs of the large products, so that no activation is
written twice; H and D, ``(N, r)``, are laid out as CPU libraries compute them fastest; modules that read one input
(query, key, value) share one product each for H, for dA and for the low-rank part of dX; X is saved once. Without
gradients, and for many rows, the product is with :math:`W_i + B_i A_i`, which is made for the moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_FIRST = 4  # position of the first weight among the arguments of the function
WIDE = 12
"""Columns from which a product is left as it is on a CPU; see :func:`_codes`."""


class Adapted(NamedTuple):
    """One adapted map: weight ``(out, in)``, bias ``(out,)`` or ``None``, A ``(r, in)``, B ``(out, r)``."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor


def adapted_linear(x: Tensor, maps: Sequence[Adapted], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Outputs of several adapted maps of one input, each of shape ``(..., out)``.

    Args:
        x: shape ``(..., in)``.
        maps: at least one.
        dtype: of all products; the weights have it already, everything else is cast to it.
    """
    weights, biases, a, b = zip(*maps, strict=True)
    # Inside a function gradients are always off: it has to be told whether they are wanted.
    return _AdaptedLinear.apply(x, dtype, len(maps), torch.is_grad_enabled(), *weights, *biases, *a, *b)


class _AdaptedLinear(torch.autograd.Function):
    """The function of the module's docstring; differentiable twice where nothing is cast."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dtype: torch.dtype, count: int, training: bool, *tensors: Any
    ) -> tuple[Tensor, ...]:
        ctx.shape, ctx.dtype, ctx.count = x.shape, dtype, count
        ctx.cast = x.dtype != dtype or tensors[-1].dtype != dtype
        if ctx.cast:
            x, tensors = x.to(dtype), tuple(None if t is None else t.to(dtype) for t in tensors)
        weights, biases, a, b = _quarters(tensors, count)
        rows = x.reshape(-1, x.shape[-1])
        merge = not training and not ctx.cast and _merging_pays(rows, weights)
        h = None if merge else _parts(_codes(rows, _columns_of(a)), a)
        outputs = []
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            if h is None:
                weight = torch.addmm(weight, b[i], a[i])
            y = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
            if h is not None:
                y.addmm_(h[i], b[i].t())
            outputs.append(y.view(*x.shape[:-1], y.shape[1]))
        if h is None:
            return tuple(outputs)
        ctx.save_for_backward(x, *weights, *a, *b, *h)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        count, dtype, needs = ctx.count, ctx.dtype, ctx.needs_input_grad
        x, *saved = ctx.saved_tensors
        weights, a, b, h = _quarters(saved, count)
        rows = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled():  # a second derivative is wanted, so H has to be part of the graph
            if ctx.cast:
                raise RuntimeError("second derivatives of an adapted layer: expected one dtype, and no autocast")
            h = _parts(_codes(rows, _columns_of(a)), a)
        result: list[Tensor | None] = [None] * (_FIRST + 4 * count)
        for_weights, for_biases, for_a, for_b = (_FIRST + k * count for k in range(4))
        live = [
            (i, gradient.to(dtype).reshape(-1, gradient.shape[-1]))
            for i, gradient in enumerate(gradients)
            if gradient is not None
        ]
        if not live:
            return tuple(result)
        live_a = [a[i] for i, _ in live]
        d = _side_by_side([_codes(dy, b[i]) for i, dy in live])
        da = torch.mm(d.t(), rows)
        for (i, dy), da_i in zip(live, da.split([len(a_i) for a_i in live_a]), strict=True):
            result[for_a + i] = da_i
            result[for_b + i] = torch.mm(h[i].t(), dy).t()
            if needs[for_weights + i]:
                result[for_weights + i] = torch.mm(dy.t(), rows)
            if needs[for_biases + i]:
                result[for_biases + i] = dy.sum(0)
        if needs[0]:
            first, dy = live[0]
            dx = torch.mm(dy, weights[first])
            for i, dy in live[1:]:
                dx.addmm_(dy, weights[i])
            result[0] = dx.addmm_(d, _columns_of(live_a).t()).view(ctx.shape)
        return tuple(result)


def _merging_pays(rows: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether ``X (W + B A)^T`` costs less than ``X W^T + H B^T``: in times out against in + out for each row.

    Twice, since W is also read and written. Training needs H all the same, and gains nothing.
    """
    width, out = rows.shape[1], sum(len(weight) for weight in weights)
    return len(rows) * (width + out) >= 2 * width * out


def _codes(x: Tensor, factor: Tensor) -> Tensor:
    """``x @ factor`` for a narrow factor ``(width, r)``: ``(N, r)``, in the layout that is computed fastest.

    BLAS libraries for CPUs have kernels that want 16 columns or more. Below that the transposed product, with few rows,
    takes half the time or less (float32, MKL, 384 and 1536 wide, one and two threads).
    """
    if factor.shape[1] >= WIDE or x.device.type != "cpu":
        return torch.mm(x, factor)
    return torch.mm(factor.t(), x.t()).t()


def _columns_of(a: Sequence[Tensor]) -> Tensor:
    """All A as columns of one contiguous matrix ``(in, sum of r)``."""
    return a[0].t().contiguous() if len(a) == 1 else torch.cat([a_i.t() for a_i in a], 1)


def _parts(h: Tensor, a: Sequence[Tensor]) -> Sequence[Tensor]:
    """The columns of H that belong to each A."""
    return (h,) if len(a) == 1 else h.split([len(a_i) for a_i in a], 1)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Codes of several maps as one matrix, in the layout that they have."""
    if len(parts) == 1:
        return parts[0]
    if any(part.shape[0] > 1 and part.stride(0) == 1 for part in parts):
        return torch.cat([part.t() for part in parts]).t()
    return torch.cat(list(parts), 1)


def _quarters(tensors: Sequence[Any], count: int) -> Iterator[Sequence[Any]]:
    """Four parts of ``count`` tensors each."""
    return (tensors[k * count : (k + 1) * count] for k in range(4))
