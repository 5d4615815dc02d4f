"""The digits: which rows are where, what a model reads of them, and the model that is pretrained on half of them."""

from __future__ import annotations

import builtins
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits

from autolora.errors import DataError
from autolora.tasks import digits, digits_vit
from autolora.tasks.records import fingerprint


def test_every_row_is_in_one_part() -> None:
    parts = {"pretraining": digits.pretraining(), **digits.adaptation()}
    ids = [i for part in parts.values() for i in part.ids]
    assert sorted(ids) == list(range(1797))
    bundled = load_digits()
    for name, part in parts.items():
        first = 0 if name == "pretraining" else 5
        assert [label + first for label in part.labels] == [bundled.target[i] for i in part.ids]
        assert (part.inputs * 16 == bundled.images[part.ids]).all()
        assert set(part.labels) == {0, 1, 2, 3, 4}
    shares = {label: count / 224 for label, count in Counter(parts["dev"].labels).items()}
    train = Counter(parts["train"].labels)
    assert all(abs(share - train[label] / 672) < 0.01 for label, share in shares.items())
    assert (
        fingerprint(digits.adaptation()) == fingerprint(digits.adaptation()) != fingerprint({"train": parts["train"]})
    )


def test_what_a_model_reads() -> None:
    images = digits.pretraining().inputs[:3]
    same = digits.pixel_values(images, 8, 1)
    assert same.shape == (3, 1, 8, 8)
    assert (same.min(), same.max()) == (-1, 1)
    larger = digits.pixel_values(images, 32, 3)
    assert larger.shape == (3, 3, 32, 32)
    assert torch.equal(larger[:, 0], larger[:, 2])
    torch.testing.assert_close(larger.mean((1, 2, 3)), same.mean((1, 2, 3)), rtol=0, atol=0.02)


def test_without_scikit_learn_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install 'autolora\[digits\]'"):
        digits.pretraining()


def test_pretraining_is_kept_and_leaves_the_random_state_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(digits_vit.RECIPE, "epochs", 1)
    before = torch.get_rng_state(), torch.get_num_threads()
    folder = digits_vit.pretrained()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]
    written = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert set(written) == {"config.json", "model.safetensors"}
    monkeypatch.setattr(digits_vit, "pretrain", None)
    assert digits_vit.pretrained() == folder  # not made again
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setitem(digits_vit.RECIPE, "epochs", 1)
    again = digits_vit.pretrained()
    assert {file.name: file.read_bytes() for file in again.iterdir()} == written
