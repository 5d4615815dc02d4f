"""Ranks from a table of roles: the table, its shape under a budget, and factors of depth."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from adapters.tiny_models import make
from hypothesis import given
from hypothesis import strategies as st
from strategies.trees import tree

from autolora.adapters import AdapterSettings
from autolora.plan import Budget, RankPlan
from autolora.roles import Role
from autolora.strategies.hierarchical import Hierarchical, depth_factor, relative_depths, table_rank

BLOCK = {
    "attention.self.query": (64, 64),
    "attention.self.key": (64, 64),
    "attention.self.value": (64, 64),
    "attention.output.dense": (64, 64),
    "intermediate.dense": (64, 96),
    "output.dense": (96, 64),
}


def encoder(blocks: int, **more: tuple[int, int]) -> Any:
    named = {f"encoder.layer.{i}.{name}": shape for i in range(blocks) for name, shape in BLOCK.items()}
    return tree({**named, **more})


def plan_of(
    model: Any,
    budget: Budget | None = None,
    max_rank: int = 16,
    settings: AdapterSettings | None = None,
    **options: Any,
) -> RankPlan:
    strategy = Hierarchical(Hierarchical.Options(**options), budget=budget or Budget(), max_rank=max_rank)
    adapters = strategy.attach(model, settings or AdapterSettings())
    plan = strategy.finalize(lambda plan: 0.0)
    assert adapters.attached_plan() == plan
    return plan


@pytest.mark.parametrize(
    ("complexity", "ranks"),
    [
        ("low", [4, 4, 4, 8, 8, 16]),
        ("medium", [8, 8, 8, 16, 16, 32]),
        ("high", [16, 16, 16, 32, 32, 64]),
    ],
)
def test_without_a_budget_the_table_as_it_stands(complexity: str, ranks: list[int]) -> None:
    """Whatever ``max_rank`` is, and without a word about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(plan_of(encoder(2), max_rank=2, complexity=complexity).values()) == ranks * 2


def test_ranks_are_clipped_to_what_a_module_can_have() -> None:
    plan = plan_of(make("bert"), max_rank=4, complexity="high")
    assert set(plan.values()) == {16}  # hidden width 16: 32 and 64 do not fit


def test_gates_are_like_up_and_the_rest_like_query() -> None:
    roles = {role: table_rank(role, "medium") for role in Role}
    assert roles == {
        Role.query: 8, Role.key: 8, Role.value: 8, Role.fused_qkv: 8, Role.attention_output: 16, Role.mlp_up: 16,
        Role.mlp_gate: 16, Role.mlp_down: 32, Role.head: 8, Role.other: 8,
    }  # fmt: skip


def test_a_budget_scales_the_shape_by_hand() -> None:
    """8 to 32 at equal cost: ten components are 2 and 8, and ``max_rank`` does not cut the larger."""
    model = tree({"block.0.query": (64, 64), "block.0.output.dense": (64, 64)})
    assert list(plan_of(model, Budget(params=10 * 128), max_rank=5).values()) == [2, 8]


@pytest.mark.parametrize("budget", [Budget(rank=5.3), Budget(rank=4), Budget(params=30_001), Budget(fraction=1.0)])
@pytest.mark.parametrize("profile", ["flat", "hourglass"])
def test_a_budget_is_spent_and_never_exceeded(budget: Budget, profile: str) -> None:
    allowance = budget.resolve(RankPlan.uniform(plan_of(encoder(3)).sites, 16))
    assert allowance is not None
    assert 0.98 * allowance <= plan_of(encoder(3), budget, depth_profile=profile).params <= allowance


def test_with_a_budget_complexity_has_no_effect() -> None:
    low, high = (plan_of(encoder(2), Budget(rank=3), complexity=level) for level in ("low", "high"))
    assert low == high


def test_rank_pattern_still_says_what_is_most() -> None:
    settings = AdapterSettings(rank_pattern={"output.dense": 10, "key": 0})
    assert list(plan_of(encoder(1), settings=settings).values()) == [8, 0, 8, 10, 16, 10]
    plan = plan_of(encoder(1), Budget(rank=8), settings=settings)
    assert plan["encoder.layer.0.attention.self.key"] == 0
    assert max(rank for name, rank in plan.items() if name.endswith("output.dense")) <= 10


# Depth ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "ranks"),
    [
        ("flat", [8, 8, 8, 8, 8]),
        ("increasing", [4, 6, 8, 10, 12]),
        ("decreasing", [12, 10, 8, 6, 4]),
        ("hourglass", [12, 8, 4, 8, 12]),
    ],
)
def test_depth_profiles_by_hand(profile: str, ranks: list[int]) -> None:
    plan = plan_of(encoder(5, pooler=(64, 64)), depth_profile=profile)
    assert [plan[f"encoder.layer.{i}.attention.self.query"] for i in range(5)] == ranks
    assert plan["pooler"] == 8  # outside the blocks


@given(st.integers(2, 40))
def test_profiles_neither_add_nor_take(blocks: int) -> None:
    depths = [d / (blocks - 1) for d in range(blocks)]
    for profile in ("flat", "increasing", "decreasing"):
        assert sum(depth_factor(profile, depth) for depth in depths) == pytest.approx(blocks)  # type: ignore[arg-type]


def test_depth_is_counted_in_each_stack_of_the_whole_model() -> None:
    modules = [f"encoder.block.{i}.q" for i in range(3)] + [f"decoder.block.{i}.q" for i in range(5)] + ["one.0.q"]
    names = ["encoder.block.1.q", "decoder.block.1.q", "decoder.block.4.q", "one.0.q", "pooler"]
    assert relative_depths(names, modules) == dict(zip(names, [0.5, 0.25, 1.0, None, None], strict=True))
