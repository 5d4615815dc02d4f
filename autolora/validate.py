"""From a composed mapping to a :class:`RunConfig`, with every fault in it said in one line each. No torch.

pydantic finds the faults; this module says them in the words of the command line: the dotted key, what was expected,
what came, and the nearest valid name.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from autolora.config import Conflict, RunConfig, StrategyConfig
from autolora.errors import ConfigError

ModelT = TypeVar("ModelT", bound=BaseModel)
STRATEGY_ROOMS = ("autolora.strategies", "autolora.search")
_NOUNS: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    Path: ("a path", "paths"),
    type(None): ("null", "nulls"),
}


class _NoOptions(BaseModel):
    """Stands in for options that are wrong."""


@dataclass(frozen=True)
class _Problem:
    """One fault at a dotted key.

    ``said`` is the whole message where a model itself gave one, ``among`` its keys; ``members`` are those of a list
    that are wrong, where the others are not.
    """

    key: str
    kind: Literal["unknown", "missing", "value", "said", "conflict"]
    expected: str = ""
    said: str = ""
    among: tuple[str, ...] = ()
    members: tuple[Any, ...] = ()


def validate(
    raw: Mapping[str, Any], typed: Mapping[str, str] | None = None, beside: Sequence[str] = ()
) -> tuple[RunConfig | None, list[str]]:
    """Validate a composed configuration; everything that is wrong with it comes back, a line each.

    Args:
        raw: nested mapping with the keys of :class:`RunConfig`; ``strategy`` is flat: ``{"name": ..., **options}``.
        typed: what the user wrote, by dotted key (``{"budget.rank": "budget.rank=-1"}``), to be quoted in the lines.
        beside: keys that the command line has besides, to be suggested too.

    Returns:
        The configuration, or ``None`` where there are faults; and the faults.
    """
    tree = copy.deepcopy(dict(raw))
    strategy, found = _strategy(tree.get("strategy"))
    # Faults of the strategy are known by now: where it has some, an empty one stands in for it.
    stand_in = {"strategy": strategy or StrategyConfig(name="", options=_NoOptions())}
    config, problems = _try(RunConfig, tree | stand_in)
    found += problems
    if any(problem.kind != "conflict" for problem in problems):
        # Models look for conflicts only once every value is valid by itself: look again at those that are.
        wrong = [problem.key for problem in problems]
        _, conflicts = _try(RunConfig, _without(tree, wrong) | stand_in)
        found += [problem for problem in conflicts if not any(_touches(key, wrong) for key in problem.among)]
    if found:
        keys = [*beside, *known_keys(tree)]
        return None, list(dict.fromkeys(_line(problem, tree, typed or {}, keys) for problem in found))
    return config, []


def require(raw: Mapping[str, Any]) -> RunConfig:
    """The configuration in ``raw``.

    Raises:
        ConfigError: with every fault, a line each.
    """
    config, faults = validate(raw)
    if config is None:
        raise ConfigError("\n".join(faults))
    return config


def require_strategy(section: Mapping[str, Any]) -> StrategyConfig:
    """A strategy with its options, from ``{"name": ..., **options}``.

    Raises:
        ConfigError: with every fault, a line each.
    """
    strategy, faults = _strategy(section)
    if strategy is None:
        tree = {"strategy": dict(section)}
        raise ConfigError("\n".join(_line(fault, tree, {}, known_keys(tree)) for fault in faults))
    return strategy


def parse(model: type[ModelT], arguments: Sequence[str]) -> ModelT:
    """The ``key=value ...`` of a small command line, as a model; values are written as in YAML.

    Dotted keys are those of sections: ``data.dir=DIR``.

    Raises:
        ConfigError: with every fault, a line each.
    """
    tree: dict[str, Any] = {}
    typed: dict[str, str] = {}
    faults = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            faults.append(f"{argument}: expected key=value")
        elif key in typed:
            faults.append(f"{argument}: {key} is given twice")
        else:
            typed[key] = argument
            _put(tree, key, _from_yaml(value))
    settings, problems = _try(model, tree)
    if any(problem.members for problem in problems):
        # Models look for conflicts only once every value is valid by itself: look again at the members that are.
        _, again = _try(model, _without_members(tree, problems))
        problems += [problem for problem in again if problem.kind == "conflict"]
    faults += [_line(problem, tree, typed, _keys_of(model, tree)) for problem in problems]
    if settings is None or faults:
        raise ConfigError("\n".join(faults))
    return settings


def _from_yaml(text: str) -> Any:
    """The value that a text stands for; what is not YAML stands for itself, and so does a dash: no list of nothing."""
    try:
        return text if text == "-" else yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key."""
    *sections, last = key.split(".")
    for section in sections:
        inner = tree.get(section)
        tree[section] = inner if isinstance(inner, dict) else {}
        tree = tree[section]
    tree[last] = value


def strategy_options(name: str) -> type[BaseModel]:
    """The options model of a strategy: ``Options`` in its module.

    Raises:
        ConfigError: if there is no such module, or it has no ``Options``.
    """
    module = strategy_module(name)
    options = getattr(module, "Options", None)
    if not (isinstance(options, type) and issubclass(options, BaseModel)):
        raise ConfigError(
            f"strategy.name={name}: {module.__name__} is no strategy: it has no class Options (a pydantic model)"
        )
    return options


def strategy_module(name: str) -> ModuleType:
    """The module of a strategy: ``autolora/strategies/<name>.py``, or ``autolora/search/<name>.py``.

    Raises:
        ConfigError: if there is none.
    """
    if not re.fullmatch(r"[a-z]\w*", name):
        raise ConfigError(f"strategy.name: expected the name of a module in autolora/strategies, got {name!r}")
    places = [f"{room}.{name}" for room in STRATEGY_ROOMS]
    for place in places:
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name not in (place, place.rpartition(".")[0]):
                raise
    raise ConfigError(f"strategy.name={name}: unknown strategy: there is no {' or '.join(places)}")


def is_strategy(name: str) -> bool:
    """Whether there is a module of this name that has the options of a strategy."""
    try:
        return hasattr(strategy_module(name), "Options")
    except ConfigError:
        return False


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The valid name that a wrong one resembles most, if one does."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)), None)


# Finding faults ------------------------------------------------------------------------------------------------------


def _strategy(section: Any) -> tuple[StrategyConfig | None, list[_Problem]]:
    """The strategy with its options validated by the strategy's own model."""
    if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
        return None, [_Problem("strategy.name", "value", expected="the name of a strategy")]
    name = section["name"]
    try:
        model = strategy_options(name)
    except ConfigError as error:
        return None, [_Problem("strategy.name", "said", said=str(error))]
    options, problems = _try(model, {key: value for key, value in section.items() if key != "name"}, ("strategy",))
    return (None if options is None else StrategyConfig(name=name, options=options)), problems


def _try(
    model: type[ModelT], data: Mapping[str, Any], prefix: tuple[str, ...] = ()
) -> tuple[ModelT | None, list[_Problem]]:
    try:
        return model.model_validate(data), []
    except ValidationError as error:
        problems: dict[str, _Problem] = {}
        for entry in error.errors(include_url=False):
            for problem in _problems(model, entry, prefix):
                # A union reports each of its types, a list each wrong member: one line says what the field expects.
                known = problems.setdefault(problem.key + problem.said, problem)
                if known.members and known is not problem:
                    members = (*known.members, *problem.members) if problem.members else known.members
                    problems[problem.key + problem.said] = replace(known, members=members)
        return None, list(problems.values())


def _problems(model: type[BaseModel], entry: Any, prefix: tuple[str, ...]) -> list[_Problem]:
    path, field = _locate(model, entry["loc"])
    key = ".".join((*prefix, *path))
    kind = "element" if any(isinstance(part, int) for part in entry["loc"]) else entry["type"]
    match kind:
        case "conflicts":
            conflicts: list[Conflict] = entry["ctx"]["conflicts"]
            return [_Problem("", "conflict", said=conflict.message, among=conflict.keys) for conflict in conflicts]
        case "extra_forbidden":
            return [_Problem(key, "unknown")]
        case "missing" | "union_tag_not_found":
            return [_Problem(key, "missing")]
        case "union_tag_invalid":
            return [_Problem(f"{key}.name", "value", expected=_one_of(_tags(field)))]
        case "value_error":
            return [_Problem(key, "said", said=f"{key}: {entry['ctx']['error']}")]
        case "model_type" | "model_attributes_type":
            return [_Problem(key, "value", expected="a section with keys of its own")]
        case _:
            of_list = isinstance(entry["loc"][-1], int) and entry["type"] != "missing"
            members = (entry["input"],) if of_list else ()
            expected = _phrase(field.annotation, field.metadata) if field else entry["msg"]
            return [_Problem(key, "value", expected=expected, members=members)]


def _locate(model: type[BaseModel], loc: Sequence[int | str]) -> tuple[tuple[str, ...], FieldInfo | None]:
    """The keys in an error's location, without the tags of unions and the indices of lists, and the field they name."""
    keys: list[str] = []
    field: FieldInfo | None = None
    options: list[type[BaseModel]] = [model]
    for part in map(str, loc):
        if len(options) > 1:  # the tag of a discriminated union
            options = [option for option in options if part in get_args(option.model_fields["name"].annotation)]
            continue
        if not options:
            break
        keys.append(part)
        field = options[0].model_fields.get(part)
        options = _models(field)
    return tuple(keys), field


def _models(field: FieldInfo | None) -> list[type[BaseModel]]:
    if field is None:
        return []
    parts = get_args(field.annotation) or (field.annotation,)
    return [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]


def _tags(field: FieldInfo | None) -> list[str]:
    return [tag for model in _models(field) for tag in get_args(model.model_fields["name"].annotation)]


def _touches(key: str, others: Iterable[str]) -> bool:
    """Whether a key is one of the others, or around or inside one; a section's name stands for all of it."""
    sections = [other.removesuffix(".name") for other in others]
    return any(key == other or key.startswith(other + ".") or other.startswith(key + ".") for other in sections)


def _without(tree: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """A copy of the tree without these dotted keys; without its name, a section cannot be told from others and goes."""
    result = copy.deepcopy(dict(tree))
    for key in keys:
        *parents, last = key.removesuffix(".name").split(".")
        node: Any = result
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.pop(last, None)
    return result


def _without_members(tree: Mapping[str, Any], problems: Iterable[_Problem]) -> dict[str, Any]:
    """A copy of the tree, its lists without the members that are wrong."""
    result = copy.deepcopy(dict(tree))
    for problem in problems:
        *parents, last = problem.key.split(".")
        node = _get(result, ".".join(parents)) if parents else result
        if problem.members and isinstance(node[last], list):
            node[last] = [member for member in node[last] if member not in problem.members]
    return result


# Saying them ---------------------------------------------------------------------------------------------------------


def _line(problem: _Problem, tree: Mapping[str, Any], typed: Mapping[str, str], keys: Sequence[str]) -> str:
    if problem.said:
        return problem.said
    value = _get(tree, problem.key)
    written = _written(problem.key, typed) or f"{problem.key}={_show(value, quote=False)}"
    if problem.kind == "missing":
        return f"{problem.key}: expected a value, got none"
    if problem.kind == "unknown":
        key = next((key for key in typed if key.startswith(problem.key + ".")), problem.key)
        return f"{written}: unknown key {key}; {_suggestion(key, keys)}"
    wrong = problem.members or (value,)
    options = re.fullmatch(r"(?:one of|a .* among) (.*)", problem.expected)
    names = options[1].split(", ") if options else []
    close = [name for item in wrong if isinstance(item, str) and (name := nearest(item, names))]
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    return f"{written}: expected {problem.expected}, got {', '.join(map(_show, wrong))}{hint}"


def _written(key: str, typed: Mapping[str, str]) -> str | None:
    """What the user typed that set this key: the key itself, a mapping around it, or something inside it."""
    near = [k for k in typed if k == key or key.startswith(k + ".") or k.startswith(key + ".")]
    return typed[max(near, key=lambda k: (k == key, len(k)))] if near else None


def _get(tree: Mapping[str, Any], key: str) -> Any:
    node: Any = tree
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _show(value: Any, quote: bool = True) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return repr(value) if quote else value
    if isinstance(value, list | tuple):
        return f"[{', '.join(_show(item) for item in value)}]"
    return str(value)


def known_keys(tree: Mapping[str, Any]) -> list[str]:
    """Every dotted key that a configuration with this task, logger and strategy may have."""
    keys = _keys_of(RunConfig, tree)
    section = tree.get("strategy")
    if isinstance(section, Mapping) and isinstance(section.get("name"), str):
        keys.append("strategy.name")
        with suppress(ConfigError):  # reported where the strategy is validated
            keys += [f"strategy.{key}" for key in _keys_of(strategy_options(section["name"]), section)]
    return keys


def _keys_of(model: type[BaseModel], tree: Any) -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        inner = tree.get(name) if isinstance(tree, Mapping) else None
        options = _models(field)
        if len(options) > 1:
            kind = inner.get("name") if isinstance(inner, Mapping) else None
            options = [o for o in options if kind in get_args(o.model_fields["name"].annotation)] or options
        if options:
            keys += [f"{name}.{key}" for option in options for key in _keys_of(option, inner)]
        else:
            keys.append(name)
    return keys


def _suggestion(key: str, keys: Sequence[str]) -> str:
    """The nearest valid keys: misspelt beside its siblings, written without its section, or nearest as a whole."""
    parent, _, last = key.rpartition(".")
    siblings = _children(parent, keys)
    if (close := nearest(last, siblings, 0.75)) is not None:
        return f"did you mean {parent}{'.' * bool(parent)}{close}?"
    if not siblings and (close := nearest(key, keys, 0.75)) is not None:
        return f"did you mean {close}?"
    elsewhere = [k for k in keys if k.rpartition(".")[2] == last]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:4])}?"
    if (close := nearest(last, siblings)) is not None:
        return f"did you mean {parent}{'.' * bool(parent)}{close}?"
    while parent and not siblings:
        parent = parent.rpartition(".")[0]
        siblings = _children(parent, keys)
    return f"the keys of {parent} are: {', '.join(siblings)}" if parent else f"expected one of: {', '.join(siblings)}"


def _children(parent: str, keys: Iterable[str]) -> list[str]:
    inside = f"{parent}." if parent else ""
    return list(dict.fromkeys(key.removeprefix(inside).split(".")[0] for key in keys if key.startswith(inside)))


def _phrase(annotation: Any, metadata: Sequence[Any] = (), plural: bool = False) -> str:
    """What a type accepts, in words: ``an integer >= 1 or null``."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _phrase(args[0], [*args[1:], *metadata], plural)
    if origin is Literal:
        return f"names among {_listed(args)}" if plural else _one_of(args)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_phrase(arg, () if arg is type(None) else metadata) for arg in args))
    if origin in (list, tuple):
        inner = _phrase(args[0], plural=True)
        fixed = f"{len(args)} " if args and args[-1] is not Ellipsis and origin is tuple else ""
        return f"a list of {fixed or _length(metadata)}{inner}"
    if origin is dict:
        return f"a mapping of names to {_phrase(args[1], plural=True)}"
    noun = _NOUNS.get(annotation, (str(annotation),) * 2)[plural]
    signs = ((Gt, "gt", ">"), (Ge, "ge", ">="), (Lt, "lt", "<"), (Le, "le", "<="))
    limits = [f"{sign} {getattr(m, name)}" for kind, name, sign in signs for m in metadata if isinstance(m, kind)]
    return f"{noun} {' and '.join(limits)}".strip()


def _length(metadata: Sequence[Any]) -> str:
    """How many members a list has to have, before what they are."""
    for least, most in ((m.min_length, m.max_length) for m in metadata if isinstance(m, Len)):
        return f"{least} " if least == most else f"at least {least} " if least > 1 else "one or more "
    return ""


def _one_of(values: Sequence[Any]) -> str:
    return f"one of {_listed(values)}"


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))
