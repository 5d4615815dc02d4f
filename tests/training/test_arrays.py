"""Whole runs on images: what is left behind, resumed, and exported."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.tiny_models import VIT
from peft import PeftModel
from test_resume import Stopper, interrupted_run, outcome, stopper  # noqa: F401  fixture
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTModel

from autolora.backbones import load_classifier
from autolora.compose import check_command_line, compose
from autolora.config import RunConfig
from autolora.errors import ConfigError
from autolora.export import main as export
from autolora.results import RunDirectory
from autolora.run import run_one
from autolora.tasks import digits, digits_vit
from autolora.tasks.records import Arrays
from autolora.training.arrays import ArrayDataModule
from autolora.training.data import FIT, HELDOUT

Configure = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def configure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Configure]:
    """Small runs on a model that is pretrained only a little."""
    folder = tmp_path_factory.mktemp("digits")

    def configured(*overrides: str) -> RunConfig:
        fixed = [f"run_root={folder / 'runs'}", "logger=csv", "max_rank=4", "budget.rank=1", "optim.adapter.lr=5e-3"]
        fixed += ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "trainer.max_epochs=2"]
        given = [override.partition("=")[0] for override in overrides]
        kept = [one for one in fixed if not any(one.startswith((f"{key}=", f"{key}.")) for key in given)]
        return compose(["task=digits", *kept, *overrides])

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setitem(digits_vit.RECIPE, "epochs", 4)
        yield configured


def dev_accuracy(model: Any) -> float:
    dev = digits.adaptation()["dev"]
    with torch.no_grad():
        logits = model.eval()(pixel_values=digits.pixel_values(dev.inputs, 8, 1)).logits
    return float((logits.argmax(1) == torch.tensor(dev.labels)).float().mean())


def test_a_run_is_complete_and_its_exports_have_its_accuracy(configure: Configure, tmp_path: Path) -> None:
    cfg = configure("strategy=autolora", f"run_root={tmp_path / 'runs'}")
    result = run_one(cfg)
    assert (result.status, result.task, result.backbone) == ("complete", "digits", "digits_vit")
    (path,) = cfg.run_root.iterdir()
    directory = RunDirectory(path)
    rows = list(csv.DictReader(directory.predictions.open(newline="")))
    assert [int(row["id"]) for row in rows] == digits.adaptation()["dev"].ids
    assert 0 < result.params.adapter <= result.params.budget
    assert any(json.loads(directory.ranks.read_text()).values())

    for form in ("peft", "merged"):
        export([f"run={path}", f"out={tmp_path / form}", f"format={form}"])
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label[0] == "5"
    base, _ = load_classifier("image", "digits_vit", labels=digits.TASK.labels, head_seed=99)
    stock = PeftModel.from_pretrained(base, str(tmp_path / "peft"))
    assert dev_accuracy(merged) == dev_accuracy(stock) == pytest.approx(result.metrics.value)


def test_interrupted_is_uninterrupted(configure: Configure, stopper: Stopper, tmp_path: Path) -> None:  # noqa: F811
    """With selectors that learn on held-out batches."""
    whole = configure("strategy=autolora_bilevel", f"run_root={tmp_path / 'whole'}")
    run_one(whole)
    broken = configure("strategy=autolora_bilevel", f"run_root={tmp_path / 'broken'}")
    assert interrupted_run(broken, stopper, 9) >= 2
    assert outcome(broken) == outcome(whole)


def test_what_is_trained_in_full_is_exported_as_a_model(configure: Configure, tmp_path: Path) -> None:
    cfg = configure("strategy=full", "budget=none", "trainer.max_epochs=1", f"run_root={tmp_path / 'runs'}")
    result = run_one(cfg)
    (path,) = (tmp_path / "runs").iterdir()
    export([f"run={path}", f"out={tmp_path / 'merged'}", "format=merged"])
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    assert dev_accuracy(merged) == pytest.approx(result.metrics.value)


def test_another_image_model_reads_the_digits_at_its_size(configure: Configure, tmp_path: Path) -> None:
    model = ViTModel(ViTConfig(**VIT | {"image_size": 16, "num_channels": 3}))
    model.save_pretrained(tmp_path / "vit")
    result = run_one(configure(f"backbone.path={tmp_path / 'vit'}", "strategy=uniform", "trainer.max_epochs=1"))
    assert (result.status, result.backbone) == ("complete", "vit")


@pytest.mark.slow
def test_adaptation_is_worth_more_than_a_head(tmp_path: Path) -> None:
    """The frozen features of 0 to 4 do not tell 5 to 9 apart."""
    fixed = ["task=digits", f"run_root={tmp_path}", "logger=csv", "trainer.accelerator=cpu"]
    head = run_one(compose([*fixed, "strategy=head", "budget=none"])).metrics.value
    adapted = run_one(compose([*fixed, "strategy=uniform", "budget.rank=4"])).metrics.value
    assert head is not None
    assert adapted is not None
    assert adapted > head + 0.05
    assert adapted > 0.9


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("task=digits backbone=minilm", "backbone=minilm: task=digits has images, not text"),
        ("task=mnli backbone=digits_vit", "backbone=digits_vit: it reads digits, and task=mnli has none"),
        ("task=digits data.source=mini", "task=digits brings its rows"),
        ("task=digits strategy=prompt", "expected a text classifier, and task=digits has none"),
    ],
)
def test_what_does_not_go_together_is_said(overrides: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_command_line(overrides.split())


def test_a_missing_scikit_learn_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "sklearn" else real(name, *a))
    with pytest.raises(ConfigError, match=r"pip install 'autolora\[digits\]'"):
        check_command_line(["task=digits"])


def test_the_order_is_one_of_the_seed_and_every_row_comes_once() -> None:
    rows = Arrays(torch.arange(10.0)[:, None].numpy(), [0, 1] * 5, list(range(10)))

    def module() -> ArrayDataModule:
        return ArrayDataModule(
            {FIT: rows, HELDOUT: rows},
            "pixel_values",
            torch.from_numpy,
            batch_size=3,
            eval_batch_size=4,
            seed=1,
            num_workers=0,
        )

    loader = module().train_dataloader()
    epochs = [[batch["index"].tolist() for batch in loader] for _ in range(2)]
    assert [sorted(itertools.chain(*epoch)) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert all(torch.equal(batch["pixel_values"][:, 0], batch["index"].float()) for batch in loader)
    later = module()
    later.start = (1, 2)
    assert [batch["index"].tolist() for batch in later.train_dataloader()] == epochs[1][2:]
    assert [len(batch["index"]) for batch in module().ordered_loader(HELDOUT)] == [4, 4, 2]
    assert [batch["index"].tolist() for batch in module().ordered_loader(HELDOUT, 3)] == [[0, 3, 6]]


def test_the_head_is_new_and_drawn_from_its_own_seed(tmp_path: Path) -> None:
    model = ViTForImageClassification(ViTConfig(**VIT))
    model.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    one, fresh = load_classifier("image", "x", path=tmp_path, labels=["a", "b", "c"], head_seed=1)
    two, _ = load_classifier("image", "x", path=tmp_path, labels=["a", "b", "c"], head_seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert fresh == ()
    assert torch.equal(one.classifier.weight, two.classifier.weight)
    assert not torch.equal(one.classifier.weight, model.classifier.weight)
    assert torch.equal(one.vit.layers[0].mlp.fc1.weight, model.vit.layers[0].mlp.fc1.weight)
