"""Methods of PEFT other than LoRA behind the handle that adapters have. PEFT is imported where it is used.

PEFT wraps the model, freezes it, and trains what its method adds (prompts, prefixes, vectors) together with a copy of
the head. The model inside stays what it was, its own head included.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn

from autolora.adapters.attach import Adapters, AdapterSettings, fully_trained_modules, replace_modules, stream
from autolora.adapters.fingerprint import check_fingerprint
from autolora.adapters.peft_format.load import backbone_of, read_sidecar, read_tensors
from autolora.adapters.peft_format.names import modules_of
from autolora.adapters.peft_format.save import SIDECAR, WEIGHTS, sidecar_of
from autolora.adapters.quantized import count_weights
from autolora.adapters.select import under
from autolora.errors import TargetError
from autolora.files import dump_json, replacing_directory
from autolora.plan import Site

if TYPE_CHECKING:
    from peft import IA3Config, PeftModel, PromptLearningConfig
    from transformers import PreTrainedModel

_NAME = "default"  # what PEFT calls the only adapter of a model


class Wrapped(Adapters):
    """Handle on a model inside PEFT's wrapper; made by :func:`wrap`. Every rank is 0.

    Attributes:
        base: the model inside.

    Args:
        model: the wrapper.
        sites: modules that an adapter could sit on, under the names of the model inside.
        heads: the modules trained in full, under the same names.
        before: every parameter that the model had before, and whether it required a gradient.
        size: how many numbers those are.
    """

    model: PeftModel

    def __init__(
        self,
        model: PeftModel,
        sites: Mapping[str, Site],
        heads: Sequence[str],
        before: Sequence[tuple[nn.Parameter, bool]],
        size: int,
    ) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        self.base: nn.Module = model.get_base_model()
        self.prefix = next(name for name, module in model.named_modules() if module is self.base)
        outer = {name: m for name, m in self.base.named_modules() if isinstance(m, ModulesToSaveWrapper)}
        self._replaced: dict[nn.Module, nn.Module] = {m: m.original_module for m in outer.values()}
        self._replaced |= {m: m.get_base_layer() for m in self.base.modules() if isinstance(m, BaseTunerLayer)}
        assert set(heads) <= set(outer)
        known = {id(p) for p, _ in before}
        known |= {id(p) for module in outer.values() for p in module.parameters()}
        added = [p for p in model.parameters() if id(p) not in known]
        fully_trained = [f"{self.prefix}.{name}.modules_to_save.{_NAME}" for name in heads]
        super().__init__(model, sites, {}, fully_trained, added)
        self.heads = list(heads)
        self._requires_grad = list(before)
        self._size = size

    def count(self) -> dict[str, int]:
        """As of adapters; ``added`` is what PEFT's method leaves (:meth:`kept`), and the head counts once.

        A network that prefixes come out of in training is among the ``trainable`` ones, and not left.
        """
        added = sum(tensor.numel() for tensor in self.kept())
        return super().count() | {"added": added, "own": 0, "total": self._size + added}

    def kept(self) -> list[Tensor]:
        """What PEFT writes, without the head."""
        heads = [f"{self.prefix}.{name}" for name in self.heads]
        return [tensor for name, tensor in self.written().items() if not under(name, heads)]

    def written(self) -> dict[str, Tensor]:
        """What PEFT itself would write."""
        from peft import get_peft_model_state_dict

        tensors: dict[str, Tensor] = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return tensors

    @contextmanager
    def unwrapped(self) -> Iterator[nn.Module]:
        """Inside this context :attr:`base` is the model as it was before, under its own names."""
        try:
            replace_modules(self.base, self._replaced)
            yield self.base
        finally:
            replace_modules(self.base, {inner: outer for outer, inner in self._replaced.items()})

    def detach(self) -> nn.Module:
        """Take the model out of the wrapper: as it was, bit for bit."""
        replace_modules(self.base, self._replaced)
        for parameter, requires_grad in self._requires_grad:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        return self.base


def wrap(
    model: nn.Module, config: IA3Config | PromptLearningConfig, sites: Mapping[str, Site], settings: AdapterSettings
) -> Wrapped:
    """Put a model into PEFT's wrapper; the random numbers come from a stream of their own.

    Args:
        model: a transformers model; its modules are replaced in place.
        config: PEFT's, for the task; the head is added to it.
        sites: modules that an adapter could sit on.
        settings: which modules are the head, and the seed.

    Raises:
        TargetError: if PEFT cannot wrap the model.
    """
    from peft import get_peft_model

    heads = fully_trained_modules(model, settings)
    before, size = [(p, p.requires_grad) for p in model.parameters()], count_weights(model)
    config.modules_to_save = list(heads)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream(settings.seed, "peft").initial_seed())
        try:
            with _quiet():
                wrapped = get_peft_model(model, config)
        except ValueError as error:
            raise TargetError(f"PEFT cannot put {config.peft_type} into {type(model).__name__}: {error}") from None
    return Wrapped(wrapped, sites, heads, before, size)


def save_wrapped(
    adapters: Wrapped,
    directory: Path,
    *,
    base_model: str,
    fresh: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write what PEFT itself would write, and ``autolora.json`` beside it, all or nothing.

    What the pretrained weights lack starts at random in every other process: it is written in full.

    Args:
        adapters: what :func:`wrap` gave.
        directory: replaced as a whole if it is there.
        base_model: hub id or path of the backbone.
        fresh: names of the modules and parameters that the pretrained weights lack.
        metadata: more to keep in ``autolora.json``, as JSON.
    """
    tensors = adapters.written()
    config: Any = copy.copy(adapters.model.peft_config[_NAME])
    config.inference_mode, config.base_model_name_or_path = True, base_model
    with adapters.unwrapped() as base:
        owners = sorted({name for name in modules_of(base, fresh) if not under(name, adapters.heads)})
        config.modules_to_save = [*adapters.heads, *owners]
        for key, tensor in base.state_dict().items():
            if under(key, owners):
                tensors.setdefault(f"{adapters.prefix}.{key}", tensor)
        without = [*adapters.heads, *fresh]
        sidecar = sidecar_of(
            adapters, base, base_model, without=without, in_full=config.modules_to_save, metadata=metadata
        )
    for key in ("target_modules", "feedforward_modules"):
        if isinstance(getattr(config, key, None), set):
            setattr(config, key, sorted(getattr(config, key)))
    written = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with replacing_directory(directory) as folder:
        config.save_pretrained(str(folder))
        (folder / WEIGHTS).write_bytes(save(written, metadata={"format": "pt"}))
        (folder / SIDECAR).write_text(dump_json(sidecar), encoding="utf-8")


def load_wrapped(model: nn.Module, directory: Path) -> PeftModel:
    """Put what :func:`save_wrapped` wrote on the backbone that it was trained on, by PEFT's own loader.

    Raises:
        DataError: if a file is missing or damaged.
        BackboneError: if the model is another backbone.
    """
    from peft import PeftModel

    sidecar = read_sidecar(directory)
    assert sidecar is not None
    read_tensors(directory)
    fingerprint = sidecar["fingerprint"]
    check_fingerprint(fingerprint["hashes"], model, fingerprint["without"], backbone_of(sidecar))
    with _quiet():
        return PeftModel.from_pretrained(model, str(directory))


@torch.no_grad()
def merge_wrapped(wrapped: PeftModel) -> nn.Module:
    """The model inside a wrapper with PEFT's factors in its weights, and with the trained head.

    PEFT merges the layers; its own way to take the wrapper off (0.21) fails on a head that is not a single Linear.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    base: nn.Module = wrapped.get_base_model()
    successors: dict[nn.Module, nn.Module] = {}
    for module in base.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
            successors[module] = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            successors[module] = module.modules_to_save[_NAME]
    replace_modules(base, successors)
    return base


@contextmanager
def _quiet() -> Iterator[None]:
    """No word of what PEFT still asks transformers for by an old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        yield


@torch.no_grad()
def logits_of_padded_row(adapters: Wrapped, tokens: int, width: int) -> Tensor:
    """What a wrapped classifier says of a row of so many equal tokens that is padded to a width."""
    model, config = adapters.model, cast("PreTrainedModel", adapters.base).config
    pad = int(config.pad_token_id or 0)
    ids = torch.full((1, width), pad)
    ids[:, :tokens] = 0 if pad else 1
    mask = (torch.arange(width) < tokens).long()[None]
    training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        logits: Tensor = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        return logits.float().cpu()
    finally:
        model.train(training)
