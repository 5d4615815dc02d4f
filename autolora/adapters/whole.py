"""Full fine-tuning behind the handle that adapters have: every parameter is trained, and every rank is 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from autolora.adapters.attach import Adapters
from autolora.adapters.peft_format.save import SIDECAR, sidecar_of
from autolora.files import dump_json, replacing_directory
from autolora.plan import Site


class WholeModel(Adapters):
    """Handle on a model that is trained in full, without adapters.

    Parameters that did not require a gradient before, such as fixed position embeddings, stay frozen.

    Args:
        model: any model.
        sites: modules that an adapter could sit on.
        heads: names of the modules that count as the head.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Site], heads: Sequence[str]) -> None:
        of_heads = {id(p) for name in heads for p in model.get_submodule(name).parameters()}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in of_heads]
        super().__init__(model, sites, {}, heads, rest)


def save_whole(
    adapters: WholeModel,
    directory: Path,
    *,
    base_model: str,
    write: Callable[[Path], None] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a model and ``autolora.json``, all or nothing.

    Args:
        adapters: the handle on the model.
        directory: replaced as a whole if it is there.
        base_model: hub id or path of the model that training began with.
        write: writes the model into a folder; by default its state goes into ``model.safetensors``.
        metadata: more to keep in ``autolora.json``, as JSON.
    """
    model = adapters.model
    with replacing_directory(directory) as folder:
        if write is not None:
            write(folder)
        else:
            (folder / "model.safetensors").write_bytes(save(model.state_dict(), metadata={"format": "pt"}))
        sidecar = sidecar_of(adapters, model, base_model, metadata=metadata)
        (folder / SIDECAR).write_text(dump_json(sidecar), encoding="utf-8")
