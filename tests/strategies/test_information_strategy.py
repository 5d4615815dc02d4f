"""Ranks from the information bottleneck: who knows the labels, what is looked at, and what is pooled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from adapters.tiny_models import make
from strategies.test_eva import Branches, outputs
from torch import Tensor, nn
from torch.nn import functional as F

from autolora.adapters import AdapterSettings
from autolora.compose import compose
from autolora.errors import ConfigError, NonFiniteLossError, PlanError
from autolora.plan import Budget
from autolora.strategies.base import Batch
from autolora.strategies.information import Information, codes_of_modules, first_examples, pool
from autolora.theory.information import price_of_labels


def clouds(directions: int, count: int = 192, width: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows, and labels that are the signs of their first and widest directions."""
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 0.85 ** torch.arange(width)
    signs = (rows[:, :directions] > 0).long()
    return rows, (signs * 2 ** torch.arange(directions)).sum(1)


def prepared(
    model: nn.Module, data: Any, budget: Budget, max_rank: int = 8, loss: Any = outputs, **options: Any
) -> Information:
    strategy = Information(Information.Options(**options), budget=budget, max_rank=max_rank)
    strategy.attach(model, AdapterSettings())
    strategy.prepare(data, loss)
    return strategy


def test_who_knows_the_labels_gets_the_ranks_and_who_does_not_gets_none() -> None:
    rows, labels = clouds(3)
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(9))
    batch = {"x": torch.cat([noise, rows], dim=1), "labels": labels}
    strategy = prepared(Branches([10, 10]), [batch], Budget(params=4 * 20))
    assert strategy.beta is not None
    assert strategy.optima() == {"branch0": 0, "branch1": 3}
    assert list(strategy.finalize(lambda plan: 0.0).values()) == [0, 4]
    assert strategy.adapters.attached_plan() == strategy.adapters.active_plan()
    assert strategy.notes == []


def test_ranks_are_proportional_to_the_optima() -> None:
    """One module reads the three directions that the labels need, the other only the first of them."""
    rows, labels = clouds(3)
    noise = torch.randn(192, 9, generator=torch.Generator().manual_seed(9)) * 0.2
    batch = {"x": torch.cat([rows[:, :1], noise, rows], dim=1), "labels": labels}
    strategy = prepared(Branches([10, 10]), [batch], Budget(params=8 * 20))
    assert strategy.optima() == {"branch0": 1, "branch1": 3}
    assert list(strategy.finalize(lambda plan: 0.0).values()) == [2, 6]


def test_the_price_may_be_given() -> None:
    """At 0 nothing is worth its bits; at a price beyond all measure the code that says most is."""
    rows, labels = clouds(2)
    batch = {"x": rows, "labels": labels}
    assert prepared(Branches([10]), [batch], Budget(rank=1), beta=0.0).optima() == {"branch0": 0}
    strategy = prepared(Branches([10]), [batch], Budget(rank=1), beta=1e9)
    code = strategy.codes["branch0"]
    assert strategy.optima()["branch0"] == code.ranks[code.about_labels.index(max(code.about_labels))]


@pytest.mark.parametrize("seed", [0, 1])
def test_where_inputs_say_nothing_ranks_are_uniform_and_it_is_said(seed: int) -> None:
    rows, _ = clouds(1)
    labels = torch.arange(192)[torch.randperm(192, generator=torch.Generator().manual_seed(50 + seed))] % 2
    batch = {"x": torch.cat([rows, rows.flip(1)], dim=1), "labels": labels}
    strategy = prepared(Branches([10, 10]), [batch], Budget(rank=2))
    assert strategy.beta is None
    assert list(strategy.finalize(lambda plan: 0.0).values()) == [2, 2]
    assert strategy.notes[0].startswith("what modules read says no more about the labels than about permutations")
    again = Information(Information.Options(), budget=Budget(rank=2), max_rank=8)
    again.attach(Branches([10, 10]), AdapterSettings())
    again.load_state_dict(strategy.state_dict())
    assert again.notes == strategy.notes


def test_scores_are_labels_too() -> None:
    rows, _ = clouds(1)
    batch = {"x": torch.cat([rows, rows.flip(0)], dim=1), "labels": rows[:, 0] + 0.5 * rows[:, 1]}
    optima = prepared(Branches([10, 10]), [batch], Budget(params=80)).optima()
    assert optima["branch0"] >= 1
    assert optima["branch1"] == 0


# What is looked at ----------------------------------------------------------------------------------------------------


def test_only_so_many_examples_are_looked_at() -> None:
    def stream() -> Iterator[Batch]:
        for seed in range(5):
            rows, labels = clouds(1, count=32, seed=seed)
            yield {"x": rows, "labels": labels}

    batches = stream()
    assert [len(batch["x"]) for batch in first_examples(batches, 80)] == [32, 32, 16]
    assert len(list(batches)) == 2
    apart = prepared(Branches([10]), stream(), Budget(rank=1), examples=80).codes["branch0"]
    whole = {key: torch.cat([batch[key] for batch in stream()])[:80] for key in ("x", "labels")}
    together = prepared(Branches([10]), [whole], Budget(rank=1), examples=80).codes["branch0"]
    assert apart.about_labels == pytest.approx(together.about_labels, abs=1e-6)
    assert apart.about_inputs == pytest.approx(together.about_inputs, abs=1e-6)


def classify(model: Any, batch: Batch) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return F.cross_entropy(model(**inputs).logits, batch["labels"])


def sentences(padding: int, fill: int = 0) -> Batch:
    ids = torch.randint(1, 64, (24, 7), generator=torch.Generator().manual_seed(0))
    pad = torch.full((24, padding), fill)
    return {
        "input_ids": torch.cat([ids, pad], dim=1),
        "attention_mask": torch.cat([torch.ones_like(ids), torch.zeros_like(pad)], dim=1),
        "labels": (ids[:, 1] > 32).long(),
    }


def test_padding_does_not_count_and_modules_that_read_one_tensor_have_one_code() -> None:
    found = []
    for batch in (sentences(0), sentences(9), sentences(9, fill=3)):
        model = make("bert")
        found.append(prepared(model, [batch], Budget(rank=2), loss=classify).codes)
    for codes in found[1:]:
        assert codes.keys() == found[0].keys()
        for name, code in codes.items():
            assert code.about_inputs == pytest.approx(found[0][name].about_inputs, abs=1e-3)
    prefix = "bert.encoder.layer.1.attention.self"
    assert found[0][f"{prefix}.query"] is found[0][f"{prefix}.value"]
    assert found[0][f"{prefix}.query"] is not found[0]["bert.encoder.layer.1.output.dense"]


@pytest.mark.parametrize("budget", [Budget(rank=5), Budget(params=3001)])
def test_a_budget_is_spent_and_the_model_left_as_it_was(budget: Budget) -> None:
    model = make("bert").train()
    expected = make("bert").eval()(input_ids=sentences(0)["input_ids"]).logits
    strategy = prepared(model, [sentences(1)] * 2, budget, loss=classify)
    assert strategy.allowance is not None
    assert 0.98 * strategy.allowance <= strategy.finalize(lambda plan: 0.0).params <= strategy.allowance
    assert model.training
    assert torch.equal(model.eval()(input_ids=sentences(0)["input_ids"]).logits, expected)


def test_pooling_by_hand() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [3.0, 2.0], [9.0, 9.0]], [[2.0, 2.0], [9.0, 9.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    rows = torch.tensor([[0.0, 1.0], [0.0, 4.0]])
    shared = torch.ones(5, 2)  # positions, say
    assert pool([tokens], mask, 2).tolist() == [[2.0, 1.0], [2.0, 2.0]]  # type: ignore[union-attr]
    assert pool([rows, shared], mask, 2).tolist() == rows.tolist()  # type: ignore[union-attr]
    assert pool([rows, rows + 2], None, 2).tolist() == (rows + 1).tolist()  # type: ignore[union-attr]
    assert pool([tokens[:, :2]], mask, 2).tolist() == [[2.0, 1.0], [5.5, 5.5]]  # type: ignore[union-attr]
    assert pool([shared], mask, 2) is None


def test_a_module_that_reads_no_example_is_left_out() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.places = nn.Linear(10, 4, bias=False), nn.Linear(10, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.read(x) + self.places(torch.ones(7, 10)).sum(0)

    rows, labels = clouds(1)
    strategy = Information(Information.Options(), budget=Budget(params=14), max_rank=2)
    adapters = strategy.attach(Positions(), AdapterSettings())
    codes = codes_of_modules(adapters, [{"x": rows, "labels": labels}], outputs, strategy.options)
    assert set(codes) == {"read"}
    assert price_of_labels(list(codes.values())) is not None
    strategy.prepare([{"x": rows, "labels": labels}], outputs)
    assert strategy.finalize(lambda plan: 0.0) == {"read": 1, "places": 0}


def test_tokens_to_predict_are_labels_too_and_batches_may_be_of_different_lengths() -> None:
    def tokens(length: int, seed: int) -> Batch:
        ids = torch.randint(1, 64, (24, length), generator=torch.Generator().manual_seed(seed))
        return {"input_ids": ids, "labels": ids}

    strategy = prepared(
        make("gpt2"), [tokens(7, 0), tokens(5, 1)], Budget(rank=2),
        loss=lambda model, batch: model(input_ids=batch["input_ids"]).logits.square().mean(),
    )  # fmt: skip
    assert list(strategy.codes) == list(strategy.largest)
    assert 0.98 * (strategy.allowance or 0) <= strategy.finalize(lambda plan: 0.0).params <= (strategy.allowance or 0)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"x": torch.randn(4, 10)}, PlanError, "expected labels in every batch, got none: choose another strategy"),
        (
            {"x": torch.randn(4, 10), "labels": torch.zeros(4, 6, 2).long()},
            PlanError,
            "expected a class, a score or a row of them for each example",
        ),
        (
            {"x": torch.full((4, 10), torch.nan), "labels": torch.arange(4)},
            NonFiniteLossError,
            "the loss is nan before training has begun",
        ),
    ],
)
def test_what_cannot_be_looked_at_is_refused(batch: Batch, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prepared(Branches([10]), [batch], Budget(rank=1))


def test_labels_that_play_no_part_are_refused() -> None:
    with pytest.raises(ConfigError, match="task=planted_encoder is to fit a teacher, and not the labels"):
        compose(["strategy=information", "task=planted_encoder"])
