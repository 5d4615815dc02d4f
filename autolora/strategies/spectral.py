r"""Ranks from the spectra of the pretrained weights: a weight that needs many directions gets a large rank.

With :math:`\sigma_1 \ge \sigma_2 \ge \dots` the singular values of a module's weight W, the module counts

.. math:: n = \min \{ k : \sum_{i \le k} \sigma_i^2 \ge energy \cdot \sum_i \sigma_i^2 \},

the directions that explain a share ``energy`` of W's energy, :math:`\|W\|_F^2`: *squared* singular values add up to it,
plain ones do not. Ranks are proportional to n. (Truncation by explained energy is the standard rule for the rank of a
matrix: Jolliffe, Principal Component Analysis, 2002, section 6.1.1; that W's spectrum says anything about the update
which a task wants is the hypothesis.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from autolora.errors import PlanError
from autolora.plan import RankPlan, even_order, proportional_order, spend
from autolora.strategies.base import Planned, StrategyOptions

if TYPE_CHECKING:
    from torch import Tensor, nn


class Options(StrategyOptions):
    """``energy``: the share of each weight's energy that the counted directions explain."""

    energy: float = Field(default=0.9, gt=0, le=1)


class Spectral(Planned[Options]):
    """Ranks proportional to the directions that explain each weight; at most ``max_rank``.

    :func:`scaled` says how they are scaled.
    """

    Options = Options

    def plan(self) -> RankPlan:
        """The shape of the spectra, scaled."""
        from autolora.theory.spectra import directions_needed, energies

        share = self.options.energy
        needed = {name: directions_needed(energies(frozen_weight(self.model, name)), share) for name in self.largest}
        return scaled(needed, self.largest, self.allowance)


def scaled(shape: Mapping[str, float], largest: RankPlan, allowance: int | None) -> RankPlan:
    """Ranks of a given shape: with a budget as large as it pays for, without one so that the largest is the maximum.

    A module of weight 0 gets components only where nobody else can take them any more, evenly over the model; so ranks
    are uniform where all weights are 0.

    Args:
        shape: what ranks shall be proportional to, at least 0, for each module.
        largest: no module gets more than its rank here.
        allowance: parameters that may be spent; ``None`` without a budget.
    """
    if allowance is not None:
        return spend([*proportional_order(shape, largest), *even_order(largest)], largest, allowance)
    if not any(shape.values()):
        return largest
    scale = max(largest.values()) / max(shape.values())
    return RankPlan(largest.sites, {name: min(round(scale * shape[name]), largest[name]) for name in largest})


def frozen_weight(model: nn.Module, name: str) -> Tensor:
    """The weight of a module; of a quantised one, that which its codes stand for."""
    from autolora.adapters.quantized import QuantizedLinear

    module = model.get_submodule(name)
    return module.dequantized() if isinstance(module, QuantizedLinear) else weight_matrix(model, name)


def weight_matrix(model: nn.Module, name: str) -> nn.Parameter:
    """The pretrained weight of a module, ``(out, in)`` or, where the module keeps it so, ``(in, out)``.

    Raises:
        PlanError: if it has no floating-point matrix.
    """
    weight = getattr(model.get_submodule(name), "weight", None)
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        raise PlanError(
            f"{name}: expected a floating-point weight matrix, got none; choose another strategy for a quantised "
            "model, or leave the module out with adapter.exclude"
        )
    return weight
