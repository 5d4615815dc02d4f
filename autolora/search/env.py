"""Rank selection as an environment of Gymnasium: ranks are moved up and down, and plans are measured."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, MultiDiscrete
from numpy.typing import NDArray

from autolora.roles import ROLE_ORDER, depth_of, role_of
from autolora.search.measure import Measurements

Observation = NDArray[np.float32]
Action = NDArray[np.int64]


class RankSearchEnv(gymnasium.Env[Observation, Action]):
    r"""Start from the uniform plan and move ranks; the reward is what a move has gained.

    *Observation*: numbers from 0 to 1, shape ``(3 n + 2,)`` for n modules: the rank of each module as a share of its
    maximum; its role, as its place in the order of roles; its depth as a share of the deepest (0 for none); then what
    is left of the budget, and of the episode.

    *Action*: for each module 0 (a level down), 1 (keep) or 2 (up). What the budget does not pay for is not done:
    :meth:`autolora.search.space.PlanSpace.moved` says how an infeasible action is repaired, so that the plan is within
    the budget after every step.

    *Reward*: :math:`worth(plan_{t+1}) - worth(plan_t)`, where worth is the score that was measured less a price on cost
    (:class:`autolora.search.measure.Measurements`). Rewards of an episode add up to what its last plan gains on the
    uniform one, so that going round in circles pays nothing (a potential: Ng, Harada & Russell, ICML 1999).

    An episode ends (``truncated``) after ``episode_steps``, or when a plan that is new finds no evaluation left: the
    plan stays as it was then.

    Args:
        measured: measures plans and remembers them; shared by all episodes.
        episode_steps: steps of an episode.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - as Gymnasium declares it

    def __init__(self, measured: Measurements, episode_steps: int = 16) -> None:
        self.measured, self.space, self.episode_steps = measured, measured.space, episode_steps
        names = self.space.names
        depths = np.array([-1 if (depth := depth_of(name)) is None else depth for name in names]) + 1
        roles = np.array([ROLE_ORDER.index(role_of(name)) for name in names])
        self._fixed = np.concatenate([roles / (len(ROLE_ORDER) - 1), depths / max(1, depths.max())])
        self.observation_space = Box(0.0, 1.0, shape=(3 * len(names) + 2,), dtype=np.float32)
        self.action_space = MultiDiscrete([3] * len(names))
        self._begin()

    def _begin(self) -> None:
        self.levels, self.worth, self.steps = self.measured.uniform, self.measured(self.measured.uniform), 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict]:
        """Back to the uniform plan."""
        super().reset(seed=seed)
        self._begin()
        return self._observation(), self._info()

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Move ranks, and measure the plan."""
        before = self.worth
        moved = self.space.moved(self.levels, [int(choice) - 1 for choice in action])
        possible = self.measured.knows(moved) or not self.measured.done
        if possible:
            self.levels, self.worth = moved, self.measured(moved)
        self.steps += 1
        over = self.steps >= self.episode_steps or not possible
        return self._observation(), self.worth - before, False, over, self._info()

    def _observation(self) -> Observation:
        ranks = np.array(list(self.space.plan(self.levels).values()))
        highest = np.maximum(1, list(self.space.largest.values()))
        left = 1 - self.space.cost(self.levels) / max(1, self.space.limit)
        time = 1 - self.steps / self.episode_steps
        return np.concatenate([ranks / highest, self._fixed, [left, max(0.0, time)]]).astype(np.float32)

    def _info(self) -> dict[str, Any]:
        return {"plan": self.space.plan(self.levels), "score": self.measured.scores[self.levels]}
