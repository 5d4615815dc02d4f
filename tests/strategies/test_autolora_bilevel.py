"""autolora_bilevel: its hypergradient, what one level knows of the other, and the way to a plan."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies.handloop import Fitted, excess_error, fit, mse, planted_batches
from strategies.toys.one_step_bilevel import LookAhead
from test_resume import Stopper, interrupted_run, outcome, stopper  # noqa: F401  fixture
from test_run import configure, sst2  # noqa: F401  fixtures
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from autolora.adapters import Adapters, AdapterSettings
from autolora.adapters.gates import SELECTOR_FORMS
from autolora.errors import ConfigError
from autolora.plan import Budget
from autolora.run import run_one
from autolora.strategies.autolora import AutoLoRA
from autolora.strategies.autolora_bilevel import AutoLoRABilevel
from autolora.strategies.base import Batch, GroupRates, Rates
from autolora.strategies.bilevel import Order, UpperLevel
from autolora.tasks.planted import TeacherStudent, plant

RATES = Rates(adapter=GroupRates(1e-2), gate=GroupRates(None), head=GroupRates(1e-3))


def pair_of() -> TeacherStudent:
    """Four modules; a component costs 24, 24, 40, 40."""
    return plant(dim=16, widths=[8, 24], ranks=(0, 2, 3, 0))


def bilevel(budget: Budget, **options: Any) -> AutoLoRABilevel:
    return AutoLoRABilevel(AutoLoRABilevel.Options(**options), budget=budget, max_rank=4)


def streams(pair: TeacherStudent) -> tuple[Iterator[Batch], Iterator[Batch]]:
    return planted_batches(pair, 32, seed=1), planted_batches(pair, 32, seed=2)


def run(strategy: AutoLoRABilevel, pair: TeacherStudent, steps: int = 40, **kwargs: Any) -> Fitted:
    return fit(strategy, pair.student, *streams(pair), steps=steps, lr=1e-2, **kwargs)


def begun(
    strategy: AutoLoRABilevel, pair: TeacherStudent, steps: int = 100, settings: AdapterSettings | None = None
) -> tuple[Adapters, Optimizer]:
    """Attached and begun, with components that do something."""
    adapters = strategy.attach(pair.student, settings or AdapterSettings())
    with torch.no_grad():
        for layer in adapters.layers.values():
            layer.lora_B.normal_(std=0.3)
    optimizer = AdamW(strategy.param_groups(RATES, steps))
    strategy.begin(steps, optimizer)
    return adapters, optimizer


def to_pruning(strategy: AutoLoRABilevel, optimizer: Optimizer) -> None:
    for step in (25, 30):
        strategy.after_step(step, optimizer)
    assert strategy.phase == "prune"


# The hypergradient ----------------------------------------------------------------------------------------------------


class Quadratic:
    """Two losses that are quadratic in the weights w and the selectors theta of a model.

    L_train = w'Hw/2 - w'C theta, L_val = |w - t|^2/2 + theta'D theta/2: the weights' answer is w* = H^-1 C theta.
    """

    def __init__(self, adapters: Adapters, curvature: float | None) -> None:
        self.weights, self.selectors = adapters.adapter_parameters(), adapters.gate_parameters()
        n, k = len(self.flat(self.weights)), len(self.flat(self.selectors))
        root = torch.randn(n, n, dtype=torch.float64) / n**0.5
        self.h = root @ root.T if curvature is None else curvature * torch.eye(n, dtype=torch.float64)
        self.c = torch.randn(n, k, dtype=torch.float64)
        self.t = torch.randn(n, dtype=torch.float64)
        self.d = torch.randn(k, k, dtype=torch.float64)
        self.d = self.d + self.d.T

    @staticmethod
    def flat(parts: list[nn.Parameter]) -> Tensor:
        return torch.cat([part.flatten() for part in parts])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        w, theta = self.flat(self.weights), self.flat(self.selectors)
        if batch["level"] == "train":
            return w @ self.h @ w / 2 - w @ self.c @ theta
        return (w - self.t).square().sum() / 2 + theta @ self.d @ theta / 2


def upper(adapters: Adapters, order: Order, lookahead: float) -> UpperLevel:
    like = AdamW(adapters.adapter_parameters())
    return UpperLevel(adapters, order=order, lookahead=lookahead, rates=GroupRates(0.1), like=like)


@pytest.mark.parametrize("curvature", [4.0, None], ids=["at the answer", "a step towards it"])
def test_the_hypergradient_of_a_quadratic_in_closed_form(curvature: float | None) -> None:
    """With H = h 1 and a step of 1/h the look-ahead is the weights' answer, so this is the exact bilevel gradient."""
    pair = pair_of()
    adapters, _ = begun(bilevel(Budget(), selector={"form": "sigmoid"}), pair)
    pair.student.double()
    problem = Quadratic(adapters, curvature)
    w, theta = (problem.flat(parts).detach().clone() for parts in (problem.weights, problem.selectors))
    step = 0.05 if curvature is None else 1 / curvature
    ahead = w - step * (problem.h @ w - problem.c @ theta)
    expected = problem.d @ theta + step * problem.c.T @ (ahead - problem.t)
    if curvature is not None:
        answer = problem.c @ theta / curvature
        torch.testing.assert_close(expected, problem.d @ theta + problem.c.T @ (answer - problem.t) / curvature)

    levels = {"level": "train"}, {"level": "val"}
    second = upper(adapters, "second", step).hypergradient(*levels, problem.loss)
    torch.testing.assert_close(second, expected, rtol=1e-9, atol=1e-9)
    first = upper(adapters, "first", step).hypergradient(*levels, problem.loss)
    torch.testing.assert_close(first, problem.d @ theta, rtol=1e-12, atol=1e-12)
    assert torch.equal(problem.flat(problem.weights), w)


@pytest.mark.parametrize("head", [(), ("V1",)], ids=["all adapted", "with a head"])
@pytest.mark.parametrize(
    ("form", "dropout"),
    [("sigmoid", 0.0), ("simplex", 0.0), ("gumbel", 0.0), ("gumbel_softmax", 0.0), ("hard_concrete", 0.3)],
)
def test_the_hypergradient_is_what_differentiating_through_the_step_gives(
    form: str, dropout: float, head: tuple[str, ...]
) -> None:
    """Against autograd's own second derivative, on the same noise; the finite difference is good to 1 in 1,000."""
    pair = pair_of()
    strategy = bilevel(Budget(), selector={"form": form, "tau": 2.0}, order="second", lookahead=0.1)
    settings = AdapterSettings(dropout=dropout, modules_to_save=list(head) or None)
    adapters, _ = begun(strategy, pair, settings=settings)
    for layer in adapters.layers.values():
        layer.gate.learn()
        with torch.no_grad():
            layer.gate.logits.normal_()
    pair.student.double().train()
    batch, heldout = ({k: v.double() for k, v in next(s).items()} for s in streams(pair))

    def rewind() -> None:
        torch.manual_seed(5)
        strategy.noise.manual_seed(6)

    rewind()
    found = strategy.upper.hypergradient(batch, heldout, mse)
    after = torch.rand(3), torch.rand(3, generator=strategy.noise)
    rewind()
    weights = {name: p for name, p in pair.student.named_parameters() if p.requires_grad}
    with strategy.upper.asked() as selectors:
        slopes = torch.autograd.grad(mse(pair.student, batch), list(weights.values()), create_graph=True)
        ahead = {name: p - 0.1 * g for (name, p), g in zip(weights.items(), slopes, strict=True)}
        exact = torch.cat(torch.autograd.grad(mse(LookAhead(pair.student, ahead), heldout), selectors))
        # the random streams stand where one forward pass on each batch leaves them
        assert torch.equal(after[0], torch.rand(3))
        assert torch.equal(after[1], torch.rand(3, generator=strategy.noise))
        ahead = {name: p.detach() for name, p in ahead.items()}
        rewind()
        mse(pair.student, batch)
        direct = torch.cat(torch.autograd.grad(mse(LookAhead(pair.student, ahead), heldout), selectors))
    largest = float(exact.abs().max())
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-3 * largest)
    assert (exact - direct).abs().max() > 0.01 * largest  # the mixed derivative is a part that can be seen


def looked_ahead(dtype: torch.dtype) -> tuple[AutoLoRABilevel, Batch, Batch]:
    pair = pair_of()
    strategy = bilevel(Budget(), selector={"form": "sigmoid"}, order="second", lookahead=0.1)
    adapters, _ = begun(strategy, pair)
    for layer in adapters.layers.values():
        layer.gate.learn()
    pair.student.to(dtype)
    batch, heldout = ({k: v.to(dtype) for k, v in next(s).items()} for s in streams(pair))
    return strategy, batch, heldout


def test_the_perturbation_has_the_same_size_whatever_the_held_out_loss_is_measured_in() -> None:
    """epsilon = 0.01 / |v| (Liu et al., ICLR 2019, section 2.3): 1,000 times the loss has 1,000 times the gradient."""
    strategy, batch, heldout = looked_ahead(torch.double)
    start = [p.detach().clone() for p in strategy.upper.weights]
    distances = []

    def loss_fn(model: nn.Module, rows: Batch) -> Tensor:
        moved = [p.detach() - before for p, before in zip(strategy.upper.weights, start, strict=True)]
        distances.append(float(torch.stack(torch._foreach_norm(moved)).norm()))
        return mse(model, rows) * (1000 if rows is heldout else 1)

    large = strategy.upper.hypergradient(batch, heldout, loss_fn)
    assert distances[0] == 0
    assert distances[2:] == pytest.approx([0.01, 0.01])
    small = strategy.upper.hypergradient(batch, heldout, mse)
    torch.testing.assert_close(large, 1000 * small, rtol=1e-6, atol=1e-6 * float(large.abs().max()))


def test_the_second_order_is_computed_in_float32_under_autocast() -> None:
    strategy, batch, heldout = looked_ahead(torch.float32)
    plain = strategy.upper.hypergradient(batch, heldout, mse)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(strategy.upper.hypergradient(batch, heldout, mse), plain)


def test_the_second_order_looks_ahead_by_the_adapters_rate_unless_told() -> None:
    for lookahead, expected in ((None, 1e-2), (0.3, 0.3)):
        strategy = bilevel(Budget(), selector={"form": "sigmoid"}, order="second", lookahead=lookahead)
        begun(strategy, pair_of())
        assert strategy.upper.lookahead == expected


# What one level knows of the other ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "form"), [("first", "straight_through"), ("second", "sigmoid")])
def test_no_gradient_of_one_level_reaches_the_other(order: str, form: str) -> None:
    strategy, pair = bilevel(Budget(rank=1), order=order, selector={"form": form}), pair_of()
    adapters, optimizer = begun(strategy, pair)
    weights, selectors = adapters.adapter_parameters(), adapters.gate_parameters()
    assert not {id(p) for p in selectors} & {id(p) for g in optimizer.param_groups for p in g["params"]}
    to_pruning(strategy, optimizer)
    batches, heldout = streams(pair)

    # a batch of a step that accumulates has left gradients already
    mse(pair.student, next(batches)).backward()
    earlier = [w.grad.clone() for w in weights]  # type: ignore[union-attr]
    frozen, before = [w.clone() for w in weights], [s.clone() for s in selectors]
    strategy.heldout_step(next(batches), next(heldout), mse)
    assert all(torch.equal(w.grad, e) for w, e in zip(weights, earlier, strict=True))
    assert all(torch.equal(w, f) for w, f in zip(weights, frozen, strict=True))
    assert all((s != b).all() for s, b in zip(selectors, before, strict=True))

    before = [s.clone() for s in selectors]
    loss = mse(pair.student, next(batches))
    assert strategy.penalty(loss) is None
    loss.backward()
    strategy.after_backward()
    optimizer.step()
    assert all((w.grad != e).any() for w, e in zip(weights, earlier, strict=True))
    assert all(s.grad is None for s in selectors)
    assert all(torch.equal(s, b) for s, b in zip(selectors, before, strict=True))


def test_weights_are_restored_when_the_loss_fails() -> None:
    strategy, pair = bilevel(Budget(), order="second", selector={"form": "sigmoid"}), pair_of()
    adapters, optimizer = begun(strategy, pair)
    to_pruning(strategy, optimizer)
    before = [w.clone() for w in adapters.adapter_parameters()]
    calls: list[int] = []

    def failing(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(1)
        if len(calls) == 4:  # at the second end of the finite difference
            raise RuntimeError("out of memory")
        return mse(model, batch)

    batches, heldout = streams(pair)
    with pytest.raises(RuntimeError, match="out of memory"):
        strategy.heldout_step(next(batches), next(heldout), failing)
    assert all(torch.equal(w, b) for w, b in zip(adapters.adapter_parameters(), before, strict=True))
    assert not any(s.requires_grad for s in adapters.gate_parameters())


def test_only_held_out_batches_are_listened_to() -> None:
    strategy, pair = bilevel(Budget(rank=1)), pair_of()
    adapters, optimizer = begun(strategy, pair)
    batches, heldout = streams(pair)
    strategy.heldout_step(next(batches), next(heldout), mse)  # in the warm-up nobody asks
    strategy.after_step(25, optimizer)
    assert strategy.phase == "listen"
    assert torch.equal(strategy.squared_gradient, torch.zeros(16))
    expected = torch.zeros(16)
    for _ in range(3):
        batch = next(heldout)
        with strategy.upper.asked() as selectors:
            expected += torch.cat(torch.autograd.grad(mse(pair.student, batch), selectors)).square()
        strategy.heldout_step(next(batches), batch, mse)
        mse(pair.student, next(batches)).backward()
        strategy.after_backward()
    assert torch.equal(strategy.squared_gradient, expected)
    logits = torch.cat([p.detach() for p in adapters.gate_parameters()])
    assert torch.equal(logits, torch.full((16,), 0.5))


def test_a_step_of_the_selectors_by_hand() -> None:
    """A loss that gates have no part in: the first step of Adam is the rate, against the price alone."""
    strategy, pair = bilevel(Budget(), sparsity={"weight": 0.02}), pair_of()
    adapters, optimizer = begun(strategy, pair)
    strategy.penalty(torch.tensor(4.0))
    to_pruning(strategy, optimizer)
    assert float(strategy.price) == pytest.approx(0.02 * 4.0)
    before = torch.cat([p.detach().clone() for p in adapters.gate_parameters()])

    def indifferent(model: nn.Module, batch: Batch) -> Tensor:
        return sum(p.square().sum() for p in adapters.adapter_parameters())  # type: ignore[return-value]

    strategy.heldout_step({}, {}, indifferent)
    after = torch.cat([p.detach() for p in adapters.gate_parameters()])
    rate = 20 / 50  # what autolora has for a prune phase of 50 steps
    torch.testing.assert_close(after, before - rate, rtol=1e-4, atol=1e-4)


# The way to a plan ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["first", "second"])
def test_it_finds_planted_ranks(order: str) -> None:
    pair = pair_of()
    form = "straight_through" if order == "first" else "hard_concrete"
    strategy = bilevel(Budget(params=pair.true_plan.params), order=order, selector={"form": form})
    fitted = run(strategy, pair, 400)
    assert fitted.plan == pair.true_plan
    assert excess_error(pair, fitted.adapters) < 1e-3


def test_without_a_budget_the_price_finds_them() -> None:
    pair = pair_of()
    fitted = run(bilevel(Budget()), pair, 400)
    assert fitted.plan == pair.true_plan


def test_at_least_98_percent_is_spent() -> None:
    pair = plant(dim=64, widths=[32, 64], ranks=(0, 1, 2, 3))
    strategy = AutoLoRABilevel(AutoLoRABilevel.Options(), budget=Budget(rank=12.3), max_rank=16)
    plan = run(strategy, pair, 20).plan
    assert strategy.allowance is not None
    assert 0.98 * strategy.allowance <= plan.params <= strategy.allowance


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("form", SELECTOR_FORMS)
def test_every_form_ends_settled_with_training_equal_to_evaluation(form: str, order: str) -> None:
    if (order, form) == ("second", "straight_through"):
        with pytest.raises(ValueError, match="order=second: expected a selector that is differentiable"):
            bilevel(Budget(), order=order, selector={"form": form})
        return
    pair = pair_of()
    strategy = bilevel(Budget(rank=1.5), order=order, selector={"form": form, "tau": 0.7})
    fitted = run(strategy, pair)
    assert strategy.settled
    assert all(math.isfinite(loss) for loss in fitted.losses)
    assert strategy.allowance is not None
    assert fitted.plan.params <= strategy.allowance
    inputs = torch.randn(9, 16)
    assert torch.equal(pair.student.train()(inputs), pair.student.eval()(inputs))


def test_modules_of_rank_0_take_part_in_nothing() -> None:
    pair = pair_of()
    fitted = run(bilevel(Budget(rank=1)), pair, settings=AdapterSettings(rank_pattern={"U0": 0}))
    assert fitted.plan["U0"] == 0
    nothing = pair_of()
    settings = AdapterSettings(rank_pattern={"U0": 0, "V0": 0, "U1": 0}, modules_to_save=["V1"])
    assert run(bilevel(Budget()), nothing, settings=settings).plan.params == 0


def test_the_second_order_is_refused_with_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters, _ = begun(bilevel(Budget(), selector={"form": "sigmoid"}), pair_of())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    upper(adapters, "first", 0.1)
    with pytest.raises(ConfigError, match=r"strategy\.order=second: expected one process, got 2: use order=first"):
        upper(adapters, "second", 0.1)


def test_selectors_count_as_trained_though_another_optimizer_has_them() -> None:
    trained = []
    for strategy in (bilevel(Budget(rank=1)), AutoLoRA(AutoLoRA.Options(), budget=Budget(rank=1), max_rank=4)):
        strategy.attach(pair_of().student, AdapterSettings())
        strategy.begin(100, AdamW(strategy.param_groups(RATES, 100)))
        trained.append(strategy.trainable)
    assert trained == [4 * 128 + 16] * 2  # rank 4 everywhere, and a selector for each of 16 components


@pytest.mark.parametrize("kind", [AutoLoRA, AutoLoRABilevel])
@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (1, "of 1 steps the phases have warmup 0, prune 1, settle 0; expected at least 1 for warmup and settle: raise"),
        (2, "of 2 steps the phases have warmup 0, prune 2, settle 0; expected at least 1 for warmup and settle: raise"),
        (3, "of 3 steps the prune phase has 1; expected at least 2"),
        (100, None),
    ],
)
def test_phases_have_to_fit_in_the_run(steps: int, message: str | None, kind: type[AutoLoRA]) -> None:
    strategy = kind(kind.Options(), budget=Budget(rank=1), max_rank=4)
    strategy.attach(pair_of().student, AdapterSettings())
    optimizer = AdamW(strategy.param_groups(RATES, steps))
    if message is None:
        strategy.begin(steps, optimizer)
        return
    with pytest.raises(ConfigError, match=message):
        strategy.begin(steps, optimizer)


# Going on -------------------------------------------------------------------------------------------------------------


def steps_of(
    strategy: AutoLoRABilevel, optimizer: Optimizer, both: tuple[Iterator[Batch], Iterator[Batch]], count: range
) -> None:
    for step in count:
        batch = next(both[0])
        strategy.heldout_step(batch, next(both[1]), mse)
        loss = mse(strategy.adapters.model, batch)
        strategy.penalty(loss)
        optimizer.zero_grad()
        loss.backward()
        strategy.after_backward()
        optimizer.step()
        strategy.after_step(step, optimizer)


@pytest.mark.parametrize(("form", "order"), [("straight_through", "first"), ("gumbel", "second")])
@pytest.mark.parametrize("stop", [5, 11, 20, 35])
def test_resumed_is_uninterrupted(form: str, order: str, stop: int) -> None:
    """Stopped in the warm-up, listening, pruning and settled: the rest of the run is the same, bit for bit."""

    def fresh() -> tuple[AutoLoRABilevel, Optimizer, tuple[Iterator[Batch], Iterator[Batch]]]:
        pair = pair_of()
        strategy = bilevel(Budget(rank=1.5), selector={"form": form}, order=order)
        strategy.attach(pair.student, AdapterSettings())
        optimizer = AdamW(strategy.param_groups(RATES, 40))
        strategy.begin(40, optimizer)
        return strategy, optimizer, streams(pair)

    whole, optimizer, both = fresh()
    steps_of(whole, optimizer, both, range(1, 41))
    first, optimizer, both = fresh()
    steps_of(first, optimizer, both, range(1, stop + 1))
    saved = first.adapters.trainable_state(), first.state_dict(), optimizer.state_dict()
    second, _, _ = fresh()
    second.adapters.load_trainable_state(saved[0])
    second.load_state_dict(saved[1])
    optimizer = AdamW(second.param_groups(RATES, 40))
    optimizer.load_state_dict(saved[2])
    steps_of(second, optimizer, both, range(stop + 1, 41))
    expected, found = whole.adapters.trainable_state(), second.adapters.trainable_state()
    assert list(expected) == list(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert whole.finalize(lambda plan: 0.0) == second.finalize(lambda plan: 0.0)


def test_an_interrupted_run_ends_as_an_unbroken_one(configure: Any, stopper: Stopper, tmp_path: Path) -> None:  # noqa: F811
    """The whole run on a text model with a head, dropout, accumulated batches and clipping."""
    overrides = (
        "strategy=autolora_bilevel", "strategy.order=second", "strategy.selector.form=sigmoid", "adapter.dropout=0.1",
        "trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=0.5", "trainer.max_epochs=4",
    )  # fmt: skip
    whole, broken = configure(*overrides), configure(*overrides, f"run_root={tmp_path / 'broken'}")
    result = run_one(whole)
    assert result.params.budget is not None
    assert 0.98 * result.params.budget <= result.params.adapter <= result.params.budget
    assert interrupted_run(broken, stopper, every=9) >= 2
    assert outcome(broken) == outcome(whole)
