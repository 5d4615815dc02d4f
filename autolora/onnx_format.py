"""A classifier as an ONNX graph that takes batches of any shape, checked against the model in onnxruntime.

torch and the packages of the extra are imported where they are used.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from autolora.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OPSET = 18
"""Version of ONNX's operators that graphs are written in: the one that torch translates to without conversion."""

TOLERANCE = 1e-4
"""How far a logit z of the graph may be from the model's: so much times 1 + abs(z)."""

PACKAGES = ("onnx", "onnxruntime", "onnxscript")

_TRACED = (2, 8)  # a size of 1 would be taken for a constant


def check_installed() -> None:
    """See that the packages of the extra are there.

    Raises:
        ExportError: naming those that are not.
    """
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ExportError(f"format=onnx: {', '.join(missing)} {verb} not installed: pip install 'autolora[onnx]'")


def write_onnx(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path, *, max_length: int
) -> tuple[list[str], float]:
    """Write a sequence classifier, and compare what onnxruntime makes of the file with the model.

    The inputs are those that the tokenizer gives (``input_ids``, ``attention_mask`` and, with segments,
    ``token_type_ids``): int64 of shape ``(batch, length)``, both free. The output is ``logits``, float32 of shape
    ``(batch, labels)``. Weights keep their names; those of a model above 2 GB are in a second file beside it.

    Args:
        model: in float32 on the CPU; it is put into evaluation mode.
        tokenizer: of the model.
        file: is written.
        max_length: the longest rows that are compared, in tokens.

    Returns:
        Names of the inputs, and the largest difference of a logit.

    Raises:
        ExportError: if the model cannot be traced, or the graph computes something else.
    """
    import torch
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    model.eval()
    example = _batch(model, tokenizer, *_TRACED)
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                (),
                kwargs=example,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(example),
                output_names=["logits"],
                dynamic_shapes={name: free for name in example},
                verbose=False,
            )
    except Exception as error:  # whatever a model's code does that cannot be traced
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ExportError(
            f"format=onnx: torch.onnx cannot trace {type(model).__name__}: {cause}; use format=merged"
        ) from error
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)  # every node says in which file of this machine it was made
    program.save(file)
    return list(example), compare(file, model, tokenizer, max_length)


def compare(file: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> float:
    """The largest difference between a logit of a graph and of the model, on batches of other shapes than the traced.

    Raises:
        ExportError: if one is larger than :data:`TOLERANCE` allows.
    """
    import torch
    from onnxruntime import InferenceSession

    session = InferenceSession(str(file), providers=["CPUExecutionProvider"])
    largest = 0.0
    for rows, length in ((1, 1), (1, max_length), (3, 2 * _TRACED[1] + 1), (5, max_length)):
        batch = _batch(model, tokenizer, rows, length)
        with torch.no_grad():
            expected = model(**batch).logits
        (found,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in batch.items()})
        difference = (torch.from_numpy(found) - expected).abs()
        if not (difference <= TOLERANCE * (1 + expected.abs())).all():  # NaN is no small difference either
            raise ExportError(
                f"format=onnx: onnxruntime computes something else than the model: on {rows} rows of {length} tokens "
                f"a logit differs by {float(difference.max()):.2e}, and at most {TOLERANCE:g} * (1 + |logit|) is "
                "rounding; use format=merged"
            )
        largest = max(largest, float(difference.max()))
    return largest


def _batch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int, length: int) -> dict[str, Tensor]:
    """Random tokens; every row after the first is shorter by one than the row before, down to one, and padded."""
    import torch

    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    ids = torch.randint(len(tokenizer), (rows, length), generator=torch.Generator().manual_seed(rows * length))
    ids[ids == pad] = (pad + 1) % len(tokenizer)
    place = torch.arange(length)
    mask = (place < (length - torch.arange(rows)).clamp(min=1)[:, None]).long()
    batch = {"input_ids": torch.where(mask > 0, ids, pad), "attention_mask": mask}
    if "token_type_ids" in tokenizer.model_input_names:
        second = min(1, max(0, int(getattr(model.config, "type_vocab_size", 2)) - 1))
        batch["token_type_ids"] = mask * (place >= length // 2) * second
    return batch


@contextmanager
def _quiet() -> Iterator[None]:
    """No word of what the exporter did not fold, of packages for images, and of what torch deprecates in itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
