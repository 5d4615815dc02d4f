"""The super-net: what a step trains, what is evaluated meanwhile, and what comes out."""

from __future__ import annotations

import copy
import math
from itertools import islice
from typing import Any

import pytest
import torch
from strategies.handloop import excess_error, fit, mse, planted_batches
from torch import Tensor, nn

from autolora.adapters import Adapters, AdapterSettings
from autolora.errors import ConfigError, PlanError
from autolora.plan import Budget, RankPlan, even_order, spend
from autolora.search.evolution import Evolution
from autolora.search.measure import Measurements
from autolora.search.random_search import RandomSearch
from autolora.search.rl_search import RLSearch
from autolora.search.supernet import SuperNet
from autolora.strategies.base import Batch, GroupRates, Rates
from autolora.tasks.planted import ResidualNet, TeacherStudent, plant

SEARCHES: list[type[SuperNet[Any]]] = [RLSearch, Evolution, RandomSearch]
RATES = Rates(adapter=GroupRates(1e-2), gate=GroupRates(None), head=GroupRates(1e-3))


def planted(ranks: tuple[int, ...] = (2, 0, 3, 1)) -> TeacherStudent:
    return plant(dim=16, widths=[8, 24], ranks=ranks)


def make(kind: type[SuperNet[Any]] = RandomSearch, budget: Budget | None = None, **options: Any) -> SuperNet[Any]:
    return kind(kind.Options(**options), budget=budget or Budget(rank=2), max_rank=4)


def attached(
    pair: TeacherStudent, kind: type[SuperNet[Any]] = RandomSearch, budget: Budget | None = None, **options: Any
) -> SuperNet[Any]:
    """A super-net whose components all say something."""
    strategy = make(kind, budget, **options)
    adapters = strategy.attach(pair.student, AdapterSettings(seed=7))
    for layer in adapters.layers.values():
        nn.init.normal_(layer.lora_B, std=0.3)
    return strategy


def written_out(pair: TeacherStudent, adapters: Adapters, plan: RankPlan) -> ResidualNet:
    """The student with the first components added to its weights, and no adapter."""
    other = plant(dim=16, widths=[8, 24], ranks=(0, 0, 0, 0)).student
    for name, layer in adapters.layers.items():
        rank = plan[name]
        update = 2.0 * layer.lora_B[:, :rank] @ layer.lora_A[:rank]
        other.get_submodule(name).weight = nn.Parameter((layer.base_layer.weight + update).detach())  # type: ignore[operator]
    return other


# A step ---------------------------------------------------------------------------------------------------------------


def test_a_step_trains_the_mean_of_the_largest_the_smallest_and_random_plans() -> None:
    pair = planted()
    strategy = attached(pair, random_plans=2)
    plans = copy.copy(strategy).sandwich()
    assert plans[0] == dict.fromkeys(plans[0], 4)
    assert plans[1] == dict.fromkeys(plans[0], 1)
    assert len({tuple(plan.values()) for plan in plans}) == 4
    batch = next(planted_batches(pair, 32, seed=1))
    loss = strategy.training_loss(pair.student, batch, mse)
    alone = [float(mse(written_out(pair, strategy.adapters, plan), batch).detach()) for plan in plans]
    assert len(set(alone)) == 4
    assert float(loss.detach()) == pytest.approx(sum(alone) / 4, rel=1e-5)


def test_a_component_learns_from_the_plans_that_use_it() -> None:
    """The gradient of a mean of losses is the mean of gradients, each with zeros beyond its plan."""
    pair = planted()
    strategy = attached(pair, random_plans=1)
    batch = next(planted_batches(pair, 32, seed=1))
    plans = copy.copy(strategy).sandwich()
    strategy.training_loss(pair.student, batch, mse).backward()
    for name, layer in strategy.adapters.layers.items():
        expected = torch.zeros_like(layer.lora_A)
        for plan in plans:
            with strategy.adapters.masked(plan):
                (gradient,) = torch.autograd.grad(mse(pair.student, batch), [layer.lora_A], materialize_grads=True)
            assert not gradient[plan[name] :].any()
            expected += gradient / len(plans)
        torch.testing.assert_close(layer.lora_A.grad, expected)


@pytest.mark.parametrize("random_plans", [0, 3])
def test_the_number_of_random_plans(random_plans: int) -> None:
    assert len(attached(planted(), random_plans=random_plans).sandwich()) == 2 + random_plans


def test_random_plans_spend_the_budget_and_have_a_stream_of_their_own() -> None:
    one, same = attached(planted()), attached(planted())
    torch.manual_seed(1)
    drawn = [plan for _ in range(20) for plan in one.sandwich()[2:]]
    assert [plan for _ in range(20) for plan in same.sandwich()[2:]] == drawn
    assert torch.initial_seed() == 1
    assert one.allowance is not None
    assert all(one.allowance - 40 < plan.params <= one.allowance for plan in drawn)  # components cost 24 or 40
    assert len({tuple(plan.values()) for plan in drawn}) > 20


def test_a_budget_for_nothing_still_trains() -> None:
    pair = planted()
    strategy = attached(pair, budget=Budget(params=0))
    strategy.training_loss(pair.student, next(planted_batches(pair, 8, seed=1)), mse).backward()
    assert strategy.finalize(lambda plan: 0.0).params == 0


# Around the training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SEARCHES)
def test_at_the_start_every_plan_is_the_bare_model(kind: type[SuperNet[Any]]) -> None:
    pair = planted()
    inputs = torch.randn(5, 16)
    before = pair.student(inputs)
    strategy = make(kind)
    adapters = strategy.attach(pair.student, AdapterSettings())
    assert torch.equal(pair.student(inputs), before)
    for plan in strategy.sandwich():
        with adapters.masked(plan):
            assert torch.equal(pair.student(inputs), before)


def test_what_is_evaluated_meanwhile_is_the_uniform_plan() -> None:
    pair = planted()
    strategy = attached(pair)
    uniform = spend(even_order(strategy.largest), strategy.largest, strategy.allowance)
    batch = next(planted_batches(pair, 8, seed=1))
    strategy.training_loss(pair.student, batch, mse)
    assert strategy.adapters.active_plan() == uniform == dict.fromkeys(uniform, 2)
    torch.testing.assert_close(
        pair.student(batch["inputs"]), written_out(pair, strategy.adapters, uniform)(batch["inputs"])
    )
    assert not strategy.settled


def test_the_grid_says_how_large_the_super_net_is() -> None:
    pair = planted()
    strategy = make(min_rank=1, step=2)
    assert set(strategy.attach(pair.student, AdapterSettings()).attached_plan().values()) == {3}
    ranks = {rank for _ in range(9) for plan in strategy.sandwich() for rank in plan.values()}
    assert ranks == {1, 3}


def test_a_budget_below_the_floor_is_refused_before_training() -> None:
    with pytest.raises(PlanError, match=r"does not pay for rank 3 everywhere.*lower strategy\.min_rank"):
        make(min_rank=3).attach(planted().student, AdapterSettings())


def test_max_rank_below_min_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_rank=\d+: expected at least strategy\.min_rank=99"):
        make(min_rank=99).attach(planted().student, AdapterSettings())


def train(strategy: SuperNet[Any], model: nn.Module, batches: list[Batch], optimizer: torch.optim.Optimizer) -> None:
    for batch in batches:
        optimizer.zero_grad()
        strategy.training_loss(model, batch, mse).backward()
        optimizer.step()


def test_resumed_is_uninterrupted() -> None:
    batches = list(islice(planted_batches(planted(), 16, seed=3), 8))

    def begin() -> tuple[SuperNet[Any], nn.Module, torch.optim.Optimizer]:
        model = planted().student
        strategy = make()
        strategy.attach(model, AdapterSettings())
        return strategy, model, torch.optim.AdamW(strategy.param_groups(RATES, 8))

    whole, model, optimizer = begin()
    train(whole, model, batches, optimizer)
    first, model, optimizer = begin()
    train(first, model, batches[:5], optimizer)
    state, weights = first.state_dict(), first.adapters.trainable_state()
    second, model, resumed = begin()
    second.adapters.load_trainable_state(weights)
    second.load_state_dict(state)
    resumed.load_state_dict(optimizer.state_dict())
    train(second, model, batches[5:], resumed)
    end: dict[str, Tensor] = second.adapters.trainable_state()
    assert all(torch.equal(end[key], value) for key, value in whole.adapters.trainable_state().items())


# The search -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SEARCHES)
def test_all_measure_equally_many_plans_within_the_budget_and_uniform_ranks_first(kind: type[SuperNet[Any]]) -> None:
    options = {} if kind is RandomSearch else {"against_random": False}
    strategy = attached(planted(), kind, evaluations=30, **options)
    asked: list[RankPlan] = []

    def score(plan: RankPlan) -> float:
        return -float(abs(plan["U1"] - 4) + plan["V0"])

    def evaluate(plan: RankPlan) -> float:
        asked.append(plan)
        return score(plan)

    plan = strategy.finalize(evaluate)
    assert len(asked) == len({tuple(one.values()) for one in asked}) == 30
    assert asked[0] == dict.fromkeys(plan, 2)
    assert strategy.allowance is not None
    assert max(one.params for one in asked) <= strategy.allowance
    assert score(plan) == max(score(one) for one in asked)
    assert strategy.adapters.active_plan() == plan
    for name, layer in strategy.adapters.layers.items():
        assert layer.gate.evaluation_gate().tolist() == [1.0] * plan[name] + [0.0] * (4 - plan[name])
    assert strategy.settled


@pytest.mark.parametrize("kind", SEARCHES)
def test_a_search_that_finds_nothing_better_says_so(kind: type[SuperNet[Any]]) -> None:
    options = {} if kind is RandomSearch else {"against_random": False}
    strategy = attached(planted(), kind, evaluations=9, objective="metric", price=0, **options)
    assert strategy.notes == []
    found = strategy.finalize(lambda plan: 0.75)
    assert set(found.values()) == {2}
    cost = found.params
    assert strategy.notes == [
        f"9 plans measured in the super-net: held-out score 0.75 at {cost:,} parameters for the plan of the highest "
        f"worth, 0.75 at {cost:,} parameters for uniform ranks; the search did not beat them"
    ]


def test_a_cheaper_plan_that_is_no_better_has_not_beaten_uniform_ranks() -> None:
    strategy = attached(planted(), RandomSearch, evaluations=9, objective="metric", price=5)
    found = strategy.finalize(lambda plan: 0.75)
    assert found.params < strategy.space.plan(strategy.space.uniform()).params
    assert f"0.75 at {found.params:,} parameters for the plan of the highest worth" in strategy.notes[0]
    assert strategy.notes[0].endswith("the search did not beat them")


def test_scores_that_are_undefined_are_counted() -> None:
    strategy = attached(planted(), RandomSearch, evaluations=9, objective="metric", price=0)
    strategy.finalize(lambda plan: math.nan if plan["U0"] else 0.5)
    undefined = sum(score == -1.0 for score in strategy.measured.scores.values())
    assert 0 < undefined < 9
    assert strategy.notes[1].startswith(f"the score of {undefined} of these plans was undefined")


def test_a_search_is_compared_with_random_plans_in_plain_words() -> None:
    def evaluate(plan: RankPlan) -> float:
        return -0.5 - 0.25 * (plan["U0"] != 2)

    level = attached(planted(), Evolution, evaluations=9, price=0, against_random=True)
    cost = level.finalize(evaluate).params
    assert len(level.notes) == 1
    level.compare(evaluate)
    assert level.notes == [
        f"9 plans measured in the super-net: held-out loss 0.5 at {cost:,} parameters for the plan of the highest "
        f"worth, 0.5 at {cost:,} parameters for uniform ranks; the search did not beat them",
        f"9 random plans: 0.5 at {cost:,} parameters for the best; the search did not beat them",
    ]

    calls: list[RankPlan] = []

    def only_the_fourth_is_good(plan: RankPlan) -> float:
        calls.append(plan)
        return -0.25 if len(calls) == 4 else -1.0

    ahead = attached(planted(), Evolution, evaluations=9, price=0, against_random=True)
    ahead.finalize(only_the_fourth_is_good)
    assert len(calls) == 9
    ahead.compare(only_the_fourth_is_good)
    assert ahead.measured is not None
    assert ahead.at_random is not None
    assert len(calls) == len({**ahead.measured.scores, **ahead.at_random.scores}) < 18  # uniform ranks are known
    assert "held-out loss 0.25 at " in ahead.notes[0]
    assert ahead.notes[1].startswith("9 random plans: 1 at ")
    assert ahead.notes[1].endswith("the search beat them")
    assert ahead.notes[0].endswith("parameters for uniform ranks")


def test_a_cheaper_plan_at_a_lower_score_has_not_beaten_random_plans() -> None:
    """Random plans spend the budget; a plan that does not is worth more at this price, and scores less."""

    class Frugal(Evolution):
        def search(self, measured: Measurements) -> None:
            measured(self.space.smallest())

    def evaluate(plan: RankPlan) -> float:
        return 0.001 * plan.params

    strategy = attached(planted(), Frugal, evaluations=9, objective="metric", price=5, against_random=True)
    found = strategy.finalize(evaluate)
    strategy.compare(evaluate)
    assert found == strategy.space.plan(strategy.space.smallest())
    assert (
        "2 plans measured in the super-net (of 9: the search came up with no others): held-out score"
        in strategy.notes[0]
    )
    assert strategy.notes[1].startswith("2 random plans: ")  # as many as the search came up with
    assert strategy.measured.worth(strategy.measured.best) > strategy.at_random.worth(strategy.at_random.best)
    assert strategy.notes[0].endswith("the search did not beat them")
    assert strategy.notes[1].endswith("the search did not beat them")


@pytest.mark.parametrize("rows", [0, 2])
def test_two_rows_are_too_few_to_measure_on(rows: int) -> None:
    with pytest.raises(ValueError, match="heldout_rows"):
        make(heldout_rows=rows)


def test_the_objective_is_what_the_run_is_asked_to_measure() -> None:
    assert make(objective="loss").scored_by == "loss"
    assert make(objective="metric").scored_by == "metric"


def test_evolution_finds_planted_ranks_in_a_super_net() -> None:
    pair = planted((0, 2, 3, 0))
    strategy = Evolution(Evolution.Options(evaluations=60), budget=Budget(params=pair.true_plan.params), max_rank=4)
    streams = planted_batches(pair, 64, seed=1), planted_batches(pair, 512, seed=2)
    fitted = fit(strategy, pair.student, *streams, steps=300, lr=1e-2)
    assert fitted.plan == pair.true_plan
    assert excess_error(pair, fitted.adapters) < 0.05
