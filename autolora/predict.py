"""What a trained run says of new examples: ``python -m autolora.predict run=DIR``; see ``--help``."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from autolora.command import carry_out
from autolora.config import Count, GlueTaskConfig, PathLike, RunConfig, Section
from autolora.errors import ConfigError, DataError, DiskFullError
from autolora.export import VIRTUAL_TOKENS, Place, check_peft, kind_of, load, plain, read_run, run_directory
from autolora.files import replacing, writing
from autolora.tasks.examples import Example, Row, Stream, form_of, read_batches
from autolora.tasks.glue import GLUE, GlueTask
from autolora.validate import parse

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

_HELP = """\
usage: {program} run=DIR [input=FILE|-] [out=FILE|-] [batch_size=32] [device=auto] [backbone.path=DIR]

Predict examples with what a complete run has trained, one line of JSON for each.

  run=DIR             the run directory: what `autolora.train` names after "written to"
  input=FILE          examples; without it, or as -, standard input
  out=FILE            predictions, written as a whole at the end; without it, or as -, standard output, batch by batch
  batch_size=32       at most so many examples at once; a batch is what has arrived
  device=auto         cpu, cuda or mps; auto is the fastest that is there
  backbone.path=DIR   where the pretrained model is now, if it is not where the run has found it

Examples are objects of JSON, one a line, with the text columns of the task as keys:

{tasks}

or, in a file *.tsv or *.csv, rows under a header with these names, a line each. GLUE's own names of the columns will
do, and what else there is does not matter. For each row, in order:

  {{"line": 1, "label": "equivalent", "probabilities": {{"not_equivalent": 0.1, "equivalent": 0.9}}}}
  {{"line": 2, "score": 3.2}}               where the task is a regression
  {{"line": 3, "error": "sentence1: expected text, got a number"}}     also on standard error

Exit codes: 0 done, 1 it failed, 2 the command line is wrong, 3 some rows have an error and all others are predicted,
130 Ctrl-C, 141 nobody reads the output any more.
"""

_STANDARD = Path("-")
_NO_READER = 141  # 128 + SIGPIPE, as a shell counts


class Settings(Section):
    """The command line."""

    run: PathLike
    input: PathLike = _STANDARD
    out: PathLike = _STANDARD
    batch_size: Count = 32
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    backbone: Place = Place()


def main(argv: Sequence[str] | None = None) -> None:
    """Check the command line, then predict.

    Args:
        argv: arguments in place of ``sys.argv[1:]``.

    Raises:
        SystemExit: with the codes that the help text lists, if it is not 0.
    """
    carry_out(_predict, argv, _help())


def _predict(arguments: Sequence[str]) -> int:
    try:
        return 3 if predict(parse(Settings, arguments)) else 0
    except BrokenPipeError:
        return _NO_READER


def predict(settings: Settings) -> int:
    """Read ``settings.input`` and write ``settings.out``, batch by batch.

    Returns:
        How many rows have an error in place of a prediction.

    Raises:
        DataError: if the run is not complete, has no text task, or its files are damaged; if the input is not there or
            lacks a header.
        BackboneError: if the backbone is nowhere to be found, or is another one than the run's.
        ConfigError: if there is no such device.
        PathError: if the output cannot be made.
        DiskFullError: if there is no space.
    """
    with _opened(settings.input) as stream:
        directory = run_directory(settings.run)
        cfg, kind = read_run(directory, "predicted with", settings.backbone.path), kind_of(directory)
        if not isinstance(cfg.task, GlueTaskConfig):
            raise DataError(
                f"task={cfg.task.name}: expected a run of a task on text: there are no examples of this one"
            )
        check_peft(cfg, kind)
        task = GLUE[cfg.task.name]
        batches = read_batches(stream, task, form_of(settings.input), settings.batch_size, str(settings.input))
        with _predictor(cfg, task, kind, directory.adapter, settings.device) as predictor, _target(settings.out) as out:
            return _answer(predictor, batches, out)


def _answer(predictor: Predictor, batches: Iterable[Sequence[Row]], out: IO[str]) -> int:
    """Write a line for each row, a batch before the next is read; returns how many have an error."""
    rows = wrong = 0
    for batch in batches:
        answers = predictor.answers(batch)
        out.write("".join(json.dumps(answer, allow_nan=False) + "\n" for answer in answers))
        out.flush()
        faults = [answer for answer in answers if "error" in answer]
        for answer in faults:
            print(f"line {answer['line']}: {answer['error']}", file=sys.stderr)
        rows, wrong = rows + len(answers), wrong + len(faults)
    if wrong:
        print(f"{wrong:,} of {rows:,} rows have an error in place of a prediction", file=sys.stderr)
    return wrong


@dataclass(frozen=True)
class Predictor:
    """A trained model that answers rows.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        task: names the classes.
        max_length: tokens that a row is cut to, as in training.
        device: of the model.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    task: GlueTask
    max_length: int
    device: torch.device

    def answers(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """What is written for each row."""
        examples = [row for row in rows if isinstance(row, Example)]
        predictions = iter(self.predictions([example.texts for example in examples]) if examples else [])
        return [
            {"line": row.line} | (next(predictions) if isinstance(row, Example) else {"error": row.reason})
            for row in rows
        ]

    def predictions(self, texts: Sequence[tuple[str, ...]]) -> list[dict[str, Any]]:
        """``label`` and ``probabilities``, or ``score``, for the texts of each row."""
        logits = self.logits(texts)
        if self.task.labels is None:
            found = [{"score": score} for score in logits[:, 0].tolist()]
        else:
            probabilities = logits.double().softmax(1).tolist()
            winners = logits.argmax(1).tolist()
            found = [
                {"label": self.task.labels[winner], "probabilities": dict(zip(self.task.labels, row, strict=True))}
                for winner, row in zip(winners, probabilities, strict=True)
            ]
        finite = logits.isfinite().all(1).tolist()
        wrong = {"error": "the model's outputs are not finite"}
        return [answer if fine else wrong for answer, fine in zip(found, finite, strict=True)]

    def logits(self, texts: Sequence[tuple[str, ...]]) -> Tensor:
        """Outputs in float32, shape ``(rows, labels)``; padded to the longest row."""
        import torch

        from autolora.tasks.records import Split
        from autolora.training.batches import TokenBatches, tokenize

        columns = [list(column) for column in zip(*texts, strict=True)]
        places = list(range(len(texts)))
        split = Split(columns[0], columns[1] if len(columns) == 2 else None, [0] * len(texts), places)
        pad = self.tokenizer.pad_token_id
        assert isinstance(pad, int)
        tokens = tokenize(split, self.tokenizer, self.max_length)
        padded = TokenBatches(
            tokens, split.labels, pad_id=pad, max_length=self.max_length, pad_type=self.tokenizer.pad_token_type_id
        )[places]
        inputs = {key: value.to(self.device) for key, value in padded.items() if key not in ("labels", "index")}
        with torch.inference_mode():
            outputs: Tensor = self.model(**inputs).logits
        return outputs.float().cpu()


@contextmanager
def _predictor(cfg: RunConfig, task: GlueTask, kind: str, folder: Path, device: str) -> Iterator[Predictor]:
    """The model of a run, with its adapter in the weights where that is the same function."""
    place = _device(device)
    trained, tokenizer = load(cfg, kind, folder)
    assert tokenizer is not None
    with _fastest(trained, kind) as model:
        yield Predictor(model.to(place).eval(), tokenizer, task, cfg.data.max_length, place)


@contextmanager
def _fastest(trained: Any, kind: str) -> Iterator[nn.Module]:
    from autolora.adapters import Adapters

    if kind in VIRTUAL_TOKENS:
        yield trained
    elif isinstance(trained, Adapters) and not all(layer.merges_precisely for layer in trained.layers.values()):
        yield trained.model
    else:
        with plain(trained, kind) as model:
            yield model


def _device(name: str) -> torch.device:
    """The device that is asked for.

    Raises:
        ConfigError: if it is not there.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, found in there.items() if found))
    if not there[name]:
        found = ", ".join(device for device, is_there in there.items() if is_there)
        raise ConfigError(f"device={name}: expected a device that is there, which are: {found}")
    return torch.device(name)


@contextmanager
def _opened(path: Path) -> Iterator[Stream]:
    if path == _STANDARD:
        yield sys.stdin.buffer  # type: ignore[misc]
        return
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"input={path}: expected a file, it cannot be read ({error.strerror})") from None
    with file:
        yield file


@contextmanager
def _target(path: Path) -> Iterator[IO[str]]:
    """Where predictions go. A file is replaced as a whole; a device or a pipe that has a name is written to."""
    if path == _STANDARD:
        with _standard_output() as stream:
            yield stream
    elif path.exists() and not path.is_file():
        with writing(path), path.open("w", encoding="utf-8") as stream:
            yield stream
    else:
        with replacing(path) as file:
            yield file


@contextmanager
def _standard_output() -> Iterator[IO[str]]:
    try:
        yield sys.stdout
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left when it ends
        if error.errno == errno.ENOSPC:
            raise DiskFullError("standard output: no space left; free some and repeat the command") from None
        raise


def _help() -> str:
    tasks = "\n".join(f"  {name:<6} {', '.join(task.fields)}" for name, task in GLUE.items())
    program = "autolora-predict" if Path(sys.argv[0]).name == "autolora-predict" else "python -m autolora.predict"
    return _HELP.format(program=program, tasks=tasks)


if __name__ == "__main__":
    main()
