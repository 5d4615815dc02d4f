"""Prefix tuning: keys and values before those of the row are trained in every layer (Li & Liang, ACL 2021), by PEFT."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from autolora.errors import TargetError
from autolora.plan import Site
from autolora.strategies.outside import TASK_TYPE, PeftOptions, Prompting

if TYPE_CHECKING:
    from peft import PrefixTuningConfig
    from torch import nn


class Options(PeftOptions):
    """How many virtual tokens, and the hidden width of the network that makes them.

    The prefixes come out of a network with one hidden layer, which is trained in their place and thrown away afterwards
    (section 4.3 of the paper). Without a ``projection`` they are trained themselves, which wants a higher rate.
    """

    tokens: int = Field(default=20, ge=1)
    projection: int | None = Field(default=512, ge=1)


class Prefix(Prompting[Options]):
    """Trains prefixes of ``tokens * layers * 2 * width`` numbers, or the network that makes them, and the head."""

    Options = Options

    def peft_config(self, model: nn.Module, sites: Mapping[str, Site]) -> PrefixTuningConfig:
        """Refuses a model that takes no keys and values from outside."""
        from peft import PrefixTuningConfig

        takers = (model, getattr(model, "base_model", model))
        if not any("past_key_values" in inspect.signature(taker.forward).parameters for taker in takers):
            raise TargetError(
                f"strategy=prefix: {type(model).__name__} takes no keys and values from outside (past_key_values), "
                "which is where prefixes go: use strategy=prompt, or another backbone"
            )
        return PrefixTuningConfig(
            task_type=TASK_TYPE,
            num_virtual_tokens=self.options.tokens,
            prefix_projection=self.options.projection is not None,
            encoder_hidden_size=self.options.projection or 0,
        )
