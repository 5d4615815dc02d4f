"""BitFit: every bias is trained, and nothing else but the head (Ben Zaken, Ravfogel & Goldberg, ACL 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from autolora.errors import TargetError
from autolora.plan import RankPlan, Site
from autolora.strategies.outside import Outside, OutsideOptions

if TYPE_CHECKING:
    from torch import nn

    from autolora.adapters import Adapters, AdapterSettings


class Options(OutsideOptions):
    """BitFit has no options; ``optim.adapter`` has the learning rate of the biases."""


class BitFit(Outside[Options]):
    """Trains the biases of all Linears and normalisations, and the head."""

    Options = Options

    def equip(self, model: nn.Module, settings: AdapterSettings, sites: Mapping[str, Site]) -> Adapters:
        """No adapters, and all biases."""
        from autolora.adapters import attach

        adapters = attach(model, replace(settings, bias="all"), RankPlan(sites, {}))
        if not adapters.also_trained:
            raise TargetError(
                f"strategy=bitfit: {type(model).__name__} has no biases outside its head, so there is nothing to train"
            )
        return adapters
