"""Which modules are linear maps that an adapter can sit on, and how their weight is laid out."""

from __future__ import annotations

import warnings

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from autolora.plan import Site


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the transposed ``Conv1D`` of GPT-2 style models, whose weight is ``(in, out)``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None


def site_of(module: nn.Module) -> Site | None:
    """The in and out width of a linear-like module, or ``None`` if it is not one.

    Linear-like are ``nn.Linear``, GPT-2's ``Conv1D``, and every module with integer ``in_features`` and
    ``out_features`` (quantised Linears, for example). The output projection of ``nn.MultiheadAttention`` is not: its
    weight is read, its forward never called, so that an adapter on it would do nothing.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    if is_conv1d(module):
        assert isinstance(module.weight, Tensor)
        return Site(*module.weight.shape)
    in_features, out_features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(in_features, int) and isinstance(out_features, int):
        return Site(in_features, out_features)
    return None


def weight_is_transposed(module: nn.Module, fan_in_fan_out: bool | None = None) -> bool:
    """Whether the weight is stored as ``(in, out)``.

    ``Conv1D`` stores ``(in, out)`` and ``nn.Linear`` ``(out, in)``; a custom module is judged by the shape of its
    weight. Only for a square weight is that ambiguous: ``fan_in_fan_out`` then decides, and ``(out, in)`` is the
    default. Where it contradicts what is known, it is ignored with a warning.
    """
    known = _known_layout(module)
    if known is None:
        return bool(fan_in_fan_out)
    if fan_in_fan_out is not None and fan_in_fan_out != known:
        layout = "(in, out)" if known else "(out, in)"
        warnings.warn(
            f"fan_in_fan_out={fan_in_fan_out} is ignored for {type(module).__name__}, whose weight is {layout}",
            stacklevel=2,
        )
    return known


def _known_layout(module: nn.Module) -> bool | None:
    """Whether the weight is ``(in, out)``, or ``None`` where type and shape do not tell."""
    if is_conv1d(module):
        return True
    weight, site = getattr(module, "weight", None), site_of(module)
    if isinstance(module, nn.Linear):
        return False
    if weight is None or site is None or weight.dim() != 2 or site.in_features == site.out_features:
        return None
    return tuple(weight.shape) == (site.in_features, site.out_features)
