r"""SoRA: a gate between A and B that proximal steps make sparse (Ding et al., EMNLP 2023, arXiv 2311.11696).

.. math:: y = W x + s \cdot B \, \mathrm{diag}(g) \, A \, x, \qquad \min_{A, B, g} L(A, B, g) + \lambda \, \|g\|_1

(section 3.2). After every step of the optimizer, whose rate for the gates is :math:`\eta`, comes the proximal step of
the L1 norm,

.. math:: g \leftarrow \mathrm{sign}(g) \max(|g| - \eta \lambda, 0) = \arg\min_u \tfrac12 (u - g)^2 + \eta \lambda |u|.

(The published code shrinks by the threshold and then sets to 0 what is below it, that is all that was below twice the
threshold, and has the L1 norm in its loss as well. Neither is done here.) A gate that is 0 has a gradient, and comes
back where that is large enough. As published, the step before is one of Adam, whose steps do not depend on the size of
the loss: :math:`\lambda` is compared with the mean gradient of a gate over its root mean square, so that values from 0
to 1 matter whatever the task, and above 1 every gate falls. Gates start at 1, not at random numbers as published, which
would decide which are 0 first.

Training has three phases, whose lengths are shares of the run. *Warm-up*: all gates are 1 and wait. *Prune*: they
learn. *Settle*: components whose gate is 0 are removed, the other gates go into B, and the rest trains on as plain
LoRA, so that training ends with the function that is evaluated.

With a budget :math:`\lambda` follows a path: at every step it is the smallest number with which the proximal step
leaves no more parameters open than a schedule allows, which leads from everything to the budget (cubic, level over the
last fifth of the phase), but ``lambda_max`` at most: to close a gate at once, all others would have to shrink as much.
At the end the budget buys the largest components; what the open ones leave of it goes to closed ones, evenly over the
model, so that it is spent. Without a budget :math:`\lambda` rises linearly from ``lambda_start`` to ``lambda_end``
(constant, where they are equal) and stays there over the last fifth, and what is open then is the plan.

*Free scale.* The same update has many (g, A, B): a gate can shrink while A and B grow, at no cost in L, so that the L1
norm of the gates alone says nothing about components. The published runs have a weight decay of 0.1 on A and B
(``optim.adapter.weight_decay``), which puts a price on their growth. ``normalize`` rules it out: from the end of the
warm-up on, B is rescaled after every step so that all components have factors of one size,

.. math:: \|a_i\| \|b_i\| / \sqrt{out} = \mathrm{const},

which is the mean of components at that time, and g takes the inverse; the output stays the same, and :math:`|g_i|` is
the size of component i over the mean. The root of the number of outputs is there because Adam moves all entries of B
alike, so that early in training columns are as large as they are long, whatever they are worth: without it, modules
with wide outputs get the whole budget of a short run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from autolora.errors import ConfigError
from autolora.plan import RankPlan
from autolora.strategies.base import Evaluate, Rates, Strategy, StrategyOptions, reset_optimizer_state
from autolora.strategies.pruning import PhaseOptions, Prices, best_components, phase_ends, settle

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from autolora.adapters import Adapters, AdapterSettings, Gate, ScaleGate

# How far a gate can travel during the prune phase when its learning rate is left to the strategy; gates start at 1.
_TRAVEL = 20.0
_MAX_GATE_LR = 0.1
# Share of the prune phase at its end over which the schedule is level.
_HOLD = 0.2

Phase = Literal["warmup", "prune", "settle"]


class Phases(PhaseOptions):
    """A shorter warm-up than by default, and a prune phase in any case."""

    warmup: float = Field(default=0.1, ge=0, le=1)
    prune: float = Field(default=0.5, gt=0, le=1)


class Options(StrategyOptions):
    """Options of :class:`SoRA`: where the path of lambda begins and ends without a budget, and its limit with one."""

    lambda_start: float = Field(default=0.0, ge=0)
    lambda_end: float = Field(default=0.5, ge=0)
    lambda_max: float = Field(default=2.0, gt=0)
    normalize: bool = True
    phases: Phases = Phases()


class SoRA(Strategy[Options]):
    """Gates under an L1 norm; the module's docstring gives the method."""

    Options = Options

    def make_gate(self, name: str, rank: int) -> Gate:
        """A gate that is 1 and waits."""
        import torch

        from autolora.adapters import ScaleGate

        gate = ScaleGate(rank, init=1.0)
        gate.fix(torch.ones(rank))
        return gate

    def attach(self, model: nn.Module, settings: AdapterSettings) -> Adapters:
        """Adapters of maximum rank with gates that wait."""
        adapters = super().attach(model, settings)
        self.gates: list[ScaleGate] = [layer.gate for layer in adapters.layers.values()]  # type: ignore[misc]
        self._ended_in: Phase | None = None
        return adapters

    def param_groups(self, rates: Rates, total_steps: int) -> list[dict[str, Any]]:
        """The gates have a group of their own, whose rate is constant and by default set by the phase's length."""
        prune_steps = max(1, round(self.options.phases.prune * total_steps))
        rate = min(_TRAVEL / prune_steps, _MAX_GATE_LR) if rates.gate.lr is None else rates.gate.lr
        gates = {"name": "gate", "params": self.adapters.gate_parameters(), **vars(rates.gate), "lr": rate}
        return [*super().param_groups(rates, total_steps), gates | {"constant": True}]

    def begin(self, total_steps: int, optimizer: Optimizer) -> None:
        """Lay out the phases.

        Raises:
            ConfigError: if the run has no step for pruning, or none before it where components are to be measured.
        """
        import torch

        phases = self.options.phases
        self.prune_from, self.settle_from = phase_ends("strategy.phases", phases.shares(), total_steps)
        if self.settle_from <= self.prune_from or (self.options.normalize and not self.prune_from):
            raise ConfigError(
                f"strategy=sora: phases.warmup={phases.warmup} and phases.prune={phases.prune} of {total_steps} steps "
                f"are {self.prune_from} and {self.settle_from - self.prune_from}: expected at least 1 to prune in, and "
                "with normalize=true 1 before; train longer, or raise them"
            )
        device = next((parameter.device for parameter in self.adapters.gate_parameters()), None)
        self.sizes = [layer.rank for layer in self.adapters.layers.values()]
        self.prices = Prices(self.adapters.attached_plan(), device)
        self.mean_size = torch.tensor(1.0, device=device)
        self.strength = torch.tensor(0.0, device=device)
        self.phase: Phase = "warmup" if self.sizes else "settle"
        self.step_seen = 0
        if self.phase == "warmup" and not self.prune_from:
            self._begin_pruning(optimizer)

    # During training -------------------------------------------------------------------------------------------------

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """The proximal step, and from phase to phase."""
        self.step_seen = step
        if self.phase == "prune":
            self._shrink(step, next(group["lr"] for group in optimizer.param_groups if group["name"] == "gate"))
        if self.phase == "warmup" and step >= self.prune_from:
            self._begin_pruning(optimizer)
        elif self.phase == "prune" and step >= self.settle_from:
            self._settle(optimizer)

    def _begin_pruning(self, optimizer: Optimizer) -> None:
        """Let the gates learn; they start at 1, or at the sizes of components over their mean."""
        for gate in self.gates:
            gate.learn()
        self.phase = "prune"
        if self.options.normalize:
            self.mean_size = self._component_sizes().mean()
            self._normalize()
            factors = [layer.lora_B for layer in self.adapters.layers.values()]
            reset_optimizer_state(optimizer, factors)  # its moments are of another scale

    def _shrink(self, step: int, rate: float) -> None:
        """The proximal step at this rate; then B is brought back to its norm."""
        import torch

        g = torch.cat(self._values())
        threshold = self._threshold(step, rate, g.abs())
        self.strength = threshold / rate if rate else torch.zeros_like(threshold)
        torch._foreach_copy_(self._values(), soft_threshold(g, threshold).split(self.sizes))
        if self.options.normalize:
            self._normalize()

    def _threshold(self, step: int, rate: float, sizes: Tensor) -> Tensor:
        """The rate times lambda, as the path has it at this step; a tensor, since nothing is asked of the device."""
        import torch

        if self.allowance is None:
            start, end = self.options.lambda_start, self.options.lambda_end
            return sizes.new_tensor(rate * (start + (end - start) * self._done(step)))
        largest, order = sizes.sort(descending=True, stable=True)
        too_much = self.prices.running(order) > self.scheduled_cost(step)
        return torch.where(too_much, largest, 0.0).max().clamp(max=rate * self.options.lambda_max)

    def _done(self, step: int) -> float:
        """How much of the way of the prune phase is behind: 1 over its last fifth."""
        return min(1.0, max(0, step - self.prune_from) / ((1 - _HOLD) * (self.settle_from - self.prune_from)))

    def scheduled_cost(self, step: int) -> float:
        """What the components that a step leaves open may cost: cubic from everything to the budget, then level."""
        assert self.allowance is not None
        return self.allowance + (self.largest.cost - self.allowance) * (1 - self._done(step)) ** 3

    def _values(self) -> list[Tensor]:
        return [gate.values.detach() for gate in self.gates]

    def _factor_sizes(self) -> Tensor:
        r""":math:`\|a_i\| \|b_i\| / \sqrt{out}` of every component."""
        import torch

        layers = self.adapters.layers.values()
        a = torch.cat([layer.lora_A.detach().norm(dim=1) for layer in layers])
        return a * torch.cat([layer.lora_B.detach().norm(dim=0) / layer.out_features**0.5 for layer in layers])

    def _component_sizes(self) -> Tensor:
        r""":math:`|g_i| \|a_i\| \|b_i\| / \sqrt{out}` of every component."""
        import torch

        sizes = self._factor_sizes()
        return sizes if self.phase != "prune" else sizes * torch.cat(self._values()).abs()

    def _normalize(self) -> None:
        """Give the factors of every component the mean size, and its gate the rest."""
        import torch

        sizes = self._factor_sizes()
        known = (sizes > 0) & (self.mean_size > 0)
        growth = torch.where(known, self.mean_size / sizes, 1.0)
        factors: list[Tensor] = [layer.lora_B.detach() for layer in self.adapters.layers.values()]
        torch._foreach_mul_(factors, growth.split(self.sizes))
        torch._foreach_div_(self._values(), growth.split(self.sizes))

    def _settle(self, optimizer: Optimizer | None = None) -> None:
        """Keep what is open, or the largest components that the budget pays for, and go on without the others."""
        sizes = self._component_sizes()
        if self.allowance is None:
            kept = (sizes > 0).to(sizes.dtype) if self.phase == "prune" else sizes.new_ones(len(sizes))
        else:
            kept = best_components(self.adapters.attached_plan(), sizes, self.allowance)
        settle(self.adapters, kept, optimizer)
        self.phase = "settle"

    @property
    def settled(self) -> bool:
        """Whether the gates are fixed for good."""
        return self.phase == "settle"

    def progress(self) -> dict[str, float]:
        """Lambda, and the cost that the schedule asks for."""
        numbers = {"sparsity_lambda": float(self.strength)}
        if self.allowance is not None:
            numbers["scheduled_cost"] = self.scheduled_cost(self.step_seen)
        return numbers

    # After training --------------------------------------------------------------------------------------------------

    def finalize(self, evaluate: Evaluate) -> RankPlan:
        """The plan of the settle phase."""
        if self.phase != "settle":
            self._ended_in = self.phase
            self._settle()
        return self.adapters.active_plan()

    @property
    def notes(self) -> list[str]:
        """Whether training ended before the phases did."""
        if self._ended_in is None:
            return []
        return [f"training ended in the {self._ended_in} phase: the ranks were never trained alone"]

    def state_dict(self) -> dict[str, Any]:
        """Phase, and what was measured; the gates are parameters."""
        return {
            "phase": self.phase,
            "step_seen": self.step_seen,
            "mean_size": self.mean_size,
            "strength": self.strength,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the phase that was saved."""
        self.phase, self.step_seen = state["phase"], state["step_seen"]
        self.mean_size = state["mean_size"].to(self.mean_size.device)
        self.strength = state["strength"].to(self.mean_size.device)


def soft_threshold(values: Tensor, threshold: Tensor) -> Tensor:
    """``sign(v) max(|v| - threshold, 0)``, the proximal operator of ``threshold * |v|``: exactly 0 up to the threshold.

    Args:
        values: any shape.
        threshold: one number, not negative.
    """
    return values - values.clamp(-threshold, threshold)
