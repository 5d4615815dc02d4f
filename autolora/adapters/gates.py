"""Where the gate vector g of an adapter comes from.

An adapter computes ``s * B diag(g) A x``; a gate gives g, one entry for each rank-1 component. A gate returns ``None``
for "all ones", so that an ungated adapter pays nothing for having a gate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor, nn

SelectorForm = Literal["straight_through", "sigmoid", "hard_concrete", "gumbel", "gumbel_softmax", "simplex"]
SELECTOR_FORMS: tuple[str, ...] = get_args(SelectorForm)
_SIMPLEX_FORMS = ("simplex", "gumbel_softmax")

# Stretch of the hard concrete distribution: Louizos, Welling & Kingma, "Learning sparse neural networks through L0
# regularization", ICLR 2018, section 4.
_STRETCH_LOW, _STRETCH_HIGH = -0.1, 1.1
_ROUNDING = 1e-5  # of a softmax in float32


class FixedGate(nn.Module):
    """A 0/1 mask that is not learned.

    Args:
        rank: number of components r.
        mask: shape ``(r,)``; all ones by default.
    """

    mask: Tensor

    def __init__(self, rank: int, mask: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(rank))
        self._components: Tensor | None = None
        if mask is not None:
            self.set_mask(mask)

    def set_mask(self, mask: Tensor) -> None:
        """Replace the mask; any non-zero entry counts as 1.

        Raises:
            ValueError: if the mask has not the shape ``(r,)``.
        """
        if mask.shape != self.mask.shape:
            raise ValueError(f"mask: expected shape {tuple(self.mask.shape)}, got {tuple(mask.shape)}")
        self.mask.copy_(mask != 0)
        self._notice()

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._notice()

    def _notice(self) -> None:
        """Keep what the mask says where forward need not ask the device."""
        self._components = None if bool(self.mask.all()) else self.mask.nonzero().flatten()

    def remaining(self) -> Tensor | None:
        """Indices of the components that are not switched off, or ``None`` when all are on."""
        if self._components is not None and self._components.device != self.mask.device:
            self._components = self._components.to(self.mask.device)
        return self._components

    def forward(self) -> Tensor | None:
        """The mask, or ``None`` when it is all ones."""
        return None if self._components is None else self.mask

    def evaluation_gate(self) -> Tensor:
        """The gate that evaluation applies, shape ``(r,)``."""
        return self.mask


class PrefixGate(FixedGate):
    """A 0/1 mask at evaluation, and in training the first components alone, as many as :meth:`first` was told last.

    How many is never asked of the device, so that it can be another number at every step. :meth:`set_mask` ends it: the
    mask then holds in training too.

    Args:
        rank: number of components r.
    """

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self._told = False
        self._first: Tensor | None = None

    def first(self, count: int) -> None:
        """Train the first ``count`` components, from 1 to r; the mask is for evaluation."""
        self._told = True
        self._first = torch.arange(count, device=self.mask.device) if count < len(self.mask) else None

    def set_mask(self, mask: Tensor) -> None:
        """Replace the mask, for training and evaluation."""
        super().set_mask(mask)
        self._told = False

    def remaining(self) -> Tensor | None:
        """Indices of the components that are on, or ``None`` when all are."""
        return self._first if self._told and self.training else super().remaining()

    def forward(self) -> Tensor | None:
        """The components that are on as a mask, or ``None`` when all are."""
        if not (self._told and self.training):
            return super().forward()
        return None if self._first is None else torch.zeros_like(self.mask).index_fill_(0, self._first, 1)


class LearnedGate(nn.Module, ABC):
    """Base of gates that are learned, until :meth:`fix` makes one a fixed 0/1 mask, and :meth:`learn` again.

    The state dict says which of the two it is.

    Args:
        rank: number of components r.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.fixed = FixedGate(rank)
        self.learning = True

    @abstractmethod
    def value(self) -> Tensor:
        """What a component is multiplied with while the gate learns, without noise or threshold, shape ``(r,)``."""

    @abstractmethod
    def level(self) -> Tensor:
        """How far what is learned opens each component, at least 0, shape ``(r,)``."""

    @abstractmethod
    def learned_evaluation_gate(self) -> Tensor:
        """The gate that evaluation applies while the gate learns, shape ``(r,)``."""

    def fix(self, mask: Tensor) -> None:
        """Stop learning and gate with this 0/1 mask.

        Raises:
            ValueError: if the mask has not the shape ``(r,)``.
        """
        self.fixed.set_mask(mask)
        self.learning = False

    def learn(self) -> None:
        """Gate with what is learned, and let it learn."""
        self.learning = True

    def remaining(self) -> Tensor | None:
        """Indices of the components that a fixed mask leaves on; ``None`` for all, and while the gate learns."""
        return None if self.learning else self.fixed.remaining()

    def evaluation_gate(self) -> Tensor:
        """The gate that evaluation applies, shape ``(r,)``."""
        return self.learned_evaluation_gate() if self.learning else self.fixed.evaluation_gate()

    def get_extra_state(self) -> Tensor:
        """Whether the gate learns, for the state dict."""
        return torch.tensor(self.learning)

    def set_extra_state(self, state: Tensor) -> None:
        """Take back what :meth:`get_extra_state` gave."""
        self.learning = bool(state)


class ScaleGate(LearnedGate):
    """One learned real number for each component: a singular value (AdaLoRA), or a gate that is shrunk (SoRA).

    A component whose number is exactly 0 is off at evaluation, and comes back when the number moves.

    Args:
        rank: number of components r.
        init: initial number of every component.
    """

    def __init__(self, rank: int, init: float = 0.0) -> None:
        super().__init__(rank)
        self.values = nn.Parameter(torch.full((rank,), float(init)))

    def value(self) -> Tensor:
        """The numbers."""
        return self.values

    def level(self) -> Tensor:
        """The numbers without their sign."""
        return self.values.abs()

    def learned_evaluation_gate(self) -> Tensor:
        """The numbers, without their graph."""
        return self.values.detach()

    def forward(self) -> Tensor | None:
        """The gate g, shape ``(r,)``."""
        return self.values if self.learning else self.fixed()


class SelectorGate(LearnedGate):
    r"""Learned selectors: one logit :math:`\theta_i` for each rank-1 component.

    In training, with :math:`\sigma` the logistic function and :math:`\tau` the temperature:

    ================  ==========================================================================================
    form              g
    ================  ==========================================================================================
    straight_through  :math:`1[\sigma(\theta) > t]` forward, the gradient of :math:`\sigma(\theta)` backward
                      (Bengio, Leonard & Courville, arXiv 1308.3432, section 2.3)
    sigmoid           :math:`\sigma(\theta / \tau)`
    hard_concrete     a binary concrete sample stretched to (-0.1, 1.1) and clipped to [0, 1]
                      (Louizos et al., ICLR 2018, section 4)
    gumbel            a binary concrete sample :math:`\sigma((\theta + \mathrm{logistic}) / \tau)`
                      (Maddison, Mnih & Teh, ICLR 2017, appendix B)
    gumbel_softmax    a concrete sample over the module's components,
                      :math:`\mathrm{softmax}((\theta + \mathrm{gumbel}) / \tau)`
                      (Jang, Gu & Poole, ICLR 2017, section 2)
    simplex           softmax over the module's components (Zhang et al., NAACL 2024, section 3.1)
    ================  ==========================================================================================

    At evaluation the noise is gone and g is hard-thresholded: a component is 0 unless its noise-free :meth:`value`
    (:math:`\sigma(\theta)` for straight_through) is above ``threshold``, and one that is above keeps this value (1 for
    straight_through), so that the scale of the output does not jump when training ends.

    Args:
        rank: number of components r.
        form: one of the forms above.
        threshold: 0.5 by default. For the two forms on the simplex 1/r, which a component that has exactly its equal
            share passes: equal shares say nothing against any of them.
        tau: temperature, > 0; without effect on straight_through and simplex.
        init: initial logit of every component.
        generator: random stream of the noise, on the CPU; the global one by default. Every forward pass draws anew.

    Raises:
        ValueError: for an unknown form, or a temperature that is not positive.
    """

    def __init__(
        self,
        rank: int,
        form: SelectorForm = "straight_through",
        *,
        threshold: float | None = None,
        tau: float = 1.0,
        init: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(rank)
        if form not in SELECTOR_FORMS:
            raise ValueError(f"selector form: expected one of {', '.join(SELECTOR_FORMS)}, got {form!r}")
        if tau <= 0:
            raise ValueError(f"tau: expected a temperature > 0, got {tau}")
        self.form = form
        self.tau = tau
        equal_share = (1 - _ROUNDING) / rank
        self.threshold = threshold if threshold is not None else (equal_share if form in _SIMPLEX_FORMS else 0.5)
        self.generator = generator
        self.logits = nn.Parameter(torch.full((rank,), float(init)))
        self.least_probability = self._probability_at_threshold()

    @property
    def elementwise(self) -> bool:
        """Whether what a gate says of a component depends on its own logit alone."""
        return self.form not in _SIMPLEX_FORMS

    def probability(self, logits: Tensor | None = None) -> Tensor:
        """Differentiable share of each component in [0, 1], shape ``(r,)``: what a sparsity penalty charges for.

        The softmax for the two forms on the simplex, P(g != 0) for hard_concrete (Louizos et al., equation 12), and
        the logistic function for the others.

        Args:
            logits: of any number of components, in place of the gate's own: all those of a model, say, in one call.
        """
        logits = self.logits if logits is None else logits
        if self.form in _SIMPLEX_FORMS:
            return logits.softmax(0)
        if self.form == "hard_concrete":
            return torch.sigmoid(logits - self.tau * math.log(-_STRETCH_LOW / _STRETCH_HIGH))
        if self.form == "sigmoid":
            return torch.sigmoid(logits / self.tau)
        return torch.sigmoid(logits)

    def level(self) -> Tensor:
        """The :meth:`probability` of each component."""
        return self.probability()

    def kept(self, logits: Tensor | None = None) -> Tensor:
        """Which components survive the threshold: bool, shape ``(r,)``; ``logits`` as for :meth:`probability`."""
        return self.probability(logits) > self.least_probability

    def _probability_at_threshold(self) -> float:
        """The :meth:`probability` of a component whose value (for straight_through, whose level) is the threshold."""
        if self.form != "hard_concrete":
            return self.threshold
        level = (self.threshold - _STRETCH_LOW) / (_STRETCH_HIGH - _STRETCH_LOW)
        return float(self.probability(torch.tensor(level).logit()))

    def learned_evaluation_gate(self) -> Tensor:
        """The noise-free value above the threshold, else 0."""
        with torch.no_grad():
            return torch.where(self.kept(), self.value(), 0.0)

    def forward(self) -> Tensor | None:
        """The gate g, shape ``(r,)``: with noise and gradient in training, thresholded at evaluation."""
        if not self.learning:
            return self.fixed()
        if not self.training:
            return self.evaluation_gate()
        if self.form == "straight_through":
            soft = torch.sigmoid(self.logits)
            return (soft > self.threshold).to(soft.dtype) + (soft - soft.detach())
        if self.form == "gumbel_softmax":
            gumbel = -torch.log(-torch.log(self._uniform()))
            return ((self.logits + gumbel) / self.tau).softmax(0)
        if self.form in ("gumbel", "hard_concrete"):
            return self._stretch(torch.sigmoid((self.logits + torch.logit(self._uniform())) / self.tau))
        return self.value()

    def value(self, logits: Tensor | None = None) -> Tensor:
        """The gate without noise or threshold, shape ``(r,)``; 1 for straight_through."""
        logits = self.logits if logits is None else logits
        if self.form == "straight_through":
            return torch.ones_like(logits)
        if self.form == "hard_concrete":
            return self._stretch(torch.sigmoid(logits))
        return self.probability(logits)

    def _stretch(self, sample: Tensor) -> Tensor:
        if self.form != "hard_concrete":
            return sample
        return (sample * (_STRETCH_HIGH - _STRETCH_LOW) + _STRETCH_LOW).clamp(0, 1)

    def _uniform(self) -> Tensor:
        eps = torch.finfo(torch.float32).eps
        draw = torch.rand(self.logits.shape, generator=self.generator)
        return draw.clamp(eps, 1 - eps).to(self.logits.device)


Gate = FixedGate | LearnedGate
