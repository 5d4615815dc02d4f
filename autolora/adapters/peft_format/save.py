"""Write adapters as a stock PEFT LoRA adapter, with what only we know in a file beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from autolora import __version__
from autolora.adapters.attach import Adapters
from autolora.adapters.bare import merging, unwrapped
from autolora.adapters.fingerprint import fingerprint
from autolora.adapters.layer import LoRALinear
from autolora.adapters.linear_like import is_conv1d, site_of
from autolora.adapters.peft_format.names import (
    PREFIX,
    exactly,
    heads_of,
    modules_of,
    outermost,
    places,
    target_modules,
    with_ties,
    wrapped_in_full,
)
from autolora.adapters.select import linear_modules, under
from autolora.errors import TargetError
from autolora.files import dump_json, replacing_directory

SCHEMA = 2
CONFIG, WEIGHTS, SIDECAR = "adapter_config.json", "adapter_model.safetensors", "autolora.json"

Factors = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Layout:
    """How the modules of a model are written.

    Args:
        factors: A ``(r, in)`` and B ``(out, r)`` of the modules that stay adapters, by name.
        in_full: modules that ``modules_to_save`` names.
        wrapped: modules that PEFT takes for named by it, the outermost.
    """

    factors: Factors
    in_full: list[str]
    wrapped: list[str]


def save_peft(
    adapters: Adapters,
    directory: Path,
    *,
    base_model: str,
    task_type: str | None,
    fresh: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write ``adapter_config.json``, ``adapter_model.safetensors`` and ``autolora.json``, all or nothing.

    The first two are what PEFT reads. Scale and gates are in B, components that are switched off are left out, and
    alpha equals the rank of each module, so that PEFT multiplies by 1. Modules that PEFT cannot load as an adapter on
    the published backbone are written in full, with their update merged: the trained head; what the pretrained weights
    lack, which starts at random in every other process, such as a head that is not trained; modules whose name ends
    like that of a head; modules that the model holds in two places; and what is tied to any of these.

    Args:
        adapters: before or after :func:`autolora.adapters.compact`.
        directory: replaced as a whole if it is there.
        base_model: hub id or path of the backbone.
        task_type: PEFT's name for the task (``SEQ_CLS``), or ``None``.
        fresh: names of the modules and parameters that the pretrained weights lack.
        metadata: more to keep in ``autolora.json``, as JSON.

    Raises:
        TargetError: if no adapter is left and there is no module that could carry an empty one; or a module that has to
            be written in full has no weight matrix to merge into.
    """
    biases = {id(bias) for bias in adapters.also_trained}
    folded = {name: pair for name, layer in adapters.layers.items() if (pair := fold(layer)) is not None}
    with unwrapped(adapters) as model:
        layout = _layout(model, adapters, folded, fresh, task_type)
        tensors = {
            f"{PREFIX}{name}.{part}.weight": tensor
            for name, pair in layout.factors.items()
            for part, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
        }
        for module in layout.wrapped:
            tensors |= _in_full(model, module, adapters.layers)
        trained = [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in biases]
        loose = [name for name in trained if not under(name, layout.wrapped)]
        tensors |= {PREFIX + _bias_key(name, layout.factors): model.get_parameter(name) for name in loose}
        config = _config(model, layout, loose, base_model, task_type)
        without = list(dict.fromkeys([*with_ties(model, adapters.fully_trained), *fresh, *trained]))
        sidecar = sidecar_of(adapters, model, base_model, without=without, in_full=layout.wrapped, metadata=metadata)
        written = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    with replacing_directory(directory) as folder:
        (folder / CONFIG).write_text(dump_json(config), encoding="utf-8")
        (folder / WEIGHTS).write_bytes(save(written, metadata={"format": "pt"}))
        (folder / SIDECAR).write_text(dump_json(sidecar), encoding="utf-8")


def sidecar_of(
    adapters: Adapters,
    model: nn.Module,
    base_model: str,
    *,
    without: Sequence[str] = (),
    in_full: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of ``autolora.json``.

    Args:
        adapters: what is saved.
        model: the model under its own names, to take the fingerprint of.
        base_model: hub id or path of the backbone.
        without: names of what training has changed, or starts at random.
        in_full: modules that are saved in full.
        metadata: more to keep, as JSON.
    """
    return {
        "schema": SCHEMA,
        "autolora": __version__,
        "base_model": base_model,
        "scale": _common_scale(adapters),
        "sites": {name: [site.in_features, site.out_features] for name, site in adapters.sites.items()},
        "ranks": dict(adapters.active_plan()),
        "in_full": list(in_full),
        "fingerprint": {"hashes": fingerprint(model, without), "without": list(without)},
        "run": dict(metadata or {}),
    }


@torch.no_grad()
def fold(layer: LoRALinear) -> tuple[Tensor, Tensor] | None:
    """A ``(k, in)`` and ``s * B diag(g)`` ``(out, k)`` of the k components that are on, or ``None`` if none is."""
    gate = layer.gate.evaluation_gate()
    kept = gate.nonzero().flatten()
    return (layer.lora_A[kept], (layer.lora_B * (gate * layer.scale))[:, kept]) if len(kept) else None


def _layout(
    model: nn.Module, adapters: Adapters, folded: Factors, fresh: Sequence[str], task_type: str | None
) -> _Layout:
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    held = places(model)
    shared = [name for name in folded if len(held[id(model.get_submodule(name))]) > 1]
    in_full = with_ties(model, [*adapters.fully_trained, *modules_of(model, fresh), *shared])
    wrapped = outermost(wrapped_in_full(names, [*in_full, *heads_of(task_type)]))
    factors = {name: pair for name, pair in folded.items() if not under(name, wrapped)}
    if not factors:
        free = [name for name in linear_modules(model) if not under(name, wrapped)]
        factors = _empty_adapter(model, [name for name in free if name in adapters.sites] or free)
    return _Layout(factors, in_full, wrapped)


def _empty_adapter(model: nn.Module, names: Sequence[str]) -> Factors:
    """One component of zeros on the smallest of the modules: PEFT refuses a configuration without a target."""
    sites = {name: site for name in names if (site := site_of(model.get_submodule(name))) is not None}
    if not sites:
        raise TargetError(
            "no adapter is left, and every linear module is written in full: there is nothing to put an empty adapter "
            "on, which PEFT needs; merge the adapters and save the model instead"
        )
    name, site = min(sites.items(), key=lambda item: item[1].cost)
    return {name: (torch.zeros(1, site.in_features), torch.zeros(site.out_features, 1))}


def _in_full(model: nn.Module, name: str, layers: Mapping[str, LoRALinear]) -> dict[str, Tensor]:
    """The state of a module, with the updates of the adapters inside it."""
    module = model.get_submodule(name)
    inside = {id(child) for child in module.modules()}
    with merging(layer for layer in layers.values() if id(layer.base_layer) in inside):
        return {f"{PREFIX}{name}.{key}": tensor.clone() for key, tensor in module.state_dict().items()}


def _bias_key(name: str, factors: Factors) -> str:
    owner, _, own = name.rpartition(".")
    return f"{owner}.base_layer.{own}" if owner in factors else name


def _config(
    model: nn.Module, layout: _Layout, biases: Sequence[str], base_model: str, task_type: str | None
) -> dict[str, Any]:
    ranks = {name: len(a) for name, (a, _) in layout.factors.items()}
    largest = max(ranks.values())
    patterns = {exactly(name): rank for name, rank in ranks.items() if rank != largest}
    of_adapted = all(name.rpartition(".")[0] in ranks for name in biases)
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": target_modules(list(ranks), [name for name, _ in model.named_modules()]),
        "modules_to_save": layout.in_full or None,
        "bias": ("lora_only" if of_adapted else "all") if biases else "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(is_conv1d(model.get_submodule(name)) for name in ranks),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }


def _common_scale(adapters: Adapters) -> float | None:
    scales = {s.item() if isinstance(s := layer.scale, Tensor) else s for layer in adapters.layers.values()}
    return scales.pop() if len(scales) == 1 else None
