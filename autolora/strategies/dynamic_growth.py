r"""Dynamic growth: ranks begin small, and new components are opened during training, where they promise most.

All components are attached from the start; those that wait have gate 0 and a column of B that is 0, and nothing touches
them. Growth goes in rounds, the last of which spends the budget (``max_rank`` everywhere without one). How many
parameters may be active after a round is a matter of ``growth_strategy``:

- *linear*: in equal parts, from ``min_rank`` everywhere to all of it;
- *step*: as for a rank that doubles in every round: 1, 2, 4, ...;
- *adaptive*: in the parts of *linear*, but only when the held-out loss has improved by less than ``tolerance`` since
  the round before. A budget is spent in the last round whatever the loss does; without a budget growth may end early.

Where they go is a matter of ``allocation``: *uniform* opens components evenly over the modules, and *importance* in the
order of a score of each module, one component each and then a second, as far as the round goes. In a round that pays
for one of every module, as a doubling does, the order alone would decide nothing: there each module gets a share in
proportion to its score. The score is measured before the round (:mod:`autolora.strategies.growing`): *gradient*, that
of the columns of B which wait, or *increlora*, the sensitivity times uncertainty of the update as it is (Zhang et al.,
arXiv 2308.12043), which knows nothing of a module without a component.

The output is the same before and after a round, bit for bit: a component that opens contributes 0, and products have
the same shapes, since those that wait are computed with the others. Its moments in AdamW are 0, and its steps are those
of a new parameter (:class:`autolora.strategies.growing.Newcomers`). What never opened is removed at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from autolora.config import Conflict, RunConfig
from autolora.errors import ConfigError, PlanError
from autolora.plan import RankPlan, even_order, proportional_order, spend
from autolora.strategies.base import Batch, Evaluate, LossFn, Strategy, StrategyOptions, needs_float_weights

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from autolora.adapters import Adapters, AdapterSettings, Gate


class Options(StrategyOptions):
    """Options of :class:`DynamicGrowth`.

    ``growth_interval``: steps from round to round; by default the rounds are laid out over the growth period, which is
    the share ``until`` of the run. ``heldout_batches``: that loss and scores are measured on.
    """

    growth_strategy: Literal["linear", "step", "adaptive"] = "linear"
    allocation: Literal["uniform", "importance"] = "importance"
    importance: Literal["gradient", "increlora"] = "gradient"
    min_rank: int = Field(default=1, ge=0)
    growth_interval: int | None = Field(default=None, ge=1)
    until: float = Field(default=0.5, gt=0, le=1)
    heldout_batches: int = Field(default=4, ge=1)
    tolerance: float = Field(default=0.01, ge=0, lt=1)

    def conflicts_with(self, config: RunConfig) -> Iterator[Conflict]:
        """Weights without a gradient, which the sensitivity of IncreLoRA is made of."""
        if self.importance == "increlora":
            yield from needs_float_weights(config, "(importance=increlora) takes the gradient of the frozen weights")


class Round(NamedTuple):
    """After this step what is active may cost so much."""

    step: int
    cost: int


_LEAST_SHARE = 1e-6
_ROUNDS = 8  # of equal parts, where no interval is given


def lay_out(options: Options, largest: RankPlan, goal: int, total_steps: int) -> list[Round]:
    """The rounds of a run; see the module's docstring.

    Args:
        options: of the strategy.
        largest: the maximum ranks.
        goal: what is active after the last round costs so much, if all take place.
        total_steps: of the run.

    Raises:
        ConfigError: if the rounds do not fit in the growth period.
    """
    start = _at_rank(largest, options.min_rank).cost
    if start >= goal:
        return []
    period = round(options.until * total_steps)
    room = f"{period} steps (strategy.until={options.until} of {total_steps})"
    interval = options.growth_interval
    if options.growth_strategy == "step":
        targets = _doublings(largest, options.min_rank, goal)
        if interval is not None and interval * len(targets) > period:
            raise ConfigError(
                f"strategy.growth_interval={interval}: {len(targets)} rounds of doubling take "
                f"{interval * len(targets)} steps, but growth has {room}: expected at most {period // len(targets)}"
            )
    else:
        count = min(_ROUNDS, period) if interval is None else period // interval
        if interval is not None and not count:
            raise ConfigError(f"strategy.growth_interval={interval}: growth has {room}: expected at most as many")
        targets = [start + (goal - start) * (i + 1) // count for i in range(count)]
    if len(targets) > period or not targets:
        raise ConfigError(f"growth has {room}; expected at least {max(1, len(targets))}: raise trainer.max_steps")
    steps = [(i + 1) * (interval or period / len(targets)) for i in range(len(targets))]
    return [Round(round(step), cost) for step, cost in zip(steps, targets, strict=True)]


def _doublings(largest: RankPlan, rank: int, goal: int) -> list[int]:
    """What ranks cost that double from round to round, up to the goal."""
    targets: list[int] = []
    while not targets or targets[-1] < goal:
        rank = max(1, 2 * rank)
        targets.append(min(goal, _at_rank(largest, rank).cost))
    return targets


def _at_rank(largest: RankPlan, rank: int) -> RankPlan:
    """The same rank everywhere, or the multiple below it, as far as each module goes."""
    sites = largest.sites
    return RankPlan(sites, {name: min(rank - rank % sites[name].multiple, top) for name, top in largest.items()})


class DynamicGrowth(Strategy[Options]):
    """Ranks that grow during training; the module's docstring gives the method."""

    Options = Options
    wants_heldout = True

    def initial_plan(self) -> RankPlan:
        """Everything, most of which waits.

        Raises:
            ConfigError: if ``max_rank`` is below ``min_rank``.
            PlanError: if the budget does not pay for ``min_rank`` everywhere.
        """
        low = self.options.min_rank
        if self.max_rank < low:
            raise ConfigError(f"max_rank={self.max_rank}: expected at least strategy.min_rank={low}")
        floor = _at_rank(self.largest, low).cost
        if self.allowance is not None and self.allowance < floor:
            raise PlanError(
                f"strategy.min_rank={low} everywhere costs {floor:,} {self.largest.unit}, more than the budget of "
                f"{self.allowance:,}: lower strategy.min_rank or raise the budget"
            )
        return self.largest

    def make_gate(self, name: str, rank: int) -> Gate:
        """0 for a component that waits and 1 for one that is open: nothing that learns."""
        from autolora.adapters import ScaleGate

        return ScaleGate(rank).requires_grad_(False)

    def attach(self, model: nn.Module, settings: AdapterSettings) -> Adapters:
        """Adapters of maximum rank, open at ``min_rank``."""
        import torch

        from autolora.strategies.growing import Newcomers, Sensitivity

        adapters = super().attach(model, settings)
        self.newcomers = Newcomers(adapters)
        self.sensitivity = Sensitivity(adapters)
        self.opened = torch.full((self.largest.components,), -1)
        self.plan = RankPlan(self.largest.sites, {})
        self._open(_at_rank(self.largest, self.options.min_rank), 0)
        return adapters

    def begin(self, total_steps: int, optimizer: Optimizer) -> None:
        """Lay out the rounds over the run."""
        goal = self.largest.cost if self.allowance is None else self.allowance
        self.rounds = lay_out(self.options, self.largest, goal, total_steps)
        self.passed = 0  # rounds whose step has come
        self.grown = 0  # rounds in which something could open
        self.step_seen = 0
        self.kept: list[Batch] = []
        self.last_loss = math.inf
        self.loss = math.nan
        self.scores: dict[str, float] = {}

    # During training -------------------------------------------------------------------------------------------------

    def heldout_step(self, batch: Batch, heldout: Batch, loss_fn: LossFn) -> None:
        """Keep the first held-out batches, and measure on them before a round.

        They are the same in every round, so that losses can be compared.
        """
        if self.settled or not (self._adaptive or self._scored):
            return
        if len(self.kept) < self.options.heldout_batches:
            self.kept.append(heldout)
        if self.step_seen + 1 == self.rounds[self.passed].step:
            self._measure(loss_fn)

    def after_backward(self) -> None:
        """Remember the weights before the step."""
        self.newcomers.hold()

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Hold new components to the pace of new ones, and grow where a round is due."""
        self.step_seen = step
        self.newcomers.pace(self.opened, step, optimizer.param_groups[0]["betas"])
        if not self.settled and step >= self.rounds[self.passed].step:
            self._pass_round(step)

    def _measure(self, loss_fn: LossFn) -> None:
        """The held-out loss, and what new components promise: what a round is decided by."""
        from autolora.strategies.growing import heldout_loss, reserve_scores

        if self._adaptive:
            self.loss = heldout_loss(self.adapters, self.kept, loss_fn)
        if self._scored and self.options.importance == "increlora":
            self.sensitivity.observe(self.kept, loss_fn)
            self.scores = self.sensitivity.scores()
        elif self._scored:
            self.scores = reserve_scores(self.adapters, self.plan, self.kept, loss_fn)

    def _pass_round(self, step: int) -> None:
        """Open what the round allows, unless the loss still falls without."""
        self.passed += 1
        improving = self._adaptive and not self.loss > (1 - self.options.tolerance) * self.last_loss
        self.last_loss = self.loss
        if self.settled:
            self.kept.clear()
        last = self.settled and self.allowance is not None
        if improving and not last:
            return
        self.grown = len(self.rounds) if last else self.grown + 1
        left = self.rounds[self.grown - 1].cost - self.plan.cost
        order = self._by_promise(left) if self._scored else self._waiting()
        # What is too dear for a round the next one has more for: to pass it over, as the last round does, would give
        # every round's small change to the cheapest modules.
        is_last = self.grown == len(self.rounds)
        self._open(spend(order, self.largest, self.rounds[self.grown - 1].cost, self.plan, pass_over=is_last), step)

    def _room(self) -> RankPlan:
        """What waits."""
        return RankPlan(self.largest.sites, {name: self.largest[name] - rank for name, rank in self.plan.items()})

    def _by_promise(self, left: int) -> list[str]:
        """Components that wait, by module: one of each module in the order of the scores, then a second, and so on.

        A score says what the first new component is worth; what the second is worth shows when there is a first. Where
        the round pays for one of each that order decides nothing, and they come in proportion to the scores.
        """
        room = self._room()
        if left >= sum(room.sites[name].step_price(self.plan[name]) for name, waiting in room.items() if waiting):
            least = max(self.scores.values(), default=0.0) * _LEAST_SHARE or 1.0  # everything is on offer in the end
            return proportional_order({name: max(self.scores.get(name, 0.0), least) for name in room}, room)
        names = sorted(dict.fromkeys(self._waiting()), key=lambda name: -self.scores[name])
        most = max(self.largest.values(), default=0)
        return [name for turn in range(most) for name in names if self.plan[name] + turn < self.largest[name]]

    def _waiting(self) -> list[str]:
        """Components that wait, by module, in an order that keeps ranks even."""
        seen = dict.fromkeys(self.plan, 0)
        waiting = []
        for name in even_order(self.largest):
            seen[name] += 1
            if seen[name] > self.plan[name]:
                waiting.append(name)
        return waiting

    def _open(self, plan: RankPlan, step: int) -> None:
        """Open the first components of every module that wait, as many as the plan says."""
        import torch

        from autolora.adapters import ScaleGate

        masks = [torch.arange(layer.rank) < plan[name] for name, layer in self.adapters.layers.items()]
        is_open = torch.cat([*masks, torch.zeros(0, dtype=torch.bool)])
        self.opened[is_open & (self.opened < 0)] = step
        for layer, mask in zip(self.adapters.layers.values(), masks, strict=True):
            assert isinstance(layer.gate, ScaleGate)
            layer.gate.values.copy_(mask)
        self.plan = plan

    @property
    def _adaptive(self) -> bool:
        return self.options.growth_strategy == "adaptive"

    @property
    def _scored(self) -> bool:
        return self.options.allocation == "importance"

    @property
    def settled(self) -> bool:
        """Whether every round has passed."""
        return self.passed == len(self.rounds)

    def progress(self) -> dict[str, float]:
        """Rounds in which something could open, of those that have passed."""
        return {"rounds_passed": self.passed, "rounds_grown": self.grown}

    # After training --------------------------------------------------------------------------------------------------

    def finalize(self, evaluate: Evaluate) -> RankPlan:
        """What has opened."""
        self.adapters.keep_first(self.plan)
        return self.plan

    @property
    def notes(self) -> list[str]:
        """Whether training ended before growth did."""
        if self.settled:
            return []
        left = len(self.rounds) - self.passed
        return [f"training ended before growth did: {left} of {len(self.rounds)} rounds were still to come"]

    def state_dict(self) -> dict[str, Any]:
        """What has opened when, what was measured, and the held-out batches that it is measured on."""
        return {
            "opened": self.opened,
            "plan": dict(self.plan),
            "passed": self.passed,
            "grown": self.grown,
            "step_seen": self.step_seen,
            "last_loss": self.last_loss,
            "sensitivity": self.sensitivity.sensitivity,
            "uncertainty": self.sensitivity.uncertainty,
            "kept": [dict(batch) for batch in self.kept],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        device = next(iter(self.adapters.adapter_parameters())).device
        self.opened = state["opened"].cpu()
        self.plan = RankPlan(self.largest.sites, state["plan"])
        self.passed, self.grown, self.step_seen = state["passed"], state["grown"], state["step_seen"]
        self.last_loss = state["last_loss"]
        self.sensitivity.sensitivity, self.sensitivity.uncertainty = state["sensitivity"], state["uncertainty"]
        self.kept = [{key: value.to(device) for key, value in batch.items()} for batch in state["kept"]]
