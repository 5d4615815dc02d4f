"""What methods outside LoRA share: they put no adapter anywhere, so every rank is 0 and there is no budget.

They see the same batches, train the same head and are measured in the same way, so that they can stand in one table
with the others. What they train besides the head is ``params.extra`` of the result.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

from autolora.config import Conflict, GlueTaskConfig, RunConfig
from autolora.errors import TargetError
from autolora.plan import RankPlan, Site
from autolora.strategies.base import Batch, Evaluate, LossFn, Strategy, StrategyOptions

if TYPE_CHECKING:
    from peft import IA3Config, PromptLearningConfig
    from torch import nn

    from autolora.adapters import Adapters, AdapterSettings

PEFT_MISSING = "PEFT is not installed: pip install 'autolora[peft]'"
TASK_TYPE = "SEQ_CLS"


class OutsideOptions(StrategyOptions):
    """Base of the options: says what of the configuration has no meaning without ranks."""

    def conflicts_with(self, config: RunConfig) -> Iterator[Conflict]:
        """A budget, a second training at the ranks found, and biases."""
        name = f"strategy={config.strategy.name}"
        for key, value in config.budget.given().items():
            message = (
                f"budget.{key}={value:g}: {name} has no adapters that a budget could count: leave it out, and give "
                f"{name} a command of its own in a comparison of methods with one (the same run_root)"
            )
            yield Conflict((f"budget.{key}", "strategy.name"), message)
        if config.retrain != "none":
            message = f"retrain={config.retrain}: {name} chooses no ranks to train again at: leave it out"
            yield Conflict(("retrain", "strategy.name"), message)
        if config.adapter.bias != "none":
            message = f"adapter.bias={config.adapter.bias}: {name} says by itself what is trained: leave it out"
            yield Conflict(("adapter.bias", "strategy.name"), message)


OptionsT = TypeVar("OptionsT", bound=OutsideOptions)


class Outside(Strategy[OptionsT]):
    """Base class: a method says in :meth:`equip` what of the model is trained."""

    def attach(self, model: nn.Module, settings: AdapterSettings) -> Adapters:
        """Make the model ready; every site has rank 0, and there is no budget."""
        from autolora.adapters import find_sites

        self.model = model
        sites = find_sites(model, settings)
        self.largest, self.allowance = RankPlan(sites, {}), None
        self.adapters = self.equip(model, settings, sites)
        return self.adapters

    def equip(self, model: nn.Module, settings: AdapterSettings, sites: Mapping[str, Site]) -> Adapters:
        """Freeze what is frozen, add what is added, and give the handle on it.

        Raises:
            TargetError: if the model has nothing that the method could train.
        """
        raise NotImplementedError(f"{type(self).__name__} has to say what is trained: implement equip()")

    def finalize(self, evaluate: Evaluate) -> RankPlan:
        """Rank 0 everywhere."""
        return self.adapters.active_plan()


class PeftOptions(OutsideOptions):
    """Base of the options of methods that PEFT implements."""

    def conflicts_with(self, config: RunConfig) -> Iterator[Conflict]:
        """Also a model that PEFT does not know, and PEFT itself."""
        yield from super().conflicts_with(config)
        name = f"strategy={config.strategy.name}"
        if not isinstance(config.task, GlueTaskConfig):
            message = f"{name}: expected a text classifier, and task={config.task.name} has none: use a GLUE task"
            yield Conflict(("strategy.name", "task.name"), message)
        if importlib.util.find_spec("peft") is None:
            yield Conflict(("strategy.name",), f"{name}: {PEFT_MISSING}")


PeftOptionsT = TypeVar("PeftOptionsT", bound=PeftOptions)


class ByPeft(Outside[PeftOptionsT]):
    """Base class of methods that PEFT implements: they say :meth:`peft_config`."""

    def equip(self, model: nn.Module, settings: AdapterSettings, sites: Mapping[str, Site]) -> Adapters:
        """PEFT's wrapper around the model."""
        from autolora.adapters.wrapped import wrap

        return wrap(model, self.peft_config(model, sites), sites, settings)

    def peft_config(self, model: nn.Module, sites: Mapping[str, Site]) -> IA3Config | PromptLearningConfig:
        """PEFT's configuration of the method.

        Raises:
            TargetError: if the method does not fit the model.
        """
        raise NotImplementedError(f"{type(self).__name__} has to say what PEFT shall do: implement peft_config()")


class Prompting(ByPeft[PeftOptionsT]):
    """Base class of methods that put virtual tokens before the row: they are not the identity at the start."""

    def prepare(self, batches: Iterable[Batch], loss_fn: LossFn) -> None:
        """Try the model on the longest row that may come, and on a padded one.

        Raises:
            TargetError: if it has no room for the row and the virtual tokens, or reads the padding.
        """
        from autolora.adapters.wrapped import Wrapped, logits_of_padded_row

        assert isinstance(self.adapters, Wrapped)
        what = f"{type(self.adapters.base).__name__} with virtual tokens before the row"
        longest = getattr(getattr(batches, "dataset", None), "max_length", 16)
        try:
            logits_of_padded_row(self.adapters, longest, longest)
            alone, padded = (logits_of_padded_row(self.adapters, 8, width) for width in (8, 16))
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise TargetError(
                f"{what} cannot read a row of data.max_length={longest} tokens ({error}): lower data.max_length, or "
                "use fewer virtual tokens or another backbone"
            ) from None
        if not alone.allclose(padded, rtol=1e-3, atol=1e-4):
            raise TargetError(f"{what} reads the padding of its batch as part of the row: use another backbone")
