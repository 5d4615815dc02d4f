"""Ranks from gradients: the equations by hand, the gradient against autograd on the bare model, and what is left."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from adapters.tiny_models import make, snapshot
from strategies.handloop import fit, mse, planted_batches
from torch import Tensor, nn
from torch.nn import functional as F

from autolora.adapters import AdapterSettings
from autolora.errors import NonFiniteLossError, PlanError
from autolora.plan import Budget, RankPlan
from autolora.strategies.base import Batch
from autolora.strategies.gradient import Gradient
from autolora.tasks.planted import plant


class Two(nn.Module):
    """Two Linears side by side, whose outputs are read through fixed matrices: d(sum)/dW is known."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.wide = nn.Linear(4, 4, bias=False), nn.Linear(4, 12, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.small(inputs).sum() + self.wide(inputs).sum()


def weighted(model: Any, batch: Batch) -> Tensor:
    """A loss that is linear in both weights, so that their gradients are the matrices of the batch."""
    total = torch.zeros(())
    for name in ("small", "wide"):
        target = batch[name]
        total = total + (target * model.get_submodule(name)(torch.eye(4)).T).sum()
    return total


def diagonal(rows: int, values: list[float]) -> Tensor:
    matrix = torch.zeros(rows, 4)
    matrix[: len(values), : len(values)] = torch.diag(torch.tensor(values))
    return matrix


def prepared(model: nn.Module, data: Any, loss: Any, budget: Budget, max_rank: int = 4, **options: Any) -> Gradient:
    strategy = Gradient(Gradient.Options(**options), budget=budget, max_rank=max_rank)
    strategy.attach(model, AdapterSettings())
    strategy.prepare(data, loss)
    return strategy


# By hand --------------------------------------------------------------------------------------------------------------


def test_components_go_by_squared_singular_values_of_the_mean_gradient_per_parameter() -> None:
    """A component of small costs 8, of wide 16. Mean gradients have values 3, 1, 1 and 4, 2: worth 9/8, 1/8, 1/8 and
    16/16, 4/16, so that the order is small, wide, wide, small, small; 16 parameters pay for two of small, but not for
    wide after the first. What cancels between batches counts nothing.
    """
    noise = diagonal(4, [0.0, 0.0, 0.0, 50.0])
    batches = [
        {"small": diagonal(4, [3.0, 1.0, 1.0]) + noise, "wide": diagonal(12, [4.0, 2.0])},
        {"small": diagonal(4, [3.0, 1.0, 1.0]) - noise, "wide": diagonal(12, [4.0, 2.0])},
    ]
    for params, ranks in ((8, (1, 0)), (16, (2, 0)), (24, (1, 1)), (40, (1, 2)), (48, (2, 2)), (56, (3, 2))):
        strategy = prepared(Two(), batches, weighted, Budget(params=params))
        assert strategy.finalize(lambda plan: 0.0) == {"small": ranks[0], "wide": ranks[1]}


def test_fisher_ranks_are_proportional_to_the_mean_square_of_an_entry() -> None:
    """small: (16 + 16) / 2 / 16 entries = 1, however signs change; wide: 96 / 48 = 2. One to two, at 40 parameters a
    unit.
    """
    batches = [{"small": sign * diagonal(4, [4.0]), "wide": diagonal(12, [96.0**0.5])} for sign in (1.0, -1.0)]
    for times in (1, 2):
        strategy = prepared(Two(), batches, weighted, Budget(params=40 * times), allocation="fisher")
        assert strategy.finalize(lambda plan: 0.0) == {"small": times, "wide": 2 * times}


def test_only_so_many_batches_are_taken() -> None:
    batches = iter([{"small": diagonal(4, [1.0]), "wide": diagonal(12, [1.0])}] * 5)
    prepared(Two(), batches, weighted, Budget(rank=1), batches=3)
    assert len(list(batches)) == 2


# The gradient ---------------------------------------------------------------------------------------------------------


def classify(model: Any, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["input_ids"]).logits
    return F.cross_entropy(logits, batch["labels"])


def token_batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 64, (6, 7), generator=generator) for _ in range(count)]
    return [{"input_ids": i, "labels": torch.randint(0, 3, (6,), generator=generator)} for i in ids]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_gradients_are_those_of_the_bare_model(family: str) -> None:
    batches = token_batches(3)
    bare = make(family)
    strategy = Gradient(Gradient.Options(), budget=Budget(rank=1), max_rank=2)
    adapters = strategy.attach(make(family), AdapterSettings())
    mean, squares = strategy._gradients(batches, classify)
    weights = {name: bare.get_submodule(name).weight for name in strategy.largest}
    found = [torch.autograd.grad(classify(bare, batch), list(weights.values())) for batch in batches]  # type: ignore[arg-type]
    for i, name in enumerate(adapters.sites):
        torch.testing.assert_close(mean[name], torch.stack([g[i] for g in found]).mean(0), rtol=1e-4, atol=1e-6)
        assert squares[name] == pytest.approx(np.mean([float(g[i].square().sum()) for g in found]), rel=1e-4)


def test_looking_changes_nothing_but_the_ranks() -> None:
    """The base stays frozen and as it was, in the mode it was in, without gradients; A starts as at these ranks."""
    model = make("bert").train()
    before = snapshot(model)
    strategy = prepared(model, token_batches(2), classify, Budget(rank=2))
    adapters = strategy.adapters
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    heads = {id(p) for p in adapters.head_parameters() + adapters.adapter_parameters()}
    assert [p for p in model.parameters() if p.requires_grad and id(p) not in heads] == []
    plan = adapters.active_plan()
    from autolora.adapters import attach

    fresh = attach(make("bert"), AdapterSettings(), plan)
    for name, layer in adapters.layers.items():
        assert torch.equal(layer.lora_A, fresh.layers[name].lora_A)
        assert torch.equal(layer.base_layer.weight, before[f"{name}.weight"])


@pytest.mark.parametrize("allocation", ["spectrum", "fisher"])
@pytest.mark.parametrize("budget", [Budget(rank=5), Budget(params=3001)])
def test_a_budget_is_spent_and_never_exceeded(allocation: str, budget: Budget) -> None:
    strategy = prepared(make("bert"), token_batches(2), classify, budget, max_rank=8, allocation=allocation)
    assert strategy.allowance is not None
    assert 0.98 * strategy.allowance <= strategy.finalize(lambda plan: 0.0).params <= strategy.allowance
    assert strategy.adapters.attached_plan() == strategy.adapters.active_plan()


def test_without_a_budget_every_module_has_the_maximum() -> None:
    strategy = prepared(make("bert"), token_batches(1), classify, Budget(), max_rank=3)
    assert set(strategy.finalize(lambda plan: 0.0).values()) == {3}


# Errors and whole runs ------------------------------------------------------------------------------------------------


def test_a_loss_without_a_gradient_is_refused() -> None:
    zeros = [{"small": torch.zeros(4, 4), "wide": torch.zeros(12, 4)}]
    with pytest.raises(PlanError, match=r"strategy=gradient: the loss does not depend on any adapted module"):
        prepared(Two(), zeros, weighted, Budget(rank=1))


def test_a_model_that_is_broken_already_is_refused() -> None:
    wrong = [{"small": torch.full((4, 4), torch.nan), "wide": torch.zeros(12, 4)}]
    model = Two()
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan before training has begun: check the backbone"):
        prepared(model, wrong, weighted, Budget(rank=1))
    assert not model.small.base_layer.weight.requires_grad  # type: ignore[union-attr, operator]


def test_training_uses_the_plan() -> None:
    pair = plant(dim=16, widths=[8, 24], ranks=(0, 2, 3, 0))
    strategy = Gradient(Gradient.Options(), budget=Budget(params=pair.true_plan.params), max_rank=4)
    streams = planted_batches(pair, 64, seed=1), planted_batches(pair, 64, seed=2)
    fitted = fit(strategy, pair.student, *streams, steps=100, lr=1e-2, loss_fn=mse)
    assert isinstance(fitted.plan, RankPlan)
    assert fitted.plan == fitted.adapters.attached_plan()
    assert fitted.losses[-1] < 0.7 * fitted.losses[0]


def test_batches_are_a_few_of_an_endless_stream() -> None:
    pair = plant(dim=16, widths=[8, 24], ranks=(0, 2, 3, 0))
    stream = planted_batches(pair, 8, seed=1)
    strategy = prepared(pair.student, stream, mse, Budget(rank=1), batches=2)
    expected = list(islice(planted_batches(pair, 8, seed=1), 3))[2]
    assert torch.equal(next(stream)["inputs"], expected["inputs"])
    assert strategy.settled
