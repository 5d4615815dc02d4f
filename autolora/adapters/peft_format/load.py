"""Read a PEFT LoRA adapter, ours or any other, into our layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autolora.adapters.attach import Adapters, AdapterSettings, attach, require_bare
from autolora.adapters.canonical import canonical_factors
from autolora.adapters.fingerprint import check_fingerprint
from autolora.adapters.linear_like import site_of
from autolora.adapters.peft_format.names import PREFIX, outermost, pattern_value, with_ties, wrapped_in_full
from autolora.adapters.peft_format.save import CONFIG, SCHEMA, SIDECAR, WEIGHTS
from autolora.adapters.select import under
from autolora.errors import DataError, TargetError
from autolora.files import read_json
from autolora.plan import RankPlan, Site

# What may be in adapter_config.json without changing what the stored tensors mean. Anything else that is set is
# refused: newer versions of PEFT put variants of LoRA behind keys of their own.
_UNDERSTOOD = frozenset(
    {
        "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
        "peft_version", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "bias",
        "fan_in_fan_out", "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform",
        "layers_pattern", "init_lora_weights", "megatron_core", "qalora_group_size", "runtime_config",
        "ensure_weight_tying",
    }
)  # fmt: skip
# Initialisations that change the base weights: the tensors then belong to weights that no model on disk has.
_MUTATING_INITS = ("pissa", "corda", "olora", "loftq", "lora_ga")
_FACTOR = re.compile(r"(.+)\.(lora_[AB])(?:\.default)?\.weight")
_UNSUPPORTED_TENSORS = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "an adapter on an embedding",
    ".lora_B.bias": "lora_bias",
    ".lora_B.default.bias": "lora_bias",
    ".token_adapter.": "trained tokens",
    ".lora_": "a variant of LoRA",
}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


# What the values of adapter_config.json that we compute with may be.
_VALUES: dict[str, Callable[[Any], bool]] = {
    "lora_alpha": _is_number,
    "lora_dropout": lambda value: value is None or (_is_number(value) and 0 <= value < 1),
    "alpha_pattern": lambda value: value is None or (isinstance(value, dict) and all(map(_is_number, value.values()))),
    "use_rslora": lambda value: value is None or isinstance(value, bool),
    "fan_in_fan_out": lambda value: value is None or isinstance(value, bool),
    "modules_to_save": lambda value: value is None or isinstance(value, list),
}

# What has to be in autolora.json for the adapter to be loaded.
_FIELDS = {
    "base_model": str, "sites": dict, "ranks": dict, "in_full": list, "fingerprint.hashes": dict,
    "fingerprint.without": list,
}  # fmt: skip


@dataclass
class _Contents:
    """The tensors of an adapter file by what they are, under the names of the model.

    Args:
        a, b: factors by module.
        other: parameters that were trained themselves.
    """

    a: dict[str, Tensor] = field(default_factory=dict)
    b: dict[str, Tensor] = field(default_factory=dict)
    other: dict[str, Tensor] = field(default_factory=dict)


def load_peft(model: nn.Module, directory: Path | str) -> Adapters:
    """Attach a stored PEFT LoRA adapter to a model, which then computes what it computes under PEFT.

    Modules and ranks are those of the tensors in the file; PEFT's scale, alpha / r or alpha / sqrt(r), goes into B
    relative to our constant s. PEFT lets a rank be above ``min(in, out)``, which no product B A can have: such factors
    are replaced by as many components as there can be, with the same product to rounding
    (:func:`autolora.adapters.canonical.canonical_factors`). Modules and biases that were saved in full become trained
    ones, so that :meth:`Adapters.detach` gives the model back as it was.

    Args:
        model: the backbone, without adapters. Unchanged if the adapter is refused.
        directory: with ``adapter_config.json`` and ``adapter_model.safetensors``; where ``autolora.json`` is beside
            them, the model has to be the backbone that it names.

    Raises:
        DataError: if a file is missing, damaged or not safetensors, or a module lacks its tensors.
        TargetError: if the model carries adapters already, or the adapter is not a plain LoRA adapter of linear
            modules, or does not fit the model.
        BackboneError: if the model is not the backbone that the adapter was trained on.
    """
    require_bare(model)
    directory = Path(directory)
    config, sidecar = read_config(directory), read_sidecar(directory)
    contents = _sort(read_tensors(directory))
    if sidecar is not None:
        fingerprint = sidecar["fingerprint"]
        check_fingerprint(fingerprint["hashes"], model, fingerprint["without"], backbone_of(sidecar))
        for name in [name for name in contents.a if sidecar["ranks"].get(name) == 0]:
            del contents.a[name], contents.b[name]  # stands in for an adapter, because PEFT needs one
        expected = [name for name, rank in sidecar["ranks"].items() if rank and not under(name, sidecar["in_full"])]
        if absent := [name for name in expected if name not in contents.a]:
            raise DataError(f"{directory}: {WEIGHTS} lacks factors of {absent[0]}; copy or export the adapter again")
    in_full, biases = _trained_in_full(model, config, contents.other)
    _check_fit(model, contents, in_full)
    scaling = {name: _scaling(config, name, len(a)) for name, a in contents.a.items()}
    _cut_to_full_rank(contents)
    sites = _sites(model, contents, sidecar, in_full)
    owners = {name.rpartition(".")[0] for name in biases}
    settings = AdapterSettings(
        scale=(sidecar or {}).get("scale") or AdapterSettings.scale,
        dropout=float(config.get("lora_dropout") or 0.0),
        fan_in_fan_out=config.get("fan_in_fan_out") or None,
        modules_to_save=[f"(?:{re.escape(name)})" for name, _ in model.named_modules() if name in in_full],
        bias="none" if not biases else "lora_only" if owners <= set(contents.a) else "all",
    )
    adapters = attach(model, settings, RankPlan(sites, {name: len(a) for name, a in contents.a.items()}))
    with torch.no_grad():
        for name, layer in adapters.layers.items():
            layer.lora_A.copy_(contents.a[name])
            layer.lora_B.copy_(contents.b[name].float() * (scaling[name] / settings.scale))
        for name, tensor in contents.other.items():
            _tensor_of(model, name, set(adapters.layers)).copy_(tensor)
    return adapters


def read_factors(directory: Path | str) -> dict[str, tuple[Tensor, Tensor]]:
    """A ``(r, in)`` and B ``(out, r)`` of every module of a stored PEFT LoRA adapter, as they are in the file.

    Raises:
        DataError: if the file is missing or damaged.
        TargetError: if it has anything but LoRA on linear modules.
    """
    contents = _sort(read_tensors(Path(directory)))
    return {name: (a, contents.b[name]) for name, a in contents.a.items()}


def read_config(directory: Path) -> dict[str, Any]:
    """The content of ``adapter_config.json``.

    Raises:
        DataError: if it is missing, not JSON, or has values of other types.
        TargetError: if it describes something else than plain LoRA.
    """
    config = _read_json(directory / CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise TargetError(f"{directory}: expected an adapter of peft_type LORA, got {kind}")
    refused = sorted(key for key, value in config.items() if value and key not in _UNDERSTOOD)
    if str(config.get("init_lora_weights")).lower().startswith(_MUTATING_INITS):
        refused.append("init_lora_weights")
    if refused:
        text = ", ".join(f"{key}={config[key]}" for key in refused)
        raise TargetError(f"{directory}: expected plain LoRA, but {CONFIG} has {text}, which is not supported")
    if malformed := [f"{key}={value!r}" for key, value in config.items() if key in _VALUES and not _VALUES[key](value)]:
        text = ", ".join(malformed)
        raise DataError(f"{directory}: {CONFIG} has {text}, which no adapter has; copy or export it again")
    return config


def backbone_of(sidecar: Mapping[str, Any]) -> str:
    """The backbone that an adapter belongs to, and what was done to its weights, for a message."""
    how = (sidecar.get("run") or {}).get("compression")
    return f"{sidecar['base_model']} with {how}" if how else str(sidecar["base_model"])


def read_sidecar(directory: Path) -> dict[str, Any] | None:
    """The content of ``autolora.json``; ``None`` beside an adapter that is not ours.

    Raises:
        DataError: if it is damaged or of another schema.
    """
    file = directory / SIDECAR
    if not file.exists():
        return None
    sidecar = _read_json(file)
    if sidecar.get("schema") != SCHEMA:
        raise DataError(
            f"{file}: expected schema {SCHEMA}, got {sidecar.get('schema')}: another version of AutoLoRA has written "
            "it; use that one, or train the run again with force=true and export it"
        )
    inner = sidecar.get("fingerprint")
    found = sidecar | {f"fingerprint.{key}": value for key, value in (inner if isinstance(inner, dict) else {}).items()}
    lacking = [key for key, kind in _FIELDS.items() if not isinstance(found.get(key), kind)]
    if lacking:
        raise DataError(f"{file}: damaged: {', '.join(lacking)} missing or malformed; copy or export the adapter again")
    return sidecar


def _read_json(file: Path) -> dict[str, Any]:
    data = read_json(file, f"{file.parent}: expected the folder of a PEFT adapter, {_what_instead(file)}")
    if not isinstance(data, dict):
        raise DataError(f"{file}: expected a JSON object, got {type(data).__name__}")
    return data


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of ``adapter_model.safetensors`` under the names in the file.

    Raises:
        DataError: if it is missing or damaged.
    """
    file = directory / WEIGHTS
    if not file.is_file():
        raise DataError(f"{directory}: expected the folder of a PEFT adapter, {_what_instead(file)}")
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: damaged or cut short ({error}); copy or export the adapter again") from None
    return tensors


def _what_instead(missing: Path) -> str:
    """What a folder is, in which one of an adapter's files is missing."""
    folder = missing.parent
    if not folder.is_dir():
        return "there is none"
    if (folder / "adapter" / missing.name).is_file():
        return f"got that of a run: its adapter is in {folder / 'adapter'}"
    if missing.name == WEIGHTS and missing.with_suffix(".bin").exists():
        return "a .bin file can carry code and is not read: save the adapter as safetensors"
    return f"got one without {missing.name}"


def tensors_in_full(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter that are no factors, by the names that they have in the model without adapters.

    Raises:
        DataError: if the file is missing or damaged.
        TargetError: if it has something else than LoRA factors of linear modules and what was trained itself.
    """
    return _sort(read_tensors(directory)).other


def _sort(tensors: Mapping[str, Tensor]) -> _Contents:
    """Tell the tensors apart by their names, which differ a little between versions of PEFT.

    Raises:
        TargetError: if some are no LoRA factors of linear modules, or a factor lacks its partner.
    """
    contents = _Contents()
    for key, tensor in tensors.items():
        name = re.sub(r"\.modules_to_save(\.default)?\.", ".", key.removeprefix(PREFIX))
        if factor := _FACTOR.fullmatch(name):
            if tensor.dim() != 2:
                raise TargetError(f"{key}: expected a matrix, got shape {tuple(tensor.shape)} (a convolution?)")
            (contents.a if factor[2] == "lora_A" else contents.b)[factor[1]] = tensor
        elif what := next((what for part, what in _UNSUPPORTED_TENSORS.items() if part in name), None):
            raise TargetError(f"{key}: {what} is not supported; expected LoRA on linear modules")
        elif ".original_module." not in name:
            contents.other[name.replace(".base_layer.", ".")] = tensor
    alone = sorted(contents.a.keys() ^ contents.b.keys())
    if alone:
        raise TargetError(f"{alone[0]}: one of lora_A and lora_B is missing; the file is incomplete")
    return contents


def _trained_in_full(model: nn.Module, config: Mapping[str, Any], other: Iterable[str]) -> tuple[list[str], list[str]]:
    """The modules whose whole state is in the file, and the biases that are there by themselves."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    wrapped = wrapped_in_full(names, config.get("modules_to_save") or [])
    loose = [name for name in other if not under(name, wrapped)]
    weights = [name for name in loose if not name.endswith((".bias", "_bias"))]
    in_full = outermost([*wrapped, *(name.rpartition(".")[0] for name in weights)])
    return in_full, [name for name in loose if not under(name, in_full)]


def _check_fit(model: nn.Module, contents: _Contents, in_full: Iterable[str]) -> None:
    """Refuse an adapter for other modules, or for modules of other shapes.

    Raises:
        TargetError: with the first few misfits.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    faults = []
    for name, a in contents.a.items():
        site = site_of(modules[name]) if name in modules else None
        found = (a.shape[1], contents.b[name].shape[0])
        if site is None:
            faults.append(f"{name}: the model has no linear module of this name")
        elif a.shape[0] != contents.b[name].shape[1] or found != (site.in_features, site.out_features):
            expected = f"in, out = {site.in_features}, {site.out_features}"
            shapes = f"A {tuple(a.shape)} and B {tuple(contents.b[name].shape)}"
            faults.append(f"{name}: expected factors for {expected}, got {shapes}")
    state, in_full = model.state_dict(), [name for name in in_full if name in modules]
    for name, tensor in contents.other.items():
        if name not in state:
            faults.append(f"{name}: the model has no such parameter")
        elif state[name].shape != tensor.shape:
            faults.append(f"{name}: expected shape {tuple(state[name].shape)}, got {tuple(tensor.shape)}")
    ties = [name for name in with_ties(model, in_full) if not under(name, in_full)]
    faults += [f"{name}: tied to a module that is saved in full without it, which PEFT would untie" for name in ties]
    lacking = [key for key in state if under(key, in_full) and key not in contents.other]
    faults += [f"{key}: the module is saved in full, but this is missing" for key in lacking]
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise TargetError(f"the adapter does not fit the model: {'; '.join(faults[:3])}{more}; load its own backbone")


def _cut_to_full_rank(contents: _Contents) -> None:
    """Write factors of more components than ``min(in, out)`` with that many; in double precision on the way."""
    for name, a in contents.a.items():
        b = contents.b[name]
        if len(a) > min(a.shape[1], b.shape[0]):
            contents.a[name], contents.b[name], _ = canonical_factors(a.double(), b.double())


def _sites(
    model: nn.Module, contents: _Contents, sidecar: Mapping[str, Any] | None, in_full: Iterable[str]
) -> dict[str, Site]:
    """The modules that were up for selection, where we know, else those with an adapter; in model order."""
    known = {name for name in (sidecar or {}).get("sites", ()) if not under(name, in_full)} | set(contents.a)
    found = {name: site_of(module) for name, module in model.named_modules(remove_duplicate=False) if name in known}
    return {name: site for name, site in found.items() if site is not None}


def _scaling(config: Mapping[str, Any], name: str, rank: int) -> float:
    """What PEFT multiplies the update of a module with."""
    alpha = pattern_value(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _tensor_of(model: nn.Module, name: str, adapted: set[str]) -> Tensor:
    """A parameter or buffer by the name it has without adapters."""
    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    tensor = getattr(module.base_layer if owner in adapted else module, own)
    assert isinstance(tensor, Tensor)
    return tensor
