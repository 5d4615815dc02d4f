"""Compact = masked, and the components are really gone."""

from __future__ import annotations

import pytest
import torch
from adapters.tiny_models import inputs_for, make, output, randomize
from torch import nn

from autolora.adapters import Adapters, AdapterSettings, FixedGate, SelectorGate, attach, compact, find_sites
from autolora.adapters.gates import SELECTOR_FORMS
from autolora.plan import RankPlan

RANK = 4


def masked_model(seed: int = 0) -> tuple[nn.Module, Adapters, dict[str, int], dict[str, nn.Module]]:
    """BERT whose modules keep 0, 1, 2, 3, 4, 0, ... components, not the first ones."""
    model = make("bert")
    sites = find_sites(model, AdapterSettings())
    originals = {name: model.get_submodule(name) for name in sites}
    adapters = attach(model, AdapterSettings(), RankPlan.uniform(sites, RANK))
    randomize(adapters)
    ranks = {name: i % (RANK + 1) for i, name in enumerate(sites)}
    adapters.fix_gates({name: (torch.arange(RANK) >= RANK - rank).float() for name, rank in ranks.items()})
    return model, adapters, ranks, originals


def test_compact_is_masked() -> None:
    model, adapters, ranks, _ = masked_model()
    batch = inputs_for("bert")
    expected = output(model, batch)
    kept = {name: layer.lora_A[RANK - ranks[name] :].clone() for name, layer in adapters.layers.items()}
    compact(adapters)
    torch.testing.assert_close(output(model, batch), expected)
    for name, layer in adapters.layers.items():
        assert torch.equal(layer.lora_A, kept[name])
        assert isinstance(layer.gate, FixedGate)
        assert layer.gate() is None
    assert adapters.attached_plan() == adapters.active_plan() == ranks


def test_parameters_are_really_fewer() -> None:
    model, adapters, ranks, _ = masked_model()
    plan = RankPlan(adapters.sites, ranks)
    bare = sum(p.numel() for p in make("bert").parameters())
    assert adapters.count()["adapter"] == RankPlan.uniform(adapters.sites, RANK).params > plan.params
    compact(adapters)
    assert adapters.count()["adapter"] == plan.params
    assert sum(p.numel() for p in model.parameters()) == bare + plan.params
    assert all(layer.lora_A.is_contiguous() and layer.lora_B.is_contiguous() for layer in adapters.layers.values())


def test_rank_0_puts_the_original_module_back() -> None:
    model, adapters, ranks, originals = masked_model()
    compact(adapters)
    gone = [name for name, rank in ranks.items() if rank == 0]
    assert gone
    for name in gone:
        assert model.get_submodule(name) is originals[name]
        assert name not in adapters.layers


def test_compacted_adapters_train_on() -> None:
    model, adapters, _, _ = masked_model()
    compact(adapters)
    output(model, inputs_for("bert")).sin().sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in adapters.adapter_parameters())


@pytest.mark.parametrize("form", SELECTOR_FORMS)
def test_soft_gates_are_folded_into_b(form: str) -> None:
    model, batch = make("bert"), inputs_for("bert")
    sites = find_sites(model, AdapterSettings())
    adapters = attach(
        model,
        AdapterSettings(),
        RankPlan.uniform(sites, RANK),
        lambda name, rank: SelectorGate(rank, form),  # type: ignore[arg-type]
    )
    randomize(adapters)
    with torch.no_grad():
        for layer in adapters.layers.values():
            layer.gate.logits.normal_(std=2.0)
    expected, plan = output(model, batch), adapters.active_plan()
    compact(adapters)
    torch.testing.assert_close(output(model, batch), expected)
    torch.testing.assert_close(output(model.train(), batch), expected)
    assert adapters.attached_plan() == plan
    assert adapters.count()["gate"] == 0


def test_compacting_everything_away_leaves_the_model() -> None:
    model, adapters, _, originals = masked_model()
    adapters.fix_gates({})
    compact(adapters)
    assert adapters.layers == {}
    assert all(model.get_submodule(name) is module for name, module in originals.items())
    assert adapters.active_plan().params == 0


def test_compact_while_merged() -> None:
    model, adapters, _, _ = masked_model()
    batch = inputs_for("bert")
    expected = output(model, batch)
    adapters.merge()
    compact(adapters)
    torch.testing.assert_close(output(model, batch), expected, rtol=1e-4, atol=1e-5)
    adapters.unmerge()
    torch.testing.assert_close(output(model, batch), expected)


def test_an_optimizer_goes_on_with_the_components_that_stay() -> None:
    """The next AdamW steps of compacted adapters are those of the masked ones: moments and step counts are kept."""

    def train(smaller: bool) -> dict[str, torch.Tensor]:
        model, adapters, ranks, _ = masked_model()
        optimizer = torch.optim.AdamW(adapters.adapter_parameters(), lr=1e-2, fused=True)
        for step in range(4):
            if smaller and step == 2:
                before = numbers_in(optimizer)
                compact(adapters, optimizer)
                assert numbers_in(optimizer) < before
                params = [p for group in optimizer.param_groups for p in group["params"]]
                assert {id(p) for p in params} == {id(p) for p in adapters.adapter_parameters()}
                assert sum(p.numel() for p in params) == RankPlan(adapters.sites, ranks).params
            optimizer.zero_grad()
            output(model, inputs_for("bert")).sin().sum().backward()
            optimizer.step()
        return {name: layer.delta_weight() for name, layer in adapters.layers.items() if ranks[name]}

    torch.testing.assert_close(train(smaller=True), train(smaller=False), rtol=1e-4, atol=1e-6)


def numbers_in(optimizer: torch.optim.Optimizer) -> int:
    return sum(value.numel() for state in optimizer.state.values() for value in state.values())


def test_a_state_of_fewer_components_loads_into_fresh_adapters() -> None:
    model, adapters, ranks, _ = masked_model()
    compact(adapters)
    fresh, larger, _, _ = masked_model()
    larger.load_trainable_state(adapters.trainable_state())
    assert larger.attached_plan() == ranks
    batch = inputs_for("bert")
    assert torch.equal(output(fresh, batch), output(model, batch))
    larger.detach()
    assert torch.equal(output(fresh, batch), output(make("bert"), batch))
