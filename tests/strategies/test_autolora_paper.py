"""autolora_paper: the recipe as published, from the configuration to the second training."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from adapters.tiny_models import FAMILIES, make
from strategies.handloop import Fitted, fit, mse, planted_batches
from test_resume import Stopper, interrupted_run, outcome, stopper  # noqa: F401  fixture
from test_run import configure, sst2  # noqa: F401  fixtures
from torch import nn
from torch.optim import AdamW, Optimizer

from autolora.adapters import Adapters, AdapterSettings, Targets
from autolora.adapters.select import linear_modules
from autolora.compose import compose
from autolora.errors import ConfigError, TargetError
from autolora.paths import config_root
from autolora.plan import Budget
from autolora.roles import SUFFIXES, Role, role_of
from autolora.run import run_one
from autolora.strategies.autolora_paper import QUERY_AND_VALUE, AutoLoRAPaper
from autolora.strategies.base import GroupRates, Rates
from autolora.tasks.planted import TeacherStudent, plant

RATES = Rates(adapter=GroupRates(1e-2), gate=GroupRates(0.1), head=GroupRates(1e-3))
PUBLISHED = AdapterSettings(targets=Targets(QUERY_AND_VALUE))


def paper(budget: Budget | None = None, **options: Any) -> AutoLoRAPaper:
    return AutoLoRAPaper(AutoLoRAPaper.Options(**options), budget=budget or Budget(), max_rank=8)


def pair_of() -> TeacherStudent:
    return plant(dim=16, widths=[8, 24], ranks=(0, 2, 3, 0))


def begun(strategy: AutoLoRAPaper, pair: TeacherStudent) -> tuple[Adapters, Optimizer]:
    adapters = strategy.attach(pair.student, AdapterSettings())
    with torch.no_grad():
        for layer in adapters.layers.values():
            layer.lora_B.normal_(std=0.3)
    optimizer = AdamW(strategy.param_groups(RATES, 100))
    strategy.begin(100, optimizer)
    return adapters, optimizer


def run(strategy: AutoLoRAPaper, pair: TeacherStudent, steps: int, **kwargs: Any) -> Fitted:
    streams = planted_batches(pair, 32, seed=1), planted_batches(pair, 32, seed=2)
    return fit(strategy, pair.student, *streams, steps=steps, lr=1e-2, **kwargs)


# The configuration ----------------------------------------------------------------------------------------------------


def test_the_configuration_says_what_the_paper_says() -> None:
    cfg = compose(["strategy=autolora_paper"])
    assert (cfg.max_rank, cfg.data.heldout, cfg.data.max_heldout, cfg.data.batch_size) == (8, 0.5, None, 16)
    assert (cfg.optim.adapter.lr, cfg.optim.head.lr, cfg.optim.gate.lr) == (1e-4, 1e-4, 1e-3)
    assert (cfg.retrain, cfg.retrain_on, cfg.budget.enabled) == ("found", "all", False)
    assert cfg.strategy.options == AutoLoRAPaper.Options(order="second")
    assert cfg.adapter.targets == QUERY_AND_VALUE


def test_the_command_line_still_wins() -> None:
    cfg = compose([
        "max_rank=4", "strategy=autolora_paper", "data.heldout=0.2", "data.max_heldout=50", "optim.gate.lr=0.5",
        "retrain=none", "retrain_on=fit", "adapter.targets=[key]", "strategy.order=first",
    ])  # fmt: skip
    assert (cfg.max_rank, cfg.data.heldout, cfg.data.max_heldout, cfg.optim.gate.lr) == (4, 0.2, 50, 0.5)
    assert (cfg.retrain, cfg.adapter.targets, cfg.data.batch_size) == ("none", ("key",), 16)
    assert cfg.strategy.options == AutoLoRAPaper.Options(order="first")


def test_other_groups_are_untouched_by_other_strategies() -> None:
    assert compose(["strategy=autolora"]) == compose([])
    assert compose([]).data.heldout == 0.1


# Query and value ------------------------------------------------------------------------------------------------------


def test_the_pattern_is_that_of_the_roles() -> None:
    written = yaml.safe_load((config_root() / "strategy" / "autolora_paper.yaml").read_text(encoding="utf-8"))
    assert written["adapter"]["targets"] == QUERY_AND_VALUE
    for suffix, role in SUFFIXES:
        chosen = bool(re.fullmatch(QUERY_AND_VALUE, f"model.layer.0.{suffix}"))
        assert chosen == (role in (Role.query, Role.value)), suffix


@pytest.mark.parametrize("family", FAMILIES)
def test_query_and_value_of_every_family(family: str) -> None:
    model = make(family)
    expected = [name for name in linear_modules(model) if role_of(name) in (Role.query, Role.value)]
    if family.startswith("gpt2"):
        message = r"the model has no query and no value among its linear modules \(transformer\.h\.0\.attn\.c_attn, "
        with pytest.raises(TargetError, match=message):
            paper().attach(model, PUBLISHED)
        return
    adapters = paper().attach(model, PUBLISHED)
    assert list(adapters.layers) == expected
    assert len(expected) >= 4
    assert set(adapters.attached_plan().values()) <= {8}


def test_one_of_the_two_is_not_enough() -> None:
    model = nn.ModuleDict({"query": nn.Linear(9, 9), "key": nn.Linear(9, 9)})
    with pytest.raises(TargetError, match=r"the model has no value among its linear modules \(query, key\)"):
        paper().attach(model, PUBLISHED)
    assert isinstance(model["query"], nn.Linear)
    only = AdapterSettings(targets=Targets(["query"]))
    assert list(paper().attach(model, only).layers) == ["query"]  # who says so gets it


def test_planted_has_neither() -> None:
    with pytest.raises(TargetError, match=r"no query and no value among its linear modules \(U0, V0, U1, V1\)"):
        paper().attach(pair_of().student, PUBLISHED)


def test_a_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="strategy=autolora_paper has no budget"):
        paper(Budget(rank=2)).attach(make("bert"), PUBLISHED)
    with pytest.raises(ConfigError, match=r"budget\.rank=4: there is no budget here .* leave budget\.rank out"):
        compose(["strategy=autolora_paper", "budget.rank=4"])


# The search -----------------------------------------------------------------------------------------------------------


def test_the_threshold_by_hand() -> None:
    """Selectors log(1..8): the weights are i/36, of which those from 5/36 on reach 1/8 (4/36 does not)."""
    pair = pair_of()
    strategy = paper()
    adapters, _ = begun(strategy, pair)
    with torch.no_grad():
        adapters.layers["U1"].gate.logits.copy_(torch.arange(1.0, 9.0).log())
        adapters.layers["V0"].gate.logits.copy_(torch.tensor([math.log(9.0)] + [0.0] * 7))
    before = adapters.layers["U1"].lora_B.detach().clone()
    pair.student.eval()
    inputs = torch.randn(9, 16)
    expected = pair.student(inputs)
    assert not strategy.settled
    plan = strategy.finalize(lambda plan: 0.0)
    assert strategy.settled
    assert plan == {"U0": 8, "V0": 1, "U1": 4, "V1": 8}  # equal weights are all kept
    assert adapters.layers["U1"].gate.evaluation_gate().tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    torch.testing.assert_close(adapters.layers["U1"].lora_B.detach(), before * torch.arange(1.0, 9.0) / 36)
    torch.testing.assert_close(pair.student(inputs), expected)


def test_the_levels_take_turns_from_the_first_step() -> None:
    pair = pair_of()
    strategy = paper(order="first")
    adapters, optimizer = begun(strategy, pair)
    weights = [p.detach().clone() for p in adapters.adapter_parameters()]
    batches, heldout = planted_batches(pair, 32, seed=1), planted_batches(pair, 32, seed=2)
    batch, held = next(batches), next(heldout)
    with strategy.upper.asked() as selectors:
        direction = torch.cat(torch.autograd.grad(mse(pair.student, held), selectors))
    before = torch.cat([p.detach().clone() for p in adapters.gate_parameters()])
    strategy.heldout_step(batch, held, mse)
    after = torch.cat([p.detach().clone() for p in adapters.gate_parameters()])
    torch.testing.assert_close(after, before - 0.1 * direction.sign(), rtol=1e-3, atol=1e-4)  # Adam's first step
    assert all(torch.equal(p, w) for p, w in zip(adapters.adapter_parameters(), weights, strict=True))

    mse(pair.student, batch).backward()
    assert all(p.grad is None for p in adapters.gate_parameters())
    optimizer.step()
    assert all((p != w).any() for p, w in zip(adapters.adapter_parameters(), weights, strict=True))
    assert torch.equal(torch.cat([p.detach() for p in adapters.gate_parameters()]), after)


def test_the_published_order_looks_ahead_by_the_rate_of_the_weights() -> None:
    """The second order's direction, found by hand: the held-out gradient after a step that is really made, and the
    mixed derivative by differences.
    """
    pair = pair_of()
    strategy = paper()
    adapters, _ = begun(strategy, pair)
    assert (strategy.upper.order, strategy.upper.lookahead) == ("second", 1e-2)
    pair.student.double()
    batch, held = (
        {key: value.double() for key, value in next(planted_batches(pair, 32, seed=seed)).items()} for seed in (1, 2)
    )
    weights = adapters.adapter_parameters()
    start = [p.detach().clone() for p in weights]

    def move(direction: Any, distance: float) -> None:
        with torch.no_grad():
            for p, origin, part in zip(weights, start, direction, strict=True):
                p.copy_(origin + distance * part)

    def of_selectors(rows: Any) -> Any:
        with strategy.upper.asked() as selectors:
            return torch.cat(torch.autograd.grad(mse(pair.student, rows), selectors))

    move(torch.autograd.grad(mse(pair.student, batch), weights), -1e-2)
    direct, v = of_selectors(held), torch.autograd.grad(mse(pair.student, held), weights)
    ends = []
    for distance in (1e-5, -1e-5):
        move(v, distance)
        ends.append(of_selectors(batch))
    move(v, 0.0)
    mixed = (ends[0] - ends[1]) / 2e-5
    expected = direct - 1e-2 * mixed
    found = strategy.upper.hypergradient(batch, held, mse)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float((1e-2 * mixed).abs().max()))


def test_the_head_learns_in_the_search() -> None:
    pair = pair_of()
    settings = AdapterSettings(modules_to_save=["V1"])
    before = pair.student.V1.weight.detach().clone()
    fitted = run(paper(), pair, 10, settings=settings)
    assert (pair.student.V1.weight != before).all()
    assert set(fitted.plan) == {"U0", "V0", "U1"}


def test_without_a_rate_the_selectors_have_that_of_the_paper() -> None:
    strategy = paper()
    strategy.attach(pair_of().student, AdapterSettings())
    groups = strategy.param_groups(Rates(GroupRates(1e-4), GroupRates(None), GroupRates(1e-4)), 10)
    assert [group["name"] for group in groups] == ["adapter"]
    assert strategy.rates == GroupRates(1e-3)
    assert strategy.lookahead == 1e-4


def test_components_that_help_are_kept() -> None:
    """Half of the components can do nothing: their rows of A are 0."""
    pair = pair_of()
    strategy = paper()

    def lame(step: int, optimizer: Optimizer) -> None:
        for layer in strategy.adapters.layers.values():
            with torch.no_grad():
                layer.lora_A[4:] = 0.0

    fitted = run(strategy, pair, 150, every_step=lame)
    for layer in (fitted.adapters.layers[name] for name in ("V0", "U1")):
        assert not layer.gate.evaluation_gate()[4:].any()
        assert layer.gate.evaluation_gate()[:4].any()


# Whole runs -----------------------------------------------------------------------------------------------------------


def test_a_whole_run_and_an_interrupted_one(configure: Any, stopper: Stopper, tmp_path: Path) -> None:  # noqa: F811
    """Half of 240 rows in batches of 16 teach the weights; the second training has all rows. Stopped in either."""
    overrides = (
        "strategy=autolora_paper", "budget.enabled=false", "adapter.dropout=0.1", "max_rank=4", "optim.gate.lr=0.05",
    )  # fmt: skip
    whole, broken = configure(*overrides), configure(*overrides, f"run_root={tmp_path / 'broken'}")
    result = run_one(whole)
    assert (result.compute.fit_steps, result.compute.retrain_steps) == (2 * 8, 2 * 15)
    assert len(result.ranks) == 4  # query and value of two layers
    assert result.found == result.ranks
    assert result.params.budget is None
    assert len(set(result.ranks.values())) > 1  # the selectors have learned
    assert interrupted_run(broken, stopper, every=13) >= 3
    assert outcome(broken) == outcome(whole)
