"""Store the frozen weights of a backbone smaller, or with zeros, before adapters are put on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from autolora.adapters.attach import replace_modules, token_heads
from autolora.adapters.layer import LoRALinear
from autolora.adapters.linear_like import is_conv1d
from autolora.adapters.peft_format.names import modules_of, outermost, places, with_ties, wrapped_in_full
from autolora.adapters.pruned import Pattern, kept
from autolora.adapters.quantized import Kind, QuantizedLinear, quantized_modules
from autolora.adapters.select import linear_modules, match_modules, under
from autolora.errors import BackboneError


@dataclass(frozen=True)
class Compression:
    """What becomes of the weights of every Linear outside the head, adapted or not.

    Embeddings, norms, biases, heads (those that predict tokens too), what is trained in full, what the pretrained
    weights lack, what the model holds in two places, and what it wants in float32 stay as they are.

    Args:
        quantization: how weights are stored (:mod:`autolora.adapters.quantized`).
        sparsity: which are made 0 before that (:mod:`autolora.adapters.pruned`).
        amount: the share of them, for ``unstructured``.
        trained: names or patterns of modules trained in full besides the heads.
    """

    quantization: Literal["none"] | Kind = "none"
    sparsity: Literal["none"] | Pattern = "none"
    amount: float = 0.5
    trained: Sequence[str] = ()

    def __bool__(self) -> bool:
        return self.quantization != "none" or self.sparsity != "none"

    def __str__(self) -> str:
        """As on a command line."""
        said = [] if self.quantization == "none" else [f"backbone.quantization={self.quantization}"]
        if self.sparsity != "none":
            said.append(f"backbone.sparsity.method={self.sparsity}")
        if self.sparsity == "unstructured":
            said.append(f"backbone.sparsity.amount={self.amount:g}")
        return " ".join(said)


@torch.no_grad()
def compress(model: nn.Module, how: Compression, heads: Sequence[str], fresh: Sequence[str] = ()) -> None:
    """Prune and quantise the weights of a model in place.

    Args:
        model: without adapters.
        how: what to do.
        heads: names of the classification heads.
        fresh: names of modules and parameters that the pretrained weights lack.

    Raises:
        BackboneError: if bitsandbytes is not installed, the weights do not suit the method, or no Linear is left to
            compress.
        TargetError: if a pattern of ``how.trained`` matches nothing.
    """
    if not how:
        return
    names = compressible(model, [*heads, *modules_of(model, fresh), *match_modules(model, how.trained, "trained")])
    if not names:
        raise BackboneError(f"{how}: the backbone has no Linear outside what is trained in full: leave it out")
    modules = [model.get_submodule(name) for name in names]
    if how.sparsity != "none":
        for name, module in zip(names, modules, strict=True):
            _prune(name, module, how)
    if how.quantization != "none":
        replace_modules(model, {module: QuantizedLinear(module, how.quantization) for module in modules})


def compressible(model: nn.Module, in_full: Iterable[str]) -> list[str]:
    """The Linears that stay frozen under an adapter and are written nowhere, in model order.

    Args:
        model: without adapters.
        in_full: names of modules that are trained or written in full.
    """
    every = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    held = places(model)
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    twice = [name for name in every if len(held[id(model.get_submodule(name))]) > 1]
    float32 = [*(getattr(model, "_keep_in_fp32_modules", None) or ())]
    full = outermost(wrapped_in_full(every, with_ties(model, [*in_full, *twice, *token_heads(model)])))
    return [
        name
        for name in linear_modules(model)
        if not under(name, full)
        and name.rpartition(".")[2] not in float32
        and (type(model.get_submodule(name)) is nn.Linear or is_conv1d(model.get_submodule(name)))
        and holders[id(model.get_submodule(name).weight)] == 1
    ]


def _prune(name: str, module: nn.Module, how: Compression) -> None:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    assert how.sparsity != "none"
    matrix = weight.data.t() if is_conv1d(module) else weight.data
    try:
        matrix.mul_(kept(matrix, how.sparsity, how.amount))
    except BackboneError as error:
        raise BackboneError(f"{name}: {error}") from None


@torch.no_grad()
def restore(model: nn.Module) -> None:
    """Put modules with float32 weights, those that the codes stand for, in place of quantised ones, adapted or not."""
    restored: dict[nn.Module, nn.Module] = {module: module.restored() for module in quantized_modules(model).values()}
    adapted = [m for m in model.modules() if isinstance(m, LoRALinear) and m.base_layer in restored]
    replace_modules(model, restored)
    for layer in adapted:
        layer.transposed = is_conv1d(layer.base_layer)
