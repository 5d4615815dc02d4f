"""Several tasks on one adapter: whose batches, heads and losses are whose, and a run of it from end to end."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import Stopper, directory_in, interrupted_run, outcome, stopper  # noqa: F401  fixture
from torch.nn import functional as F

from autolora.adapters.peft_format import load_peft
from autolora.analyze import read_trained
from autolora.backbones import load_backbone
from autolora.compose import compose
from autolora.config import RunConfig
from autolora.errors import DataError
from autolora.export import Settings as ExportSettings
from autolora.export import export
from autolora.parts import make_problem
from autolora.predict import Settings as PredictSettings
from autolora.predict import predict
from autolora.run import run_one
from autolora.tasks.glue import GLUE
from autolora.training.mixture import Mixture
from autolora.training.problem import Outputs, evaluate
from autolora.training.text import TextProblem

TASKS = ("rte", "stsb", "mnli")


@pytest.fixture
def configured(tiny_bert_dir: Path, tmp_path: Path) -> Any:
    def make(*overrides: str) -> RunConfig:
        fixed = (
            "task=mixture", f"task.tasks=[{','.join(TASKS)}]", "data.source=mini", "data.max_train=40",
            "data.batch_size=8", f"data.cache_dir={tmp_path / 'cache'}", f"backbone.path={tiny_bert_dir}",
            f"run_root={tmp_path / 'runs'}", "logger=csv", "max_rank=4", "budget.rank=2", "trainer.accelerator=cpu",
            "trainer.precision=32-true", "trainer.enable_progress_bar=false", "trainer.max_epochs=2",
        )  # fmt: skip
        given = {one.partition("=")[0]: one for one in (*fixed, *overrides)}
        return compose(list(given.values()))

    return make


def built(cfg: RunConfig) -> Mixture:
    problem = make_problem(cfg)
    problem.build()
    assert isinstance(problem, Mixture)
    return problem


def alone(configured: Any, name: str) -> TextProblem:
    problem = make_problem(configured().model_copy(update={"task": compose([f"task={name}"]).task}))
    problem.build()
    assert isinstance(problem, TextProblem)
    return problem


def test_every_task_has_the_batches_and_the_head_that_it_has_alone(configured: Any) -> None:
    problem = built(configured())
    for epoch in range(2):
        batches = list(problem.datamodule.train_dataloader())
        assert len({int(batch["task"]) for batch in batches[:6]}) > 1  # in no order of tasks
        for task, name in enumerate(TASKS):
            own = alone(configured, name)
            loader = own.datamodule.train_dataloader()
            loader.sampler.set_epoch(epoch)
            expected = sorted(batch["input_ids"].tolist() for batch in loader)
            assert sorted(batch["input_ids"].tolist() for batch in batches if int(batch["task"]) == task) == expected
            if epoch == 0:
                with problem.alone(task):
                    state = problem.model.state_dict()
                    assert all(torch.equal(state[key], value) for key, value in own.model.state_dict().items())
        problem.datamodule.start = (epoch + 1, 0)


def test_orders_of_epochs_differ_and_a_pass_can_begin_in_the_middle(configured: Any) -> None:
    data = built(configured()).datamodule
    first, second = ([batch["input_ids"].tolist() for batch in loader] for loader in [data.train_dataloader()] * 2)
    assert first != second
    assert sorted(map(str, first)) != first
    data.start = (1, 4)
    assert [batch["input_ids"].tolist() for batch in data.train_dataloader()] == second[4:]


def test_losses_and_logits_are_those_of_the_batchs_task(configured: Any) -> None:
    problem = built(configured())
    model = problem.model.eval()
    losses = {
        "rte": F.cross_entropy,
        "stsb": lambda logits, labels: F.mse_loss(logits[:, 0], labels.float()),
        "mnli": F.cross_entropy,
    }
    for batch in list(problem.datamodule.train_dataloader())[:8]:
        task = int(batch["task"])
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
        with problem.alone(task) as part:
            logits = model(**inputs).logits
        labels = batch["labels"][:, 0]
        expected = losses[part.name](logits, labels if part.task.regression else labels.long())
        torch.testing.assert_close(problem.loss(model, batch), expected)
        padded = problem.forward(model, batch)
        assert padded.shape[1] == 3
        torch.testing.assert_close(padded[:, : logits.shape[1]], logits)
    problem.loss(model, batch).backward()
    (heads,) = problem.heads
    for task, head in enumerate(heads.of_task):
        assert (head.weight.grad is not None) == (task == int(batch["task"]))


def test_held_out_rows_are_scored_by_task(configured: Any) -> None:
    problem = built(configured("data.max_train=400"))
    together = evaluate(problem, problem.model, "heldout")
    scores = problem.scores({"heldout": together})
    primary = []
    for task, part in enumerate(problem.parts):
        with problem.alone(task):
            own = part.scores({"heldout": evaluate(part, problem.model, "heldout")})
        assert own.value is not None
        primary.append(own.value)
        for name, value in own.all.items():
            assert scores.all[f"{part.name}/{name}"] == pytest.approx(value)
    assert scores.value == pytest.approx(sum(primary) / 3)
    total = 0.0
    for task, part in enumerate(problem.parts):
        with problem.alone(task):
            own = evaluate(part, problem.model, "heldout")
        total += len(own.labels) * float(part.criterion(own.logits, own.labels))
    whole = float(problem.criterion(together.logits, together.labels))
    assert whole == pytest.approx(total / len(together.labels))


def test_an_undefined_score_leaves_the_average_undefined(configured: Any) -> None:
    problem = built(configured())
    constant = Outputs(torch.zeros(4, 1), torch.arange(4.0))
    sure = Outputs(torch.eye(2), torch.arange(2))
    three = Outputs(torch.eye(3), torch.arange(3))
    splits = {"rte/dev": sure, "mnli/dev": three, "mnli/dev_mismatched": three}
    assert problem.scores({**splits, "stsb/dev": Outputs(torch.arange(4.0)[:, None], torch.arange(4.0))}).value == 1.0
    scores = problem.scores({**splits, "stsb/dev": constant})
    assert scores.value is None
    assert any(note.startswith("stsb: ") for note in scores.notes)


def test_a_run_leaves_an_adapter_for_each_task(configured: Any, tiny_bert_dir: Path) -> None:
    """Each by itself, with its head, gives what the run predicted."""
    cfg = configured("strategy=autolora", "trainer.max_epochs=3")
    result = run_one(cfg)
    assert result.params.budget is not None
    assert result.params.adapter <= result.params.budget
    assert result.params.head == 32 * (2 + 1 + 3) + 2 + 1 + 3
    directory = directory_in(cfg.run_root)
    with directory.predictions.open() as file:
        rows = list(csv.DictReader(file))
    for name in TASKS:
        glue = GLUE[name]
        model = load_backbone(
            path=tiny_bert_dir, num_labels=glue.num_labels, problem_type=glue.problem_type, labels=glue.labels
        ).model
        load_peft(model, directory.adapter / name)
        outputs = evaluate(alone(configured, name), model, "dev")
        own = [row for row in rows if row["split"] == f"{name}/dev"]
        wanted = [[float(row[f"logit_{i}"]) for i in range(glue.num_labels)] for row in own]
        torch.testing.assert_close(outputs.logits, torch.tensor(wanted), rtol=1e-4, atol=1e-5)
    what = "adapter/TASK has the adapter of one task (mnli, rte, stsb) in PEFT's format, to be copied as it is"
    for purpose, command in (
        ("exported as one model", lambda: export(ExportSettings(run=directory.path, out=directory.path / "out"))),
        ("predicted with", lambda: predict(PredictSettings(run=directory.path, input=Path(__file__)))),
        ("analysed", lambda: read_trained(directory.path, None)),
    ):
        with pytest.raises(DataError, match=rf"a run on several tasks cannot be {purpose}\. {re.escape(what)}"):
            command()


def test_an_interrupted_run_ends_as_an_unbroken_one(configured: Any, stopper: Stopper, tmp_path: Path) -> None:  # noqa: F811
    extra = ("strategy=autolora_bilevel", "trainer.max_epochs=2")
    whole, broken = configured(*extra), configured(*extra, f"run_root={tmp_path / 'broken'}")
    run_one(whole)
    assert interrupted_run(broken, stopper, 8) >= 2
    assert outcome(broken) == outcome(whole)
