"""Take a trained adapter out of its run directory: ``python -m autolora.export run=DIR out=DIR``; see ``--help``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml

from autolora.config import GlueTaskConfig, PathLike, PlantedConfig, RunConfig, Section
from autolora.errors import AutoLoRAError, ConfigError, DataError
from autolora.files import replacing_directory
from autolora.results import RunDirectory
from autolora.validate import parse, require

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_HELP = """\
usage: {program} run=DIR out=DIR [format=peft|merged]

Take the trained adapter out of the run directory of a complete run.

  run=DIR         the run directory: what `autolora.train` names after "written to"
  out=DIR         a folder that is not there yet, or empty
  format=peft     a LoRA adapter that peft.PeftModel.from_pretrained loads (the default)
  format=merged   the whole model, the adapter merged into its weights, that
                  transformers.AutoModelForSequenceClassification.from_pretrained loads without PEFT or AutoLoRA

Before anything is written, the adapter is loaded into the backbone that it was trained on.
Exit codes: 0 done, 1 the export failed, 2 the command line is wrong.
"""


class Settings(Section):
    """The command line."""

    run: PathLike
    out: PathLike
    format: Literal["peft", "merged"] = "peft"


def main(argv: Sequence[str] | None = None) -> None:
    """Check the command line, then export.

    Args:
        argv: arguments in place of ``sys.argv[1:]``.

    Raises:
        SystemExit: 1 if the export fails with an error that the user can mend, 2 if the command line is wrong.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        program = "autolora-export" if Path(sys.argv[0]).name == "autolora-export" else "python -m autolora.export"
        print(_HELP.format(program=program), end="")
        return
    try:
        settings = parse(Settings, arguments)
    except ConfigError as error:
        print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        sys.exit(2)
    try:
        print(export(settings))
    except AutoLoRAError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def export(settings: Settings) -> str:
    """Write ``settings.out``, as a whole or not at all, and say what it is.

    Raises:
        DataError: if the run is not complete, its files are damaged, or there is something in ``out``.
        BackboneError: if the backbone is nowhere to be found, or is another one than the run's.
        TargetError: if the adapter cannot be loaded or merged.
    """
    directory, out = RunDirectory(settings.run), settings.out
    cfg = read_run(directory)
    if settings.format == "merged" and isinstance(cfg.task, PlantedConfig):
        raise DataError("format=merged: task=planted has no pretrained model to merge into: use format=peft")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"out={out}: expected a folder that is not there yet, or empty: name another")
    from autolora.adapters.bare import merged
    from autolora.adapters.peft_format import load_peft
    from autolora.backbones import save_pretrained

    model, tokenizer = build_model(cfg)
    adapters = load_peft(model, directory.adapter)
    with replacing_directory(out) as folder:
        if settings.format == "peft":
            shutil.copytree(directory.adapter, folder, dirs_exist_ok=True)
        else:
            assert tokenizer is not None
            with merged(adapters) as plain:
                save_pretrained(plain, tokenizer, folder)
    loader = "peft.PeftModel" if settings.format == "peft" else "transformers.AutoModelForSequenceClassification"
    return f"written to {out}; load it with {loader}.from_pretrained"


def read_run(directory: RunDirectory) -> RunConfig:
    """The configuration of a complete run.

    Where the data were does not matter any more, and a backbone in a folder is looked for where it was found then.

    Raises:
        DataError: if the run is not complete, or its files are damaged or of another version.
    """
    from autolora.adapters.peft_format import read_sidecar

    status = directory.read_result().status
    if status != "complete":
        raise DataError(f"{directory.path}: expected a complete run, this one is {status}; give its command again")
    sidecar = read_sidecar(directory.adapter)
    if sidecar is None:
        raise DataError(f"{directory.path}: expected the folder adapter/ with autolora.json; run again with force=true")
    try:
        tree = yaml.safe_load(directory.config.read_text(encoding="utf-8"))
        if tree["backbone"]["path"] is not None:
            tree["backbone"]["path"] = sidecar["base_model"]
        return require({key: value for key, value in tree.items() if key != "data"})
    except (OSError, yaml.YAMLError, TypeError, KeyError, ConfigError) as error:
        raise DataError(f"{directory.config}: cannot be used: {error}") from None


def build_model(cfg: RunConfig) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """The backbone of a run with a new head, and its tokenizer, where it has one."""
    if isinstance(cfg.task, GlueTaskConfig):
        return _classifier(cfg, cfg.task)
    from autolora.parts import make_problem

    problem = make_problem(cfg)
    problem.build()
    return problem.model, None


def _classifier(cfg: RunConfig, task: GlueTaskConfig) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    from autolora.backbones import load_backbone
    from autolora.tasks.glue import GLUE

    glue = GLUE[task.name]
    backbone = load_backbone(**cfg.backbone.weights, num_labels=glue.num_labels, problem_type=glue.problem_type)
    if glue.labels is not None:
        backbone.model.config.id2label = dict(enumerate(glue.labels))
        backbone.model.config.label2id = {label: i for i, label in enumerate(glue.labels)}
    return backbone.model, backbone.tokenizer


if __name__ == "__main__":
    main()
