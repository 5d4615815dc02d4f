"""Reinforcement learning of plans: PPO (Schulman et al., arXiv 1707.06347) moves ranks in a super-net.

The environment is :class:`autolora.search.env.RankSearchEnv`, the agent that of stable-baselines3 (Raffin et al., JMLR
22, 2021). Every evaluation is a step of the agent, so there are few of them for a policy of many modules: moves are
credited with what they gain at once (a low ``discount``), and the untrained policy moves few modules a step (``keep``),
so that a reward says something about each of them. What comes out is the best plan that was measured, not what the
policy would do last.

Needs the extra ``autolora[search]``.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import Field

from autolora.config import Conflict, RunConfig
from autolora.search.measure import Measurements
from autolora.search.supernet import LearnedSearchOptions, SuperNet

_AGENTS = 4
"""At the most, one after the other."""


class Options(LearnedSearchOptions):
    """``episode_steps``: moves before the agent starts again from uniform ranks. ``rollout``: steps between updates of
    the policy, each of ``epochs`` passes. ``discount``, ``learning_rate``, ``entropy``: of PPO. ``keep``: logit of not
    moving a module at the start; 0 moves two thirds of them in each step.
    """

    episode_steps: int = Field(default=16, ge=1)
    rollout: int = Field(default=16, ge=2)
    epochs: int = Field(default=10, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0)
    discount: float = Field(default=0.5, ge=0, le=1)
    entropy: float = Field(default=0.03, ge=0)
    keep: float = 2.0

    def conflicts_with(self, config: RunConfig) -> Iterator[Conflict]:
        """Packages that are not installed."""
        yield from super().conflicts_with(config)
        lacking = [name for name in ("gymnasium", "stable_baselines3") if importlib.util.find_spec(name) is None]
        if lacking:
            message = f"strategy=rl_search needs {' and '.join(lacking)}: pip install 'autolora[search]'"
            yield Conflict(("strategy.name",), message)


class RLSearch(SuperNet[Options]):
    """Measures the plans that a PPO agent comes to."""

    Options = Options

    def search(self, measured: Measurements) -> None:
        """Let the agent learn until every evaluation is spent."""
        learn_to_move(measured, self.options, self.seed)


def learn_to_move(measured: Measurements, options: Options, seed: int) -> None:
    """Train a PPO agent on the environment of the measurements; the random state of the process stays as it was.

    An agent that has settled on plans it knows spends no more evaluations: after so many steps a new one goes on.

    Args:
        measured: measures plans and remembers them.
        options: of environment and agent.
        seed: of the agent.
    """
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import Logger

    from autolora.search.env import RankSearchEnv

    class WhileThereIsSomethingToMeasure(BaseCallback):
        def _on_step(self) -> bool:
            return not measured.done

    with _random_state_kept():
        for agents in range(_AGENTS):
            if measured.done:
                return
            agent = PPO(
                "MlpPolicy",
                RankSearchEnv(measured, options.episode_steps),
                n_steps=options.rollout,
                batch_size=options.rollout,
                n_epochs=options.epochs,
                learning_rate=options.learning_rate,
                gamma=options.discount,
                ent_coef=options.entropy,
                policy_kwargs={"net_arch": [64]},
                seed=(seed + 10_007 * agents) % 2**32,
                device="cpu",
            )
            with torch.no_grad():
                agent.policy.action_net.bias.view(-1, 3)[:, 1] += options.keep  # type: ignore[operator]
            agent.set_logger(Logger(None, []))  # by default it leaves a folder behind
            agent.learn(measured.most_steps // _AGENTS, callback=WhileThereIsSomethingToMeasure())


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """stable-baselines3 seeds the generators of the whole process."""
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
