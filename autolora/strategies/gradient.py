r"""Ranks from the gradient of the pretrained weights, before training.

Over N batches the gradients :math:`G_b = \partial L_b / \partial W` of every adapted weight W, shape ``(out, in)``, are
taken at the model as it is, with its fresh head. Two allocations:

``spectrum``
    With :math:`\sigma_i` the singular values of the mean gradient :math:`G = \frac1N \sum_b G_b`, component i is worth

    .. math:: \sigma_i^2 / c

    with c the parameters of a component of the module, and the most valuable are bought. Among updates of rank r and
    norm :math:`\epsilon` the one along G's first r singular directions lowers the loss most, to first order by
    :math:`\epsilon \sqrt{\sum_{i \le r} \sigma_i^2}`: squares add up over components and modules. (The directions are
    those that LoRA-GA starts from: Wang, Yu & Li, arXiv 2407.05000, section 3; here they choose ranks.)

``fisher``
    Ranks are proportional to the mean squared gradient of an entry of W,

    .. math:: F = \frac{1}{N} \sum_b \|G_b\|_F^2 \, / \, (in \cdot out),

    the diagonal of the empirical Fisher information over batches, averaged over the module, so that a module gets no
    rank for being large. (GoRA, He et al., arXiv 2502.12171, also sets ranks by gradients before training, in
    proportion to the mean of :math:`|W \odot G|`.)

It takes the memory of one more copy of the adapted weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from autolora.config import Conflict, RunConfig
from autolora.errors import NonFiniteLossError, PlanError
from autolora.plan import RankPlan, proportional_order, rank_by_score, spend
from autolora.strategies.base import Batch, Evaluate, LossFn, Strategy, StrategyOptions, needs_float_weights
from autolora.strategies.spectral import weight_matrix

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autolora.adapters import Adapters


class Options(StrategyOptions):
    """``allocation`` by spectrum or Fisher information, from ``batches`` of training data (fewer if there are)."""

    allocation: Literal["spectrum", "fisher"] = "spectrum"
    batches: int = Field(default=8, ge=1)

    def conflicts_with(self, config: RunConfig) -> Iterator[Conflict]:
        """Weights without a gradient."""
        return needs_float_weights(config, "takes the gradient of the frozen weights")


class Gradient(Strategy[Options]):
    """Ranks by the gradients of the frozen weights; the module's docstring has the equations.

    Without a budget there is nothing to allocate: every module gets ``max_rank``. Under ``fisher`` a module without a
    gradient gets nothing either way.
    """

    Options = Options

    def prepare(self, batches: Iterable[Batch], loss_fn: LossFn) -> None:
        """Take the gradients, and remove the components that the budget does not pay for.

        Raises:
            NonFiniteLossError: if the model gives no finite loss to begin with.
            PlanError: if a weight has no gradient to take, or all of them are zero.
        """
        from autolora.adapters import compact

        mean, square = self._gradients(batches, loss_fn)
        if not any(square.values()):
            raise PlanError("strategy=gradient: the loss does not depend on any adapted module; choose other targets")
        order = self._by_spectrum(mean) if self.options.allocation == "spectrum" else self._by_fisher(square)
        self.adapters.keep_first(spend(order, self.largest, self.allowance))
        compact(self.adapters)

    def finalize(self, evaluate: Evaluate) -> RankPlan:
        """The plan that the gradients gave."""
        return self.adapters.active_plan()

    def _by_spectrum(self, mean: dict[str, Tensor]) -> list[str]:
        """Components by squared singular value per parameter."""
        from autolora.theory.spectra import energies

        sites, owners, worth = self.largest.sites, [], []
        for name, rank in self.largest.items():
            owners += [name] * rank
            worth += (energies(mean[name])[:rank] / sites[name].cost).tolist()
        return rank_by_score(owners, worth)

    def _by_fisher(self, square: dict[str, float]) -> list[str]:
        """Components that make ranks proportional to the mean squared gradient of an entry."""
        sites = self.largest.sites
        fisher = {name: square[name] / (site.in_features * site.out_features) for name, site in sites.items()}
        return proportional_order(fisher, self.largest)

    def _gradients(self, batches: Iterable[Batch], loss_fn: LossFn) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The mean gradient of each adapted weight, and its mean squared norm, over the batches."""
        import torch

        weights = {name: weight_matrix(self.adapters.model, name) for name in self.largest}
        total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        squares, count = dict.fromkeys(weights, 0.0), 0
        with trained(self.adapters, weights.values()):
            for batch in islice(batches, self.options.batches):
                loss = loss_fn(self.adapters.model, batch)
                if not torch.isfinite(loss):
                    raise NonFiniteLossError(
                        f"the loss is {float(loss.detach())} before training has begun: check the backbone's weights"
                    )
                found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                for name, gradient in zip(weights, found, strict=True):
                    if gradient is not None:
                        total[name] += gradient
                        squares[name] += float(gradient.square().sum())
                count += 1
        return {name: g / count for name, g in total.items()}, {name: sq / count for name, sq in squares.items()}


@contextmanager
def trained(adapters: Adapters, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside this context frozen weights have gradients; adapters and dropout are off."""
    model, frozen = adapters.model, [weight for weight in weights if not weight.requires_grad]
    was_training = model.training
    model.eval()
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with adapters.disabled():
            yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
        model.train(was_training)
