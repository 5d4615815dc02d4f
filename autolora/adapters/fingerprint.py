"""A short identity of the frozen weights that an adapter belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from autolora.adapters.layer import LoRALinear
from autolora.adapters.select import under
from autolora.errors import BackboneError

_HALF = (torch.bfloat16, torch.float16)


@torch.no_grad()
def fingerprint(model: nn.Module, without: Iterable[str] = ()) -> dict[str, str]:
    """Hashes of a model's own weights; adapters, attached or merged, do not show.

    ``structure`` is of names and shapes; ``bfloat16`` and ``float16`` of all values rounded to that dtype, so that a
    backbone loaded in half precision has the fingerprint that it has in float32. Rounding first to one of the two and
    then to the other can differ from rounding once: a model in one of them lacks the other's hash.

    Args:
        model: with or without adapters.
        without: names of modules and parameters to leave out, such as a head that is trained.
    """
    left_out = list(without)
    named = sorted((name, p) for name, p in own_parameters(model) if not under(name, left_out))
    structure = hashlib.sha256(repr([(name, tuple(p.shape)) for name, p in named]).encode())
    tensors = [p.detach() for _, p in named]
    found = {"structure": structure.hexdigest()[:32]}
    for half, other in (_HALF, _HALF[::-1]):
        if all(tensor.dtype != other for tensor in tensors):
            found[str(half).removeprefix("torch.")] = _digest(tensors, half)
    return found


def check_fingerprint(expected: Mapping[str, str], model: nn.Module, without: Iterable[str], source: str) -> None:
    """Refuse a model that is not the one an adapter was trained on.

    Args:
        expected: what :func:`fingerprint` gave then.
        model: with or without adapters.
        without: names that were left out then.
        source: the adapter's backbone, for the message.

    Raises:
        BackboneError: if a hash that both have differs.
    """
    found = fingerprint(model, without)
    differing = [kind for kind, value in expected.items() if found.get(kind, value) != value]
    if differing:
        kind = differing[0]
        what = "other modules or shapes" if kind == "structure" else "other weights"
        raise BackboneError(
            f"this adapter was trained on another backbone ({source}): the model has {what}: expected {kind} "
            f"fingerprint {expected[kind][:12]}, got {found[kind][:12]}; load that backbone"
        )


def own_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """A model's parameters under the names and with the values that they have without adapters.

    One that the model holds under two names comes twice.
    """
    if isinstance(module, LoRALinear):
        for name, parameter in own_parameters(module.base_layer, prefix):
            yield name, module.unmerged_weight if name == f"{prefix}weight" else parameter
        return
    for name, own in module._parameters.items():
        if own is not None:
            yield prefix + name, own
    for name, child in module._modules.items():
        if child is not None:
            yield from own_parameters(child, f"{prefix}{name}.")


def _digest(tensors: Iterable[Tensor], dtype: torch.dtype) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        rounded = tensor.to(dtype) if tensor.is_floating_point() else tensor
        digest.update(rounded.cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
