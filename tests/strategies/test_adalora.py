"""AdaLoRA: importance, schedule and allocation by hand and against PEFT's, and what is left at the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from strategies.checks import (
    RATES,
    assert_accumulation_of_2_is_one_double_batch,
    assert_resumed_is_uninterrupted,
    begun,
    pair_of,
    run,
    streams,
    train,
)
from strategies.handloop import excess_error
from strategies.trees import tree
from torch import nn
from torch.optim import SGD, AdamW

from autolora.adapters import AdapterSettings, ScaleGate
from autolora.errors import ConfigError
from autolora.plan import Budget, RankPlan, Site
from autolora.strategies.adalora import AdaLoRA, orthogonality
from autolora.strategies.pruning import best_components, settle


def adalora(budget: Budget, max_rank: int = 4, **options: Any) -> AdaLoRA:
    return AdaLoRA(AdaLoRA.Options(**options), budget=budget, max_rank=max_rank)


def alone(n_in: int, n_out: int, rank: int, budget: Budget, steps: int = 100, **options: Any) -> AdaLoRA:
    """A single module "m" with adapters."""
    strategy = adalora(budget, rank, **options)
    strategy.attach(tree({"m": (n_in, n_out)}), AdapterSettings(modules_to_save=()))
    strategy.begin(steps, SGD(strategy.param_groups(RATES, steps)))
    return strategy


# The parameters -------------------------------------------------------------------------------------------------------


def test_it_starts_as_the_bare_model_with_gaussian_factors() -> None:
    pair = pair_of()
    inputs = torch.randn(9, 16)
    bare = pair.student(inputs)
    adapters = adalora(Budget(rank=1)).attach(pair.student, AdapterSettings(init_std=0.05))
    assert torch.equal(pair.student(inputs), bare)
    for factor in ("lora_A", "lora_B"):
        entries = torch.cat([layer.get_parameter(factor).flatten() for layer in adapters.layers.values()])
        assert float(entries.detach().std()) == pytest.approx(0.05, rel=0.2)
    assert all((layer.gate.value() == 0).all() for layer in adapters.layers.values())  # type: ignore[union-attr]


def test_orthogonal_factors_where_the_settings_say_so() -> None:
    adapters = adalora(Budget(rank=1)).attach(pair_of().student, AdapterSettings(init="orthogonal"))
    for layer in adapters.layers.values():
        torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(4))
        torch.testing.assert_close(layer.lora_B.T @ layer.lora_B, torch.eye(4))


def test_singular_values_have_the_rate_of_the_factors_unless_gates_have_one() -> None:
    strategy = adalora(Budget(rank=1))
    strategy.attach(pair_of().student, AdapterSettings())
    (gates,) = [group for group in strategy.param_groups(RATES, 10) if group["name"] == "gate"]
    assert (gates["lr"], gates.get("constant")) == (1e-2, None)


# The regulariser ------------------------------------------------------------------------------------------------------


def test_orthogonality_by_hand() -> None:
    """The first misses orthonormal rows by 3 and 0 on the diagonal and twice by 2 beside it, the second not at all, and
    the third by -3/4: (9 + 0 + 4 + 4 + 0 + 9/16) / 3.
    """
    first = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    second = torch.tensor([[0.6, 0.8, 0.0], [-0.8, 0.6, 0.0]])
    third = torch.tensor([[0.5, 0.0]])
    assert float(orthogonality([first, second, third])) == pytest.approx((17 + 9 / 16) / 3)


def test_orthogonality_is_of_the_squares_of_what_peft_adds() -> None:
    """PEFT: the mean of norms over all A and B, read off a forward pass with and without its weight."""
    from peft import AdaLoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    size = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AdaLoraConfig(init_r=3, target_r=1, target_modules=["query"], total_step=10, orth_reg_weight=1.0)
    model = get_peft_model(BertForSequenceClassification(BertConfig(**size, vocab_size=20)).eval(), config).eval()
    (a,) = [p for name, p in model.named_parameters() if "lora_A" in name]
    (b,) = [p for name, p in model.named_parameters() if "lora_B" in name]
    with torch.no_grad():
        a.copy_(torch.randn(a.shape))
        b.copy_(torch.linalg.qr(torch.randn(b.shape)).Q)  # contributes nothing
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([1])}
    with torch.no_grad():
        total = float(model.base_model(**batch).loss)
        model.peft_config["default"].orth_reg_weight = 0.0
        norm = 2 * (total - float(model.base_model(**batch).loss))
        assert float(orthogonality([a, b.mT])) == pytest.approx(norm**2 / 2, rel=1e-3)


def test_the_regulariser_is_in_the_training_loss_until_the_allocation_is_final() -> None:
    strategy, pair = adalora(Budget(rank=1), orthogonality=0.3), pair_of()
    adapters, _ = begun(strategy, pair, 40)
    matrices = [m for layer in adapters.layers.values() for m in (layer.lora_A, layer.lora_B.mT)]
    penalty = strategy.penalty(torch.tensor(1.0))
    assert penalty is not None
    torch.testing.assert_close(penalty, 0.3 * orthogonality(matrices))
    penalty.backward()
    assert all(layer.lora_A.grad is not None and layer.lora_B.grad is not None for layer in adapters.layers.values())
    strategy.finalize(lambda plan: 0.0)
    assert strategy.penalty(torch.tensor(1.0)) is None


def test_the_regulariser_is_computed_in_float32_under_autocast() -> None:
    matrices = [torch.linalg.qr(torch.randn(64, 16)).Q.T for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(orthogonality(matrices)) < 1e-10


def test_without_weight_there_is_none() -> None:
    strategy = adalora(Budget(rank=1), orthogonality=0)
    begun(strategy, pair_of(), 40)
    assert strategy.penalty(torch.tensor(1.0)) is None


# Importance -----------------------------------------------------------------------------------------------------------


def test_two_steps_of_importance_by_hand() -> None:
    strategy = alone(2, 3, 1, Budget(rank=1), beta1=0.5, beta2=0.75)
    layer = strategy.adapters.layers["m"]
    parameters = {"q": layer.lora_A, "p": layer.lora_B, "value": layer.gate.values}
    weights = {"q": [1.0, -2.0], "p": [1.0, 2.0, -1.0], "value": [0.5]}
    gradients = [
        {"q": [4.0, 1.0], "p": [2.0, 0.0, 1.0], "value": [8.0]},
        {"q": [0.0, -3.0], "p": [1.0, 1.0, 1.0], "value": [-2.0]},
    ]
    sensitivity = {key: [0.0] * len(values) for key, values in weights.items()}
    uncertainty = {key: [0.0] * len(values) for key, values in weights.items()}
    for step in gradients:
        for key, parameter in parameters.items():
            with torch.no_grad():
                parameter.copy_(torch.tensor(weights[key]).view_as(parameter))
            parameter.grad = torch.tensor(step[key]).view_as(parameter)
            for i, (w, g) in enumerate(zip(weights[key], step[key], strict=True)):
                sensitivity[key][i] = 0.5 * sensitivity[key][i] + 0.5 * abs(w * g)
                uncertainty[key][i] = 0.75 * uncertainty[key][i] + 0.25 * abs(abs(w * g) - sensitivity[key][i])
        strategy.after_backward()
    assert sensitivity["q"] == [1.0, 3.5]  # 4, then 0: 0.5 * 2; 2, then 6: 0.5 * 1 + 3
    assert uncertainty["q"] == [0.625, 0.8125]  # 0.75 * 0.5 + 0.25 * 1; 0.75 * 0.25 + 0.25 * 2.5
    score = sum(
        sum(s * u for s, u in zip(sensitivity[key], uncertainty[key], strict=True)) / len(weights[key])
        for key in weights
    )
    assert strategy.scores().tolist() == pytest.approx([score])


def test_a_parameter_without_a_gradient_counts_as_not_sensitive() -> None:
    strategy = alone(2, 3, 1, Budget(rank=1))
    strategy.after_backward()
    assert strategy.scores().tolist() == [0.0]


def with_peft(modules: int, n: int, rank: int, target: int, **schedule: Any) -> Any:
    """PEFT's AdaLoRA on square Linears."""
    from peft import AdaLoraConfig, get_peft_model

    class Chain(nn.Sequential):
        config: dict[str, Any] = {"model_type": "chain"}  # noqa: RUF012

    model = Chain(*(nn.Linear(n, n, bias=False) for _ in range(modules)))
    names = [str(i) for i in range(modules)]
    return get_peft_model(model, AdaLoraConfig(init_r=rank, target_r=target, target_modules=names, **schedule))


@pytest.mark.parametrize("count", ["parameters", "components"])
def test_peft_masks_the_same_components_at_every_step(count: str) -> None:
    """The same weights and gradients, new at every step, in modules of equal cost; the published triplets and schedule.

    At the last allocation PEFT leaves the averages as they were at the step before.
    """
    modules, n, rank, steps = 4, 6, 5, 60
    peft = with_peft(modules, n, rank, 2, tinit=6, tfinal=18, deltaT=4, beta1=0.85, beta2=0.9, total_step=steps)
    theirs = {name.split(".")[2:][0]: m for name, m in peft.named_modules() if hasattr(m, "lora_E") and m.lora_E}
    shapes = {str(i): (n, n) for i in range(modules)}
    strategy = adalora(Budget(rank=2), rank, t_init=0.1, t_final=0.3, delta_t=4, beta2=0.9, count=count)
    strategy.attach(tree(shapes), AdapterSettings(modules_to_save=()))
    optimizer = AdamW(strategy.param_groups(RATES, steps))
    strategy.begin(steps, optimizer)
    ours = dict(strategy.adapters.layers)
    masked = 0
    for step in range(1, 43):
        for name, layer in ours.items():
            other = theirs[name]
            pairs = [
                (layer.lora_A, other.lora_A["default"]),
                (layer.lora_B, other.lora_B["default"]),
                (layer.gate.values, other.lora_E["default"]),
            ]
            for mine, their in pairs:
                with torch.no_grad():
                    mine.copy_(torch.randn(mine.shape))
                    their.copy_(mine.view_as(their))
                mine.grad = torch.randn(mine.shape) * (1 + int(name))
                their.grad = mine.grad.view_as(their).clone()
        peft.base_model.update_and_allocate(step)
        if step < 42:
            strategy.after_backward()
        strategy.after_step(step, optimizer)
        for name, layer in ours.items():
            expected = theirs[name].lora_E["default"].flatten() != 0
            if step < 42:
                assert torch.equal(layer.gate.values != 0, expected)
                masked += int((~expected).sum())
    assert masked > 0
    expected_plan = {name: int((theirs[name].lora_E["default"] != 0).sum()) for name in ours}
    assert strategy.settled
    assert strategy.adapters.attached_plan() == expected_plan
    assert sum(expected_plan.values()) == 2 * modules
    for name, layer in strategy.adapters.layers.items():  # and the very same ones
        kept = theirs[name].lora_E["default"].flatten() != 0
        assert torch.equal(layer.lora_A, theirs[name].lora_A["default"][kept])


# The schedule ---------------------------------------------------------------------------------------------------------


def test_the_schedule_is_cubic_from_everything_to_the_budget() -> None:
    strategy = adalora(Budget(params=112), t_init=0.1, t_final=0.5)
    begun(strategy, pair_of(), 100)  # everything costs 4 * 128 = 512
    assert [strategy.scheduled(step) for step in (1, 10, 30, 50, 99)] == [512, 512, 112 + 50, 112, 112]


def test_the_schedule_of_components_is_pefts_at_every_step() -> None:
    """In PEFT's terms the last allocation is made when the schedule has come to its end."""
    peft = with_peft(4, 6, 5, 2, tinit=6, tfinal=18, total_step=60)
    allocator = peft.base_model.rankallocator
    strategy = adalora(Budget(rank=2), 5, t_init=0.1, t_final=0.3, count="components")
    strategy.attach(tree({str(i): (6, 6) for i in range(4)}), AdapterSettings(modules_to_save=()))
    strategy.begin(60, AdamW(strategy.param_groups(RATES, 60)))
    assert [strategy.scheduled(t) for t in range(1, 61)] == [allocator.budget_schedule(t)[0] for t in range(1, 61)]


def test_allocation_comes_every_delta_t_steps_between_t_init_and_t_final() -> None:
    strategy = adalora(Budget(rank=1), delta_t=7)
    _, optimizer = begun(strategy, pair_of(), 100)
    allocate, seen = strategy._bought, []
    strategy._bought = lambda step: (seen.append(step), allocate(step))[1]  # type: ignore[method-assign, func-returns-value]
    for step in range(1, 101):
        strategy.after_step(step, optimizer)
    assert seen == [14, 21, 28, 35, 42, 49, 50]


def test_what_is_masked_has_a_gradient_and_comes_back() -> None:
    """One of two components fits. The first is worth more for a while, then the second."""
    strategy = alone(4, 4, 2, Budget(rank=1), delta_t=10, t_init=0.0, orthogonality=0)
    layer = strategy.adapters.layers["m"]
    optimizer = SGD(strategy.param_groups(RATES, 100), lr=0.1)
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(4)[:2])
        layer.lora_B.copy_(torch.eye(4)[:, :2])
        layer.gate.values.copy_(torch.tensor([1.0, 0.1]))
    inputs, masks = torch.eye(4), []
    for step in range(1, 50):
        target = torch.tensor([3.0, 0.0]) if step <= 25 else torch.tensor([0.0, 5.0])
        wanted = layer.base_layer(inputs).detach() + torch.diag(torch.cat([target, torch.zeros(2)]))
        optimizer.zero_grad()
        (layer(inputs) - wanted).square().sum().backward()
        strategy.after_backward()
        assert layer.gate.values.grad is not None
        optimizer.step()
        strategy.after_step(step, optimizer)
        if step % 10 == 0:
            masks.append((layer.gate.values != 0).tolist())
    assert masks[1] == [True, False]
    assert masks[-1] == [False, True]


def test_phases_that_do_not_fit_are_an_error_with_the_numbers() -> None:
    strategy = adalora(Budget(rank=1), t_init=0.5, t_final=0.45)
    message = r"t_init=0.5 and t_final=0.45 of 2 steps are 1 and 1, which leaves none to allocate in"
    with pytest.raises(ConfigError, match=message):
        begun(strategy, pair_of(), 2)


def test_ranks_that_would_never_be_trained_alone_are_an_error() -> None:
    with pytest.raises(
        ConfigError, match=r"t_final=0.5 of 1 steps is none, and the ranks would never be trained alone"
    ):
        begun(adalora(Budget(rank=1), t_init=0.0, t_final=0.5), pair_of(), 1)


def test_options_that_leave_no_room() -> None:
    with pytest.raises(ValueError, match=r"t_init \+ t_final: expected less than 1, got 0.5 \+ 0.5"):
        AdaLoRA.Options(t_init=0.5, t_final=0.5)


# What is left ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [Budget(rank=0.5), Budget(rank=1), Budget(params=301), Budget(fraction=0.9)])
def test_the_plan_spends_the_budget_and_is_physical(budget: Budget) -> None:
    strategy, pair = adalora(budget, delta_t=2), pair_of()
    fitted = run(strategy, pair)
    assert strategy.allowance is not None
    cheapest = min(fitted.plan.sites[n].cost for n in fitted.plan if fitted.plan[n] < strategy.largest[n])
    assert strategy.allowance - cheapest < fitted.plan.params <= strategy.allowance
    assert fitted.adapters.attached_plan() == fitted.plan
    assert fitted.adapters.count()["adapter"] == fitted.plan.params
    assert fitted.adapters.count()["gate"] == 0
    inputs = torch.randn(9, 16)
    assert torch.equal(pair.student.train()(inputs), pair.student.eval()(inputs))


def test_components_stay_within_the_parameters_too() -> None:
    """b_T is what the budget pays for at the mean cost: floor(16 * 112 / 512) components, as far as they fit."""
    strategy = adalora(Budget(params=112), count="components", delta_t=2)
    plan = run(strategy, pair_of()).plan
    assert strategy.scheduled(40) == 3
    assert 1 <= plan.components <= 3
    assert plan.params <= 112


def test_without_a_budget_nothing_is_masked() -> None:
    strategy = adalora(Budget(), delta_t=1)
    fitted = run(strategy, pair_of())
    assert fitted.plan == strategy.largest
    assert strategy.settled
    assert strategy.progress() == {}


def test_a_budget_of_nothing_leaves_the_bare_model() -> None:
    pair = pair_of()
    inputs = torch.randn(5, 16)
    bare = pair.student(inputs)
    assert run(adalora(Budget(params=0)), pair).plan.components == 0
    assert torch.equal(pair.student(inputs), bare)


def test_the_last_allocation_removes_what_it_masks_and_nothing_else_changes() -> None:
    strategy, pair = adalora(Budget(rank=2), delta_t=2), pair_of()
    adapters, optimizer = begun(strategy, pair, 40)
    train(strategy, optimizer, streams(pair)[0], 1, 19)
    inputs, before = torch.randn(9, 16), [values.detach().clone() for values in strategy.singular_values]
    kept = strategy._bought(20)
    with torch.no_grad():
        for values, mask in zip(strategy.singular_values, kept.split([4] * 4), strict=True):
            values *= mask
        masked = pair.student(inputs)
        for values, old in zip(strategy.singular_values, before, strict=True):
            values.copy_(old)
        assert not torch.allclose(pair.student(inputs), masked, atol=1e-3)
        strategy.after_step(20, optimizer)
        torch.testing.assert_close(pair.student(inputs), masked, rtol=1e-4, atol=1e-5)
    assert adapters.attached_plan().components == int(kept.sum()) == 8
    gone = {id(entry) for entry in strategy.entries}
    assert not gone & {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) not in gone for p in optimizer.state)


def test_a_run_that_ends_early_is_within_the_budget_and_says_so() -> None:
    strategy = adalora(Budget(rank=1))
    begun(strategy, pair_of(), 100)
    plan = strategy.finalize(lambda plan: 0.0)
    assert set(plan.values()) == {1}  # no importance was measured: spread evenly
    assert strategy.notes == ["training ended before the last allocation (step 50), which was made afterwards"]


def test_modules_of_rank_0_take_part_in_nothing() -> None:
    plan = run(adalora(Budget(rank=1)), pair_of(), settings=AdapterSettings(rank_pattern={"U0": 0})).plan
    assert plan["U0"] == 0
    assert plan.params <= 128


def test_it_finds_planted_ranks() -> None:
    pair = pair_of()
    fitted = run(adalora(Budget(params=pair.true_plan.params)), pair, 400)
    assert fitted.plan == pair.true_plan
    assert excess_error(pair, fitted.adapters) < 1e-2


# Pruning, which others share ------------------------------------------------------------------------------------------


def test_components_are_bought_by_score_while_they_fit_by_hand() -> None:
    plan = RankPlan({"a": Site(2, 3), "b": Site(4, 6)}, {"a": 2, "b": 2})  # 5 and 10 each
    scores = torch.tensor([1.0, 3.0, 4.0, 2.0])
    assert best_components(plan, scores, 15).tolist() == [0, 1, 1, 0]
    assert best_components(plan, scores, 14).tolist() == [0, 0, 1, 0]
    assert best_components(plan, scores, 20).tolist() == [1, 1, 1, 0]  # the second of b does not fit any more
    assert best_components(plan, scores, None, most=3).tolist() == [0, 1, 1, 1]
    assert best_components(plan, scores, None).tolist() == [1, 1, 1, 1]
    assert best_components(plan, torch.zeros(4), 15).tolist() == [1, 0, 1, 0]  # ties are spread evenly


def test_b_keeps_its_moments_in_its_new_scale() -> None:
    """After the fold, Adam goes on as if it had always trained B diag(g): with its gradient, divided by g."""
    strategy = alone(3, 3, 2, Budget())
    layer = strategy.adapters.layers["m"]
    assert isinstance(layer.gate, ScaleGate)
    g = torch.tensor([4.0, 0.5])
    with torch.no_grad():
        layer.gate.values.copy_(g)
    folded = nn.Parameter(layer.lora_B.detach() * g)
    ours, reference = AdamW([layer.lora_B], lr=0.0), AdamW([folded], lr=0.0)
    for _ in range(3):
        layer.lora_B.grad = torch.randn(3, 2)
        folded.grad = layer.lora_B.grad / g
        ours.step()
        reference.step()
    settle(strategy.adapters, torch.ones(2), ours)
    torch.testing.assert_close(layer.lora_B, folded)
    for key, value in reference.state[folded].items():
        torch.testing.assert_close(ours.state[layer.lora_B][key], value)


# Checkpoints and accumulation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", ["parameters", "components"])
@pytest.mark.parametrize("stop", [3, 11, 15, 20, 33])
def test_resumed_is_uninterrupted(stop: int, count: str) -> None:
    """Stopped before the first allocation, between two, at one, at the last and after it."""
    assert_resumed_is_uninterrupted(lambda: adalora(Budget(rank=1.5), delta_t=5, count=count), stop)


def test_accumulation_of_2_is_one_double_batch() -> None:
    assert_accumulation_of_2_is_one_double_batch(lambda: adalora(Budget(rank=1.5), delta_t=5))
