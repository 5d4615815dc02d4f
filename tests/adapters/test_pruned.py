"""Magnitude pruning: by hand, against torch's own, and the pattern of sparse tensor cores."""

from __future__ import annotations

import pytest
import torch
from adapters.tiny_models import FAMILIES, inputs_for, make, output, randomize
from torch import nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from autolora.adapters import AdapterSettings, attach, find_sites
from autolora.adapters.compress import Compression, compress
from autolora.adapters.pruned import kept
from autolora.errors import BackboneError
from autolora.plan import RankPlan


def test_by_hand() -> None:
    weight = torch.tensor([[1.0, -4.0, 0.5, 3.0, -0.1, 0.2, 0.3, -0.4], [9.0, 8.0, 7.0, 6.0, 5.0, -5.5, 0.0, 0.0]])
    assert kept(weight, "2:4").int().tolist() == [[0, 1, 0, 1, 0, 0, 1, 1], [1, 1, 0, 0, 1, 1, 0, 0]]
    assert kept(weight, "unstructured", 0.5).int().tolist() == [[0, 1, 0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]]


def test_of_equal_magnitudes_as_many_go_as_are_asked_for() -> None:
    weight = torch.tensor([[1.0, -1.0, 1.0, -1.0] * 4])
    assert kept(weight, "unstructured", 0.25).int().tolist() == [[0] * 4 + [1] * 12]
    assert kept(weight, "2:4").int().tolist() == [[0, 0, 1, 1] * 4]


@pytest.mark.parametrize("amount", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("shape", [(48, 32), (7, 5)])
def test_unstructured_is_that_of_torch(amount: float, shape: tuple[int, int]) -> None:
    linear = nn.Linear(*shape)
    mask = kept(linear.weight.detach(), "unstructured", amount)
    prune.l1_unstructured(linear, "weight", amount)
    assert torch.equal(mask, linear.weight_mask.bool())
    assert int((~mask).sum()) == round(amount * mask.numel())


def test_two_of_four_consecutive_inputs_stay_and_they_are_the_larger() -> None:
    weight = torch.randn(24, 32)
    mask, groups = kept(weight, "2:4"), weight.abs().view(-1, 4)
    assert torch.equal(mask.view(-1, 4).sum(1), torch.full((24 * 8,), 2))
    smallest_kept = groups.masked_fill(~mask.view(-1, 4), torch.inf).amin(1)
    largest_gone = groups.masked_fill(mask.view(-1, 4), 0).amax(1)
    assert bool((smallest_kept > largest_gone).all())


def test_conv1d_is_pruned_along_its_inputs() -> None:
    model = nn.ModuleDict({"a": Conv1D(12, 8)})
    before = model["a"].weight.detach().clone()
    compress(model, Compression(sparsity="2:4"), [])
    assert torch.equal(model["a"].weight != 0, kept(before.t(), "2:4").t())


def test_a_width_that_is_no_multiple_of_four_is_refused() -> None:
    model = nn.ModuleDict({"odd": nn.Linear(6, 4)})
    with pytest.raises(BackboneError, match=r"odd: backbone\.sparsity\.method=2:4: expected a multiple of 4 input"):
        compress(model, Compression(sparsity="2:4"), [])
    compress(model, Compression(sparsity="unstructured"), [])
    assert int((model["odd"].weight == 0).sum()) == 12


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_learn_on_pruned_weights_which_stay_pruned(family: str) -> None:
    model, head, batch = make(family), FAMILIES[family][2], inputs_for(family)
    compress(model, Compression(sparsity="2:4"), [head] if head else [])
    adapters = attach(model, AdapterSettings(), RankPlan.uniform(find_sites(model, AdapterSettings()), 2))
    zeros = {name: layer.weight == 0 for name, layer in adapters.layers.items()}
    assert any(2 * int(mask.sum()) == mask.numel() for mask in zeros.values())
    randomize(adapters)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        output(model, batch).sin().sum().backward()
        optimizer.step()
    assert all(torch.equal(layer.weight == 0, zeros[name]) for name, layer in adapters.layers.items())
    adapters.merge()
    pruned = [layer.weight[zeros[name]] for name, layer in adapters.layers.items() if zeros[name].any()]
    assert all(bool((weights != 0).any()) for weights in pruned)
