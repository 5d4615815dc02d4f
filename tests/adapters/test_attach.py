"""Attach, train and detach on models small enough to see through, and on a tiny BERT."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from adapters.tiny_models import Shared, inputs_for, make, output, randomize, snapshot
from torch import Tensor, nn

from autolora.adapters import (
    Adapters,
    AdapterSettings,
    FixedGate,
    LoRALinear,
    SelectorGate,
    Targets,
    attach,
    compact,
    find_sites,
)
from autolora.adapters.gates import SELECTOR_FORMS, ScaleGate
from autolora.errors import PlanError, TargetError
from autolora.plan import RankPlan


def put(model: nn.Module, rank: int = 2, **settings: object) -> Adapters:
    chosen = AdapterSettings(**settings)  # type: ignore[arg-type]
    return attach(model, chosen, RankPlan.uniform(find_sites(model, chosen), rank))


def train(model: nn.Module, batch: dict[str, Tensor], steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        output(model, batch).square().sum().backward()
        optimizer.step()
    model.eval()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# Attach, train, detach ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_frozen_is_bit_identical_after_training_and_detach_restores_all(bias: str) -> None:
    model, batch = make("bert"), inputs_for("bert")
    model.bert.embeddings.requires_grad_(False)
    before, expected = snapshot(model), output(model, batch)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    names = [name for name, _ in model.named_modules()]

    adapters = put(model, bias=bias)
    assert torch.equal(output(model, batch), expected)
    train(model, batch)
    assert not torch.allclose(output(model, batch), expected)
    after = {name.replace("base_layer.", ""): tensor for name, tensor in snapshot(model).items()}
    adapted = set(adapters.layers)
    for name, tensor in before.items():
        owner, _, own = name.rpartition(".")
        biases_of = {"none": set(), "all": {owner}, "lora_only": adapted}[bias]
        trained = name.startswith("classifier") or (own == "bias" and owner in biases_of)
        assert trained or torch.equal(after[name], tensor), name
        assert not trained or own == "bias" or not torch.equal(after[name], tensor), name

    assert adapters.detach() is model
    assert same(snapshot(model), before)
    assert torch.equal(output(model, batch), expected)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [name for name, _ in model.named_modules()] == names
    assert all(p.grad is None for p in model.parameters())
    put(model)  # and it can be adapted again


def test_detach_while_merged() -> None:
    model = make("bert")
    before = snapshot(model)
    adapters = put(model)
    randomize(adapters)
    adapters.merge()
    adapters.detach()
    assert same(snapshot(model), before)


def test_detach_restores_buffers_even_after_a_move() -> None:
    """Moving a model makes new buffers; batch statistics are buffers that a training step changes."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    before = snapshot(model)
    adapters = put(model, modules_to_save=["1"])
    model._apply(torch.clone)
    model(torch.randn(8, 3) + 5)
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    adapters.detach()
    assert same(snapshot(model), before)


def test_attach_refuses_a_model_with_adapters() -> None:
    model = make("bert")
    put(model)
    with pytest.raises(TargetError, match=r"already carries adapters; detach them first"):
        put(model)


def test_rank_0_leaves_the_module_alone() -> None:
    model = make("bert")
    settings = AdapterSettings()
    sites = find_sites(model, settings)
    first, *others = sites
    adapters = attach(model, settings, RankPlan(sites, {name: 1 for name in others}))
    assert first not in adapters.layers
    assert type(model.get_submodule(first)) is nn.Linear
    assert adapters.attached_plan()[first] == 0
    assert list(adapters.active_plan()) == list(sites)


def test_dropped_to_nothing_at_all() -> None:
    model, batch = make("bert"), inputs_for("bert")
    adapters = put(model, rank=0)
    assert adapters.layers == {}
    assert adapters.active_plan().params == 0
    assert adapters.adapter_parameters() == []
    train(model, batch)  # the head alone


def test_a_module_draws_the_same_whatever_else_is_adapted() -> None:
    everything, few = put(make("bert"), seed=3), put(make("bert"), seed=3, targets=Targets(targets="key"))
    other = put(make("bert"), seed=4)
    for name, layer in few.layers.items():
        assert torch.equal(layer.lora_A, everything.layers[name].lora_A)
        assert not torch.equal(layer.lora_A, other.layers[name].lora_A)
    a, b = list(few.layers.values())[:2]
    assert not torch.equal(a.lora_A, b.lora_A)


def test_attach_follows_the_mode_of_each_module() -> None:
    model = make("bert").train()
    model.bert.pooler.eval()
    adapters = put(model, dropout=0.5)
    assert adapters.layers["bert.encoder.layer.0.output.dense"].training
    assert not adapters.layers["bert.pooler.dense"].training
    assert not model.bert.pooler.dense.base_layer.training


# Heads and biases -----------------------------------------------------------------------------------------------------


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}


def test_modules_to_save() -> None:
    model = make("bert")
    adapters = put(model, modules_to_save=["classifier", "pooler"])
    assert adapters.fully_trained == ["bert.pooler", "classifier"]
    assert "bert.pooler.dense" not in adapters.layers
    assert trainable(model) == {f"{m}.{p}" for m in ("bert.pooler.dense", "classifier") for p in ("weight", "bias")}
    assert sum(p.numel() for p in adapters.head_parameters()) == (16 * 16 + 16) + (16 * 3 + 3)


def test_no_modules_to_save_adapts_the_classifier_too() -> None:
    model = make("bert")
    adapters = put(model, modules_to_save=[])
    assert "classifier" in adapters.layers
    assert trainable(model) == set()
    assert adapters.head_parameters() == []


def test_biases() -> None:
    head = {"classifier.weight", "classifier.bias"}
    target = Targets(targets="key")
    model = make("bert")
    put(model, bias="lora_only", targets=target)
    assert trainable(model) == head | {f"bert.encoder.layer.{i}.attention.self.key.base_layer.bias" for i in (0, 1)}

    model = make("bert")
    every = {name for name, _ in model.named_parameters() if name.endswith("bias")} - {"classifier.bias"}
    adapters = put(model, bias="all", targets=target)
    assert {name.replace("base_layer.", "") for name in trainable(model)} == head | every
    assert "bert.embeddings.LayerNorm.bias" in every
    count = sum(adapters.model.get_parameter(n).numel() for n in trainable(model) - head)
    assert sum(p.numel() for p in adapters.also_trained) == count


def test_fused_biases_count_as_biases() -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
    put(model, bias="all")
    assert trainable(model) == {"0.in_proj_bias", "0.out_proj.bias", "1.base_layer.bias"}


# Shared modules -------------------------------------------------------------------------------------------------------


def test_a_shared_linear_is_adapted_once_under_all_names() -> None:
    model, x = Shared(), torch.randn(5, 4)
    linear, expected = model.first, model(x)
    adapters = put(model)
    assert list(adapters.layers) == ["first", "inner.1"]
    assert isinstance(model.first, LoRALinear)
    assert model.first is model.again is model.inner[0]
    randomize(adapters)
    assert adapters.count()["adapter"] == 2 * 2 * 8
    dense = Shared()
    dense.load_state_dict({name.replace("base_layer.", ""): p for name, p in model.state_dict().items()}, strict=False)
    with torch.no_grad():
        dense.first.weight += adapters.layers["first"].delta_weight()
        dense.inner[1].weight += adapters.layers["inner.1"].delta_weight()
    torch.testing.assert_close(model(x), dense(x))
    adapters.detach()
    assert model.first is model.again is model.inner[0] is linear
    assert torch.equal(model(x), expected)


# Counting and states --------------------------------------------------------------------------------------------------


def test_count_and_summary_by_hand() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    settings = AdapterSettings(modules_to_save=["1"], learn_scale=True)
    plan = RankPlan.uniform(find_sites(model, settings), 3)
    adapters = attach(model, settings, plan, lambda name, rank: SelectorGate(rank))
    # A 3 x 6 and B 4 x 3; the scale; three logits; the head 4 x 2 + 2; the base 6 x 4 + 4
    counted = {"adapter": 30, "added": 1, "own": 0, "gate": 3, "head": 10, "trainable": 44, "total": 44 + 28}
    assert adapters.count() == counted
    assert adapters.summary() == "trainable parameters: 44 of 72 (61.11 %)"
    assert sum(p.numel() for p in adapters.gate_parameters()) == 3


def test_the_mean_gate_by_hand() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    settings = AdapterSettings(modules_to_save=[])
    plan = RankPlan.uniform(find_sites(model, settings), 2)
    gates = {"0": SelectorGate(2, init=math.log(3)), "1": ScaleGate(2, init=-0.25)}
    adapters = attach(model, settings, plan, lambda name, rank: gates[name])
    assert adapters.mean_gate() == pytest.approx((0.75 + 0.25) / 2)
    gates["0"].fix(torch.ones(2))
    assert adapters.mean_gate() == pytest.approx(0.25)
    gates["1"].fix(torch.ones(2))
    assert adapters.mean_gate() is None


def test_trainable_state_round_trip() -> None:
    model, batch = make("bert"), inputs_for("bert")
    adapters = put(model, bias="all")
    train(model, batch)
    state, expected = adapters.trainable_state(), output(model, batch)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert not frozen & set(state)
    train(model, batch)
    adapters.fix_gates({})
    assert not torch.allclose(output(model, batch), expected)
    adapters.load_trainable_state(state)
    assert torch.equal(output(model, batch), expected)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_of_modules_without_components_load(bias: Literal["all", "lora_only"]) -> None:
    model, batch = make("bert"), inputs_for("bert")
    adapters = put(model, bias=bias)
    train(model, batch)
    first, *others = adapters.layers
    adapters.fix_gates({name: torch.ones(adapters.layers[name].rank) for name in others})
    compact(adapters)
    assert first not in adapters.layers
    expected, state = output(model, batch), adapters.trainable_state()
    fresh = make("bert")
    put(fresh, bias=bias).load_trainable_state(state)
    assert torch.equal(output(fresh, batch), expected)


def test_trainable_state_says_whether_selectors_learn_and_holds_buffers_of_the_head() -> None:
    def build() -> tuple[nn.Module, Adapters]:
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        settings = AdapterSettings(modules_to_save=["1"])
        plan = RankPlan.uniform(find_sites(model, settings), 2)
        return model, attach(model, settings, plan, lambda name, rank: SelectorGate(rank, init=1.0))

    model, adapters = build()
    adapters.fix_gates({"0": torch.tensor([1, 0])})
    model(torch.randn(9, 3))
    other, copy_of = build()
    copy_of.load_trainable_state(adapters.trainable_state())
    assert not copy_of.layers["0"].gate.learning
    assert copy_of.active_plan() == {"0": 1}
    assert torch.equal(other[1].running_mean, model[1].running_mean)


def test_a_state_of_larger_ranks_or_other_modules_is_refused() -> None:
    small, large, other = put(make("bert"), 1), put(make("bert"), 2), put(make("bert"), 1, targets=Targets("key"))
    with pytest.raises(ValueError, match=r"does not fit the model .* it has in another shape bert.*lora_A"):
        small.load_trainable_state(large.trainable_state())
    with pytest.raises(ValueError, match=r"has, but the model lacks, bert"):
        other.load_trainable_state(small.trainable_state())
    state = small.trainable_state()
    del state["classifier.weight"]
    with pytest.raises(ValueError, match=r"it lacks classifier.weight"):
        small.load_trainable_state(state)
    assert small.attached_plan() == dict.fromkeys(small.sites, 1)


def test_a_model_with_adapters_can_be_copied() -> None:
    model, batch = make("bert"), inputs_for("bert")
    settings = AdapterSettings()
    plan = RankPlan.uniform(find_sites(model, settings), 2)
    generator = torch.Generator().manual_seed(0)
    adapters = attach(model, settings, plan, lambda name, rank: SelectorGate(rank, "gumbel", generator=generator))
    randomize(adapters)
    assert torch.equal(output(copy.deepcopy(model), batch), output(model, batch))


# Operations on all adapters -------------------------------------------------------------------------------------------


@pytest.fixture
def trained() -> tuple[nn.Module, Adapters, dict[str, Tensor]]:
    model = make("bert")
    adapters = put(model, 4)
    randomize(adapters)
    return model, adapters, inputs_for("bert")


def test_merge_all(trained: tuple[nn.Module, Adapters, dict[str, Tensor]]) -> None:
    model, adapters, batch = trained
    expected, before = output(model, batch), snapshot(model)
    adapters.merge()
    assert all(layer.merged for layer in adapters.layers.values())
    torch.testing.assert_close(output(model, batch), expected, rtol=1e-4, atol=1e-5)
    adapters.unmerge()
    assert same(snapshot(model), before)


@pytest.mark.parametrize("merged", [False, True])
def test_disabled(trained: tuple[nn.Module, Adapters, dict[str, Tensor]], merged: bool) -> None:
    model, adapters, batch = trained
    bare = output(make("bert"), batch)
    if merged:
        adapters.merge()
    expected = output(model, batch)
    assert not torch.allclose(expected, bare)
    with adapters.disabled():
        assert torch.equal(output(model, batch), bare)
    assert torch.equal(output(model, batch), expected)
    assert all(layer.merged == merged for layer in adapters.layers.values())


@pytest.mark.parametrize("merged", [False, True])
def test_masked_uses_the_first_components(trained: tuple[nn.Module, Adapters, dict[str, Tensor]], merged: bool) -> None:
    model, adapters, batch = trained
    ranks = {name: i % 5 for i, name in enumerate(adapters.layers)}
    reference = copy.deepcopy(model)
    for name, rank in ranks.items():
        with torch.no_grad():
            reference.get_submodule(name).lora_B[:, rank:] = 0
    if merged:
        adapters.merge()
    expected = output(model, batch)
    gates = {name: layer.gate for name, layer in adapters.layers.items()}
    with adapters.masked(RankPlan(adapters.sites, ranks)):
        torch.testing.assert_close(output(model, batch), output(reference, batch))
        assert adapters.active_plan() == ranks
    assert torch.equal(output(model, batch), expected)
    assert all(layer.gate is gates[name] for name, layer in adapters.layers.items())


def test_a_merged_plan_is_the_plan_in_one_forward_pass_of_the_bare_model(
    trained: tuple[nn.Module, Adapters, dict[str, Tensor]],
) -> None:
    model, adapters, batch = trained
    weights = {name: layer.weight for name, layer in adapters.layers.items()}
    before = {name: weight.clone() for name, weight in weights.items()}
    expected = output(model, batch)
    already = next(iter(adapters.layers.values()))
    with adapters.masked(RankPlan(adapters.sites, {name: i % 5 for i, name in enumerate(adapters.layers)})):
        of_plan = output(model, batch)
        already.merge()
        with adapters.merged():
            assert all(layer.merged for layer in adapters.layers.values())
            torch.testing.assert_close(output(model, batch), of_plan)
        assert [layer.merged for layer in adapters.layers.values()].count(True) == 1
        already.unmerge()
    assert torch.equal(output(model, batch), expected)
    assert all(layer.weight is weights[name] for name, layer in adapters.layers.items())
    assert all(torch.equal(weights[name], before[name]) for name in weights)


def test_a_coarser_weight_is_not_merged_for_a_pass(trained: tuple[nn.Module, Adapters, dict[str, Tensor]]) -> None:
    """bf16 has 8 bits: an update below a 512th of a weight would be lost in it."""
    _, adapters, _ = trained
    coarse = next(iter(adapters.layers.values()))
    coarse.base_layer.bfloat16()
    with adapters.merged():
        assert [layer for layer in adapters.layers.values() if not layer.merged] == [coarse]


def test_masked_refuses_more_than_there_is(trained: tuple[nn.Module, Adapters, dict[str, Tensor]]) -> None:
    _, adapters, _ = trained
    first = next(iter(adapters.layers))
    with pytest.raises(PlanError, match=rf"more components than are attached at {first}"):
        adapters.masked(RankPlan(adapters.sites, {first: 5})).__enter__()
    adapters.remove(first)
    with pytest.raises(PlanError, match=first):
        adapters.masked(RankPlan(adapters.sites, {first: 1})).__enter__()
    assert all(isinstance(layer.gate, FixedGate) for layer in adapters.layers.values())


@pytest.mark.parametrize("form", SELECTOR_FORMS)
def test_fix_gates_keeps_what_evaluation_computed(form: str) -> None:
    model, batch = make("bert"), inputs_for("bert")
    settings = AdapterSettings()
    plan = RankPlan.uniform(find_sites(model, settings), 4)
    adapters = attach(model, settings, plan, lambda name, rank: SelectorGate(rank, form))  # type: ignore[arg-type]
    randomize(adapters)
    with torch.no_grad():
        for layer in adapters.layers.values():
            layer.gate.logits.normal_(std=2.0)
    expected, active = output(model, batch), adapters.active_plan()
    assert 0 < active.components < plan.components
    adapters.fix_gates({name: layer.gate.kept() for name, layer in adapters.layers.items()})
    torch.testing.assert_close(output(model, batch), expected)
    assert adapters.active_plan() == active
    assert all(set(layer.gate.evaluation_gate().tolist()) <= {0.0, 1.0} for layer in adapters.layers.values())
    torch.testing.assert_close(output(model.train(), batch), expected)  # training forward = evaluation forward
    adapters.fix_gates({name: layer.gate.evaluation_gate() for name, layer in adapters.layers.items()})
    torch.testing.assert_close(output(model, batch), expected)  # a second time folds nothing in


def test_fix_gates_switches_off_what_is_left_out() -> None:
    model, batch = make("bert"), inputs_for("bert")
    adapters = put(model, 2)
    randomize(adapters)
    adapters.fix_gates({})
    assert torch.equal(output(model, batch), output(make("bert"), batch))
    with pytest.raises(ValueError, match=r"masks: expected modules that have an adapter, got nope"):
        adapters.fix_gates({"nope": torch.ones(2)})
    with pytest.raises(ValueError, match=r"mask: expected shape \(2,\), got \(3,\)"):
        adapters.fix_gates({next(iter(adapters.layers)): torch.ones(3)})


def test_remove_and_compact_keep_the_sites(trained: tuple[nn.Module, Adapters, dict[str, Tensor]]) -> None:
    _, adapters, _ = trained
    sites: Sequence[str] = list(adapters.sites)
    adapters.fix_gates({sites[2]: torch.tensor([0, 1, 1, 0])})
    compact(adapters)
    assert list(adapters.layers) == [sites[2]]
    assert list(adapters.attached_plan()) == sites
