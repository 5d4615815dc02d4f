"""Which modules of a model get an adapter: names, suffixes, regular expressions, layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from autolora.adapters.linear_like import site_of
from autolora.errors import TargetError

ALL_LINEAR = "all-linear"
_PLAIN_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Targets:
    """A selection of linear-like modules.

    Args:
        targets: ``"all-linear"``; or one name or a list of names, each matched against the whole module name or a
            dotted suffix of it (``query`` matches ``layer.0.query``, not ``layer.0.subquery``); or one regular
            expression matched against the full name.
        exclude: names or regular expressions of modules to leave out.
        layers_to_transform: only modules in these layers.
        layers_pattern: name of the module list that ``layers_to_transform`` counts in; the first number in the name
            by default.
    """

    targets: str | Sequence[str] = ALL_LINEAR
    exclude: Sequence[str] = field(default_factory=tuple)
    layers_to_transform: Sequence[int] | None = None
    layers_pattern: str | None = None


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a module: whole name, dotted suffix, or regular expression over the full name.

    Raises:
        TargetError: if the pattern is not a name and not a valid regular expression.
    """
    if _PLAIN_NAME.fullmatch(pattern):
        return name == pattern or name.endswith("." + pattern)
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise TargetError(f"{pattern!r}: expected a module name or a regular expression ({error})") from None


def under(name: str, parents: Iterable[str]) -> bool:
    """Whether a module is one of ``parents`` or inside one."""
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def linear_modules(model: nn.Module) -> dict[str, list[str]]:
    """Every linear-like module: its first name, in model order, and all the names that the model holds it under.

    What is inside another linear-like module belongs to that one, and is not listed.
    """
    names: dict[int, list[str]] = {}
    inside: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if name and site_of(module) is not None:
            names.setdefault(id(module), []).append(name)
            inside |= {id(child) for child in module.modules() if child is not module}
    return {aliases[0]: aliases for key, aliases in names.items() if key not in inside}


def select(model: nn.Module, spec: Targets, fully_trained: Sequence[str] = ()) -> list[str]:
    """Names of the modules that ``spec`` selects, in model order; a module that has two names is listed once.

    Args:
        model: any model.
        spec: what to select.
        fully_trained: modules that are trained in full; neither they nor what is inside them is adapted.

    Raises:
        TargetError: if nothing is selected (with candidates), or a pattern matches nothing.
    """
    everything = linear_modules(model)
    candidates = {
        name: aliases for name, aliases in everything.items() if not any(under(n, fully_trained) for n in aliases)
    }
    if not candidates:
        raise TargetError("the model has no linear-like module outside the fully trained ones: nothing to adapt")
    if spec.targets == ALL_LINEAR:
        chosen = set(candidates)
    else:
        patterns = [spec.targets] if isinstance(spec.targets, str) else list(spec.targets)
        chosen = _match_all("targets", patterns, candidates)
    chosen -= _match_all("exclude", spec.exclude, everything)
    if spec.layers_to_transform is not None:
        chosen = _in_layers(chosen, spec.layers_to_transform, spec.layers_pattern)
    elif spec.layers_pattern is not None:
        raise TargetError(f"layers_pattern={spec.layers_pattern}: expected layers_to_transform=[...] beside it")
    if not chosen:
        raise TargetError(f"nothing is left to adapt after exclude and layers_to_transform. {_candidates(candidates)}")
    return [name for name in candidates if name in chosen]


def match_modules(model: nn.Module, patterns: Sequence[str], option: str) -> list[str]:
    """Names of all modules (linear or not) that the patterns match, outermost only.

    Raises:
        TargetError: if a pattern matches nothing.
    """
    names = [name for name, _ in model.named_modules() if name]
    found = _match_all(option, patterns, {name: [name] for name in names})
    return [name for name in names if name in found and not under(name, found - {name})]


def match_ranks(names: Sequence[str], rank_pattern: Mapping[str, int], default: int) -> dict[str, int]:
    """The rank of each module: that of the first pattern that matches its name, else the default.

    Raises:
        TargetError: if a pattern matches nothing.
    """
    _match_all("rank_pattern", rank_pattern, {name: [name] for name in names})
    return {name: next((r for p, r in rank_pattern.items() if matches(p, name)), default) for name in names}


def _match_all(option: str, patterns: Iterable[str], modules: Mapping[str, Sequence[str]]) -> set[str]:
    """The modules that at least one pattern matches, under any of their names."""
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name, aliases in modules.items() if any(matches(pattern, alias) for alias in aliases)}
        if not hits:
            raise TargetError(f"{option}: {pattern!r} matches no module. {_candidates(modules)}")
        found |= hits
    return found


def _in_layers(names: set[str], layers: Sequence[int], pattern: str | None) -> set[str]:
    prefix = r"(?:^|\.)" + (re.escape(pattern) + r"\." if pattern else "")
    index = re.compile(prefix + r"(\d+)(?:\.|$)")
    found = {name: int(hit.group(1)) for name in names if (hit := index.search(name))}
    if not found:
        where = f"layers_pattern={pattern} matches no numbered layer" if pattern else "no name has a layer number"
        raise TargetError(f"layers_to_transform: {where}. {_candidates(sorted(names))}")
    missing = sorted(set(layers) - set(found.values()))
    if missing:
        raise TargetError(f"layers_to_transform: no layer {missing}; the layers are {sorted(set(found.values()))}")
    return {name for name, layer in found.items() if layer in layers}


def _candidates(names: Iterable[str]) -> str:
    """A few names for an error message, with layer numbers folded so that each kind shows once."""
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    return f"Candidates: {', '.join(kinds[:24])}{', ...' if len(kinds) > 24 else ''}"
