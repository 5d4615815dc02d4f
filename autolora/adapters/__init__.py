"""The adapted layer, its gates, and handling the adapters of a model together. torch only."""

from autolora.adapters.attach import Adapters, AdapterSettings, attach, find_sites, largest_plan
from autolora.adapters.canonical import canonicalize, singular_values
from autolora.adapters.compact import compact
from autolora.adapters.gates import FixedGate, Gate, LearnedGate, PrefixGate, ScaleGate, SelectorGate
from autolora.adapters.layer import LoRALinear
from autolora.adapters.select import Targets

__all__ = [
    "AdapterSettings",
    "Adapters",
    "FixedGate",
    "Gate",
    "LearnedGate",
    "LoRALinear",
    "PrefixGate",
    "ScaleGate",
    "SelectorGate",
    "Targets",
    "attach",
    "canonicalize",
    "compact",
    "find_sites",
    "largest_plan",
    "singular_values",
]
