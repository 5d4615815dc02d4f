"""The fingerprint knows a backbone again, whatever was done to it that is not training it."""

from __future__ import annotations

import copy

import pytest
import torch
from adapters.tiny_models import FAMILIES, inputs_for, make, output, randomize
from torch import nn

from autolora.adapters import AdapterSettings, attach, compact, find_sites
from autolora.adapters.fingerprint import check_fingerprint, fingerprint
from autolora.errors import BackboneError
from autolora.plan import RankPlan


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_training_and_merging_do_not_show(family: str) -> None:
    model, batch = make(family), inputs_for(family)
    head = [head] if (head := FAMILIES[family][2]) else []
    expected = fingerprint(model, head)
    assert set(expected) == {"structure", "bfloat16", "float16"}
    settings = AdapterSettings()
    adapters = attach(model, settings, RankPlan.uniform(find_sites(model, settings), 2))
    assert fingerprint(model, head) == expected
    randomize(adapters)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    output(model, batch).sin().sum().backward()
    optimizer.step()
    assert fingerprint(model, head) == expected
    assert not head or fingerprint(model) != fingerprint(make(family))
    adapters.merge()
    assert fingerprint(model, head) == expected
    adapters.unmerge()
    compact(adapters)
    assert fingerprint(model, head) == expected
    adapters.detach()
    assert fingerprint(model, head) == expected


def test_another_seed_or_shape_is_another_backbone() -> None:
    one, two = fingerprint(make("bert")), fingerprint(make("bert", seed=1))
    assert one["structure"] == two["structure"]
    assert one["bfloat16"] != two["bfloat16"]
    assert one["float16"] != two["float16"]
    assert fingerprint(make("roberta"))["structure"] != one["structure"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_same_backbone(family: str, dtype: torch.dtype) -> None:
    whole, half = make(family), make(family).to(dtype)
    check_fingerprint(fingerprint(whole), half, [], "tiny")
    check_fingerprint(fingerprint(half), whole, [], "tiny")
    other = make(family, seed=1).to(dtype)
    with pytest.raises(BackboneError, match="other weights"):
        check_fingerprint(fingerprint(whole), other, [], "tiny")


def test_double_rounding_would_not_agree() -> None:
    """Why there is a hash for each half precision: float16 first and bfloat16 then is not bfloat16."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(x.half().bfloat16(), x.bfloat16())


def test_every_value_of_a_large_tensor_counts() -> None:
    """Its width has many divisors: a sample at even distances would see a few columns only."""
    model = nn.Linear(1536, 384, bias=False)
    expected, regions = fingerprint(model), [(slice(None), slice(1, 40)), (slice(7, 8), slice(None))]
    for row, column in torch.randint(384, (20, 2), generator=torch.Generator().manual_seed(0)).tolist():
        regions.append((slice(row, row + 1), slice(4 * column, 4 * column + 1)))
    for region in regions:
        before = model.weight.detach().clone()
        with torch.no_grad():
            model.weight[region] = 0
        found = fingerprint(model)
        assert found["structure"] == expected["structure"]
        assert found["bfloat16"] != expected["bfloat16"]
        assert found["float16"] != expected["float16"]
        with torch.no_grad():
            model.weight.copy_(before)
    assert fingerprint(model) == expected


def test_scalars_integers_and_layouts_in_memory() -> None:
    """A parameter without dimensions, one that is not floating point, and one that is not contiguous."""
    model = nn.Module()
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    model.a, model.b = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.arange(4), requires_grad=False)
    model.c = nn.Parameter(weight.T.contiguous().T)
    assert not model.c.is_contiguous()
    expected = fingerprint(model)
    model.c = nn.Parameter(weight)
    assert fingerprint(model) == expected
    model.b += 1
    assert fingerprint(model) != expected


def test_names_are_left_out_whole() -> None:
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "heading": nn.Linear(2, 2)})
    expected = fingerprint(model, ["head"])
    with torch.no_grad():
        model["head"].weight += 1
    assert fingerprint(model, ["head"]) == expected
    with torch.no_grad():
        model["heading"].bias += 1
    assert fingerprint(model, ["head"]) != expected
    assert fingerprint(model, ["head", "heading.bias"]) == fingerprint(copy.deepcopy(model), ["head", "heading.bias"])
