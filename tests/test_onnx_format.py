"""Graphs of the families of encoders, and what is said of models that cannot become one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.tiny_models import make
from onnxruntime import InferenceSession
from torch import Tensor, nn

from autolora.errors import ExportError
from autolora.onnx_format import check_installed, write_onnx


class Tokenizer:
    """What of a tokenizer is asked for: 64 tokens, the first of which is padding."""

    pad_token_id = 0

    def __init__(self, *more: str) -> None:
        self.model_input_names = ["input_ids", "attention_mask", *more]

    def __len__(self) -> int:
        return 64


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("roberta", ()),
        ("deberta_v2", ("token_type_ids",)),  # which its tokenizer gives and its model does not read
        pytest.param("distilbert", (), marks=pytest.mark.slow),
        pytest.param("electra", ("token_type_ids",), marks=pytest.mark.slow),
        pytest.param("gpt2", (), marks=pytest.mark.slow),
        pytest.param("llama", (), marks=pytest.mark.slow),
    ],
)
def test_the_graph_of_a_family_takes_batches_of_any_shape(family: str, more: tuple[str, ...], tmp_path: Path) -> None:
    model: Any = make(family)
    model.config.use_cache = False
    names, difference = write_onnx(model, Tokenizer(*more), tmp_path / "model.onnx", max_length=24)  # type: ignore[arg-type]
    assert names == ["input_ids", "attention_mask", *more]
    assert difference < 1e-6
    session = InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for rows, length in ((1, 3), (4, 11), (13, 2)):
        ids = torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[1:, length // 2 :] = 0
        batch = {"input_ids": ids * mask, "attention_mask": mask} | {name: torch.zeros_like(ids) for name in more}
        with torch.no_grad():
            expected = model(**batch).logits
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-6)


def test_a_model_that_cannot_be_traced(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return input_ids.float() if input_ids.sum() > 3 else attention_mask.float()

    with pytest.raises(ExportError, match=r"format=onnx: torch.onnx cannot trace Branching: .*; use format=merged"):
        write_onnx(Branching(), Tokenizer(), tmp_path / "model.onnx", max_length=24)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_every_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"onnx, onnxruntime, onnxscript are not installed: pip install '.*\[onnx\]'"):
        check_installed()
