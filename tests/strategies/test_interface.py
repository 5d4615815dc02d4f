"""The strategy interface carries a bilevel method, growth, and initialisation from data, each written in one file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from strategies.handloop import excess_error, fit, mse, planted_batches
from strategies.toys.activation_svd import ActivationSVD
from strategies.toys.growth import Growth
from strategies.toys.one_step_bilevel import OneStepBilevel
from torch import Tensor, nn
from torch.optim import Optimizer

from autolora.adapters import AdapterSettings
from autolora.errors import ConfigError
from autolora.plan import Budget, RankPlan
from autolora.strategies import make_strategy
from autolora.strategies.base import Batch, GroupRates, Rates, Strategy, StrategyOptions, reset_optimizer_state
from autolora.tasks.planted import TeacherStudent, plant

RATES = Rates(adapter=GroupRates(1e-2), gate=GroupRates(None), head=GroupRates(1e-3))


def planted(ranks: tuple[int, ...]) -> TeacherStudent:
    return plant(dim=16, widths=[8, 24], ranks=ranks)


def streams(pair: TeacherStudent) -> tuple[Iterator[Batch], Iterator[Batch]]:
    return planted_batches(pair, 64, seed=1), planted_batches(pair, 64, seed=2)


# A bilevel method -----------------------------------------------------------------------------------------------------


def bilevel(pair: TeacherStudent) -> OneStepBilevel:
    return OneStepBilevel(OneStepBilevel.Options(), budget=Budget(params=pair.true_plan.params), max_rank=4)


def test_a_bilevel_selector_finds_the_planted_ranks() -> None:
    pair = planted((0, 2, 3, 0))
    fitted = fit(bilevel(pair), pair.student, *streams(pair), steps=500, lr=1e-2)
    assert fitted.plan == pair.true_plan
    assert excess_error(pair, fitted.adapters) < 1e-3


def test_a_bilevel_gradient_is_that_of_the_looked_ahead_loss() -> None:
    """Against central differences of the held-out loss after a step that is really made, in double precision."""
    pair = planted((0, 2, 3, 0))
    strategy = bilevel(pair)
    adapters = strategy.attach(pair.student, AdapterSettings())
    pair.student.double()
    batch, heldout = ({k: v.double() for k, v in next(s).items()} for s in streams(pair))
    layer = adapters.layers["V0"]
    with torch.no_grad():
        for other in adapters.layers.values():
            other.lora_B.normal_(std=0.3)
    gradient = dict(zip(adapters.layers, strategy.hypergradient(batch, heldout, mse), strict=True))["V0"]

    def after_a_step() -> float:
        weights = adapters.adapter_parameters()
        slopes = torch.autograd.grad(mse(pair.student, batch), weights)
        with torch.no_grad():
            for p, g in zip(weights, slopes, strict=True):
                p -= strategy.options.lookahead * g
            loss = float(mse(pair.student, heldout))
            for p, g in zip(weights, slopes, strict=True):
                p += strategy.options.lookahead * g
        return loss

    for i in range(layer.rank):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                layer.gate.logits[i] += sign * 1e-4
            losses.append(after_a_step())
            with torch.no_grad():
                layer.gate.logits[i] -= sign * 1e-4
        assert float(gradient[i]) == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=1e-4)


def test_no_gradient_of_one_level_reaches_the_other() -> None:
    pair = planted((0, 2, 3, 0))
    strategy = bilevel(pair)
    adapters = strategy.attach(pair.student, AdapterSettings())
    with torch.no_grad():
        for layer in adapters.layers.values():
            layer.lora_B.normal_(std=0.3)
    weights, logits = adapters.adapter_parameters(), adapters.gate_parameters()
    batches, heldout = streams(pair)
    assert not {id(p) for p in logits} & {id(p) for g in strategy.param_groups(RATES, 10) for p in g["params"]}

    frozen, before = [w.clone() for w in weights], [t.clone() for t in logits]
    strategy.begin(10, torch.optim.AdamW(weights))
    strategy.heldout_step(next(batches), next(heldout), mse)
    assert all(p.grad is None for p in pair.student.parameters())
    assert all(torch.equal(w, f) for w, f in zip(weights, frozen, strict=True))
    assert all((t != b).all() for t, b in zip(logits, before, strict=True))

    before = [t.clone() for t in logits]
    mse(pair.student, next(batches)).backward()
    assert all(w.grad is not None for w in weights)
    assert all(t.grad is None for t in logits)
    assert all(torch.equal(t, b) for t, b in zip(logits, before, strict=True))


# Growth ---------------------------------------------------------------------------------------------------------------


def test_growth_reaches_the_budget_and_fits_a_uniform_teacher() -> None:
    pair = planted((2, 2, 2, 2))
    strategy = Growth(Growth.Options(events=2), budget=Budget(rank=2), max_rank=4)
    plans: list[RankPlan] = []
    fitted = fit(
        strategy,
        pair.student,
        *streams(pair),
        steps=500,
        lr=1e-2,
        every_step=lambda step, optimizer: plans.append(strategy.adapters.active_plan()),
    )
    assert plans[0] == dict.fromkeys(pair.true_plan, 1)
    assert plans[-1] == fitted.plan == dict.fromkeys(pair.true_plan, 2)
    assert all(early[name] <= late[name] for early, late in pairwise(plans) for name in early)
    assert excess_error(pair, fitted.adapters) < 1e-2


def test_growth_never_jolts_the_output() -> None:
    pair = planted((2, 2, 2, 2))
    strategy = Growth(Growth.Options(events=4), budget=Budget(rank=3), max_rank=4)
    inputs, jolts = torch.randn(9, 16), []
    grow = strategy._open

    def watched(plan: RankPlan, optimizer: Optimizer) -> None:
        components, before = strategy.adapters.active_plan().components, pair.student(inputs)
        grow(plan, optimizer)
        assert strategy.adapters.active_plan().components > components
        jolts.append(float((pair.student(inputs) - before).detach().abs().max()))

    strategy._open = watched  # type: ignore[method-assign]
    fit(strategy, pair.student, *streams(pair), steps=40, lr=1e-2)
    assert len(jolts) == 4
    assert max(jolts) < 1e-6  # outputs are of size 1: rounding in float32, since products then have more terms


def test_growth_resets_the_moments_of_new_components_alone() -> None:
    pair = planted((2, 2, 2, 2))
    strategy = Growth(Growth.Options(events=2, until=0.5), budget=Budget(rank=2), max_rank=4)

    def spoil_and_look(step: int, optimizer: Optimizer) -> None:
        layer = strategy.adapters.layers["U1"]
        a, b = (optimizer.state[p]["exp_avg"] for p in (layer.lora_A, layer.lora_B))
        if step == 9:
            a.fill_(1.0)
            b.fill_(1.0)
        if step == 10:  # the second component opened after this step
            assert (a[1] == 0).all()
            assert (b[:, 1] == 0).all()
            assert (a[0] != 0).all()
            assert (b[:, 0] != 0).all()

    fit(strategy, pair.student, *streams(pair), steps=20, lr=1e-2, every_step=spoil_and_look)
    assert strategy.settled


# Initialisation from data ---------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Two Linears side by side, each on its own half of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(10, 6, bias=False), nn.Linear(10, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x[:, :10]), self.right(x[:, 10:])], dim=1)


def branch_batches(basis: Tensor, teacher: nn.Module, seed: int) -> Iterator[Batch]:
    """The left input fills three directions evenly, the right one lies almost on a line."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        left = torch.randn(64, 3, generator=generator) @ basis[:3]
        right = torch.randn(64, 1, generator=generator) * basis[3:] + 0.02 * torch.randn(64, 10, generator=generator)
        inputs = torch.cat([left, right], dim=1)
        yield {"inputs": inputs, "labels": teacher(inputs).detach()}


def test_activation_svd_gives_each_module_the_rank_of_its_inputs() -> None:
    student, teacher = Branches(), Branches()
    basis = torch.linalg.qr(torch.randn(10, 4)).Q.T
    streams = [branch_batches(basis, teacher, seed) for seed in (1, 2)]
    strategy = ActivationSVD(ActivationSVD.Options(), budget=Budget(rank=2), max_rank=6)
    starts: list[Tensor] = []
    fitted = fit(
        strategy,
        student,
        *streams,
        steps=300,
        lr=1e-2,
        every_step=lambda step, optimizer: (
            starts.append(strategy.adapters.layers["left"].lora_A.detach().clone()) if step == 1 else None
        ),
    )
    assert fitted.plan == {"left": 3, "right": 1}
    assert fitted.adapters.attached_plan() == fitted.plan  # the rest was never trained
    assert fitted.adapters.count()["adapter"] == 4 * 16
    onto = starts[0] / starts[0].norm(dim=1, keepdim=True)
    torch.testing.assert_close(onto.T @ onto, basis[:3].T @ basis[:3], rtol=0, atol=0.03)
    # Rank 3 and rank 1 are enough to be the teacher on these inputs, but for the noise around the line
    assert fitted.losses[-1] < 5e-3 * fitted.losses[0]


# The base class -------------------------------------------------------------------------------------------------------


def test_a_strategy_has_to_say_which_plan_comes_out() -> None:
    class Silent(Strategy[StrategyOptions]):
        pass

    silent = Silent(StrategyOptions(), budget=Budget(), max_rank=2)
    with pytest.raises(NotImplementedError, match=r"Silent has to say which plan comes out: implement finalize"):
        silent.finalize(lambda plan: 0.0)


def test_defaults_do_nothing_but_attach_the_largest_plan() -> None:
    class Plain(Strategy[StrategyOptions]):
        pass

    model = Branches()
    plain = Plain(StrategyOptions(), budget=Budget(fraction=0.5), max_rank=2)
    adapters = plain.attach(model, AdapterSettings(modules_to_save=["right"]))
    assert plain.largest == adapters.active_plan() == {"left": 2}
    assert plain.allowance == 16
    groups = plain.param_groups(RATES, 10)
    assert [(g["name"], g["lr"], sum(p.numel() for p in g["params"])) for g in groups] == [
        ("adapter", 1e-2, 32),
        ("head", 1e-3, 60),
    ]
    assert plain.penalty(torch.tensor(1.0)) is None
    assert plain.settled
    assert plain.state_dict() == {} == plain.progress()


def test_loraplus_trains_b_at_a_rate_of_its_own() -> None:
    """A step of SGD moves B ratio times as far as without it, and A as far."""
    moved = []
    for ratio in (1.0, 16.0):
        pair = planted((0, 2, 3, 0))
        strategy = Strategy(StrategyOptions(), budget=Budget(), max_rank=4)
        adapters = strategy.attach(pair.student, AdapterSettings())
        torch.manual_seed(0)
        with torch.no_grad():
            for layer in adapters.layers.values():
                layer.lora_B.normal_(std=0.3)
        before = [(layer.lora_A.detach().clone(), layer.lora_B.detach().clone()) for layer in adapters.layers.values()]
        rates = Rates(GroupRates(1e-2), GroupRates(None), GroupRates(1e-3), loraplus_lr_ratio=ratio)
        groups = strategy.param_groups(rates, 10)
        optimizer = torch.optim.SGD([{"params": group["params"], "lr": group["lr"]} for group in groups])
        mse(pair.student, next(streams(pair)[0])).backward()
        optimizer.step()
        now = [(layer.lora_A.detach(), layer.lora_B.detach()) for layer in adapters.layers.values()]
        moved.append([(a - b, c - d) for (a, c), (b, d) in zip(now, before, strict=True)])
    for (a, b), (same, further) in zip(*moved, strict=True):
        assert torch.equal(same, a)
        torch.testing.assert_close(further, 16 * b, rtol=1e-3, atol=1e-6)


def test_empty_groups_are_left_out() -> None:
    class Plain(Strategy[StrategyOptions]):
        pass

    plain = Plain(StrategyOptions(), budget=Budget(), max_rank=2)
    plain.attach(Branches(), AdapterSettings())
    assert [g["name"] for g in plain.param_groups(RATES, 10)] == ["adapter"]


def test_reset_optimizer_state_forgets_moments_and_step_counts() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([a, b], lr=0.1, weight_decay=0.0)
    for _ in range(5):
        (a.sum() + b.sum()).backward()
        optimizer.step()
    reset_optimizer_state(optimizer, [a, nn.Parameter(torch.ones(1))])  # one that it never saw is no error
    before = a.detach().clone()
    a.grad, b.grad = torch.full((2,), -7.0), torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(a.detach(), before + 0.1)  # a first step of Adam: the rate, whatever the gradient
    assert optimizer.state[a]["step"] == 1
    assert optimizer.state[b]["step"] == 6


def test_make_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    from autolora.strategies.autolora import AutoLoRA
    from autolora.strategies.uniform import Options, Uniform

    made = make_strategy("uniform", Options(), budget=Budget(rank=3), max_rank=5)
    assert isinstance(made, Uniform)
    assert (made.budget, made.max_rank) == (Budget(rank=3), 5)
    assert isinstance(make_strategy("autolora", AutoLoRA.Options(), budget=Budget(), max_rank=1), AutoLoRA)
    monkeypatch.setitem(sys.modules, "autolora.strategies.empty", ModuleType("autolora.strategies.empty"))
    with pytest.raises(ConfigError, match=r"strategy\.name=empty: expected one subclass of Strategy .* found none"):
        make_strategy("empty", Options(), budget=Budget(), max_rank=1)
