r"""The places in a model where adapters differ, and which adapter computes there for whom.

A slot stands in place of a module. It holds nothing of any adapter: the caller's choice says which module computes in
its place. A choice is one of three:

* :class:`One`: the same adapter for everything.
* :class:`PerRow`: an adapter for each row of the batch. With :math:`R_k` the rows of adapter k, an adapted linear map
  is

  .. math:: y = x W^T + b, \qquad y_{R_k} \mathrel{+}= s_k \, x_{R_k} A_k^T B_k^T

  so that the large product is made once, whatever the number of adapters.
* :class:`Blend`: every adapter for every row i, with weights :math:`\pi_{ik}`,

  .. math:: y_i = x_i W^T + b + \sum_k \pi_{ik} \, s_k \, x_i A_k^T B_k^T
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autolora.adapters import Adapters, LoRALinear
from autolora.adapters.layer import Casts
from autolora.errors import TargetError

Chosen = Callable[[], "Choice"]


class Slot(nn.Module):
    """Stands in the model for a module that adapters replace, and hands calls on as the caller has chosen.

    Attributes of the module can be read here as well.

    Args:
        name: of the module in the model.
        base: the module.
        chosen: gives the choice of whoever calls.

    Attributes:
        casts: the module's weight in other dtypes, for all adapters (:attr:`LoRALinear.casts`).
    """

    def __init__(self, name: str, base: nn.Module, chosen: Chosen) -> None:
        super().__init__()
        self.name, self.base_layer, self.chosen = name, base, chosen
        self.casts: Casts = {}
        self.train(base.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes for the caller's choice."""
        return self.chosen().compute(self, *args, **kwargs)


class Member:
    """The modules of one adapter, by the names of those that they stand for.

    Args:
        adapters: on a model of their own (:func:`twin`); ``None`` for the model as it is without any.
    """

    def __init__(self, adapters: Adapters | None = None) -> None:
        self.layers: Mapping[str, LoRALinear] = adapters.layers if adapters else {}
        whole = adapters.fully_trained if adapters else ()
        self.whole = {name: adapters.model.get_submodule(name) for name in whole if adapters}

    def at(self, slot: Slot) -> nn.Module:
        """The module that computes in a slot."""
        return self.layers.get(slot.name, self.whole.get(slot.name, slot.base_layer))

    def update(self, slot: Slot, x: Tensor) -> Tensor | None:
        """What the adapter adds to the output of the module in a slot, if anything."""
        layer = self.layers.get(slot.name)
        return layer.update(x) if layer is not None and layer.enabled else None


class Choice:
    """Which adapter computes for which row."""

    def compute(self, slot: Slot, *args: Any, **kwargs: Any) -> Any:
        """What comes out of a slot."""
        raise NotImplementedError

    def in_full(self, slot: Slot) -> bool:
        """Whether an adapter has the module in a slot in full."""
        raise NotImplementedError


@dataclass(frozen=True)
class One(Choice):
    """The same adapter for everything."""

    member: Member

    def compute(self, slot: Slot, *args: Any, **kwargs: Any) -> Any:
        """The output of the adapter's module."""
        return self.member.at(slot)(*args, **kwargs)

    def in_full(self, slot: Slot) -> bool:
        """Whether the adapter has the module in full."""
        return slot.name in self.member.whole


@dataclass(frozen=True)
class PerRow(Choice):
    """An adapter for each row.

    Args:
        groups: an adapter and the positions of its rows, ``(rows,)``; every position once.
        rows: of the batch.
        computing: a context in which the choice is another.
    """

    groups: Sequence[tuple[Member, Tensor]]
    rows: int
    computing: Callable[[Choice], Any]

    def compute(self, slot: Slot, *args: Any, **kwargs: Any) -> Any:
        """The outputs of all rows in their order.

        Where modules trained in full have outputs of different widths, all are as wide as the widest, filled up with
        minus infinity: heads of different numbers of labels.

        Raises:
            TargetError: if the first dimension of the input is not the batch, or an output is not a tensor.
        """
        if self.in_full(slot):
            return self._each_by_itself(slot, args, kwargs)
        x = args[0]
        require_rows(slot, x, self.rows)
        y = slot.base_layer(*args, **kwargs)
        for member, rows in self.groups:
            update = member.update(slot, x.index_select(0, rows))
            if update is not None:
                y.index_add_(0, rows, update.to(y.dtype))
        return y

    def in_full(self, slot: Slot) -> bool:
        """Whether the adapter of any row has the module in full."""
        return any(slot.name in member.whole for member, _ in self.groups)

    def _each_by_itself(self, slot: Slot, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        require_rows(slot, args[0], self.rows)
        outputs = []
        for member, rows in self.groups:
            some = [_rows_of(value, rows, self.rows) for value in args]
            named = {key: _rows_of(value, rows, self.rows) for key, value in kwargs.items()}
            with self.computing(One(member)):  # slots inside the module see these rows alone
                y = member.at(slot)(*some, **named)
            if not isinstance(y, Tensor):
                raise TargetError(
                    f"{slot.name}: expected a module with a tensor as its output, got {type(y).__name__}; "
                    "adapters that differ there cannot share a batch: compute them one after the other"
                )
            outputs.append(y)
        widest = max(y.shape[-1] for y in outputs)
        padded = [F.pad(y, (0, widest - y.shape[-1]), value=-torch.inf) for y in outputs]
        order = torch.cat([rows for _, rows in self.groups]).argsort()
        return torch.cat(padded).index_select(0, order)


@dataclass(frozen=True)
class Blend(Choice):
    """Every adapter for every row, by weights.

    Args:
        members: the adapters.
        weights: ``(rows, members)``.
        heads: whose modules trained in full compute.
    """

    members: Sequence[Member]
    weights: Tensor
    heads: One | PerRow

    def compute(self, slot: Slot, *args: Any, **kwargs: Any) -> Any:
        """The base's output and the weighted sum of the updates; or what ``heads`` says, where that is trained in full.

        Raises:
            TargetError: if the first dimension of the input is not the batch.
        """
        if self.heads.in_full(slot):
            return self.heads.compute(slot, *args, **kwargs)
        x = args[0]
        require_rows(slot, x, len(self.weights))
        y = slot.base_layer(*args, **kwargs)
        for member, weight in zip(self.members, self.weights.unbind(1), strict=True):
            update = member.update(slot, x)
            if update is not None:
                y = y + (weight.view(-1, *[1] * (update.dim() - 1)) * update).to(y.dtype)
        return y

    def in_full(self, slot: Slot) -> bool:
        """Whether the heads that compute have the module in full."""
        return self.heads.in_full(slot)


def require_rows(slot: Slot, x: Tensor, rows: int) -> None:
    """Refuse an input whose first dimension is not the batch.

    Raises:
        TargetError: with the shape.
    """
    if x.shape[0] != rows:
        raise TargetError(
            f"{slot.name}: expected an input of {rows} rows, one for each adapter that was named, got shape "
            f"{tuple(x.shape)}; name an adapter for every row of the batch (where a module reads something else than "
            "the rows, leave it out of the adapters, or use one adapter at a time)"
        )


def _rows_of(value: Any, rows: Tensor, count: int) -> Any:
    """Some rows of what has a row for each of the batch; anything else as it is."""
    per_row = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == count
    return value.index_select(0, rows) if per_row else value


def twin(module: nn.Module, known: dict[nn.Module, nn.Module] | None = None) -> nn.Module:
    """A model of the same modules, in which others can be put in their place, with the same tensors: none is copied.

    Slots are left out: the module that each stands for is in the twin.
    """
    known = {} if known is None else known
    if isinstance(module, Slot):
        return twin(module.base_layer, known)
    if module not in known:
        other = known[module] = copy.copy(module)
        other._parameters, other._buffers = dict(module._parameters), dict(module._buffers)
        children = module._modules.items()
        other._modules = {name: None if child is None else twin(child, known) for name, child in children}
    return known[module]
