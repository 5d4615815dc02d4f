"""Adapters as PEFT keeps them on disk: written by :func:`save_peft`, read by :func:`load_peft`; PEFT is not needed."""

from autolora.adapters.peft_format.load import load_peft, read_config, read_sidecar, tensors_in_full
from autolora.adapters.peft_format.save import save_peft

__all__ = ["load_peft", "read_config", "read_sidecar", "save_peft", "tensors_in_full"]
