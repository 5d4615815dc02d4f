r"""DyLoRA: adapters that work at every rank (Valipour et al., EACL 2023, arXiv 2210.07558).

Every step draws a rank b uniformly from 1 to the largest and trains the first b components of every module alone,

.. math:: y = W x + s \cdot B_{:, 1:b} \, A_{1:b, :} \, x

(section 4.1; a module of fewer components uses them all), so that the first components learn to do without the later
ones and any prefix is a working adapter. The published forward pass has the scale :math:`\alpha / b`; here s is the
same for every rank, as for all strategies, so that cutting an adapter leaves the components that stay as they were.
``frozen`` is the published mode in which only the b-th row of A and column of B have a gradient. A component that has
none in a step is still moved by Adam's average of earlier ones.

Evaluation uses the first components of a plan within the budget, in training too: by default the uniform one, which
``select: uniform`` also ends with. Since any prefixes can be measured without training, ``select: greedy`` looks for a
better plan afterwards: it measures on the held-out slice what one component more and one fewer are worth in every
module, then moves components from where they are worth least per parameter to where they are worth most for as long as
the score rises, and measures ``evaluations`` plans at most. What it returns is never worse on that slice than uniform
ranks. Without a budget the plan is the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from autolora.errors import ConfigError
from autolora.plan import RankPlan, even_order, spend
from autolora.strategies.base import Evaluate, Strategy, StrategyOptions

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from autolora.adapters import Adapters, AdapterSettings, Gate, PrefixGate


class Options(StrategyOptions):
    """Options of :class:`DyLoRA`.

    ``per_module`` draws a rank for every module by itself, where the published method has one for all.
    """

    frozen: bool = False
    per_module: bool = False
    select: Literal["uniform", "greedy"] = "uniform"
    evaluations: int = Field(default=200, ge=1)


class DyLoRA(Strategy[Options]):
    """Random truncation; the module's docstring gives the method."""

    Options = Options

    def make_gate(self, name: str, rank: int) -> Gate:
        """A mask of the first components."""
        from autolora.adapters import PrefixGate

        return PrefixGate(rank)

    def attach(self, model: nn.Module, settings: AdapterSettings) -> Adapters:
        """Adapters of maximum rank that are evaluated at the uniform plan.

        Raises:
            ConfigError: if there are too few evaluations to measure every module.
        """
        from autolora.adapters.attach import stream

        adapters = super().attach(model, settings)
        self.stream = stream(settings.seed, "dylora ranks")
        self.gates: dict[str, PrefixGate] = {name: layer.gate for name, layer in adapters.layers.items()}  # type: ignore[misc]
        self.uniform = spend(even_order(self.largest), self.largest, self.allowance)
        self.chosen = not self._searches
        needed = 2 * len(adapters.layers) + 2
        if self._searches and self.options.evaluations < needed:
            raise ConfigError(
                f"strategy.evaluations: select=greedy needs at least {needed} to measure each of the "
                f"{len(adapters.layers)} modules with one component more and one fewer, got {self.options.evaluations}"
            )
        adapters.keep_first(self.uniform)
        return adapters

    @property
    def _searches(self) -> bool:
        return self.options.select == "greedy" and self.allowance is not None

    def begin(self, total_steps: int, optimizer: Optimizer) -> None:
        """Draw the rank of the first step."""
        self._draw()

    # During training -------------------------------------------------------------------------------------------------

    def after_backward(self) -> None:
        """In the frozen mode, leave the gradients of the last components in use alone."""
        if not self.options.frozen:
            return
        for layer, rank in zip(self.adapters.layers.values(), self.ranks, strict=True):
            if layer.lora_A.grad is not None and layer.lora_B.grad is not None:
                layer.lora_A.grad[: rank - 1] = 0
                layer.lora_B.grad[:, : rank - 1] = 0

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Draw the rank of the next step."""
        self._draw()

    def _draw(self) -> None:
        """One rank for all modules, clipped to what each has, or one for each."""
        import torch

        sizes = [layer.rank for layer in self.adapters.layers.values()]
        if self.options.per_module:
            drawn = [int(torch.randint(size, (), generator=self.stream)) + 1 for size in sizes]
        else:
            rank = int(torch.randint(max(sizes, default=1), (), generator=self.stream)) + 1
            drawn = [min(rank, size) for size in sizes]
        self._train_first(drawn)

    def _train_first(self, ranks: list[int]) -> None:
        self.ranks = ranks
        for gate, rank in zip(self.gates.values(), ranks, strict=True):
            gate.first(rank)

    @property
    def settled(self) -> bool:
        """Whether the plan is known: from the beginning, unless it is looked for at the end."""
        return self.chosen

    # After training --------------------------------------------------------------------------------------------------

    def finalize(self, evaluate: Evaluate) -> RankPlan:
        """The uniform plan, or what a greedy search makes of it."""
        plan = self.uniform
        if self._searches:
            assert self.allowance is not None
            plan = greedy(evaluate, plan, self.largest, self.allowance, self.options.evaluations)
        self.adapters.keep_first(plan)
        self.chosen = True
        return plan

    def state_dict(self) -> dict[str, Any]:
        """The random stream, and the ranks that were drawn for the next step."""
        return {"stream": self.stream.get_state(), "ranks": self.ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the same ranks."""
        self.stream.set_state(state["stream"])
        self._train_first(state["ranks"])


def greedy(evaluate: Evaluate, start: RankPlan, largest: RankPlan, allowance: int, evaluations: int) -> RankPlan:
    """Improve a plan by trades: a component (or a multiple) more for one module, paid for by those that miss it least.

    Args:
        evaluate: the score of a plan, to maximise.
        start: within the allowance.
        largest: the highest rank of every module.
        allowance: what a plan may cost.
        evaluations: how many plans may be measured, at least two for each module and two more.

    Returns:
        The best plan found, which is ``start`` if none was better.
    """
    left = evaluations

    def measure(plan: RankPlan) -> float:
        nonlocal left
        left -= 1
        return evaluate(plan)

    plan, best = start, measure(start)
    gain: dict[str, float] = {}
    loss: dict[str, float] = {}

    def look(name: str) -> None:
        """What one component more and one fewer is worth per parameter, to the plan as it is."""
        gain.pop(name, None)
        loss.pop(name, None)
        if plan[name] < largest[name]:
            more = _changed(plan, name, 1)
            gain[name] = (measure(more) - best) / (more.cost - plan.cost)
        if plan[name] > 0:
            less = _changed(plan, name, -1)
            loss[name] = (best - measure(less)) / (plan.cost - less.cost)

    for name in start:
        look(name)
    tried: set[str] = set()
    while left > 0 and set(gain) - tried:
        receiver = max((name for name in gain if name not in tried), key=lambda name: gain[name])
        tried.add(receiver)
        offer = _trade(plan, receiver, sorted(loss, key=lambda name: loss[name]), allowance)
        score = measure(offer) if offer is not None else best
        if offer is None or score <= best:
            continue
        moved = [name for name in plan if offer[name] != plan[name]]
        plan, best = offer, score
        tried.clear()
        for name in moved:
            if left >= 2:
                look(name)
    return plan


def _changed(plan: RankPlan, name: str, by: int) -> RankPlan:
    return RankPlan(plan.sites, {**plan, name: plan[name] + by * plan.sites[name].multiple})


def _trade(plan: RankPlan, receiver: str, donors: Sequence[str], allowance: int) -> RankPlan | None:
    """One component more for the receiver; donors give one each, in their order, round after round until it is paid.

    What is left over goes back to the donors, the last first. ``None`` if it cannot be paid.
    """
    offer = _changed(plan, receiver, 1)
    gave: list[str] = []
    while offer.cost > allowance:
        giving = [name for name in donors if name != receiver and offer[name] > 0]
        if not giving:
            return None
        for name in giving:
            if offer.cost > allowance:
                offer = _changed(offer, name, -1)
                gave.append(name)
    for name in reversed(gave):
        returned = _changed(offer, name, 1)
        if returned.cost <= allowance:
            offer = returned
    return offer
