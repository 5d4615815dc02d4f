"""The environment: both checkers, what it shows, what it pays, and when it ends."""

from __future__ import annotations

import warnings
from random import Random

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as check_env_of_sb3

from autolora.plan import RankPlan, Site
from autolora.search.env import RankSearchEnv
from autolora.search.measure import Measurements
from autolora.search.space import PlanSpace

SITES = {
    "encoder.layer.0.attention.self.query": Site(5, 5),
    "encoder.layer.1.output.dense": Site(15, 5),
    "pooler.dense": Site(5, 5),
}
SPACE = PlanSpace(RankPlan.uniform(SITES, 4), 80)  # uniform is rank 2, at 10, 20 and 10 a component


def value(plan: RankPlan) -> float:
    return sum(weight * rank for weight, rank in zip((1.0, 0.5, 2.0), plan.values(), strict=True))


def make(evaluations: int = 500, episode_steps: int = 4, price: float = 0.0) -> RankSearchEnv:
    return RankSearchEnv(Measurements(SPACE, value, evaluations=evaluations, price=price), episode_steps)


def test_gymnasium_and_stable_baselines_accept_it_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(), skip_render_check=True)
        check_env_of_sb3(make())
    assert not caplog.records


def test_what_it_shows() -> None:
    env = make()
    observation, info = env.reset(seed=0)
    ranks, roles, depths, left = [2 / 4] * 3, [0, 7 / 9, 1], [1 / 2, 2 / 2, 0], [0, 1]  # ten roles, two layers
    np.testing.assert_allclose(observation, np.float32([*ranks, *roles, *depths, *left]))
    assert info["plan"] == dict.fromkeys(SITES, 2)
    observation, *_ = env.step(np.array([1, 0, 1]))
    np.testing.assert_allclose(observation[[0, 1, 2, 9, 10]], np.float32([0.5, 0.25, 0.5, 20 / 80, 0.75]))


def test_the_reward_is_what_a_move_gains_less_its_price() -> None:
    env = make(price=1.6)
    env.reset()
    _, reward, terminated, truncated, info = env.step(np.array([0, 1, 2]))
    assert info["plan"] == dict(zip(SITES, (1, 2, 3), strict=True))
    assert reward == pytest.approx(-1 + 2)  # at equal cost
    assert (terminated, truncated) == (False, False)
    _, reward, *_ = env.step(np.array([1, 0, 1]))
    assert reward == pytest.approx(-0.5 + 1.6 * 20 / 160)


def test_rewards_of_an_episode_add_up_to_what_the_last_plan_gains_on_the_uniform_one() -> None:
    env = make(episode_steps=12)
    env.reset()
    rng, total, over = np.random.default_rng(0), 0.0, False
    while not over:
        _, reward, _, over, info = env.step(rng.integers(0, 3, size=3))
        total += reward
    assert total == pytest.approx(value(info["plan"]) - value(SPACE.plan(SPACE.uniform())))


def test_an_episode_ends_after_its_steps_and_begins_at_uniform_ranks() -> None:
    env = make(episode_steps=3)
    for _ in range(2):
        _, info = env.reset()
        assert info["plan"] == dict.fromkeys(SITES, 2)
        assert [env.step(np.array([0, 1, 2]))[3] for _ in range(3)] == [False, False, True]


def test_without_evaluations_a_new_plan_ends_the_episode_where_it_stands() -> None:
    env = make(evaluations=2, episode_steps=99)
    env.reset()
    env.step(np.array([0, 1, 2]))
    assert env.step(np.array([1, 1, 1]))[3] is False  # it is known
    _, reward, _, truncated, info = env.step(np.array([0, 1, 2]))
    assert (reward, truncated) == (0.0, True)
    assert info["plan"] == dict(zip(SITES, (1, 2, 3), strict=True))
    assert len(env.measured.scores) == 2


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_no_action_ever_leaves_the_budget_or_the_box(seed: int, bounded: bool) -> None:
    rng = Random(seed)
    sites = {f"layer.{i}.{name}": Site(rng.randint(1, 6), rng.randint(1, 6)) for i in range(2) for name in ("q", "fc1")}
    largest = RankPlan.uniform(sites, 3)
    space = PlanSpace(largest, rng.randint(0, largest.params) if bounded else None)
    env = RankSearchEnv(Measurements(space, lambda plan: plan.params, evaluations=30), episode_steps=50)
    env.reset(seed=seed)
    env.action_space.seed(seed)
    over = False
    while not over:
        observation, _, _, over, info = env.step(env.action_space.sample())
        assert info["plan"].params <= space.limit
        assert env.observation_space.contains(observation)
    assert len(env.measured.scores) <= 30
