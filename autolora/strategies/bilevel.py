r"""What bilevel strategies share: selectors that learn on held-out batches while the weights learn on the others.

With weights w (A, B and the head), selectors :math:`\theta` and two disjoint sets of rows, the problem is

.. math:: \min_\theta L_{val}(w^*(\theta), \theta), \qquad w^*(\theta) = \arg\min_w L_{train}(w, \theta).

The weights that answer a :math:`\theta` are not waited for. To first order w stands for them, and the selectors descend
on :math:`\nabla_\theta L_{val}(w, \theta)`. To second order one gradient step does,
:math:`w' = w - \xi \nabla_w L_{train}(w, \theta)`, and the chain rule gives (Liu, Simonyan & Yang, "DARTS", ICLR 2019,
equations 7 and 8)

.. math::

    \nabla_\theta L_{val}(w', \theta) - \xi \nabla^2_{\theta, w} L_{train}(w, \theta) \, v, \qquad
    v = \nabla_{w'} L_{val}(w', \theta),

    \nabla^2_{\theta, w} L_{train}(w, \theta) \, v \approx
    \frac{\nabla_\theta L_{train}(w + \epsilon v, \theta) - \nabla_\theta L_{train}(w - \epsilon v, \theta)}
    {2 \epsilon}, \qquad \epsilon = \frac{0.01}{\lVert v \rVert}.

No gradient of one level reaches the other: all are asked for by name, so that ``.grad`` of nothing changes, and the
selectors require one only while they are asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from autolora.adapters import Adapters
from autolora.errors import ConfigError
from autolora.strategies.base import Batch, GroupRates, LossFn

Order = Literal["first", "second"]

_PERTURBATION = 0.01  # the length of epsilon * v


class UpperLevel:
    r"""The selectors of a model, with an optimizer of their own.

    Args:
        adapters: with gates that have something to learn.
        order: of the hypergradient.
        lookahead: :math:`\xi`, the step of the weights that the second order looks ahead by.
        rates: learning rate and weight decay of the selectors.
        like: the optimizer of the weights; the selectors' AdamW has its betas and epsilon.
        noise: the random stream of the gates, if they have one.

    Raises:
        ConfigError: for the second order with several processes: the mean of their hypergradients is not that of the
            mean loss.
    """

    def __init__(
        self,
        adapters: Adapters,
        *,
        order: Order,
        lookahead: float,
        rates: GroupRates,
        like: Optimizer,
        noise: torch.Generator | None = None,
    ) -> None:
        if order == "second" and torch.distributed.is_available() and torch.distributed.is_initialized():
            processes = torch.distributed.get_world_size()
            if processes > 1:
                raise ConfigError(
                    f"strategy.order=second: expected one process, got {processes}: use order=first, or one device"
                )
        self.model = adapters.model
        self.selectors = adapters.gate_parameters()
        self.weights: list[Tensor] = [*adapters.adapter_parameters(), *adapters.head_parameters()]
        self.order, self.lookahead, self.noise = order, lookahead, noise
        adam = {key: like.defaults[key] for key in ("betas", "eps")}
        self.optimizer = AdamW([{"params": self.selectors, **vars(rates)}], **adam)
        self._require_gradient(False)

    @contextmanager
    def asked(self) -> Iterator[list[nn.Parameter]]:
        """Inside this context the selectors require a gradient."""
        self._require_gradient(True)
        try:
            yield self.selectors
        finally:
            self._require_gradient(False)

    def hypergradient(self, batch: Batch, heldout: Batch, loss_fn: LossFn) -> Tensor:
        """The gradient for the selectors, one after the other, shape ``(components,)``; averaged over processes.

        The weights are the same afterwards, bit for bit.

        Args:
            batch: that the weights will step on.
            heldout: what the selectors learn from.
            loss_fn: the loss of either.
        """
        with self.asked():
            if self.order == "first":
                gradient = self._gradients(loss_fn(self.model, heldout), self.selectors)
            else:
                gradient = self._second_order(batch, heldout, loss_fn)
        flat = torch.cat([part.flatten() for part in gradient] or [torch.zeros(0)])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(flat)
            flat /= torch.distributed.get_world_size()
        return flat

    def step(self, gradient: Tensor) -> None:
        """Descend along a gradient of the shape that :meth:`hypergradient` gives."""
        for selector, part in zip(self.selectors, gradient.split([len(s) for s in self.selectors]), strict=True):
            selector.grad = part
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forget(self) -> None:
        """Drop the moments, as for selectors that are new."""
        self.optimizer.state.clear()

    def _second_order(self, batch: Batch, heldout: Batch, loss_fn: LossFn) -> list[Tensor]:
        """In float32: what a perturbation of this size changes is below the resolution of half precision."""
        start, before = self._random_state(), [weight.detach().clone() for weight in self.weights]
        with torch.autocast(self.weights[0].device.type, enabled=False):
            try:
                slope = self._gradients(loss_fn(self.model, batch), self.weights)
                self._move(before, slope, -self.lookahead)
                both = self._gradients(loss_fn(self.model, heldout), [*self.selectors, *self.weights])
                direct, v = both[: len(self.selectors)], both[len(self.selectors) :]
                length = float(torch.stack(torch._foreach_norm(v)).norm())
                if length == 0:  # no weight matters to the held-out loss
                    return direct
                epsilon = _PERTURBATION / length
                ends = []
                for sign in (1, -1):
                    self._move(before, v, sign * epsilon)
                    with self._replayed(start):
                        ends.append(self._gradients(loss_fn(self.model, batch), self.selectors))
            finally:
                with torch.no_grad():
                    torch._foreach_copy_(self.weights, before)
        mixed = torch._foreach_div(torch._foreach_sub(*ends), 2 * epsilon)
        return list(torch._foreach_sub(direct, mixed, alpha=self.lookahead))

    @torch.no_grad()
    def _move(self, origin: list[Tensor], direction: list[Tensor], distance: float) -> None:
        """Put the weights at this distance from where they were."""
        torch._foreach_copy_(self.weights, torch._foreach_add(origin, direction, alpha=distance))

    @staticmethod
    def _gradients(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Of a loss with respect to inputs that may have no part in it."""
        return list(torch.autograd.grad(loss, inputs, materialize_grads=True))

    def _require_gradient(self, on: bool) -> None:
        for selector in self.selectors:
            selector.requires_grad_(on)

    # Noise: the two ends of a finite difference differ in the weights alone -------------------------------------------

    def _random_state(self) -> list[Tensor]:
        """Where the random streams stand that a forward pass draws from: dropout's, and the gates'."""
        device = self.weights[0].device
        state = [torch.get_rng_state()]
        state += [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return state + ([] if self.noise is None else [self.noise.get_state()])

    @contextmanager
    def _replayed(self, state: Sequence[Tensor]) -> Iterator[None]:
        """Inside this context the random streams go on from an earlier state; afterwards from where they were."""
        now = self._random_state()
        self._set_random_state(state)
        try:
            yield
        finally:
            self._set_random_state(now)

    def _set_random_state(self, state: Sequence[Tensor]) -> None:
        device = self.weights[0].device
        torch.set_rng_state(state[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state[1], device)
        if self.noise is not None:
            self.noise.set_state(state[-1])

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Moments and step counts."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self.optimizer.load_state_dict(state)
