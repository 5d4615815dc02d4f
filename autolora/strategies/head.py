"""The head alone is trained, on the frozen pretrained model: what every other method has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from autolora.errors import TargetError
from autolora.plan import RankPlan, Site
from autolora.strategies.outside import Outside, OutsideOptions

if TYPE_CHECKING:
    from torch import nn

    from autolora.adapters import Adapters, AdapterSettings


class Options(OutsideOptions):
    """The head alone has no options: ``adapter.modules_to_save`` says what counts as head."""


class Head(Outside[Options]):
    """Trains the modules that every strategy trains in full, and nothing else."""

    Options = Options

    def equip(self, model: nn.Module, settings: AdapterSettings, sites: Mapping[str, Site]) -> Adapters:
        """No adapters."""
        from autolora.adapters import attach

        adapters = attach(model, settings, RankPlan(sites, {}))
        if not adapters.head_parameters():
            raise TargetError(
                f"strategy=head: {type(model).__name__} has no classification head, so there is nothing to train; name "
                "modules to train in full with adapter.modules_to_save=[...]"
            )
        return adapters
