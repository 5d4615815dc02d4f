"""dynamic_growth: when it grows, where, and what growing must not disturb."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies.handloop import Fitted, fit, mse, planted_batches
from test_resume import Stopper, interrupted_run, outcome, stopper  # noqa: F401  fixture
from test_run import configure, sst2  # noqa: F401  fixtures
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from autolora.adapters import Adapters, AdapterSettings, compact
from autolora.adapters.layer import INITS, Init
from autolora.errors import ConfigError, PlanError
from autolora.plan import Budget, RankPlan, Site
from autolora.run import run_one
from autolora.strategies.base import Batch, GroupRates, Rates
from autolora.strategies.dynamic_growth import DynamicGrowth, Options, Round, lay_out
from autolora.strategies.growing import Newcomers, Sensitivity, catch_up, heldout_loss, reserve_scores
from autolora.tasks.planted import TeacherStudent, plant

RATES = Rates(adapter=GroupRates(1e-2, weight_decay=0.3), gate=GroupRates(None), head=GroupRates(1e-3))
SITES = {"U0": Site(16, 8), "V0": Site(8, 16), "U1": Site(16, 24), "V1": Site(24, 16)}
LARGEST = RankPlan.uniform(SITES, 4)  # a component costs 24, 24, 40, 40: a rank everywhere 128, and all 512


def pair_of(ranks: tuple[int, ...] = (0, 2, 3, 0)) -> TeacherStudent:
    return plant(dim=16, widths=[8, 24], ranks=ranks)


def growth(budget: Budget | None = None, max_rank: int = 4, **options: Any) -> DynamicGrowth:
    return DynamicGrowth(Options(**options), budget=budget or Budget(), max_rank=max_rank)


def streams(pair: TeacherStudent) -> tuple[Iterator[Batch], Iterator[Batch]]:
    return planted_batches(pair, 32, seed=1), planted_batches(pair, 32, seed=2)


def run(strategy: DynamicGrowth, pair: TeacherStudent, steps: int = 40, **kwargs: Any) -> Fitted:
    return fit(strategy, pair.student, *streams(pair), steps=steps, lr=1e-2, **kwargs)


def attached(strategy: DynamicGrowth, pair: TeacherStudent, filled: bool = True) -> Adapters:
    adapters = strategy.attach(pair.student, AdapterSettings())
    with torch.no_grad():
        for layer in adapters.layers.values() if filled else ():
            layer.lora_B.normal_(std=0.3).mul_(layer.gate.values)
    return adapters


# When -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "goal", "steps", "expected"),
    [
        ({}, 512, 80, [(5 * i, 128 + 48 * i) for i in range(1, 9)]),
        ({"growth_interval": 10}, 512, 80, [(10, 224), (20, 320), (30, 416), (40, 512)]),
        ({"growth_interval": 15}, 512, 80, [(15, 320), (30, 512)]),
        ({"growth_strategy": "adaptive", "growth_interval": 10}, 512, 80, [(10, 224), (20, 320), (30, 416), (40, 512)]),
        ({"growth_strategy": "step"}, 512, 80, [(20, 256), (40, 512)]),
        ({"growth_strategy": "step", "min_rank": 0, "until": 0.75}, 300, 80, [(20, 128), (40, 256), (60, 300)]),
        ({"growth_strategy": "step", "growth_interval": 7}, 512, 80, [(7, 256), (14, 512)]),
        ({"min_rank": 4}, 512, 80, []),
        ({}, 128, 80, []),
        ({"min_rank": 0}, 0, 80, []),
        ({}, 512, 6, [(1, 256), (2, 384), (3, 512)]),
    ],
)
def test_rounds_by_hand(options: dict[str, Any], goal: int, steps: int, expected: list[tuple[int, int]]) -> None:
    assert lay_out(Options(**options), LARGEST, goal, steps) == [Round(*one) for one in expected]


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        (
            {"growth_interval": 50},
            80,
            r"strategy\.growth_interval=50: growth has 40 steps \(strategy\.until=0\.5 of 80\): expected at most as",
        ),
        (
            {"growth_strategy": "step", "min_rank": 0, "growth_interval": 20},
            80,
            r"strategy\.growth_interval=20: 3 rounds of doubling take 60 steps, but growth has 40 steps .*at most 13",
        ),
        (
            {"growth_strategy": "step", "min_rank": 0},
            4,
            r"growth has 2 steps \(strategy\.until=0\.5 of 4\); expected at least 3: raise trainer\.max_steps",
        ),
        ({}, 1, r"growth has 0 steps .* expected at least 1"),
    ],
)
def test_rounds_that_do_not_fit(options: dict[str, Any], steps: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lay_out(Options(**options), LARGEST, 512, steps)
    strategy = growth(**options)
    adapters = strategy.attach(pair_of().student, AdapterSettings())
    with pytest.raises(ConfigError, match=message):
        strategy.begin(steps, AdamW(adapters.adapter_parameters()))


def test_a_budget_below_the_floor() -> None:
    strategy = growth(Budget(params=255), min_rank=2)
    pair = pair_of()
    with pytest.raises(PlanError, match=r"strategy\.min_rank=2 everywhere costs 256 parameters, more than .* of 255"):
        strategy.attach(pair.student, AdapterSettings())
    assert isinstance(pair.student.U0, nn.Linear)
    growth(Budget(params=256), min_rank=2).attach(pair_of().student, AdapterSettings())


def test_max_rank_below_min_rank() -> None:
    with pytest.raises(ConfigError, match=r"max_rank=4: expected at least strategy\.min_rank=5"):
        growth(min_rank=5).attach(pair_of().student, AdapterSettings())


def scripted(losses: list[float]) -> Any:
    """A loss that falls as it is told, whatever is in the batch."""
    told = iter(losses)

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return torch.tensor(next(told))

    return loss_fn


@pytest.mark.parametrize(
    ("losses", "budget", "expected"),
    [
        # round 1 sets the measure; after that growth waits for an improvement below a tenth
        ([1.0, 0.99, 0.5, 0.46], Budget(), [128, 224, 224, 320]),
        ([1.0, 0.8, 0.6, 0.4], Budget(), [128, 128, 128, 128]),
        ([1.0, 0.8, 0.6, 0.4], Budget(params=416), [128, 128, 128, 416]),
        ([1.0, 1.0, 1.0, 1.0], Budget(params=416), [128, 200, 272, 416]),
        ([1.0, 2.0, 3.0, 4.0], Budget(), [128, 224, 320, 416]),
    ],
)
def test_adaptive_growth_waits_for_a_plateau(losses: list[float], budget: Budget, expected: list[int]) -> None:
    strategy = growth(
        budget, growth_strategy="adaptive", allocation="uniform", growth_interval=1, heldout_batches=1, tolerance=0.1
    )
    adapters = attached(strategy, pair_of())
    optimizer = AdamW(adapters.adapter_parameters())
    strategy.begin(8, optimizer)
    loss_fn, seen = scripted(losses), []
    for step in range(1, 5):
        strategy.heldout_step({}, {}, loss_fn)
        strategy.after_backward()
        strategy.after_step(step, optimizer)
        seen.append(adapters.active_plan().params)
    slack = 40  # a round buys whole components
    assert all(wanted - slack < found <= wanted for found, wanted in zip(seen, expected, strict=True))
    assert strategy.settled
    assert strategy.progress() == {"rounds_passed": 4, "rounds_grown": strategy.grown}


# Where ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [Budget(), Budget(rank=2.5), Budget(params=301), Budget(rank=1)])
@pytest.mark.parametrize("allocation", ["uniform", "importance"])
@pytest.mark.parametrize("kind", ["linear", "step", "adaptive"])
def test_ranks_never_shrink_and_end_at_the_budget(kind: str, allocation: str, budget: Budget) -> None:
    strategy, pair = growth(budget, growth_strategy=kind, allocation=allocation), pair_of()
    plans: list[RankPlan] = []
    fitted = run(strategy, pair, every_step=lambda step, optimizer: plans.append(strategy.adapters.active_plan()))
    assert all(1 <= early[name] <= late[name] for early, late in pairwise(plans) for name in early)
    assert plans[0] == dict.fromkeys(pair.true_plan, 1)
    assert plans[-1] == fitted.plan == fitted.adapters.active_plan()
    goal = 512 if strategy.allowance is None else strategy.allowance
    assert fitted.plan.params <= goal
    if kind != "adaptive" or strategy.allowance is not None:
        left = [fitted.plan.sites[n].cost for n in fitted.plan if fitted.plan[n] < 4]
        assert goal - fitted.plan.params < min(left, default=1)
    if allocation == "uniform":
        assert max(fitted.plan.values()) - min(fitted.plan.values()) <= 1
    compact(fitted.adapters)
    assert fitted.adapters.attached_plan() == fitted.plan  # the rest is gone
    inputs = torch.randn(9, 16)
    assert torch.equal(pair.student.train()(inputs), pair.student.eval()(inputs))


@pytest.mark.parametrize(
    "options",
    [
        {"growth_strategy": "step"},
        {"growth_strategy": "linear", "growth_interval": 20},  # one round
        {"growth_strategy": "adaptive", "tolerance": 0.0},  # nothing before the last round
    ],
)
def test_rounds_that_pay_for_all_are_shared_out_by_the_scores(options: dict[str, Any]) -> None:
    """Each pays for one more component of every module: in their order alone, all would get one."""
    strategy, pair = growth(Budget(rank=4), max_rank=16, **options), pair_of((0, 8, 0, 0))
    strategy._measure = lambda loss_fn: setattr(strategy, "scores", {"U0": 0.0, "V0": 6.0, "U1": 1.0, "V1": 1.0})  # type: ignore[method-assign]
    plan = run(strategy, pair).plan
    assert plan["V0"] > 4 >= plan["U1"] > plan["U0"] == 1
    assert strategy.allowance is not None
    assert strategy.allowance - 40 < plan.params <= strategy.allowance


def test_what_promises_most_comes_first() -> None:
    """88 parameters do not pay for a component of each of the four (128): one of each by the scores, then a second."""
    strategy = growth(Budget(rank=2))
    attached(strategy, pair_of())
    strategy.scores = {"U0": 0.0, "V0": 6.0, "U1": 1.0, "V1": 2.0}
    assert strategy._by_promise(88)[:6] == ["V0", "V1", "U1", "U0", "V0", "V1"]


@pytest.mark.parametrize("importance", ["gradient", "increlora"])
def test_the_score_that_is_asked_for_is_the_one_that_decides(importance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = growth(Budget(rank=2), importance=importance, growth_interval=1, heldout_batches=1)
    adapters = attached(strategy, pair_of())
    strategy.begin(40, AdamW(adapters.adapter_parameters()))
    monkeypatch.setattr("autolora.strategies.growing.reserve_scores", lambda *_: {"gradient": 1.0})
    monkeypatch.setattr("autolora.strategies.growing.Sensitivity.scores", lambda self: {"increlora": 1.0})
    batches, heldout = streams(pair_of())
    strategy.heldout_step(next(batches), next(heldout), mse)
    assert strategy.scores == {importance: 1.0}


@pytest.mark.parametrize(
    "options",
    [{"growth_strategy": "adaptive", "allocation": "uniform"}, {"importance": "gradient"}, {"importance": "increlora"}],
    ids=["adaptive", "gradient", "increlora"],
)
def test_rounds_are_decided_on_held_out_rows(options: dict[str, Any]) -> None:
    strategy, pair = growth(Budget(rank=2), growth_interval=1, heldout_batches=2, **options), pair_of()
    adapters = attached(strategy, pair)
    strategy.begin(40, AdamW(adapters.adapter_parameters()))
    held, measured = [], []

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        measured.append(batch)
        return mse(model, batch)

    batches, heldout = streams(pair)
    for _ in range(2):
        held.append(next(heldout))
        strategy.heldout_step(next(batches), held[-1], loss_fn)
    assert measured
    assert all(any(batch is one for one in held) for batch in measured)


@pytest.mark.parametrize(
    ("importance", "module"), [("gradient", 0), ("gradient", 2), *(("increlora", module) for module in range(4))]
)
def test_growth_gives_the_module_where_something_is_planted_more_than_the_others(importance: str, module: int) -> None:
    """The gradient's score takes the second and the fourth module for each other or for one before them."""
    pair = pair_of(tuple(3 * (i == module) for i in range(4)))
    fitted = run(growth(Budget(rank=2), growth_interval=10, importance=importance), pair, 200)
    ranks = list(fitted.plan.values())
    assert ranks[module] > max(ranks[:module] + ranks[module + 1 :])


def test_a_module_that_the_loss_does_not_reach_scores_0() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    strategy = growth(max_rank=2)
    strategy.attach(model, AdapterSettings())

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return model["used"](torch.ones(1, 4)).square().sum()  # type: ignore[index]

    assert reserve_scores(strategy.adapters, {"used": 1, "idle": 1}, [{}], loss)["idle"] == 0.0
    measured = Sensitivity(strategy.adapters)
    measured.observe([{}], loss)
    assert measured.scores()["idle"] == 0.0


def test_at_least_98_percent_is_spent() -> None:
    pair = plant(dim=64, widths=[32, 64], ranks=(0, 1, 2, 3))
    strategy = growth(Budget(rank=12.3), max_rank=16)
    plan = run(strategy, pair, 20).plan
    assert strategy.allowance is not None
    assert 0.98 * strategy.allowance <= plan.params <= strategy.allowance


def one_module() -> tuple[DynamicGrowth, nn.Module, list[Batch]]:
    """A single Linear (6 to 4), one of three components open, and two batches."""
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    strategy = growth(max_rank=3)
    strategy.attach(model, AdapterSettings(scale=2.0))
    with torch.no_grad():
        strategy.adapters.layers["0"].lora_B[:, 0].normal_()
    return strategy, model, [{"inputs": torch.randn(5, 6), "labels": torch.randn(5, 4)} for _ in range(2)]


def gradient_by_hand(model: nn.Module, weight: Tensor, batch: Batch) -> Tensor:
    """Of the mean squared error with respect to the whole matrix, from its formula."""
    error = batch["inputs"] @ weight.T - batch["labels"]
    return 2 * error.T @ batch["inputs"] / error.numel()


def test_the_gradient_score_by_hand() -> None:
    strategy, model, batches = one_module()
    layer = strategy.adapters.layers["0"]
    whole = (layer.weight + 2.0 * layer.lora_B[:, :1] @ layer.lora_A[:1]).detach()
    mean = torch.stack([gradient_by_hand(model, whole, batch) for batch in batches]).mean(0)
    rows = layer.lora_A.detach()[1:]
    expected = [6 * float((2.0 * mean @ row).square().sum() / row.square().sum()) / 10 for row in rows]
    scores = reserve_scores(strategy.adapters, {"0": 1}, batches, mse)
    assert scores == {"0": pytest.approx(sum(expected) / 2, rel=1e-5)}
    assert reserve_scores(strategy.adapters, {"0": 3}, batches, mse) == {"0": 0.0}  # none is left
    loss = mse(model, batches[0])
    (gradient,) = torch.autograd.grad(loss, [layer.lora_B])
    assert (layer.lora_B[:, 1:] * gradient[:, 1:] == 0).all()  # w * grad of what waits is 0, whatever it is worth
    assert layer.gate.values.tolist() == [1, 0, 0]


def test_the_score_of_increlora_by_hand() -> None:
    strategy, model, batches = one_module()
    layer = strategy.adapters.layers["0"]
    update = (2.0 * layer.lora_B[:, :1] @ layer.lora_A[:1]).detach()
    sensitivity = uncertainty = 0.0
    for batch in batches:
        gradient = gradient_by_hand(model, layer.weight.detach() + update, batch)
        now = float((update * gradient).abs().sum()) / 24**0.5
        sensitivity = 0.85 * sensitivity + 0.15 * now
        uncertainty = 0.85 * uncertainty + 0.15 * abs(now - sensitivity)
    measured = Sensitivity(strategy.adapters)
    measured.observe(batches, mse)
    assert measured.scores() == {"0": pytest.approx(sensitivity * uncertainty, rel=1e-5)}
    with torch.no_grad():
        layer.lora_B.zero_()
    blind = Sensitivity(strategy.adapters)
    blind.observe(batches, mse)
    assert blind.scores() == {"0": 0.0}  # without a component it sees nothing


@pytest.mark.parametrize("init", INITS)
def test_what_is_in_reserve_scores_alike_whatever_the_shape(init: Init) -> None:
    """Two modules whose gradients have the same size: the wider one costs more for it, and is worth as much less."""
    wide, narrow = nn.Linear(400, 20, bias=False), nn.Linear(20, 20, bias=False)
    model = nn.ModuleDict({"wide": wide, "narrow": narrow})
    strategy = growth(max_rank=20)
    strategy.attach(model, AdapterSettings(init=init))
    slopes = {name: torch.randn(20, module.in_features) for name, module in (("wide", wide), ("narrow", narrow))}
    slopes = {name: slope / slope.norm() for name, slope in slopes.items()}

    def linear_in_the_weights(model: nn.Module, batch: Batch) -> Tensor:
        eye = {name: torch.eye(slope.shape[1]) for name, slope in slopes.items()}
        return sum((slopes[name].T * model[name](eye[name])).sum() for name in slopes)  # type: ignore[index,return-value]

    scores = reserve_scores(strategy.adapters, {"wide": 0, "narrow": 0}, [{}], linear_in_the_weights)
    assert scores["wide"] * 420 == pytest.approx(scores["narrow"] * 40, rel=0.25)


@pytest.mark.parametrize("importance", ["gradient", "increlora"])
def test_measuring_disturbs_nothing(importance: str) -> None:
    pair = pair_of()
    strategy = growth(importance=importance, growth_strategy="adaptive", growth_interval=1)
    adapters = attached(strategy, pair)
    strategy.begin(40, AdamW(adapters.adapter_parameters()))
    batches, heldout = streams(pair)
    pair.student.train()
    mse(pair.student, next(batches)).backward()
    before = {name: p.detach().clone() for name, p in pair.student.named_parameters()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in pair.student.named_parameters()}
    learns = {name: p.requires_grad for name, p in pair.student.named_parameters()}
    random = torch.get_rng_state()
    strategy.heldout_step(next(batches), next(heldout), mse)
    assert len(set(strategy.scores.values())) == 4
    assert torch.equal(torch.get_rng_state(), random)
    assert pair.student.training
    for name, p in pair.student.named_parameters():
        assert torch.equal(p, before[name])
        assert p.requires_grad == learns[name]
        assert (p.grad is None) == (gradients[name] is None)
        assert p.grad is None or torch.equal(p.grad, gradients[name])


def test_the_held_out_loss_is_that_of_evaluation() -> None:
    pair = pair_of()
    strategy = growth()
    adapters = strategy.attach(pair.student, AdapterSettings(dropout=0.5))
    with torch.no_grad():
        for layer in adapters.layers.values():
            layer.lora_B.normal_()
    batches = [next(streams(pair)[1]) for _ in range(3)]
    pair.student.eval()
    expected = sum(float(mse(pair.student, batch).detach()) for batch in batches) / 3
    pair.student.train()
    assert heldout_loss(adapters, batches, mse) == pytest.approx(expected, rel=1e-6)


# What growing must not disturb ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["uniform", "importance"])
def test_growth_changes_no_bit_of_the_output(allocation: str) -> None:
    pair = plant(dim=24, widths=[16, 32], ranks=(2, 2, 2, 2))
    strategy = growth(max_rank=16, allocation=allocation)
    inputs, grown = torch.randn(9, 24), []
    really = strategy._open

    def watched(plan: RankPlan, step: int) -> None:
        if not step:
            really(plan, step)
            return
        components = strategy.adapters.active_plan().components
        modes = (pair.student.train, pair.student.eval)
        before = [mode()(inputs) for mode in modes]
        really(plan, step)
        assert all(torch.equal(mode()(inputs), y) for mode, y in zip(modes, before, strict=True))
        pair.student.train()
        grown.append(strategy.adapters.active_plan().components - components)

    strategy._open = watched  # type: ignore[method-assign]
    run(strategy, pair)
    assert len(grown) == 8
    assert all(count > 0 for count in grown)
    assert sum(grown) == 15 * 4


def test_what_waits_is_left_alone_and_begins_afresh() -> None:
    """Weight decay, moments and clipping pass it by: it opens with A as it was drawn, and B and the moments are 0."""
    pair = pair_of()
    strategy = growth(growth_interval=10, until=0.75)
    adapters = strategy.attach(pair.student, AdapterSettings())
    drawn = {name: layer.lora_A.detach().clone() for name, layer in adapters.layers.items()}
    optimizer = AdamW(strategy.param_groups(RATES, 40))
    strategy.begin(40, optimizer)
    opened = dict.fromkeys(drawn, 1)
    for step in one_after_the_other(strategy, optimizer, streams(pair), range(1, 41)):
        for name, layer in adapters.layers.items():
            young = slice(opened[name], None) if step % 10 == 0 else slice(strategy.plan[name], None)
            assert torch.equal(layer.lora_A[young], drawn[name][young])
            assert not layer.lora_B[:, young].any()
            for moment in ("exp_avg", "exp_avg_sq"):
                assert not optimizer.state[layer.lora_A][moment][young].any()
                assert not optimizer.state[layer.lora_B][moment][:, young].any()
            assert (layer.lora_A[: opened[name]] != drawn[name][: opened[name]]).all()
            if step % 10 == 0:
                opened[name] = strategy.plan[name]
    assert strategy.settled
    assert opened == dict.fromkeys(drawn, 4)


def test_catching_up_by_hand() -> None:
    found = catch_up(torch.tensor([0, 1, 2, 50]), 50, (0.9, 0.99))

    def u(k: int) -> float:
        return (1 - 0.99**k) ** 0.5 / (1 - 0.9**k)

    assert found.tolist() == pytest.approx([0.0, u(1) / u(50), u(2) / u(50), 1.0])
    assert float(found[3]) == 1.0
    late = catch_up(torch.arange(1, 200), 100_000, (0.9, 0.999))
    assert 1 / float(late.min()) == pytest.approx(6.57, abs=0.01)  # how much too large updates would be


def test_a_newcomer_steps_as_a_new_parameter_does() -> None:
    """Against AdamW on parameters of their own; the others move as if there were no newcomer, bit for bit."""
    adapters = growth().attach(pair_of().student, AdapterSettings())
    layers = list(adapters.layers.values())
    weights = adapters.adapter_parameters()
    before, after = torch.tensor([0, 0, -1, -1] * 4), torch.tensor([0, 0, 7, -1] * 4)
    optimizer = AdamW(weights, lr=0.01, weight_decay=0.0)
    plain = [w.detach().clone().requires_grad_() for w in weights]
    reference = AdamW(plain, lr=0.01, weight_decay=0.0)
    fresh = [
        part.detach().clone().requires_grad_() for layer in layers for part in (layer.lora_A[2], layer.lora_B[:, 2])
    ]
    late = AdamW(fresh, lr=0.01, weight_decay=0.0)
    waiting = [layer.lora_A[3].detach().clone() for layer in layers]
    newcomers = Newcomers(adapters)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 40):
        for layer in layers:
            for weight, columns in ((layer.lora_A, False), (layer.lora_B, True)):
                slope = torch.randn(weight.shape, generator=generator) * step**0.5
                rows = slope.T if columns else slope
                rows[3] = 0
                if step <= 7:
                    rows[2] = 0
                weight.grad = slope
        for p, w in zip(plain, weights, strict=True):
            p.grad = w.grad.clone()  # type: ignore[union-attr]
        reference.step()
        newcomers.hold()
        optimizer.step()
        newcomers.pace(after if step > 7 else before, step, (0.9, 0.999))
        if step > 7:
            pairs = [part for layer in layers for part in (layer.lora_A.grad[2], layer.lora_B.grad[:, 2])]  # type: ignore[index]
            for p, g in zip(fresh, pairs, strict=True):
                p.grad = g.clone()
            late.step()
    for i, layer in enumerate(layers):
        a, b = 2 * i, 2 * i + 1
        assert torch.equal(layer.lora_A[:2], plain[a][:2])
        assert torch.equal(layer.lora_B[:, :2], plain[b][:, :2])
        torch.testing.assert_close(layer.lora_A[2], fresh[a], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.lora_B[:, 2], fresh[b], rtol=1e-5, atol=1e-6)
        assert torch.equal(layer.lora_A[3], waiting[i])


def test_without_growth_it_is_plain_training() -> None:
    """At min_rank = max_rank every weight moves as AdamW moves it."""
    from autolora.strategies.uniform import Uniform

    first, second = pair_of(), pair_of()
    grown = run(growth(min_rank=4), first)
    plain = fit(
        Uniform(Uniform.Options(), budget=Budget(), max_rank=4), second.student, *streams(second), steps=40, lr=1e-2
    )
    for ours, theirs in zip(grown.adapters.layers.values(), plain.adapters.layers.values(), strict=True):
        torch.testing.assert_close(ours.lora_A, theirs.lora_A)
        torch.testing.assert_close(ours.lora_B, theirs.lora_B)


# Does it work? --------------------------------------------------------------------------------------------------------


def test_modules_of_rank_0_take_part_in_nothing() -> None:
    pair = pair_of()
    fitted = run(growth(Budget(rank=2)), pair, settings=AdapterSettings(rank_pattern={"U0": 0}))
    assert fitted.plan["U0"] == 0
    assert "U0" not in fitted.adapters.layers


def test_a_run_that_ends_early_says_so() -> None:
    strategy = growth(Budget(rank=2))
    adapters = attached(strategy, pair_of())
    strategy.begin(80, AdamW(adapters.adapter_parameters()))
    assert strategy.finalize(lambda plan: 0.0) == dict.fromkeys(SITES, 1)
    assert strategy.notes == ["training ended before growth did: 8 of 8 rounds were still to come"]
    whole = growth(Budget(rank=2))
    run(whole, pair_of())
    assert whole.notes == []


# Going on -------------------------------------------------------------------------------------------------------------


def one_after_the_other(
    strategy: DynamicGrowth, optimizer: Optimizer, both: tuple[Iterator[Batch], Iterator[Batch]], count: range
) -> Iterator[int]:
    model = strategy.adapters.model
    for step in count:
        batch = next(both[0])
        strategy.heldout_step(batch, next(both[1]), mse)
        optimizer.zero_grad()
        mse(model, batch).backward()
        strategy.after_backward()
        nn.utils.clip_grad_norm_(strategy.adapters.adapter_parameters(), 0.5)
        optimizer.step()
        strategy.after_step(step, optimizer)
        yield step


@pytest.mark.parametrize(
    "options",
    [{"importance": "increlora"}, {"growth_strategy": "adaptive", "tolerance": 0.2}],
    ids=["increlora", "adaptive"],
)
@pytest.mark.parametrize("stop", [1, 4, 5, 12, 25])
def test_resumed_is_uninterrupted(options: dict[str, Any], stop: int) -> None:
    def fresh() -> tuple[DynamicGrowth, Optimizer, tuple[Iterator[Batch], Iterator[Batch]]]:
        pair = pair_of()
        strategy = growth(Budget(rank=2.5), growth_interval=5, heldout_batches=2, **options)
        strategy.attach(pair.student, AdapterSettings())
        optimizer = AdamW(strategy.param_groups(RATES, 40))
        strategy.begin(40, optimizer)
        return strategy, optimizer, streams(pair)

    whole, optimizer, both = fresh()
    list(one_after_the_other(whole, optimizer, both, range(1, 41)))
    first, optimizer, both = fresh()
    list(one_after_the_other(first, optimizer, both, range(1, stop + 1)))
    saved = first.adapters.trainable_state(), first.state_dict(), optimizer.state_dict()
    second, _, _ = fresh()
    second.adapters.load_trainable_state(saved[0])
    second.load_state_dict(saved[1])
    optimizer = AdamW(second.param_groups(RATES, 40))
    optimizer.load_state_dict(saved[2])
    assert second.adapters.active_plan() == first.adapters.active_plan() == second.plan
    list(one_after_the_other(second, optimizer, both, range(stop + 1, 41)))
    expected, found = whole.adapters.trainable_state(), second.adapters.trainable_state()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert whole.finalize(lambda plan: 0.0) == second.finalize(lambda plan: 0.0)


def test_an_interrupted_run_ends_as_an_unbroken_one(configure: Any, stopper: Stopper, tmp_path: Path) -> None:  # noqa: F811
    """The whole run on a text model with a head, dropout, weight decay, accumulated batches and clipping."""
    overrides = (
        "strategy=dynamic_growth", "strategy.growth_strategy=adaptive", "adapter.dropout=0.1",
        "optim.adapter.weight_decay=0.1", "trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=0.5",
        "trainer.max_epochs=6",
    )  # fmt: skip
    whole, broken = configure(*overrides), configure(*overrides, f"run_root={tmp_path / 'broken'}")
    result = run_one(whole)
    assert result.params.budget is not None
    assert 0.98 * result.params.budget <= result.params.adapter <= result.params.budget
    assert interrupted_run(broken, stopper, every=9) >= 3
    assert outcome(broken) == outcome(whole)
