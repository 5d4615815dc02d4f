r"""EVA: A and the ranks from the directions in which each module's inputs vary (Paischer et al., arXiv 2410.07170).

Before training, the inputs of every module over a few batches are decomposed incrementally
(:func:`autolora.theory.spectra.absorb`). With :math:`\sigma_i` and :math:`v_i` the singular values and right singular
vectors of a module's centred inputs, component i starts with :math:`v_i` as its row of A, and explains

.. math:: \xi_i = \sigma_i^2 / \sum_j \sigma_j^2

of the variance of what the module reads, the sum taken over all directions. Components with the largest share go first,
over all modules together, as in the authors' implementation (``peft.tuners.lora.eva``), with which the ranks agree
where all modules cost the same. Where they do not, what is explained within a number of *parameters* is to be as much
as possible: the order is that of :math:`\xi_i / c`, with c the parameters of a component of the module.

Differences from the published code: a fixed number of batches instead of a test of convergence, padding left out by
itself, and a scale s that does not depend on the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING

from pydantic import Field

from autolora.errors import NonFiniteLossError
from autolora.plan import RankPlan
from autolora.strategies.base import Batch, Evaluate, LossFn, Strategy, StrategyOptions
from autolora.strategies.pruning import best_components, keep

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autolora.adapters import Adapters
    from autolora.theory.spectra import Principal


class Options(StrategyOptions):
    """``batches`` of training data to look at; fewer where the data have fewer."""

    batches: int = Field(default=8, ge=1)


class EVA(Strategy[Options]):
    """Ranks and A from the variance of activations; without a budget ``max_rank`` everywhere, and A alone."""

    Options = Options

    def prepare(self, batches: Iterable[Batch], loss_fn: LossFn) -> None:
        """Look at the inputs, set A, and remove the components that the budget does not pay for.

        Raises:
            NonFiniteLossError: if the model gives no finite loss to begin with.
        """
        import torch

        from autolora.adapters import compact

        principal = self._principal(batches, loss_fn)
        worth = []
        for name, layer in self.adapters.layers.items():
            shares = torch.zeros(layer.rank, dtype=torch.double)
            if name in principal:
                known = min(int((principal[name].values > 0).sum()), layer.rank)  # more directions than rows saw stay
                shares[:known] = principal[name].explained[:known]
                with torch.no_grad():
                    layer.lora_A[:known] = principal[name].directions[:known].to(layer.lora_A)
            worth.append(shares / layer.site.cost)
        keep(self.adapters, best_components(self.largest, torch.cat(worth), self.allowance), optimizer=None)
        compact(self.adapters)

    def finalize(self, evaluate: Evaluate) -> RankPlan:
        """The plan that the inputs gave."""
        return self.adapters.active_plan()

    def _principal(self, batches: Iterable[Batch], loss_fn: LossFn) -> dict[str, Principal]:
        """Principal directions of the inputs of every module that is called; who reads one tensor shares the work."""
        import torch

        from autolora.theory.spectra import absorb

        keep = max(self.largest.values())
        found: dict[str, Principal] = {}
        for batch in islice(batches, self.options.batches):
            before, computed = dict(found), {}
            for name, tensors in inputs_of(self.adapters, batch, loss_fn).items():
                key = (id(before.get(name)), *map(id, tensors))
                if key not in computed:
                    rows = torch.cat([rows_of(tensor, batch.get("attention_mask")) for tensor in tensors])
                    computed[key] = absorb(before.get(name), rows, keep)
                found[name] = computed[key]
        return found


def inputs_of(adapters: Adapters, batch: Batch, loss_fn: LossFn) -> dict[str, list[Tensor]]:
    """What each adapted module reads in one forward pass without adapters and dropout, a tensor for each call.

    Raises:
        NonFiniteLossError: if the loss is not finite.
    """
    import torch

    seen: dict[str, list[Tensor]] = {}

    def watching(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: seen.setdefault(name, []).append(args[0])

    handles = [layer.register_forward_pre_hook(watching(name)) for name, layer in adapters.layers.items()]
    was_training = adapters.model.training
    adapters.model.eval()
    with torch.no_grad(), adapters.disabled():
        loss = loss_fn(adapters.model, batch)
    adapters.model.train(was_training)
    for handle in handles:
        handle.remove()
    if not torch.isfinite(loss):
        raise NonFiniteLossError(f"the loss is {float(loss)} before training has begun: check the backbone's weights")
    return seen


def rows_of(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """A module's input as rows, without those that stand for padding.

    Args:
        tensor: shape ``(..., n)``.
        mask: 1 for tokens and 0 for padding, shape ``(batch, length)``; it is for inputs of this shape alone.
    """
    if mask is not None and tensor.shape[:-1] == mask.shape:
        return tensor[mask.bool()]
    return tensor.flatten(0, -2)
