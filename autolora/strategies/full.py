"""Full fine-tuning: every parameter of the model is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from autolora.config import Conflict, RunConfig
from autolora.plan import Site
from autolora.strategies.base import needs_float_weights
from autolora.strategies.outside import Outside, OutsideOptions

if TYPE_CHECKING:
    from torch import nn

    from autolora.adapters import Adapters, AdapterSettings


class Options(OutsideOptions):
    """Full fine-tuning has no options; ``optim.adapter`` has the learning rate of the backbone."""

    def conflicts_with(self, config: RunConfig) -> Iterator[Conflict]:
        """Also weights that cannot be trained, and those that are to stay 0."""
        yield from super().conflicts_with(config)
        yield from needs_float_weights(config, "trains the weights of the backbone")
        if (method := config.backbone.sparsity.method) != "none":
            message = f"backbone.sparsity.method={method}: strategy=full trains pruned weights too: leave it out"
            yield Conflict(("backbone.sparsity.method", "strategy.name"), message)


class Full(Outside[Options]):
    """Trains everything; the backbone at a rate of its own."""

    Options = Options

    def equip(self, model: nn.Module, settings: AdapterSettings, sites: Mapping[str, Site]) -> Adapters:
        """No adapters, and nothing frozen."""
        from autolora.adapters.attach import fully_trained_modules
        from autolora.adapters.whole import WholeModel

        return WholeModel(model, sites, fully_trained_modules(model, settings))
