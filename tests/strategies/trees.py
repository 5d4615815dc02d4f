"""Models that are nothing but Linears under given names, for strategies that look at names and weights alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def tree(shapes: Mapping[str, tuple[int, int]]) -> nn.Module:
    """Bias-free Linears of shape ``(in, out)`` under dotted names."""
    root = nn.Module()
    for name, shape in shapes.items():
        *parents, last = name.split(".")
        parent = root
        for part in parents:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, nn.Linear(*shape, bias=False))
    return root
