r"""How PEFT finds the modules that a configuration names: facts about peft 0.18 to 0.21, tested against the library.

* ``target_modules`` as a list: a module matches if its name is an entry or ends in ``"." + entry``; as text: a regular
  expression over the whole name. A module object that the model holds in two places is replaced in one of them.
* ``rank_pattern``, ``alpha_pattern``: the first key for which ``re.match(rf"(.*\.)?({key})$", name)`` succeeds.
* ``modules_to_save``: every module whose name *ends* with an entry, in the middle of a word too: ``classifier`` is also
  ``pre_classifier``. Such a module cannot carry an adapter as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from autolora.errors import TargetError

PREFIX = "base_model.model."
"""What PEFT puts before the names of the model."""

_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def heads_of(task_type: str | None) -> tuple[str, ...]:
    """Entries that PEFT adds to ``modules_to_save`` by itself for a kind of task."""
    return _HEADS.get(task_type or "", ())


def wrapped_in_full(names: Iterable[str], modules_to_save: Sequence[str]) -> list[str]:
    """The modules that PEFT trains and saves in full for these entries."""
    return [name for name in names if name.endswith(tuple(modules_to_save))]


def exactly(name: str) -> str:
    """A pattern key for one module alone.

    PEFT lets anything that ends in a dot come before a key. The caret forbids it: the group before the key can then
    match only nothing, because a caret holds nowhere but at the start.
    """
    return "^" + re.escape(name)


def pattern_value(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The value of the first pattern that matches a module, else the default.

    Raises:
        TargetError: if a key is not a regular expression.
    """
    for key, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        except re.error as error:
            raise TargetError(f"adapter_config.json: {key!r} is not a regular expression ({error})") from None
    return default


def target_modules(targets: Sequence[str], names: Iterable[str]) -> list[str] | str:
    """What makes PEFT adapt exactly ``targets``: their full names, or where one of them is the end of another module's
    name, a regular expression.
    """
    endings = tuple("." + target for target in targets)
    if any(name.endswith(endings) for name in set(names) - set(targets)):
        return "|".join(re.escape(target) for target in targets)
    return list(targets)


def places(model: nn.Module) -> dict[int, set[tuple[int, str]]]:
    """Where the model holds each module: the parents (by ``id``) and the attributes."""
    found: dict[int, set[tuple[int, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            found.setdefault(id(child), set()).add((id(parent), attribute))
    return found


def with_ties(model: nn.Module, modules: Iterable[str]) -> list[str]:
    """The outermost of these modules, and of those that hold one of their parameters as well."""
    chosen = list(modules)
    inside = {id(p) for name in chosen for p in model.get_submodule(name).parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return outermost([*chosen, *(name.rpartition(".")[0] for name, p in named if id(p) in inside)])


def modules_of(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The modules that these names of modules and parameters stand for: a parameter for the one that holds it."""
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    return [name if name in modules else name.rpartition(".")[0] for name in names]


def outermost(names: Iterable[str]) -> list[str]:
    """The names without those inside another one."""
    chosen = list(dict.fromkeys(names))
    return [name for name in chosen if not any(name.startswith(other + ".") for other in chosen)]
