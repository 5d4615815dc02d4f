r"""What growth needs of tensors: which components promise most, and how new ones join a matrix that AdamW steps.

A component that is closed has gate 0 and a column of B that is 0. Two scores say where a new one is worth most; both
are measured on held-out batches, in evaluation mode, without touching the training step.

:func:`reserve_scores` looks at the components in reserve as if they were open. With G the gradient of the loss with
respect to a module's weight, that of B is :math:`s \, G A^T`, one column for each row of A: :math:`w \cdot \nabla w` of
such a column is 0, because B is, but the gradient itself is not. The first-order gain of a gradient step on a column is
its squared norm. Rows of A are random, and a row of length 1 sees a share of 1/n of the squares of G, with n inputs. So
the score is the mean over the columns in reserve of

.. math:: n_{in} \, \lVert \nabla_{b_i} L \rVert^2 / (\lVert a_i \rVert^2 (n_{in} + n_{out})),

what a direction of G is worth per parameter, for modules of any shape and any initialisation of A.

:class:`Sensitivity` is the score of IncreLoRA (Zhang et al., arXiv 2308.12043, and its code), for a module as a whole:
:math:`S = \sum_{jk} |\Delta W_{jk} G_{jk}| / \sqrt{n_{in} n_{out}}`, smoothed over batches, and multiplied by the
smoothed deviation from that (sensitivity times uncertainty, as in AdaLoRA: Zhang et al., ICLR 2023, section 3.2). The
published code takes every training step into its averages; here it is the held-out batches before a round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from autolora.adapters import Adapters, ScaleGate
from autolora.strategies.base import Batch, LossFn

_SMOOTHING = 0.85  # of sensitivity and of uncertainty, as published


def heldout_loss(adapters: Adapters, batches: Sequence[Batch], loss_fn: LossFn) -> float:
    """Mean loss, in evaluation mode; over the batches of all processes."""
    with _evaluating(adapters.model), torch.no_grad():
        losses = torch.stack([loss_fn(adapters.model, batch).float() for batch in batches])
    return float(_over_processes(losses.mean()))


def reserve_scores(
    adapters: Adapters, opened: Mapping[str, int], batches: Sequence[Batch], loss_fn: LossFn
) -> dict[str, float]:
    """What a new component of each module is worth per parameter; 0 where none waits.

    Args:
        adapters: whose gates are :class:`~autolora.adapters.ScaleGate`; all are opened for the moment.
        opened: how many of each module's first components are open.
        batches: that the gradient is averaged over.
        loss_fn: the loss.
    """
    columns: list[Tensor] = [layer.lora_B for layer in adapters.layers.values()]
    with _evaluating(adapters.model), _all_open(adapters):
        losses = (loss_fn(adapters.model, batch) for batch in batches)
        gradients = [torch.autograd.grad(loss, columns, materialize_grads=True) for loss in losses]
    scores = []
    for (name, layer), *parts in zip(adapters.layers.items(), *gradients, strict=True):
        waiting = _over_processes(torch.stack(parts).mean(0)[:, opened[name] :].contiguous())
        rows = layer.lora_A.detach()[opened[name] :]
        seen = waiting.square().sum(0) / rows.square().sum(1).clamp(min=torch.finfo(rows.dtype).tiny)
        scores.append(seen.sum() * (layer.in_features / layer.site.cost / max(1, len(seen))))
    return dict(zip(adapters.layers, torch.stack(scores).tolist() if scores else [], strict=True))


class Sensitivity:
    """IncreLoRA's score of every module: smoothed sensitivity times smoothed uncertainty.

    Args:
        adapters: of one model.
    """

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters
        self.sensitivity = torch.zeros(len(adapters.layers))
        self.uncertainty = torch.zeros(len(adapters.layers))

    def observe(self, batches: Sequence[Batch], loss_fn: LossFn) -> None:
        """Take these batches into the averages, one after the other."""
        for batch in batches:
            now = _over_processes(self._of(batch, loss_fn)).cpu()
            self.sensitivity.lerp_(now, 1 - _SMOOTHING)
            self.uncertainty.lerp_((now - self.sensitivity).abs(), 1 - _SMOOTHING)

    def scores(self) -> dict[str, float]:
        """By module."""
        return dict(zip(self.adapters.layers, (self.sensitivity * self.uncertainty).tolist(), strict=True))

    def _of(self, batch: Batch, loss_fn: LossFn) -> Tensor:
        """S of every module; the gradient of the frozen weights is made for the moment."""
        layers = list(self.adapters.layers.values())
        weights = [layer.weight for layer in layers]
        frozen = [weight for weight in weights if not weight.requires_grad]
        try:
            for weight in frozen:
                weight.requires_grad_(True)
            with _evaluating(self.adapters.model):
                gradients = torch.autograd.grad(loss_fn(self.adapters.model, batch), weights, materialize_grads=True)
        finally:
            for weight in frozen:
                weight.requires_grad_(False)
        found = []
        for layer, gradient in zip(layers, gradients, strict=True):
            update = layer.delta_weight()
            product = (update.T if layer.transposed else update) * gradient
            found.append(product.abs().sum() / product.numel() ** 0.5)
        return torch.stack(found)


class Newcomers:
    r"""Lets components join a matrix that AdamW has been stepping for a while.

    AdamW keeps one count of steps for a matrix, which corrects its moments for their start at 0. A component that opens
    after t - k steps has moments of k steps, and the correction for t is not the one it needs: its updates would be up
    to 6.5 times those of a new parameter. With

    .. math:: u(k) = \sqrt{1 - \beta_2^k} / (1 - \beta_1^k),

    by which Adam multiplies a step, they are brought back by :math:`u(k) / u(t)`. Closed components stay as they are,
    whatever weight decay does; those that were open from the first step move as AdamW moves them, bit for bit.

    Args:
        adapters: of one model.
    """

    def __init__(self, adapters: Adapters) -> None:
        self.layers = list(adapters.layers.values())
        self._before: list[Tensor] = []

    @torch.no_grad()
    def hold(self) -> None:
        """Remember the weights before the optimizer's step."""
        self._before = [weight.clone() for weight in self._weights()]

    @torch.no_grad()
    def pace(self, opened: Tensor, step: int, betas: tuple[float, float]) -> None:
        """Correct the optimizer's step.

        Args:
            opened: after which step each component opened, -1 for a closed one, shape ``(components,)``.
            step: the count of the optimizer's steps, this one included.
            betas: of AdamW.
        """
        factor = catch_up(torch.where(opened < 0, 0, step - opened), step, betas)
        if bool((factor == 1).all()):
            return
        parts = factor.to(self._before[0]).split([layer.rank for layer in self.layers])
        shares = [share for part in parts for share in (part[:, None], part)]
        weights = self._weights()
        shares = [share.expand_as(weight) for share, weight in zip(shares, weights, strict=True)]
        torch._foreach_copy_(weights, torch._foreach_lerp(self._before, weights, shares))

    def _weights(self) -> list[Tensor]:
        """A and B of every module, in turns."""
        return [weight for layer in self.layers for weight in (layer.lora_A, layer.lora_B)]


def catch_up(ages: Tensor, step: int, betas: tuple[float, float]) -> Tensor:
    """u(k) / u(t) of :class:`Newcomers` for components that have made k steps where their matrix has made t.

    Args:
        ages: k; 0 gives 0.
        step: t, at least 1.
        betas: of Adam.
    """
    counts = torch.cat([ages, ages.new_tensor([step])]).double()
    sizes = (1 - betas[1] ** counts).sqrt() / (1 - betas[0] ** counts)
    return torch.where(ages == 0, 0.0, sizes[:-1] / sizes[-1])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside this context the model is in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _all_open(adapters: Adapters) -> Iterator[None]:
    """Inside this context every gate is 1; none of them learns."""
    gates = [layer.gate for layer in adapters.layers.values() if isinstance(layer.gate, ScaleGate)]
    before = [gate.values.clone() for gate in gates]
    try:
        for gate in gates:
            gate.values.fill_(1.0)
        yield
    finally:
        for gate, earlier in zip(gates, before, strict=True):
            gate.values.copy_(earlier)


def _over_processes(value: Tensor) -> Tensor:
    """The mean over all processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value
