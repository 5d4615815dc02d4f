"""A model without its adapters' wrappers for a while: as it was, or with the updates merged in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from autolora.adapters.attach import Adapters, replace_modules
from autolora.adapters.layer import LoRALinear


@contextmanager
def unwrapped(adapters: Adapters) -> Iterator[nn.Module]:
    """Inside this context every adapted module stands in the model itself, under its own name; what is merged stays.

    The adapters are back at the end, and :meth:`Adapters.detach` restores what it would have restored.
    """
    try:
        replace_modules(adapters.model, {layer: layer.base_layer for layer in adapters.layers.values()})
        yield adapters.model
    finally:
        replace_modules(adapters.model, {layer.base_layer: layer for layer in adapters.layers.values()})


@contextmanager
def merged(adapters: Adapters) -> Iterator[nn.Module]:
    """Inside this context the model is a plain one with the updates in its weights, and no trace of adapters.

    Raises:
        TargetError: if an adapted module has no floating-point weight matrix to add to.
    """
    with merging(adapters.layers.values()), unwrapped(adapters) as model:
        yield model


@contextmanager
def merging(layers: Iterable[LoRALinear]) -> Iterator[None]:
    """Inside this context these layers are merged; those that were before stay so.

    Raises:
        TargetError: if one has no floating-point weight matrix to add to.
    """
    before = [layer for layer in layers if not layer.merged]
    try:
        for layer in before:
            layer.merge()
        yield
    finally:
        for layer in before:
            layer.unmerge()
