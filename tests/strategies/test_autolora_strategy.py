"""The autolora strategy step by step: phases, price, multiplier, rotation, projection, and going on after a stop."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from strategies.handloop import Fitted, fit, mse, planted_batches
from torch.optim import AdamW, Optimizer

from autolora.adapters import Adapters, AdapterSettings
from autolora.adapters.gates import SELECTOR_FORMS
from autolora.plan import Budget, RankPlan
from autolora.strategies.autolora import AutoLoRA
from autolora.strategies.base import Batch, GroupRates, Rates
from autolora.tasks.planted import TeacherStudent, plant

RATES = Rates(adapter=GroupRates(1e-2), gate=GroupRates(None), head=GroupRates(1e-3))


def pair_of() -> TeacherStudent:
    """Four modules; a component costs 24, 24, 40, 40."""
    return plant(dim=16, widths=[8, 24], ranks=(0, 2, 3, 0))


def autolora(budget: Budget, max_rank: int = 4, **options: Any) -> AutoLoRA:
    return AutoLoRA(AutoLoRA.Options(**options), budget=budget, max_rank=max_rank)


def run(strategy: AutoLoRA, pair: TeacherStudent, steps: int = 40, **kwargs: Any) -> Fitted:
    return fit(strategy, pair.student, *streams(pair), steps=steps, lr=1e-2, **kwargs)


def streams(pair: TeacherStudent) -> tuple[Iterator[Batch], Iterator[Batch]]:
    return planted_batches(pair, 32, seed=1), planted_batches(pair, 32, seed=2)


def begun(strategy: AutoLoRA, pair: TeacherStudent, steps: int = 100) -> tuple[Adapters, Optimizer]:
    """Attached and begun, with components that do something."""
    adapters = strategy.attach(pair.student, AdapterSettings())
    with torch.no_grad():
        for layer in adapters.layers.values():
            layer.lora_B.normal_(std=0.3)
    optimizer = AdamW(strategy.param_groups(RATES, steps))
    strategy.begin(steps, optimizer)
    return adapters, optimizer


def set_logits(adapters: Adapters, logits: dict[str, list[float]]) -> None:
    with torch.no_grad():
        for name, values in logits.items():
            adapters.layers[name].gate.logits.copy_(torch.tensor(values))


# Phases ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "listening"), [(20, 1), (100, 5)])
def test_phases_scale_with_the_run(steps: int, listening: int) -> None:
    """After each step: a phase begins with the last step of the one before; listening is a tenth of pruning."""
    strategy, seen = autolora(Budget(rank=1)), []
    run(strategy, pair_of(), steps, every_step=lambda step, optimizer: seen.append(strategy.phase))
    quarter = steps // 4
    pruning = ["listen"] * listening + ["prune"] * (2 * quarter - listening)
    assert seen == ["warmup"] * (quarter - 1) + pruning + ["settle"] * (quarter + 1)


@pytest.mark.parametrize(
    ("selector", "least"),
    [
        ({"form": "hard_concrete", "init": -2.4}, "-2.4"),  # log(1/11) = -2.398
        ({"init": 0.0}, "0"),
        ({"threshold": 0.7}, "0.847"),  # log(7/3)
    ],
)
def test_a_gate_that_would_begin_closed_is_refused(selector: dict[str, Any], least: str) -> None:
    with pytest.raises(ValueError, match=rf"init: expected more than {re.escape(least)}, where a gate of form"):
        autolora(Budget(rank=1), selector=selector)


def test_every_component_is_open_while_listening() -> None:
    strategy = autolora(Budget(rank=1), selector={"threshold": 0.7, "init": 0.9})
    adapters, optimizer = begun(strategy, pair_of())
    strategy.after_step(25, optimizer)
    assert strategy.phase == "listen"
    adapters.model.train()
    assert all(layer.gate().tolist() == [1.0] * 4 for layer in adapters.layers.values())


def test_without_noise_to_go_by_selectors_begin_evenly() -> None:
    """No gradient has been heard: the order is that of even ranks, and the first to close are the last of that."""
    strategy = autolora(Budget(rank=1), selector={"init": 0.5, "spread": 4.0})
    adapters, optimizer = begun(strategy, pair_of())
    strategy.after_step(25, optimizer)
    strategy.after_step(30, optimizer)
    assert strategy.phase == "prune"
    logits = {name: layer.gate.logits.tolist() for name, layer in adapters.layers.items()}
    assert all(values == sorted(values, reverse=True) for values in logits.values())
    assert min(values[0] for values in logits.values()) > max(values[1] for values in logits.values())


@pytest.mark.parametrize(("warmup", "prune"), [(0.0, 0.5), (0.5, 0.5), (0.0, 1.0)])
def test_phases_of_no_length(warmup: float, prune: float) -> None:
    strategy = autolora(Budget(rank=1), phases={"warmup": warmup, "prune": prune})
    plan = run(strategy, pair_of(), 12).plan
    assert strategy.settled
    assert plan.params <= 128


def test_gates_wait_open_during_the_warm_up() -> None:
    strategy, pair = autolora(Budget(rank=1)), pair_of()
    adapters, _ = begun(strategy, pair)
    before = [p.clone() for p in adapters.gate_parameters()]
    batch = next(streams(pair)[0])
    mse(pair.student, batch).backward()
    assert strategy.penalty(torch.tensor(1.0)) is None
    assert adapters.active_plan() == strategy.largest
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(adapters.gate_parameters(), before, strict=True))


def test_the_selectors_have_a_constant_rate_set_by_the_length_of_the_phase() -> None:
    strategy = autolora(Budget(rank=1))
    strategy.attach(pair_of().student, AdapterSettings())

    def gate_group(rates: Rates, steps: int) -> dict[str, Any]:
        return next(group for group in strategy.param_groups(rates, steps) if group["name"] == "gate")

    assert gate_group(RATES, 1000)["lr"] == pytest.approx(20 / 500)
    assert gate_group(RATES, 100)["lr"] == pytest.approx(20 / 50)
    assert gate_group(RATES, 20)["lr"] == 0.5
    assert gate_group(RATES, 1000)["constant"]
    chosen = Rates(adapter=GroupRates(1e-2), gate=GroupRates(0.5, weight_decay=0.1), head=GroupRates(1e-3))
    assert (gate_group(chosen, 1000)["lr"], gate_group(chosen, 1000)["weight_decay"]) == (0.5, 0.1)


# The price ------------------------------------------------------------------------------------------------------------


def test_penalty_by_hand() -> None:
    strategy = autolora(Budget(), sparsity={"weight": 0.02})
    adapters, optimizer = begun(strategy, pair_of(), steps=300)
    of_step = {1: (2.0, 4.0), 2: (6.0, 4.0), 3: (4.0, 4.0)}  # two batches each; the first hundredth of the run
    for step in range(1, 91):
        for loss in of_step.get(step, (100.0, 100.0)):
            assert strategy.penalty(torch.tensor(loss)) is None
        strategy.after_step(step, optimizer)
    assert strategy.phase == "prune"
    set_logits(adapters, {name: [0.0, 1.0, -1.0, 2.0] for name in adapters.layers})
    sigma = {x: 1 / (1 + math.exp(-x)) for x in (0.0, 1.0, -1.0, 2.0)}
    expected = 0.02 * 4.0 * sum(sigma.values()) / 4  # the same share of every module, whatever it costs
    penalty = strategy.penalty(torch.tensor(7.0))
    assert penalty is not None
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-5)
    penalty.backward()
    costs = {"U0": 24, "V0": 24, "U1": 40, "V1": 40}
    for name, layer in adapters.layers.items():
        by_hand = [0.02 * 4.0 * costs[name] / 512 * sigma[x] * (1 - sigma[x]) for x in (0.0, 1.0, -1.0, 2.0)]
        torch.testing.assert_close(layer.gate.logits.grad, torch.tensor(by_hand))
        assert layer.lora_A.grad is layer.lora_B.grad is None


def test_no_penalty_once_settled() -> None:
    strategy, pair = autolora(Budget()), pair_of()
    begun(strategy, pair)
    strategy.finalize(lambda plan: 0.0)
    assert strategy.penalty(torch.tensor(1.0)) is None


def test_scheduled_cost_is_cubic_down_to_the_budget() -> None:
    strategy = autolora(Budget(params=112))
    begun(strategy, pair_of())  # everything costs 4 * 128 = 512; the cost falls from step 30 to 66, and is held to 75
    costs = [strategy.scheduled_cost(step) for step in (20, 30, 48, 66, 70, 75)]
    assert costs == pytest.approx([512, 512, 112 + 400 / 8, 112, 112, 112])


def test_a_dual_ascent_step_by_hand() -> None:
    strategy = autolora(Budget(params=112), sparsity={"weight": 0.01, "ascent": 15.0, "gain": 30.0})
    adapters, optimizer = begun(strategy, pair_of())
    strategy.penalty(torch.tensor(200.0))
    for step in (25, 30):  # no gradient was heard: the unit of the price is that of the fixed price, 0.01 * 200
        strategy.after_step(step, optimizer)
        assert float(strategy.price) == 0.0
    assert strategy.phase == "prune"
    strategy.after_step(48, optimizer)  # all is kept: 512 where the schedule says 162
    rate, high, low = 15 / 45, (512 - 162) / 512, (40 - 112) / 512
    assert float(strategy.price) == pytest.approx(2 * (rate * high + 30 * high))
    assert strategy.progress() == {
        "sparsity_price": pytest.approx(float(strategy.price)),
        "scheduled_cost": pytest.approx(162),
    }
    set_logits(adapters, {"U0": [-1.0] * 4, "V0": [-1.0] * 4, "U1": [-1.0] * 4, "V1": [-1.0, -1.0, -1.0, 1.0]})
    strategy.after_step(66, optimizer)  # 40 where the schedule says 112: the price is never negative
    assert float(strategy.integral) == pytest.approx(rate * (high + low))
    assert float(strategy.price) == 0.0
    for _ in range(20):
        strategy.after_step(67, optimizer)
    assert float(strategy.integral) == 0.0


def test_without_a_budget_the_price_is_a_share_of_the_initial_loss() -> None:
    strategy = autolora(Budget(), sparsity={"weight": 0.03})
    prices: list[float] = []
    fitted = run(strategy, pair_of(), every_step=lambda step, optimizer: prices.append(float(strategy.price)))
    assert prices == pytest.approx([0.0] * 11 + [0.03 * fitted.losses[0]] * 29)
    assert set(strategy.progress()) == {"sparsity_price"}


# Listening ------------------------------------------------------------------------------------------------------------


def test_what_is_heard_sets_the_order_and_the_unit_of_the_price_by_hand() -> None:
    strategy = autolora(Budget(params=112), selector={"init": 0.5, "spread": 4.0})
    adapters, optimizer = begun(strategy, pair_of())
    strategy.after_step(25, optimizer)
    assert strategy.phase == "listen"
    generator = torch.Generator().manual_seed(0)
    heard = {name: [0.0] * 4 for name in adapters.layers}
    for step in range(26, 31):
        for name, layer in adapters.layers.items():
            layer.gate.logits.grad = torch.rand(4, generator=generator)
            heard[name] = [h + float(g) ** 2 for h, g in zip(heard[name], layer.gate.logits.grad, strict=True)]
        strategy.after_backward()
        strategy.after_step(step, optimizer)
    assert strategy.phase == "prune"

    costs = {"U0": 24, "V0": 24, "U1": 40, "V1": 40}
    worth = sorted((square / costs[name], name, i) for name in heard for i, square in enumerate(heard[name]))
    below = 0
    for _, name, i in worth:
        below += costs[name]
        assert float(adapters.layers[name].gate.logits[i].detach()) == pytest.approx(0.5 + 4 * below / 512, rel=1e-5)

    slope = (sigma := 1 / (1 + math.exp(-0.5))) * (1 - sigma)
    ratios = sorted((square / 5) ** 0.5 / (costs[name] * slope / 512) for name in heard for square in heard[name])
    assert float(strategy.price_unit) == pytest.approx(ratios[7], rel=1e-5)  # torch's median of 16 is the eighth


@pytest.mark.parametrize("form", ["straight_through", "sigmoid", "simplex"])
def test_no_change_of_phase_before_pruning_jolts_the_output(form: str) -> None:
    strategy, pair = autolora(Budget(rank=1), selector={"form": form}), pair_of()
    _, optimizer = begun(strategy, pair)
    inputs = torch.randn(9, 16)
    expected = pair.student(inputs)
    for step, phase in ((25, "listen"), (30, "prune")):
        strategy.after_step(step, optimizer)
        assert strategy.phase == phase
        torch.testing.assert_close(pair.student(inputs), expected, rtol=1e-4, atol=1e-5)


# The rotation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotate", [True, False])
def test_rotation_at_the_end_of_the_warm_up_leaves_the_output(rotate: bool) -> None:
    strategy, pair = autolora(Budget(rank=1), rotate=rotate), pair_of()
    inputs, seen = torch.randn(9, 16), []
    begin = strategy._begin_listening

    def watched(optimizer: Optimizer) -> None:
        weights = strategy.adapters.adapter_parameters()
        before, factors = pair.student(inputs), [w.clone() for w in weights]
        assert all(w in optimizer.state for w in weights)
        begin(optimizer)
        torch.testing.assert_close(pair.student(inputs), before, rtol=1e-4, atol=1e-5)
        assert [w in optimizer.state for w in weights] == [not rotate] * len(weights)
        assert [torch.equal(w, f) for w, f in zip(weights, factors, strict=True)] == [not rotate] * len(weights)
        if rotate:
            for layer in strategy.adapters.layers.values():
                gram = layer.lora_B.T @ layer.lora_B
                assert (gram - gram.diagonal().diag()).abs().max() < 1e-4
        seen.append(strategy.phase)

    strategy._begin_listening = watched  # type: ignore[method-assign]
    run(strategy, pair)
    assert seen == ["listen"]


# The plan -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [Budget(rank=0.5), Budget(rank=1), Budget(params=301), Budget(fraction=0.9)])
def test_the_final_plan_is_within_the_budget_and_spends_it(budget: Budget) -> None:
    strategy, pair = autolora(budget), pair_of()
    fitted = run(strategy, pair)
    assert strategy.allowance is not None
    # The cheapest component costs 24, which is more than 2 % of such small budgets
    cheapest = min(fitted.plan.sites[n].cost for n in fitted.plan if fitted.plan[n] < strategy.largest[n])
    assert strategy.allowance - cheapest < fitted.plan.params <= strategy.allowance
    assert strategy.settled
    assert fitted.adapters.active_plan() == fitted.plan


def test_at_least_98_percent_is_spent() -> None:
    pair = plant(dim=64, widths=[32, 64], ranks=(0, 1, 2, 3))
    strategy = autolora(Budget(rank=12.3), max_rank=16)
    plan = run(strategy, pair, 20).plan
    assert strategy.allowance is not None
    assert 0.98 * strategy.allowance <= plan.params <= strategy.allowance


def test_a_budget_of_nothing_leaves_rank_0_everywhere() -> None:
    pair = pair_of()
    inputs = torch.randn(5, 16)
    bare = pair.student(inputs)
    fitted = run(autolora(Budget(params=0)), pair)
    assert fitted.plan == dict.fromkeys(pair.true_plan, 0)
    assert torch.equal(pair.student(inputs), bare)


def test_the_projection_keeps_the_most_probable_that_fit() -> None:
    strategy = autolora(Budget(params=112))
    adapters, _ = begun(strategy, pair_of())
    set_logits(
        adapters,
        {"U0": [-3.0, 0.2, 0.1, 0.0], "V0": [-2.0] * 4, "U1": [5.0, 4.0, 3.0, 2.0], "V1": [1.0, -1.0, -1.0, -1.0]},
    )
    strategy.phase = "prune"
    plan = strategy.finalize(lambda plan: 0.0)
    # 40 + 40 for the first two of U1; neither its third nor V1 fits in the 32 that are left; a U0 for 24 does
    assert plan == {"U0": 1, "V0": 0, "U1": 2, "V1": 0}
    assert adapters.layers["U0"].gate.evaluation_gate().tolist() == [0, 1, 0, 0]
    assert adapters.layers["U1"].gate.evaluation_gate().tolist() == [1, 1, 0, 0]


def test_the_plan_goes_by_the_mean_over_the_last_fifth_of_pruning() -> None:
    """A selector that dips below the threshold at the last moment is kept."""
    strategy = autolora(Budget())
    adapters, optimizer = begun(strategy, pair_of())
    for step in range(25, 67):
        strategy.after_step(step, optimizer)
    for step in range(67, 76):  # pruning is steps 30 to 75, its last fifth steps 67 to 75
        up, dipped = [3.0, 3.0, -3.0, -3.0], [-0.1, 3.0, -3.0, 0.1]
        set_logits(adapters, {name: dipped if step >= 73 else up for name in adapters.layers})
        before = {name: layer.lora_A[:2].detach().clone() for name, layer in adapters.layers.items()}
        strategy.after_step(step, optimizer)
    assert strategy.settled
    assert all(torch.equal(layer.lora_A, before[name]) for name, layer in adapters.layers.items())


def test_without_a_budget_the_plan_is_what_the_selectors_keep() -> None:
    strategy = autolora(Budget())
    adapters, optimizer = begun(strategy, pair_of())
    strategy.after_step(25, optimizer)
    strategy.after_step(30, optimizer)
    set_logits(
        adapters, {"U0": [-1.0] * 4, "V0": [1.0, -1.0, 1.0, -1.0], "U1": [1.0] * 4, "V1": [-0.1, 0.1, -3.0, -3.0]}
    )
    assert strategy.finalize(lambda plan: 0.0) == {"U0": 0, "V0": 2, "U1": 4, "V1": 1}
    assert adapters.layers["V0"].gate.evaluation_gate().tolist() == [1, 0, 1, 0]


def test_without_a_budget_training_that_ends_in_the_warm_up_keeps_everything() -> None:
    strategy = autolora(Budget())
    begun(strategy, pair_of())
    assert strategy.finalize(lambda plan: 0.0) == strategy.largest


@pytest.mark.parametrize("form", SELECTOR_FORMS)
def test_without_a_budget_what_evaluation_keeps_is_kept(form: str) -> None:
    """With hard_concrete a gate may be open more often than not and its value below the threshold: logits -1, -2."""
    strategy = autolora(Budget(), selector={"form": form, "tau": 0.7})
    adapters, optimizer = begun(strategy, pair_of())
    strategy.after_step(25, optimizer)
    strategy.after_step(30, optimizer)
    set_logits(adapters, {name: [-1.0, -2.0, 1.0, -3.0] for name in adapters.layers})
    before = adapters.active_plan()
    assert set(before.values()) == {1}
    assert strategy.finalize(lambda plan: 0.0) == before


@pytest.mark.parametrize("budget", [Budget(rank=1.5), Budget()])
@pytest.mark.parametrize("form", SELECTOR_FORMS)
def test_every_form_ends_settled_with_training_equal_to_evaluation(form: str, budget: Budget) -> None:
    pair = pair_of()
    strategy = autolora(budget, selector={"form": form, "tau": 0.7})
    fitted = run(strategy, pair)
    assert strategy.settled
    assert all(math.isfinite(loss) for loss in fitted.losses)
    assert strategy.allowance is None or fitted.plan.params <= strategy.allowance
    for layer in fitted.adapters.layers.values():
        assert set(layer.gate.evaluation_gate().tolist()) <= {0.0, 1.0}
    inputs = torch.randn(9, 16)
    assert torch.equal(pair.student.train()(inputs), pair.student.eval()(inputs))


# Checkpoints ----------------------------------------------------------------------------------------------------------


def steps_of(strategy: AutoLoRA, optimizer: Optimizer, batches: Iterator[Batch], first: int, last: int) -> None:
    model = strategy.adapters.model
    for step in range(first, last + 1):
        loss = mse(model, next(batches))
        penalty = strategy.penalty(loss)
        optimizer.zero_grad()
        (loss if penalty is None else loss + penalty).backward()
        strategy.after_backward()
        optimizer.step()
        strategy.after_step(step, optimizer)


@pytest.mark.parametrize("form", ["straight_through", "gumbel"])
@pytest.mark.parametrize("stop", [5, 11, 20, 29, 35])
def test_resumed_is_uninterrupted(form: str, stop: int) -> None:
    """Stopped in the warm-up, listening, pruning (twice) and settled: the rest of the run is the same, bit for bit."""

    def fresh() -> tuple[AutoLoRA, Optimizer, Iterator[Batch]]:
        pair = pair_of()
        strategy = autolora(Budget(rank=1.5), selector={"form": form})
        strategy.attach(pair.student, AdapterSettings())
        optimizer = AdamW(strategy.param_groups(RATES, 40))
        strategy.begin(40, optimizer)
        return strategy, optimizer, streams(pair)[0]

    whole, optimizer, batches = fresh()
    steps_of(whole, optimizer, batches, 1, 40)
    first, optimizer, batches = fresh()
    steps_of(first, optimizer, batches, 1, stop)
    saved = first.adapters.trainable_state(), first.state_dict(), optimizer.state_dict()
    second, _, _ = fresh()
    second.adapters.load_trainable_state(saved[0])
    second.load_state_dict(saved[1])
    optimizer = AdamW(second.param_groups(RATES, 40))
    optimizer.load_state_dict(saved[2])
    assert second.phase == first.phase
    kept = ("integral", "price", "price_unit", "squared_gradient", "initial_loss", "losses_seen", "probability_sum")
    for name in (*kept, "watched", "step_seen"):
        torch.testing.assert_close(getattr(second, name), getattr(first, name), rtol=0, atol=0)
    assert (second.watched > 0) == (stop >= 29)  # the last fifth of pruning, and after it
    assert second.adapters.attached_plan() == first.adapters.attached_plan()
    assert second.adapters.active_plan() == first.adapters.active_plan()
    steps_of(second, optimizer, batches, stop + 1, 40)
    expected, found = whole.adapters.trainable_state(), second.adapters.trainable_state()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert whole.finalize(lambda plan: 0.0) == second.finalize(lambda plan: 0.0)


def test_options_that_leave_no_room() -> None:
    with pytest.raises(ValueError, match=r"warmup \+ prune: expected at most 1, got 0.6 \+ 0.5"):
        AutoLoRA.Options(phases={"warmup": 0.6, "prune": 0.5})


def test_modules_of_rank_0_take_part_in_nothing() -> None:
    pair = pair_of()
    settings = AdapterSettings(rank_pattern={"U0": 0})
    fitted = run(autolora(Budget(rank=1)), pair, settings=settings)
    assert fitted.plan["U0"] == 0
    assert RankPlan(fitted.adapters.sites, dict(fitted.plan)).params <= 128


def test_listening_moves_no_selector() -> None:
    strategy, pair = autolora(Budget(rank=1)), pair_of()
    seen: list[str] = []

    def every_step(step: int, optimizer: Optimizer) -> None:
        if strategy.phase == "listen":
            logits = torch.cat([gate.logits for gate in strategy.gates.values()])
            assert torch.equal(logits, torch.full_like(logits, strategy.options.selector.init))
            assert strategy.adapters.active_plan() == strategy.largest
            seen.append(strategy.phase)

    fit(strategy, pair.student, *streams(pair), steps=100, every_step=every_step)
    assert len(seen) == 5


def test_a_run_that_ends_in_the_warm_up_spreads_the_budget_evenly() -> None:
    strategy = autolora(Budget(rank=1))
    begun(strategy, pair_of())
    plan = strategy.finalize(lambda plan: 0.0)
    assert set(plan.values()) == {1}


def test_a_run_that_ends_early_says_that_its_ranks_are_not_learned() -> None:
    strategy = autolora(Budget(rank=1))
    begun(strategy, pair_of())
    strategy.finalize(lambda plan: 0.0)
    assert strategy.notes == [
        "training ended in the warmup phase: the ranks are spread evenly, not learned, and were never trained alone"
    ]
    whole = autolora(Budget(rank=1))
    run(whole, pair_of())
    assert whole.notes == []


@pytest.mark.parametrize("options", [{"selector": {"init": float("nan")}}, {"sparsity": {"weight": float("inf")}}])
def test_options_are_finite(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="finite number"):
        AutoLoRA.Options.model_validate(options)
