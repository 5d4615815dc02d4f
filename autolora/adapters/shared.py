"""Adapted modules that read the same input, so that they can be computed together.

Query, key and value of an attention read one tensor; so do gate and up of a gated MLP. Which modules might is known
from their names; that they do is checked at every call by the identity of the tensor, and where a model does something
else with them (cross-attention, positions that reuse a projection), they are computed one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from autolora.adapters.function import adapted_linear
from autolora.roles import Role, role_of

if TYPE_CHECKING:
    from autolora.adapters.layer import LoRALinear

_TOGETHER = ({Role.query, Role.key, Role.value}, {Role.mlp_gate, Role.mlp_up})


class SharedInput:
    """Modules of one input, in the order in which the model calls them.

    The first that is called computes the outputs of all; the others collect theirs. What was not collected when the
    first is called again was computed in vain: the modules then go separate ways for good.
    """

    def __init__(self, members: Sequence[LoRALinear]) -> None:
        self.members = list(members)
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def output(self, member: LoRALinear, x: Tensor) -> Tensor | None:
        """The output of a member, or ``None`` if it has to compute it alone."""
        if self._input is x and id(member) in self._outputs:
            y = self._outputs.pop(id(member))
            if not self._outputs:
                self._input = None
            return y
        if member is not self.members[0]:
            return None
        if self._outputs:
            self.dissolve()
            return None
        dtype = member.fused_dtype(x)
        if dtype is None or any(other.fused_dtype(x) != dtype for other in self.members):
            return None
        outputs = adapted_linear(x, [one.adapted(dtype) for one in self.members], dtype)
        self._outputs = {id(one): y for one, y in zip(self.members[1:], outputs[1:], strict=True)}
        self._input = x
        return outputs[0]

    def dissolve(self) -> None:
        """Let every member compute alone from now on."""
        for member in self.members:
            member.shared = None
        self._input, self._outputs = None, {}


def share_inputs(layers: Mapping[str, LoRALinear]) -> None:
    """Put adapted modules that probably read one input into groups, in place of earlier groups."""
    groups: dict[tuple[str, int], list[LoRALinear]] = {}
    for name, layer in layers.items():
        layer.shared = None
        for kind, roles in enumerate(_TOGETHER):
            if role_of(name) in roles:
                groups.setdefault((name.rpartition(".")[0], kind), []).append(layer)
    for members in groups.values():
        if len({member.site.in_features for member in members}) == 1 < len(members):
            group = SharedInput(members)
            for member in members:
                member.shared = group
