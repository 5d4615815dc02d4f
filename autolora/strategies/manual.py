"""Ranks that somebody wrote down: the ``ranks.json`` of a run, or what a PEFT adapter has.

The file is one of

* ``{"module": rank, ...}``: ``ranks.json`` of a run directory, or a ``rank_pattern`` of PEFT, whose keys are regular
  expressions for the ends of names. A module that no key names has rank 0.
* ``adapter_config.json`` of a PEFT LoRA adapter: ``r`` for the modules that ``target_modules`` selects, or what
  ``rank_pattern`` says. Only the ranks are read; scale, initialisation and the rest are ``adapter``'s business.

A name stands for the module of exactly this name, if there is one; else keys are PEFT's patterns, the first that
matches. Every key has to name a module: one that does not is a sign of a plan for another model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import field_validator, model_validator

from autolora.config import PathLike
from autolora.errors import DataError, PlanError
from autolora.files import read_json
from autolora.plan import RankPlan
from autolora.strategies.base import Planned, Strategy, StrategyOptions

_FILES = ("ranks.json", "adapter_config.json")
_PEFT_KEYS = ("peft_type", "target_modules")
_NOT_READ = ("exclude_modules", "layers_to_transform", "layers_pattern")


class Options(StrategyOptions):
    """``path`` of the plan, or of the run or adapter that it is in; ``fingerprint`` of the file, which makes its
    content part of the run's identity.

    The fingerprint is filled in by itself. Where it is given, as in the configuration of an earlier run, the file has
    to be the one that was meant, but need not be there before it is read.
    """

    path: PathLike | None = None
    fingerprint: str | None = None

    @field_validator("path")
    @classmethod
    def _given(cls, path: Path | None) -> Path | None:
        if path is None:
            raise ValueError("expected the file of a plan: add strategy.path=FILE (ranks.json or adapter_config.json)")
        return find_plan(path)

    @model_validator(mode="after")
    def _identify(self) -> Options:
        if self.path is None or self.fingerprint is not None:
            return self
        try:
            read_plan(self.path)
        except DataError as error:
            raise ValueError(str(error)) from None
        object.__setattr__(self, "fingerprint", fingerprint_of(self.path))  # the model is frozen
        return self


class Manual(Planned[Options]):
    """The plan in a file, as it stands: ``max_rank`` does not cut it, and a plan above the budget is refused."""

    Options = Options

    def plan(self) -> RankPlan:
        """The plan of the file; :func:`plan_in_file`."""
        return plan_in_file(self, self.options)


def find_plan(path: Path) -> Path:
    """The file of the plan in the folder of a run or an adapter, or the path itself."""
    return next((path / name for name in _FILES if (path / name).is_file()), path)


def plan_in_file(strategy: Strategy[Any], options: Options) -> RankPlan:
    """The plan that a strategy's options name, for its model and within its budget.

    Raises:
        DataError: if the file cannot be read, or is not the one that was meant.
        PlanError: if it is a plan for another model, or above the budget.
    """
    path, sites, allowance = options.path, strategy.largest.sites, strategy.allowance
    if path is None:
        raise PlanError("strategy.path: expected the file of a plan (ranks.json or adapter_config.json), got none")
    data = read_plan(path)
    if options.fingerprint not in (None, fingerprint_of(path)):
        raise DataError(f"{path}: the file has changed since it was chosen; give the command again")
    plan = RankPlan(sites, ranks_for(list(sites), data, path))
    if allowance is not None and plan.cost > allowance:
        room = plan.cost <= strategy.largest.cost
        amount = f"params={plan.cost}" if plan.unit == "parameters" else f"rank={max(plan.values())}"
        enough = f"budget.{amount} (or more)" if room else f"max_rank={max(plan.values())}"
        raise PlanError(
            f"{path}: the plan costs {plan.cost:,} {plan.unit} and the budget is {allowance:,}: use "
            f"budget=none, {enough}, or smaller ranks"
        )
    return plan


def fingerprint_of(path: Path) -> str:
    """A hash of the file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def read_plan(path: Path) -> dict[str, Any]:
    """The content of a plan's file: ranks by name or pattern, or a PEFT configuration.

    Raises:
        DataError: if it is missing or neither of the two, or a rank is not a whole number.
    """
    data = read_json(path, f"{path}: there is no such file; expected ranks.json or adapter_config.json")
    if not isinstance(data, dict) or not data:
        raise DataError(f'{path}: expected {{"module": rank, ...}} or a PEFT configuration, got something else')
    ranks = data
    if is_peft(data):
        if data.get("peft_type", "LORA") != "LORA":
            raise DataError(f"{path}: expected an adapter of peft_type LORA, got {data['peft_type']}")
        if unread := [key for key in _NOT_READ if data.get(key)]:
            raise DataError(f"{path}: {', '.join(unread)} cannot be read: name the modules in target_modules instead")
        if not data.get("target_modules"):
            raise DataError(f"{path}: expected target_modules to name modules, got {data.get('target_modules')}")
        ranks = {"r": data.get("r", 8), **(data.get("rank_pattern") or {})}
    for name, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise DataError(f"{path}: rank of {name}: expected a whole number >= 0, got {rank!r}")
    return data


def is_peft(data: Mapping[str, Any]) -> bool:
    """Whether this is the content of an ``adapter_config.json``."""
    return any(key in data for key in _PEFT_KEYS)


def ranks_for(names: list[str], data: Mapping[str, Any], path: Path) -> dict[str, int]:
    """The rank of each module, from what :func:`read_plan` gave.

    Args:
        names: modules that can be adapted.
        data: the plan.
        path: of its file, for messages.

    Raises:
        PlanError: if a key or a target names no module.
    """
    if not is_peft(data):
        _refuse_strangers({key: key for key in data}, names, path)
        return {name: _value(data, name, 0) for name in names}
    patterns = data.get("rank_pattern") or {}
    targets = _target_patterns(data["target_modules"])
    _refuse_strangers(targets | {key: key for key in patterns}, names, path)
    ranks = {name: _value(patterns, name, data.get("r", 8)) for name in names}
    return {name: rank if any(_matches(key, name) for key in targets.values()) else 0 for name, rank in ranks.items()}


def _target_patterns(targets: str | list[str]) -> dict[str, str]:
    """What ``target_modules`` says, as patterns: a list has ends of names, a text is an expression for whole names."""
    if targets == "all-linear":
        return {targets: ".*"}
    return {targets: f"^(?:{targets})"} if isinstance(targets, str) else {key: re.escape(key) for key in targets}


def _value(patterns: Mapping[str, int], name: str, default: int) -> int:
    """The rank under exactly this name, else of the first pattern that matches, else the default."""
    from autolora.adapters.peft_format.names import pattern_value

    return patterns[name] if name in patterns else int(pattern_value(patterns, name, default))


def _matches(key: str, name: str) -> bool:
    """Whether PEFT takes a pattern for the name of a module."""
    from autolora.adapters.peft_format.names import pattern_value

    return bool(pattern_value({key: 1}, name, 0))


def _refuse_strangers(patterns: Mapping[str, str], names: list[str], path: Path) -> None:
    """Every pattern, by the key that it is of, has to name one of the modules."""
    strangers = [
        key for key, form in patterns.items() if key not in names and not any(_matches(form, name) for name in names)
    ]
    if strangers:
        shown = ", ".join(strangers[:8]) + (", ..." if len(strangers) > 8 else "")
        raise PlanError(
            f"{path}: a plan for another model? It names {len(strangers)} modules that are not adapted here: {shown}; "
            f"expected names among: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        )
