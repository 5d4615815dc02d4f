"""SoRA: the proximal step, the path of lambda and the scale of gates by hand, and what is left at the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.optimize import minimize_scalar
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
from torch import Tensor
from torch.optim import SGD, Optimizer

from autolora.adapters import AdapterSettings
from autolora.errors import ConfigError
from autolora.plan import Budget
from autolora.strategies.base import GroupRates, Rates
from autolora.strategies.sora import SoRA, soft_threshold

GATED = Rates(adapter=GroupRates(1e-2), gate=GroupRates(0.1), head=GroupRates(1e-3))


def sora(budget: Budget, max_rank: int = 4, **options: Any) -> SoRA:
    return SoRA(SoRA.Options(**options), budget=budget, max_rank=max_rank)


def pruning(gates: dict[str, list[float]], budget: Budget, n: int = 6, **options: Any) -> tuple[SoRA, Optimizer]:
    """Square modules that have just begun to prune with these gates, at a rate of 0.1."""
    strategy = sora(budget, len(next(iter(gates.values()))), **options)
    strategy.attach(tree(dict.fromkeys(gates, (n, n))), AdapterSettings(modules_to_save=()))
    optimizer = SGD(strategy.param_groups(GATED, 100))
    strategy.begin(100, optimizer)
    with torch.no_grad():
        for layer in strategy.adapters.layers.values():
            layer.lora_B.normal_()
    strategy.after_step(10, optimizer)
    assert strategy.phase == "prune"
    set_gates(strategy, gates)
    return strategy, optimizer


def set_gates(strategy: SoRA, gates: dict[str, list[float]]) -> None:
    with torch.no_grad():
        for name, values in gates.items():
            strategy.adapters.layers[name].gate.values.copy_(torch.tensor(values))  # type: ignore[union-attr, operator]


def gates_of(strategy: SoRA) -> list[float]:
    return torch.cat(strategy._values()).tolist()


# The proximal step ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_soft_threshold_is_the_argmin_of_its_definition(threshold: float) -> None:
    """u that minimises (u - v)^2 / 2 + t |u|, by a search that knows nothing of the closed form."""
    values = torch.linspace(-3, 3, 41, dtype=torch.float64)
    found = [
        minimize_scalar(lambda u, v=v: (u - v) ** 2 / 2 + threshold * abs(u), bounds=(-4, 4), options={"xatol": 1e-9}).x
        for v in values.tolist()
    ]
    ours = soft_threshold(values, torch.tensor(threshold, dtype=torch.float64))
    assert ours.tolist() == pytest.approx(found, abs=1e-6)


def test_soft_threshold_by_hand() -> None:
    """Exactly 0 up to the threshold and no further: what lies between it and its double stays."""
    values = torch.tensor([-2.0, -0.75, -0.5, -0.25, 0.0, 0.5, 0.625, 1.5])
    assert soft_threshold(values, torch.tensor(0.5)).tolist() == [-1.5, -0.25, 0.0, 0.0, 0.0, 0.0, 0.125, 1.0]


def test_a_step_shrinks_by_rate_times_lambda() -> None:
    options = {"lambda_start": 0.5, "lambda_end": 0.5, "normalize": False}
    strategy, optimizer = pruning({"m": [1.0, -0.3, 0.04, 0.05]}, Budget(), **options)
    strategy.after_step(11, optimizer)
    assert gates_of(strategy) == pytest.approx([0.95, -0.25, 0.0, 0.0])
    assert gates_of(strategy)[2:] == [0.0, 0.0]
    assert strategy.progress() == {"sparsity_lambda": pytest.approx(0.5)}


def test_a_closed_gate_has_a_gradient_and_comes_back() -> None:
    strategy, optimizer = pruning({"m": [1.0, 0.04]}, Budget(), lambda_start=0.5, lambda_end=0.5, normalize=False)
    strategy.after_step(11, optimizer)
    layer = strategy.adapters.layers["m"]
    assert strategy.adapters.active_plan() == {"m": 1}
    (layer(torch.eye(6)) @ layer.lora_B[:, 1]).sum().backward()
    assert layer.gate.values.grad[1] != 0  # type: ignore[union-attr, index]
    layer.gate.values.grad.mul_(1 / layer.gate.values.grad[1])  # type: ignore[union-attr, index, operator]
    optimizer.step()
    strategy.after_step(12, optimizer)
    assert gates_of(strategy)[1] == pytest.approx(-0.1 * 1 + 0.05)


# The path of lambda ---------------------------------------------------------------------------------------------------


def test_without_a_budget_lambda_rises_linearly_and_is_level_at_the_end() -> None:
    """The prune phase is steps 10 to 60, its last fifth 50 to 60."""
    strategy, optimizer = pruning({"m": [9.0] * 3}, Budget(), lambda_start=0.2, lambda_end=1.0)
    seen = []
    for step in (20, 30, 50, 59):
        strategy.after_step(step, optimizer)
        seen.append(float(strategy.strength))
    assert seen == pytest.approx([0.4, 0.6, 1.0, 1.0])


def test_with_a_budget_lambda_is_the_smallest_that_meets_the_schedule() -> None:
    """Eight components of 12; at step 30 the half of the way leaves 36 + 60 / 8 = 43.5 parameters: three components.

    The fourth largest gate is 0.15, so that the threshold is 0.15 and lambda 1.5.
    """
    gates = {"a": [0.5, 0.1, 0.15, 0.01], "b": [-0.4, 0.12, 0.3, 0.02]}
    strategy, optimizer = pruning(gates, Budget(params=36), normalize=False)
    assert strategy.scheduled_cost(30) == pytest.approx(43.5)
    strategy.after_step(30, optimizer)
    assert gates_of(strategy) == pytest.approx([0.35, 0, 0, 0, -0.25, 0, 0.15, 0])
    assert [g != 0 for g in gates_of(strategy)] == [True, False, False, False, True, False, True, False]
    assert strategy.progress() == {"sparsity_lambda": pytest.approx(1.5), "scheduled_cost": pytest.approx(43.5)}
    strategy.after_step(31, optimizer)  # all is well: nothing is shrunk
    assert gates_of(strategy) == pytest.approx([0.35, 0, 0, 0, -0.25, 0, 0.15, 0])


def test_with_a_budget_lambda_has_a_limit() -> None:
    gates = {"a": [0.5, 0.1, 0.15, 0.01], "b": [-0.4, 0.12, 0.3, 0.02]}
    strategy, optimizer = pruning(gates, Budget(params=36), normalize=False, lambda_max=0.5)
    strategy.after_step(30, optimizer)
    assert gates_of(strategy) == pytest.approx([0.45, 0.05, 0.1, 0, -0.35, 0.07, 0.25, 0])


def test_lambda_0_closes_nothing_and_a_large_one_everything() -> None:
    open_, closed = (
        sora(Budget(), lambda_start=value, lambda_end=value, phases={"warmup": 0.1, "prune": 0.6}) for value in (0, 50)
    )
    assert run(open_, pair_of()).plan == open_.largest
    assert run(closed, pair_of()).plan.components == 0
    assert open_.settled
    assert closed.settled


# The scale of gates ---------------------------------------------------------------------------------------------------


def test_normalizing_gives_all_factors_one_size_and_leaves_the_output() -> None:
    strategy, pair = sora(Budget(rank=1)), pair_of()
    adapters, optimizer = begun(strategy, pair, 40)
    batches, inputs = streams(pair)[0], torch.randn(9, 16)
    train(strategy, optimizer, batches, 1, 3)
    with torch.no_grad():
        before, sizes = pair.student(inputs), []
        for layer in adapters.layers.values():
            sizes.append(layer.lora_A.norm(dim=1) * layer.lora_B.norm(dim=0) / layer.out_features**0.5)
        strategy.after_step(4, optimizer)
        assert strategy.phase == "prune"
        torch.testing.assert_close(pair.student(inputs), before, rtol=1e-4, atol=1e-5)
    mean = torch.cat(sizes).mean()
    for layer, own in zip(adapters.layers.values(), sizes, strict=True):
        torch.testing.assert_close(layer.gate.values.detach(), own / mean)  # type: ignore[union-attr]
    train(strategy, optimizer, batches, 5, 12)
    factors = [x.lora_A.norm(dim=1) * x.lora_B.norm(dim=0) / x.out_features**0.5 for x in adapters.layers.values()]
    torch.testing.assert_close(torch.cat(factors).detach(), mean.expand(16))


def test_the_budget_buys_by_size_whatever_the_scale_of_the_factors() -> None:
    strategy, _ = pruning({"m": [1.0, 2.0, 0.5, 0.1]}, Budget(params=24), normalize=False)
    layer = strategy.adapters.layers["m"]
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(6)[:4])
        layer.lora_B.copy_(torch.eye(6)[:, :4] * torch.tensor([1.0, 0.1, 8.0, 9.0]))  # sizes 1, 0.2, 4, 0.9
    strategy.finalize(lambda plan: 0.0)
    assert layer.gate.evaluation_gate().tolist() == [1, 0, 1, 0]
    assert strategy.notes == ["training ended in the prune phase: the ranks were never trained alone"]


# Phases ---------------------------------------------------------------------------------------------------------------


def test_phases_and_the_rate_of_the_gates() -> None:
    strategy, pair, seen = sora(Budget(rank=1)), pair_of(), []
    started: list[Tensor] = []

    def look(step: int, optimizer: Optimizer) -> None:
        seen.append(strategy.phase)
        if step == 3:
            started.extend(strategy._values())
            assert strategy.adapters.active_plan() == strategy.largest

    run(strategy, pair, every_step=look)
    assert seen == ["warmup"] * 3 + ["prune"] * 20 + ["settle"] * 17
    strategy.attach(pair_of().student, AdapterSettings())
    (gates,) = [group for group in strategy.param_groups(RATES, 1000) if group["name"] == "gate"]
    assert (gates["lr"], gates["constant"]) == (20 / 500, True)
    assert next(g["lr"] for g in strategy.param_groups(RATES, 40) if g["name"] == "gate") == 0.1


def test_gates_wait_during_the_warm_up() -> None:
    strategy, pair = sora(Budget(rank=1)), pair_of()
    _, optimizer = begun(strategy, pair, 100)
    train(strategy, optimizer, streams(pair)[0], 1, 9)
    assert all((values == 1).all() for values in strategy._values())
    assert all(values.grad is None for values in strategy.adapters.gate_parameters())


def test_without_a_warm_up_the_gates_learn_from_the_start() -> None:
    strategy = sora(Budget(), normalize=False, phases={"warmup": 0.0, "prune": 0.5})
    adapters, _ = begun(strategy, pair_of(), 40)
    assert strategy.phase == "prune"
    assert all(layer.gate.value().tolist() == [1.0] * 4 for layer in adapters.layers.values())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("phases", "steps", "message"),
    [
        (
            {"warmup": 0.1, "prune": 0.5},
            4,
            "of 4 steps the phases have warmup 0, prune 2, settle 2; .* for warmup: raise",
        ),
        (
            {"warmup": 0.5, "prune": 0.1},
            4,
            "of 4 steps the phases have warmup 2, prune 0, settle 2; .* for prune: raise",
        ),
        ({"warmup": 0.0, "prune": 0.5}, 4, r"phases.warmup=0.0 and phases.prune=0.5 of 4 steps are 0 and 2: "),
    ],
)
def test_phases_that_do_not_fit_are_an_error_with_the_numbers(phases: Any, steps: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        begun(sora(Budget(rank=1), phases=phases), pair_of(), steps)


def test_options_that_leave_no_room() -> None:
    with pytest.raises(ValueError, match=r"warmup \+ prune: expected at most 1, got 0.6 \+ 0.5"):
        SoRA.Options(phases={"warmup": 0.6, "prune": 0.5})


# What is left ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("budget", [Budget(rank=0.5), Budget(rank=1), Budget(params=301), Budget(fraction=0.9)])
def test_the_plan_spends_the_budget_and_is_physical(budget: Budget, normalize: bool) -> None:
    strategy, pair = sora(budget, normalize=normalize), pair_of()
    fitted = run(strategy, pair)
    assert strategy.allowance is not None
    cheapest = min(fitted.plan.sites[n].cost for n in fitted.plan if fitted.plan[n] < strategy.largest[n])
    assert strategy.allowance - cheapest < fitted.plan.params <= strategy.allowance
    assert fitted.adapters.attached_plan() == fitted.plan
    assert fitted.adapters.count()["gate"] == 0
    inputs = torch.randn(9, 16)
    assert torch.equal(pair.student.train()(inputs), pair.student.eval()(inputs))


def test_settling_removes_closed_components_and_leaves_the_output() -> None:
    strategy, pair = sora(Budget()), pair_of()
    adapters, optimizer = begun(strategy, pair, 40)
    train(strategy, optimizer, streams(pair)[0], 1, 23)
    with torch.no_grad():
        for gate in strategy.gates:
            gate.values[1:3] = 0
        inputs = torch.randn(9, 16)
        before = pair.student(inputs)
        strategy._settle(optimizer)
        torch.testing.assert_close(pair.student(inputs), before, rtol=1e-4, atol=1e-5)
    assert set(adapters.attached_plan().values()) <= {0, 1, 2}
    assert adapters.gate_parameters() == []


def test_a_budget_of_nothing_leaves_the_bare_model() -> None:
    pair = pair_of()
    inputs = torch.randn(5, 16)
    bare = pair.student(inputs)
    assert run(sora(Budget(params=0)), pair).plan.components == 0
    assert torch.equal(pair.student(inputs), bare)


def test_modules_of_rank_0_take_part_in_nothing() -> None:
    plan = run(sora(Budget(rank=1)), pair_of(), settings=AdapterSettings(rank_pattern={"U0": 0})).plan
    assert plan["U0"] == 0
    assert plan.params <= 128


def test_it_finds_planted_ranks() -> None:
    pair = pair_of()
    fitted = run(sora(Budget(params=pair.true_plan.params)), pair, 400)
    assert fitted.plan == pair.true_plan
    assert excess_error(pair, fitted.adapters) < 1e-2


# Checkpoints and accumulation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("stop", [2, 4, 15, 24, 33])
def test_resumed_is_uninterrupted(stop: int, normalize: bool) -> None:
    """Stopped in the warm-up, at its end, pruning, at the end of that, and settled."""
    assert_resumed_is_uninterrupted(lambda: sora(Budget(rank=1.5), normalize=normalize), stop)


def test_accumulation_of_2_is_one_double_batch() -> None:
    assert_accumulation_of_2_is_one_double_batch(lambda: sora(Budget(rank=1.5)))
