"""Take a trained adapter out of its run directory: ``python -m autolora.export run=DIR out=DIR``; see ``--help``."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from autolora.command import carry_out
from autolora.config import DigitsConfig, GlueTaskConfig, PathLike, RunConfig, Section, SpeechConfig
from autolora.errors import BackboneError, ConfigError, DataError
from autolora.files import read_json, replacing_directory, require_empty
from autolora.onnx_format import check_installed
from autolora.results import RunDirectory
from autolora.strategies.outside import PEFT_MISSING
from autolora.validate import parse, require

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from autolora.backbones import Modality

_HELP = """\
usage: {program} run=DIR out=DIR [format=peft|merged|onnx] [backbone.path=DIR]

Take the trained adapter out of the run directory of a complete run.

  run=DIR         the run directory: what `autolora.train` names after "written to"
  out=DIR         a folder that is not there yet, or empty
  format=peft     the adapter, that peft.PeftModel.from_pretrained loads (the default)
  format=merged   the whole model, the adapter merged into its weights, that
                  transformers.AutoModelForSequenceClassification (images: AutoModelForImageClassification)
                  loads without PEFT or AutoLoRA
  format=onnx     the merged model as model.onnx for batches of any shape, with its tokenizer and config.json;
                  needs the extra autolora[onnx]
  backbone.path=DIR   where the pretrained model is now, if it is not where the run has found it

strategy=full has all but the first, strategy=prompt and strategy=prefix have the first only. A merged model has float32
weights: of a quantised backbone, those that its codes stand for.

Before anything is written, the adapter is loaded into the backbone that it was trained on. An ONNX file is kept only if
onnxruntime computes the model's logits from it, on batches of several shapes.
Exit codes: 0 done, 1 the export failed, 2 the command line is wrong.
"""

# PEFT's names for what only PEFT can load.
VIRTUAL_TOKENS = ("PROMPT_TUNING", "PREFIX_TUNING")
_BY_PEFT = (*VIRTUAL_TOKENS, "IA3")


class Place(Section):
    """Where the pretrained model is, if not where the run has found it."""

    path: PathLike | None = None


class Settings(Section):
    """The command line."""

    run: PathLike
    out: PathLike
    format: Literal["peft", "merged", "onnx"] = "peft"
    backbone: Place = Place()


def main(argv: Sequence[str] | None = None) -> None:
    """Check the command line, then export.

    Args:
        argv: arguments in place of ``sys.argv[1:]``.

    Raises:
        SystemExit: 1 if the export fails with an error that the user can mend, 2 if the command line is wrong.
    """
    program = "autolora-export" if Path(sys.argv[0]).name == "autolora-export" else "python -m autolora.export"
    carry_out(lambda arguments: print(export(parse(Settings, arguments))), argv, _HELP.format(program=program))


def export(settings: Settings) -> str:
    """Write ``settings.out``, as a whole or not at all, and say what it is.

    Raises:
        DataError: if the run is not complete, its files are damaged, or there is something in ``out``.
        BackboneError: if the backbone is nowhere to be found, or is another one than the run's.
        TargetError: if the adapter cannot be loaded or merged.
        ExportError: if the packages that a format needs are missing, or a graph is not the model.
        PathError: if ``out`` cannot be made.
        DiskFullError: if there is no space.
    """
    directory, out = run_directory(settings.run), settings.out
    cfg = read_run(directory, "exported as one model", settings.backbone.path)
    kind = kind_of(directory)
    _refuse(cfg, kind, settings.format)
    require_empty(out)
    from autolora.parts import compression

    trained, tokenizer = load(cfg, kind, directory.adapter)
    how = str(compression(cfg))
    with replacing_directory(out) as folder:
        if settings.format == "peft":
            for file in directory.adapter.iterdir():
                shutil.copyfile(file, folder / file.name)
            belongs = f"; it belongs to the backbone with {how}" if how else ""
            use = f"load it with peft.PeftModel.from_pretrained{belongs}"
        else:
            if cfg.backbone.quantization != "none":
                print(f"warning: {how}: merged weights are written in float32, larger than the codes", file=sys.stderr)
            with plain(trained, kind) as model:
                use = _write_model(model, tokenizer, folder, settings.format, cfg)
    return f"written to {out}; {use}"


def _write_model(model: Any, tokenizer: PreTrainedTokenizerBase | None, folder: Path, form: str, cfg: RunConfig) -> str:
    """Write a plain model with its tokenizer, if it has one, and say how it is used."""
    from autolora.backbones import classifier_class, save_pretrained

    save_pretrained(model, tokenizer, folder, weights=form == "merged")
    if form == "merged":
        return f"load it with transformers.{classifier_class(_modality(cfg))}.from_pretrained"
    from autolora.onnx_format import OPSET, write_onnx

    assert tokenizer is not None
    inputs, difference = write_onnx(model, tokenizer, folder / "model.onnx", max_length=cfg.data.max_length)
    return (
        f"load model.onnx with onnxruntime.InferenceSession: opset {OPSET}, inputs {', '.join(inputs)} (int64, batch x "
        f"length), logits within {difference:.1e} of the model's"
    )


def run_directory(path: Path) -> RunDirectory:
    """The directory of a run, which its result stands for too."""
    directory = RunDirectory(path)
    return RunDirectory(path.parent) if path.name == directory.result.name else directory


def read_run(directory: RunDirectory, purpose: str, backbone: Path | None = None) -> RunConfig:
    """The configuration of a complete run.

    Where the data were does not matter any more, and a backbone in a folder is looked for where it was found then.

    Args:
        directory: of the run.
        purpose: what the run is to be, for messages: "predicted with".
        backbone: folder to take the backbone from instead.

    Raises:
        DataError: if the run is not complete, or its files are damaged or of another version.
        BackboneError: if the folder of the backbone is gone.
    """
    status = directory.read_result().status
    if status != "complete":
        raise DataError(f"{directory.path}: expected a complete run, this one is {status}; give its command again")
    from autolora.adapters.peft_format import read_sidecar

    sidecar = read_sidecar(directory.adapter)
    if sidecar is None and (of_tasks := sorted(path.parent.name for path in directory.adapter.glob("*/autolora.json"))):
        raise DataError(
            f"{directory.path}: a run on several tasks cannot be {purpose}. adapter/TASK has the adapter of one task "
            f"({', '.join(of_tasks)}) in PEFT's format, to be copied as it is: on the backbone with a head for the "
            "task's labels, peft.PeftModel.from_pretrained loads it, and so do load_peft and AdapterBank of autolora"
        )
    if sidecar is None:
        raise DataError(f"{directory.path}: expected the folder adapter/ with autolora.json; run again with force=true")
    try:
        tree = yaml.safe_load(directory.config.read_text(encoding="utf-8"))
        if tree["backbone"]["path"] is not None or backbone is not None:
            folder = backbone or Path(sidecar["base_model"])
            if not folder.is_dir():
                raise BackboneError(
                    f"{folder}: there is no such folder; the run was trained on {sidecar['base_model']}: "
                    "say with backbone.path=DIR where that is now"
                )
            tree["backbone"]["path"] = str(folder)
        tree["data"] = {key: value for key, value in tree["data"].items() if key not in ("source", "dir", "cache_dir")}
        return require(tree)
    except (OSError, yaml.YAMLError, TypeError, KeyError, ConfigError) as error:
        raise DataError(f"{directory.config}: cannot be used: {error}") from None


def kind_of(directory: RunDirectory) -> str:
    """PEFT's name for what a run has trained (``LORA``), or ``MODEL`` for a whole model.

    Raises:
        DataError: if that cannot be told.
    """
    file = directory.adapter / "adapter_config.json"
    if any(directory.adapter.glob("model*.safetensors")):
        return "MODEL"
    config = read_json(file, f"{file.parent}: there is no {file.name}; run again with force=true")
    return str(config.get("peft_type")) if isinstance(config, dict) else "none"


def _refuse(cfg: RunConfig, kind: str, form: str) -> None:
    """What cannot be had in a format."""
    strategy = f"strategy={cfg.strategy.name}"
    if kind == "MODEL" and not isinstance(cfg.task, GlueTaskConfig) and _modality(cfg) is None:
        raise DataError(
            f"task={cfg.task.name}, {strategy}: no library loads this model: adapter/ of the run has its state"
        )
    if form == "peft" and kind == "MODEL":
        raise DataError(
            f"format=peft: {strategy} has trained the whole model, so there is no adapter: use format=merged"
        )
    if form == "onnx" and _modality(cfg) is not None:
        raise DataError(f"format=onnx: task={cfg.task.name}: graphs are written of models of text: use format=merged")
    if form != "peft" and not isinstance(cfg.task, GlueTaskConfig) and _modality(cfg) is None:
        raise DataError(f"format={form}: task={cfg.task.name} has no classifier to merge into: use format=peft")
    if form != "peft" and kind in VIRTUAL_TOKENS:
        raise DataError(
            f"format={form}: {strategy} trains virtual tokens, which no weight can take in: use format=peft"
        )
    check_peft(cfg, kind)
    if form == "onnx":
        check_installed()


def check_peft(cfg: RunConfig, kind: str) -> None:
    """See that PEFT is there, if what was trained needs it.

    Raises:
        DataError: if it is not.
    """
    if kind in _BY_PEFT and importlib.util.find_spec("peft") is None:
        raise DataError(f"strategy={cfg.strategy.name}: {PEFT_MISSING}")


def load(cfg: RunConfig, kind: str, folder: Path) -> tuple[Any, PreTrainedTokenizerBase | None]:
    """What a run has trained, on its backbone; and the tokenizer, where it has one.

    Raises:
        DataError: if a file is damaged.
        BackboneError: if the backbone is nowhere to be found, or is another one than the run's.
        TargetError: if the adapter does not fit.
    """
    from autolora.adapters.fingerprint import fingerprint
    from autolora.adapters.peft_format import load_peft, read_sidecar
    from autolora.adapters.wrapped import load_wrapped
    from autolora.backbones import load_pretrained

    if kind == "MODEL":
        whole, its_tokenizer = load_pretrained(folder, _modality(cfg))
        if fingerprint(whole) != (read_sidecar(folder) or {})["fingerprint"]["hashes"]:
            raise DataError(f"{folder}: the weights are not those of the run; run again with force=true")
        return whole, its_tokenizer
    model, tokenizer = build_model(cfg) if _modality(cfg) is None else (_of_labels(cfg, folder), None)
    return (load_wrapped if kind in _BY_PEFT else load_peft)(model, folder), tokenizer


def _of_labels(cfg: RunConfig, folder: Path) -> nn.Module:
    """The backbone of a run on images or sound, with a head for the labels that its adapter names."""
    from autolora.adapters.peft_format import read_sidecar
    from autolora.backbones import load_classifier
    from autolora.parts import seed_for

    modality, labels = _modality(cfg), (read_sidecar(folder) or {})["run"]["labels"]
    assert modality is not None
    return load_classifier(modality, **cfg.backbone.weights, labels=labels, head_seed=seed_for(cfg.seed, "head"))[0]


def _modality(cfg: RunConfig) -> Modality | None:
    """What the model of a run reads, if that is no text."""
    if isinstance(cfg.task, SpeechConfig):
        return "audio"
    return "image" if isinstance(cfg.task, DigitsConfig) else None


@contextmanager
def plain(trained: Any, kind: str) -> Iterator[nn.Module]:
    """Inside this context what was trained is a plain model; quantised weights have become float32."""
    from autolora.adapters.bare import merged
    from autolora.adapters.compress import restore
    from autolora.adapters.wrapped import merge_wrapped

    if kind == "MODEL":
        yield trained
        return
    restore(trained if kind in _BY_PEFT else trained.model)
    if kind in _BY_PEFT:
        yield merge_wrapped(trained)
    else:
        with merged(trained) as model:
            yield model


def build_model(cfg: RunConfig) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """The backbone of a run with the head that it began with, and its tokenizer, where it has one.

    A regression head began at the mean of its training rows, which are not looked for: it is in the adapter.
    """
    if isinstance(cfg.task, GlueTaskConfig):
        return _classifier(cfg, cfg.task)
    from autolora.parts import make_problem

    problem = make_problem(cfg)
    problem.build()
    return problem.model, None


def _classifier(cfg: RunConfig, task: GlueTaskConfig) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    from autolora.backbones import load_backbone
    from autolora.parts import compression, seed_for
    from autolora.tasks.glue import GLUE

    glue = GLUE[task.name]
    backbone = load_backbone(
        **cfg.backbone.weights,
        num_labels=glue.num_labels,
        problem_type=glue.problem_type,
        labels=glue.labels,
        head_seed=seed_for(cfg.seed, "head"),
        compression=compression(cfg),
    )
    return backbone.model, backbone.tokenizer


if __name__ == "__main__":
    main()
