"""The adapted linear map: one class for every linear-like module, gate and strategy."""

from __future__ import annotations

from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autolora.adapters.function import Adapted, adapted_linear
from autolora.adapters.gates import FixedGate, Gate, LearnedGate
from autolora.adapters.linear_like import is_conv1d, site_of, weight_is_transposed
from autolora.adapters.shared import SharedInput
from autolora.errors import TargetError
from autolora.plan import Site

Init = Literal["kaiming", "gaussian", "orthogonal"]
INITS: tuple[str, ...] = get_args(Init)

Casts = dict[torch.dtype, tuple[tuple[int, int], Tensor]]
"""A frozen weight in other dtypes, each with the address and the version of the weight that was cast."""


def init_a(weight: Tensor, init: Init, std: float, generator: torch.Generator | None) -> None:
    r"""Fill A, shape ``(r, in)``, in place.

    ``kaiming``: uniform on :math:`\pm 1/\sqrt{in}`, as in the published LoRA code; ``gaussian``: N(0, std²);
    ``orthogonal``: orthonormal rows. Rows are drawn one after the other, so that a smaller rank gets the first rows of
    a larger one.

    Raises:
        ValueError: for an unknown ``init``.
    """
    if init not in INITS:
        raise ValueError(f"init of A: expected one of {', '.join(INITS)}, got {init!r}")
    bound = weight.shape[1] ** -0.5
    with torch.no_grad():
        for row in weight:
            if init == "kaiming":
                row.uniform_(-bound, bound, generator=generator)
            else:
                row.normal_(0.0, std if init == "gaussian" else 1.0, generator=generator)
        if init == "orthogonal":
            weight.copy_(torch.linalg.qr(weight.T).Q.T)


class LoRALinear(nn.Module):
    r"""A frozen linear-like module W with a gated low-rank update.

    .. math:: y = W x + s \cdot B \, \mathrm{diag}(g) \, A \, x

    with A of shape ``(r, in)``, B of shape ``(out, r)``, g of shape ``(r,)`` (Hu et al., ICLR 2022, section 4.1). B
    starts at 0, so that the module computes exactly what it did before. ``s`` does not depend on r, unlike their
    ``alpha / r``: removing a component leaves the others as they were.

    A and B are float32 parameters whatever the dtype of W. The update is computed in float32, or as autocast says where
    it is on, and is cast to the dtype of ``W x``.

    Args:
        base: the linear-like module; it becomes ``base_layer`` and is not copied.
        rank: r, from 1 to ``min(in, out)``.
        scale: s.
        gate: where g comes from; all ones by default.
        init: initialisation of A (:func:`init_a`), with ``init_std`` for ``gaussian``.
        dropout: probability of zeroing an entry of the adapter's input in training.
        learn_scale: make s a parameter.
        fan_in_fan_out: whether the weight of ``base`` is ``(in, out)``; detected by default.
        generator: random stream for A, on the CPU.

    Attributes:
        casts: the base weight in other dtypes; layers on one base can share it.

    Raises:
        ValueError: if ``base`` is not linear-like or has an adapter already, or rank or dropout is out of range.
    """

    scale: float | nn.Parameter
    shared: SharedInput | None = None

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        *,
        scale: float = 2.0,
        gate: Gate | None = None,
        init: Init = "kaiming",
        init_std: float = 0.02,
        dropout: float = 0.0,
        learn_scale: bool = False,
        fan_in_fan_out: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        site = site_of(base)
        if site is None or isinstance(base, LoRALinear):
            raise ValueError(f"expected a linear-like module without an adapter, got {type(base).__name__}")
        if not 1 <= rank <= site.full_rank:
            raise ValueError(f"rank: expected 1 to {site.full_rank} (min(in, out)), got {rank}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected 0 <= p < 1, got {dropout}")
        self.site: Site = site
        self.base_layer = base
        self.transposed = weight_is_transposed(base, fan_in_fan_out)
        device = next((tensor.device for tensor in chain(base.parameters(), base.buffers())), None)
        a = torch.empty(rank, site.in_features)
        init_a(a, init, init_std, generator)
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(site.out_features, rank, device=device))
        self.gate: Gate = (FixedGate(rank) if gate is None else gate).to(device)
        self.scale = nn.Parameter(torch.tensor(float(scale), device=device)) if learn_scale else float(scale)
        self.dropout_p = dropout
        self.enabled = True
        self._original_weight: list[nn.Parameter] = []  # a list, so that the module does not register it
        self.casts: Casts = {}

    @property
    def rank(self) -> int:
        """Number of components r, switched off ones included."""
        return self.lora_A.shape[0]

    @property
    def merged(self) -> bool:
        """Whether the update is currently part of the base weight."""
        return bool(self._original_weight)

    @property
    def weight(self) -> Tensor:
        """The base weight; models that read ``module.weight`` keep working."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def unmerged_weight(self) -> nn.Parameter:
        """The base weight without the update, merged or not."""
        return self._original_weight[0] if self.merged else self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base bias."""
        return getattr(self.base_layer, "bias", None)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.site.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.site.out_features

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the module to ``x`` of shape ``(..., in)``; gives ``(..., out)``."""
        if not self.enabled or self.merged:
            return self.base_layer(x, *args, **kwargs)
        dtype = None if args or kwargs else self.fused_dtype(x)
        if dtype is None:
            y = self.base_layer(x, *args, **kwargs)
            return y + self.update(x).to(y.dtype)
        if self.training and self.shared is not None:
            y = self.shared.output(self, x)
            if y is not None:
                return y
        return adapted_linear(x, [self.adapted(dtype)], dtype)[0]

    def update(self, x: Tensor) -> Tensor:
        """``s * B diag(g) A x`` alone, shape ``(..., out)``: for bases whose own product is not to be touched."""
        if self.dropout_p and self.training:
            x = F.dropout(x, self.dropout_p)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.dtype)
        a, b = self.factors()
        return F.linear(F.linear(x, a), b)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A, and B with gate and scale in it; components that a fixed mask switches off are left out."""
        a, b = self.lora_A, self.lora_B
        remaining = self.gate.remaining()
        if remaining is not None:
            return a.index_select(0, remaining), b.index_select(1, remaining) * self.scale
        gate = self.gate()
        return a, b * (self.scale if gate is None else gate * self.scale)

    def fused_dtype(self, x: Tensor) -> torch.dtype | None:
        """The dtype in which base and update can be computed as one, or ``None`` if they cannot.

        The base has to be a plain linear map without hooks, the adapter without dropout at this moment, and all of one
        dtype: that of autocast where it is on.
        """
        base = self.base_layer
        if type(base) is not nn.Linear and not is_conv1d(base):
            return None
        if base._forward_hooks or base._forward_pre_hooks or (self.dropout_p and self.training):
            return None
        if self.merged or not self.enabled or not x.is_floating_point():
            return None
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return x.dtype if x.dtype == self.lora_A.dtype == self.weight.dtype else None

    def adapted(self, dtype: torch.dtype) -> Adapted:
        """The map as :func:`autolora.adapters.function.adapted_linear` takes it."""
        weight = self._weight_as(dtype)
        return Adapted(weight.t() if self.transposed else weight, self.bias, *self.factors())

    def _weight_as(self, dtype: torch.dtype) -> Tensor:
        """The base weight in another dtype; a frozen one is cast once, not at every call."""
        weight = self.weight
        if weight.dtype == dtype or weight.requires_grad:
            return weight.to(dtype)
        stamp = (weight.data_ptr(), weight._version)
        known = self.casts.get(dtype)
        if known is None or known[0] != stamp:
            known = self.casts[dtype] = stamp, weight.detach().to(dtype)
        return known[1]

    @torch.no_grad()
    def fix_gate(self, mask: Tensor) -> None:
        """Gate with this 0/1 mask from now on.

        What a learning gate multiplies a component with goes into B, so that the components that stay keep their
        scale.

        Raises:
            ValueError: if the mask has not the shape ``(r,)``.
        """
        if not isinstance(self.gate, LearnedGate):
            self.gate.set_mask(mask)
            return
        value = self.gate.value() if self.gate.learning else None
        self.gate.fix(mask)
        if value is not None:
            self.lora_B.mul_(value)

    def delta_weight(self) -> Tensor:
        """The update ``s * B diag(g) A`` with the evaluation gate, shape ``(out, in)``, in the dtype of A and B."""
        with torch.no_grad(), torch.autocast(self.lora_A.device.type, enabled=False):
            gate = self.gate.evaluation_gate() * self.scale
            return (self.lora_B * gate) @ self.lora_A

    def merge(self) -> None:
        """Add the update to the base weight; the original weight is kept for :meth:`unmerge`.

        The sum is made in the wider dtype of the two and rounded once to that of the weight. Gates that change while an
        update is merged have no effect until it is unmerged.

        Raises:
            TargetError: if the base has no floating-point weight matrix of its own to add to.
        """
        if self.merged:
            return
        weight = self._own_matrix()
        if weight is None:
            raise TargetError(
                f"merge: expected a floating-point weight matrix, got {type(self.base_layer).__name__} without one; "
                "keep the adapter unmerged on this backbone, or give it such weights first "
                "(autolora.adapters.compress.restore makes them from quantised ones)"
            )
        delta = self.delta_weight()
        merged = (weight.detach() + (delta.T if self.transposed else delta)).to(weight.dtype)
        # A new parameter, so that a weight tied to another module (an embedding, say) keeps its value there.
        self._original_weight.append(weight)
        self.base_layer.weight = nn.Parameter(merged, requires_grad=False)

    @property
    def merges_precisely(self) -> bool:
        """Whether the base has a weight matrix of its own, in a dtype that holds all values of that of A and B."""
        weight = self._own_matrix()
        return weight is not None and torch.promote_types(weight.dtype, self.lora_A.dtype) == weight.dtype

    def _own_matrix(self) -> nn.Parameter | None:
        weight = self.base_layer._parameters.get("weight")
        return weight if weight is not None and weight.dim() == 2 and weight.is_floating_point() else None

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        if self.merged:
            self.base_layer.weight = self._original_weight.pop()

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of the adapter."""
        return f"rank={self.rank}, scale={self.scale}, gate={type(self.gate).__name__}, merged={self.merged}"
