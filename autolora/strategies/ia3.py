"""(IA)3: keys, values and the inner activations of the MLP are rescaled (Liu et al., NeurIPS 2022), through PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from autolora.errors import TargetError
from autolora.plan import Site
from autolora.roles import Role, role_of
from autolora.strategies.outside import TASK_TYPE, ByPeft, PeftOptions

if TYPE_CHECKING:
    from peft import IA3Config
    from torch import nn

_OUTPUTS = (Role.key, Role.value, Role.fused_qkv)


class Options(PeftOptions):
    """(IA)3 has no options; ``adapter.targets`` narrows the modules down."""


class IA3(ByPeft[Options]):
    """Trains a factor for each output of keys and values and each input of the MLP's second map, and the head.

    Where one module computes queries, keys and values, all its outputs are scaled. All factors start at 1.
    """

    Options = Options

    def peft_config(self, model: nn.Module, sites: Mapping[str, Site]) -> IA3Config:
        """The modules by their roles; PEFT's own table has them for some models only, and more of them for BERT."""
        from peft import IA3Config

        from autolora.adapters.linear_like import is_conv1d
        from autolora.adapters.peft_format.names import target_modules

        inputs = [name for name in sites if role_of(name) is Role.mlp_down]
        scaled = [name for name in sites if role_of(name) in _OUTPUTS] + inputs
        if not scaled:
            raise TargetError(
                "strategy=ia3: expected modules for keys, values or the second map of an MLP among the targets, got "
                f"{', '.join(list(sites)[:5])}, ...: widen adapter.targets"
            )
        names = [name for name, _ in model.named_modules()]
        return IA3Config(
            task_type=TASK_TYPE,
            target_modules=target_modules(scaled, names),
            feedforward_modules=inputs,
            fan_in_fan_out=any(is_conv1d(model.get_submodule(name)) for name in scaled),
        )
