"""Adapters on every family of models: in the forward path, trained, merged, compacted, and gone without a trace."""

from __future__ import annotations

import pytest
import torch
from adapters.tiny_models import FAMILIES, inputs_for, make, output, randomize, snapshot
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from autolora.adapters import AdapterSettings, attach, compact, find_sites
from autolora.plan import RankPlan, Site


@torch.no_grad()  # attention picks its kernel by what needs a gradient: with none, equal weights give equal bits
def evaluate(family: str, model: nn.Module) -> Tensor:
    return output(model, inputs_for(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    _, expected_sites, head = FAMILIES[family]
    model, batch = make(family), inputs_for(family)
    before, bare = snapshot(model), evaluate(family, model)
    settings = AdapterSettings()
    sites = find_sites(model, settings)
    assert len(sites) == expected_sites
    adapters = attach(model, settings, RankPlan.uniform(sites, 2))
    assert adapters.fully_trained == ([head] if head else [])
    assert torch.equal(evaluate(family, model), bare)

    # Every adapter is in the forward path: its B gets a gradient, as A does once B is not zero.
    output(model, batch).square().sum().backward()
    assert all(layer.lora_B.grad is not None for layer in adapters.layers.values())
    randomize(adapters)
    model.zero_grad()
    output(model, batch).sin().sum().backward()
    assert [name for name, layer in adapters.layers.items() if layer.lora_A.grad.abs().sum() == 0] == []
    changed = evaluate(family, model)
    assert not torch.allclose(changed, bare, atol=1e-3)

    adapters.merge()
    torch.testing.assert_close(evaluate(family, model), changed, rtol=1e-4, atol=1e-5)
    adapters.unmerge()
    assert torch.equal(evaluate(family, model), changed)

    adapters.fix_gates({name: torch.tensor([1, 0]) for name in list(sites)[::2]})
    masked = evaluate(family, model)
    compact(adapters)
    torch.testing.assert_close(evaluate(family, model), masked)
    adapters.detach()
    after = snapshot(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(evaluate(family, model), bare)


def test_gpt2_is_made_of_conv1d() -> None:
    model = make("gpt2")
    sites = find_sites(model, AdapterSettings())
    assert all(isinstance(model.get_submodule(name), Conv1D) for name in sites)
    assert sites["transformer.h.0.attn.c_attn"] == Site(16, 48)


def test_t5_in_half_precision_reads_the_dtype_of_its_weight() -> None:
    """T5 casts the hidden states to ``wo.weight.dtype`` before it calls ``wo``."""
    model, batch = make("t5_encoder").to(torch.bfloat16), inputs_for("t5_encoder")
    adapters = attach(model, AdapterSettings(), RankPlan.uniform(find_sites(model, AdapterSettings()), 2))
    assert all(layer.lora_A.dtype == torch.float32 for layer in adapters.layers.values())
    randomize(adapters)
    assert output(model, batch).dtype == torch.bfloat16
