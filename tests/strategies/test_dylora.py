"""DyLoRA: which components a step uses, which it updates, and which plan comes out."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
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
from strategies.handloop import mse
from torch.nn import functional as F
from torch.optim import SGD

from autolora.adapters import AdapterSettings, PrefixGate
from autolora.errors import ConfigError
from autolora.plan import Budget, RankPlan, Site
from autolora.strategies.dylora import DyLoRA, greedy
from autolora.strategies.uniform import Uniform
from autolora.tasks.planted import plant


def dylora(budget: Budget, max_rank: int = 4, **options: Any) -> DyLoRA:
    return DyLoRA(DyLoRA.Options(**options), budget=budget, max_rank=max_rank)


def with_something_in_b(strategy: DyLoRA) -> None:
    with torch.no_grad():
        for layer in strategy.adapters.layers.values():
            layer.lora_B.normal_(std=0.3)


# A step ---------------------------------------------------------------------------------------------------------------


def test_a_step_trains_the_first_components_and_evaluation_uses_the_plan() -> None:
    strategy, pair = dylora(Budget(rank=2)), pair_of()
    adapters, _ = begun(strategy, pair, 10)
    with_something_in_b(strategy)
    strategy._train_first([3, 1, 4, 2])
    inputs = torch.randn(5, 16)
    for layer, rank in zip(adapters.layers.values(), (3, 1, 4, 2), strict=True):
        x = inputs if layer.in_features == 16 else torch.randn(5, layer.in_features)
        for mode, first in ((True, rank), (False, 2)):
            expected = layer.base_layer(x) + 2.0 * x @ layer.lora_A[:first].T @ layer.lora_B[:, :first].T
            torch.testing.assert_close(layer.train(mode)(x), expected)
    assert set(adapters.active_plan().values()) == {2}


def test_a_truncated_step_has_the_gradients_of_plain_lora_of_that_rank() -> None:
    """With the first rows and columns in adapters that have no others; the rest has none."""
    strategy, pair, plain = dylora(Budget(rank=2)), pair_of(), pair_of()
    adapters, _ = begun(strategy, pair, 10)
    with_something_in_b(strategy)
    strategy._train_first([3] * 4)
    small = Uniform(Uniform.Options(), budget=Budget(rank=3), max_rank=4).attach(plain.student, AdapterSettings())
    with torch.no_grad():
        for name, layer in small.layers.items():
            layer.lora_A.copy_(adapters.layers[name].lora_A[:3])
            layer.lora_B.copy_(adapters.layers[name].lora_B[:, :3])
    batch = next(streams(pair)[0])
    for model in (pair.student.train(), plain.student.train()):
        mse(model, batch).backward()
    for name, layer in small.layers.items():
        a, b = adapters.layers[name].lora_A.grad, adapters.layers[name].lora_B.grad
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a, F.pad(layer.lora_A.grad, (0, 0, 0, 1)))  # type: ignore[arg-type]
        torch.testing.assert_close(b, F.pad(layer.lora_B.grad, (0, 1)))  # type: ignore[arg-type]


def test_ranks_are_drawn_uniformly_one_for_all_modules_and_clipped() -> None:
    strategy = dylora(Budget(rank=2), max_rank=8)
    strategy.attach(plant(dim=16, widths=[8, 24], ranks=(0, 2, 3, 0)).student, AdapterSettings(rank_pattern={"U1": 3}))
    strategy.begin(10, SGD(strategy.param_groups(RATES, 10)))
    drawn: Counter[int] = Counter()
    for step in range(1, 2001):
        b = strategy.ranks[0]
        assert strategy.ranks == [b, b, min(b, 3), b]
        drawn[b] += 1
        strategy.after_step(step, None)  # type: ignore[arg-type]
    assert sorted(drawn) == list(range(1, 9))
    assert chisquare(list(drawn.values())).pvalue > 0.01


def test_per_module_ranks_are_drawn_for_each() -> None:
    strategy = dylora(Budget(rank=2), per_module=True)
    begun(strategy, pair_of(), 10)
    seen = set()
    for step in range(1, 301):
        seen.add(tuple(strategy.ranks))
        strategy.after_step(step, None)  # type: ignore[arg-type]
    assert {ranks[2] for ranks in seen} == {1, 2, 3, 4}
    assert len(seen) > 100


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_updates_the_last_row_and_column_in_use_alone(frozen: bool) -> None:
    strategy, pair = dylora(Budget(rank=2), frozen=frozen), pair_of()
    adapters, _ = begun(strategy, pair, 10)
    with_something_in_b(strategy)
    strategy._train_first([3] * 4)
    before = [(layer.lora_A.clone(), layer.lora_B.clone()) for layer in adapters.layers.values()]
    optimizer = SGD(adapters.adapter_parameters(), lr=0.1)
    train(strategy, optimizer, streams(pair)[0], 1, 1)
    for layer, (a, b) in zip(adapters.layers.values(), before, strict=True):
        moved = [False, False, True, False] if frozen else [True, True, True, False]
        assert (layer.lora_A != a).any(1).tolist() == moved
        assert (layer.lora_B != b).any(0).tolist() == moved


def test_a_prefix_gate() -> None:
    gate = PrefixGate(4)
    gate.set_mask(torch.tensor([1, 1, 0, 0]))
    gate.first(3)
    assert gate.train().remaining().tolist() == [0, 1, 2]  # type: ignore[union-attr]
    assert gate().tolist() == [1, 1, 1, 0]  # type: ignore[union-attr]
    assert gate.evaluation_gate().tolist() == [1, 1, 0, 0]
    assert gate.eval().remaining().tolist() == [0, 1]  # type: ignore[union-attr]
    assert gate().tolist() == [1, 1, 0, 0]  # type: ignore[union-attr]
    gate.train().first(4)
    assert gate.remaining() is gate() is None
    gate.set_mask(torch.tensor([1, 0, 0, 0]))
    assert gate.remaining().tolist() == [0]  # type: ignore[union-attr]


# The plan -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [Budget(rank=2), Budget(params=301), Budget(fraction=0.3), Budget(), Budget(rank=0)])
def test_it_ends_with_the_uniform_plan(budget: Budget) -> None:
    strategy, pair = dylora(budget), pair_of()
    uniform = Uniform(Uniform.Options(), budget=budget, max_rank=4)
    uniform.attach(pair_of().student, AdapterSettings())
    plans: list[RankPlan] = []
    fitted = run(strategy, pair, 10, every_step=lambda *_: plans.append(strategy.adapters.active_plan()))
    assert all(plan == fitted.plan == uniform.plan() for plan in plans)
    assert fitted.adapters.active_plan() == fitted.plan
    assert strategy.settled
    inputs = torch.randn(9, 16)
    assert torch.equal(pair.student.train()(inputs), pair.student.eval()(inputs))


def test_every_prefix_works_after_training() -> None:
    """Of a teacher of rank 4 with decaying singular values each rank captures more; and all at once, not one alone."""
    pair = plant(dim=16, widths=[8, 24], ranks=(4, 4, 4, 4), profile="decaying")
    strategy = dylora(Budget(rank=4))
    fitted = run(strategy, pair, 500)
    batch = next(streams(pair)[1])
    errors = []
    for rank in range(5):
        with torch.no_grad(), fitted.adapters.masked(RankPlan.uniform(fitted.adapters.sites, rank)):
            errors.append(float(mse(pair.student, batch)))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.5 * errors[0]
    assert errors[4] < 0.1 * errors[0]


SITES = {"a": Site(4, 6), "b": Site(5, 5), "c": Site(6, 4)}  # all cost 10
CONCAVE = {"a": [0.0, 5.0, 9.0, 9.5, 9.6], "b": [0.0, 1.0, 1.1, 1.1, 1.1], "c": [0.0, 4.0, 7.0, 9.0, 9.5]}


@pytest.mark.parametrize("components", [2, 3, 5, 7])
def test_greedy_is_exhaustive_search_where_modules_do_not_interact(components: int) -> None:
    largest = RankPlan.uniform(SITES, 4)
    seen: list[RankPlan] = []

    def evaluate(plan: RankPlan) -> float:
        seen.append(plan)
        return sum(CONCAVE[name][rank] for name, rank in plan.items())

    third = components // 3
    start = RankPlan(SITES, {"a": components - 2 * third, "b": third, "c": third})
    found = greedy(evaluate, start, largest, 10 * components, 60)
    ranks = [r for r in product(range(5), repeat=3) if sum(r) == components]
    best = max(sum(CONCAVE[name][rank] for name, rank in zip(SITES, r, strict=True)) for r in ranks)
    assert sum(CONCAVE[name][rank] for name, rank in found.items()) == pytest.approx(best)
    assert found.params <= 10 * components
    assert len(seen) <= 60


@pytest.mark.parametrize("evaluations", [8, 20, 200])
def test_greedy_keeps_to_its_evaluations_and_the_budget_and_is_never_worse(evaluations: int) -> None:
    """Modules of unequal cost, and a score that is noise."""
    sites = {"a": Site(4, 6), "b": Site(30, 10), "c": Site(3, 4)}
    largest, start = RankPlan.uniform(sites, 4), RankPlan(sites, {"a": 2, "b": 1, "c": 2})
    generator = torch.Generator().manual_seed(0)
    scores: dict[tuple[int, ...], float] = {}
    calls = 0

    def evaluate(plan: RankPlan) -> float:
        nonlocal calls
        calls += 1
        return scores.setdefault(tuple(plan.values()), float(torch.rand((), generator=generator)))

    found = greedy(evaluate, start, largest, 80, evaluations)
    assert calls <= evaluations
    assert found.params <= 80
    assert evaluate(found) >= evaluate(start)


def test_greedy_finds_where_a_planted_teacher_needs_its_ranks() -> None:
    pair = pair_of()  # 0, 2, 3, 0
    uniform, searched = (
        run(dylora(Budget(params=pair.true_plan.params), select=select), pair_of(), 300)  # type: ignore[arg-type]
        for select in ("uniform", "greedy")
    )
    assert searched.plan.params <= pair.true_plan.params
    assert searched.plan["V0"] + searched.plan["U1"] > uniform.plan["V0"] + uniform.plan["U1"]


def test_greedy_is_settled_only_when_it_has_searched() -> None:
    strategy = dylora(Budget(rank=2), select="greedy")
    begun(strategy, pair_of(), 10)
    assert not strategy.settled
    strategy.finalize(lambda plan: -float(plan["V1"]))
    assert strategy.settled
    assert strategy.adapters.active_plan()["V1"] < 2


def test_too_few_evaluations_are_an_error() -> None:
    strategy = dylora(Budget(rank=2), select="greedy", evaluations=9)
    with pytest.raises(ConfigError, match=r"select=greedy needs at least 10 to measure each of the 4 modules .* got 9"):
        strategy.attach(pair_of().student, AdapterSettings())


# Checkpoints and accumulation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"per_module": True, "frozen": True}, {"select": "greedy"}])
@pytest.mark.parametrize("stop", [1, 11])
def test_resumed_is_uninterrupted(stop: int, options: dict[str, Any]) -> None:
    assert_resumed_is_uninterrupted(lambda: dylora(Budget(rank=1.5), **options), stop, steps=20)


@pytest.mark.parametrize("frozen", [True, False])
def test_accumulation_of_2_is_one_double_batch(frozen: bool) -> None:
    assert_accumulation_of_2_is_one_double_batch(lambda: dylora(Budget(rank=1.5), frozen=frozen), steps=20)


def test_every_run_of_a_seed_draws_the_same_ranks() -> None:
    drawn = []
    for seed in (0, 0, 1):
        strategy = dylora(Budget(rank=2))
        begun(strategy, pair_of(), 30, AdapterSettings(seed=seed))
        ranks: list[int] = []
        for step in range(30):
            ranks.append(strategy.ranks[0])
            strategy.after_step(step, None)  # type: ignore[arg-type]
        drawn.append(ranks)
    assert drawn[0] == drawn[1] != drawn[2]
