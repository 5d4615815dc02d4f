"""Ways to choose ranks: one idea a file, behind the interface of :mod:`autolora.strategies.base`.

A strategy is found by its name: ``strategy=NAME`` is the module ``autolora.strategies.NAME`` (or, for those that try
many plans, ``autolora.search.NAME``), which has a pydantic model ``Options`` and one subclass of
:class:`~autolora.strategies.base.Strategy`; ``conf/strategy/NAME.yaml`` holds its defaults.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from autolora.errors import ConfigError
from autolora.plan import Budget
from autolora.strategies.base import Strategy
from autolora.validate import strategy_module


def make_strategy(name: str, options: BaseModel, *, budget: Budget, max_rank: int) -> Strategy[Any]:
    """The strategy of this name.

    Raises:
        ConfigError: if there is no such module, or it does not define exactly one strategy.
    """
    module = strategy_module(name)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Strategy) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        names = ", ".join(cls.__name__ for cls in found) or "none"
        raise ConfigError(
            f"strategy.name={name}: expected one subclass of Strategy in {module.__name__}, found {names}"
        )
    return found[0](options, budget=budget, max_rank=max_rank)
