r"""AutoLoRA: selectors learned beside the weights, under a price on parameters.

Every module starts at its maximum rank, with a selector logit :math:`\theta_i` on each rank-1 component i. Training has
three phases, whose lengths are shares of the run:

1. *Warm-up*: all gates are open; A and B find the update that the task wants. Then every module's (A, B) is rotated
   into the singular basis of its own product (:func:`autolora.adapters.canonicalize`): before that, components share
   directions, and a gate would judge a part of several of them.
2. *Prune*: the selectors are trained too, on

   .. math:: L(A, B, \theta) + \lambda \, \frac{\sum_i c_i \, p(\theta_i)}{\sum_i c_i}

   with :math:`c_i` the component's parameters and p the gate's probability. The penalty acts on the selectors only: it
   is not a function of A and B, and since the forward pass uses hard gates (straight_through), a growing B cannot pay
   for a shrinking gate. The first tenth of the phase only listens: it measures the mean squared gradient of each gate,
   a Fisher estimate of what closing it would cost (as in SNIP: Lee, Ajanthan & Torr, ICLR 2019, section 4, squared and
   averaged), and the logits then start in the order of that estimate per parameter, spread evenly in cumulative cost.
   So the price closes the least valuable gates first and the cost falls smoothly, where equal logits, which Adam moves
   at equal speed, would all cross the threshold together. A gate that was closed wrongly feels the gradient of what it
   is missed for, and opens again.
3. *Settle*: the gates are fixed to 0/1 and the survivors go on alone, so that training ends with the function that is
   evaluated.

With a budget :math:`\lambda` is a Lagrange multiplier, moved by dual ascent with a proportional term (Stooke, Achiam &
Abbeel, ICML 2020, section 4) on the violation of a schedule that leads the hard cost from everything down to the budget
(cubic, as in Zhu & Gupta, arXiv 1710.01878, section 3), and the plan is projected to the budget when the gates are
fixed. Without one, :math:`\lambda` is ``sparsity.weight`` times the training loss at the beginning of the run, so that
one weight means the same for tasks of any scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from autolora.config import Conflict
from autolora.errors import ConfigError
from autolora.plan import RankPlan
from autolora.strategies.base import Evaluate, Rates, Strategy, StrategyOptions, reset_optimizer_state
from autolora.strategies.pruning import PhaseOptions, Prices, best_components, even_components, keep, phase_ends

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from autolora.adapters import Adapters, AdapterSettings, Gate, SelectorGate
    from autolora.config import RunConfig

Form = Literal["straight_through", "sigmoid", "hard_concrete", "gumbel", "gumbel_softmax", "simplex"]

# How far, in logits, a selector can travel during the prune phase when its learning rate is left to the strategy.
_TRAVEL = 20.0
_MAX_GATE_LR = 0.5
# Shares of the prune phase: listening at its beginning, and holding the cost at the budget at its end.
_LISTEN = 0.1
_HOLD = 0.2

_STATE = (
    "integral", "price", "price_unit", "squared_gradient", "initial_loss", "losses_seen", "probability_sum", "watched",
    "step_seen",
)  # fmt: skip

Phase = Literal["warmup", "listen", "prune", "settle"]


class SelectorOptions(StrategyOptions):
    """The selectors; see :class:`autolora.adapters.SelectorGate`.

    ``init`` is the lowest logit at the start of pruning, and ``spread`` the distance to the highest.
    """

    form: Form = "straight_through"
    threshold: float | None = Field(default=None, ge=0, lt=1)
    tau: float = Field(default=1.0, gt=0)
    init: float = 0.5
    spread: float = Field(default=4.0, ge=0)

    @model_validator(mode="after")
    def _begin_open(self) -> SelectorOptions:
        lowest = {"straight_through": 0.5 if self.threshold is None else self.threshold, "hard_concrete": 1 / 12}
        share = lowest.get(self.form, 0.0)  # of the logistic function's range
        logit = math.log(share / (1 - share)) if share else -math.inf
        if not self.init > logit:
            raise ValueError(
                f"init: expected more than {logit:.3g}, where a gate of form {self.form} is open as every component "
                f"begins, got {self.init}: raise it{', or lower threshold' if self.form == 'straight_through' else ''}"
            )
        return self


class SparsityOptions(StrategyOptions):
    r"""The price of parameters.

    ``weight``: without a budget, keeping every component costs this share of the initial loss. ``ascent`` and ``gain``:
    with a budget, the integral and the proportional response of the price to a violation of the schedule (cost above
    schedule as a share of the largest cost); a price of 1 pushes the median gate as hard as its own gradient noise.
    ``spend_all``: the budget is spent as far as components fit. If not, it is a ceiling: ``weight`` is charged under it
    as it is without a budget, and components that are not worth that are left out.
    """

    weight: float = Field(default=0.01, ge=0)
    ascent: float = Field(default=300.0, ge=0)
    gain: float = Field(default=100.0, ge=0)
    spend_all: bool = True


class Options(StrategyOptions):
    """Options of :class:`AutoLoRA`."""

    selector: SelectorOptions = SelectorOptions()
    sparsity: SparsityOptions = SparsityOptions()
    phases: PhaseOptions = PhaseOptions()
    rotate: bool = True

    def conflicts_with(self, config: RunConfig) -> Iterator[Conflict]:
        """Multiples are what a budget buys."""
        if config.rank_multiple > 1 and not self.sparsity.spend_all:
            message = (
                "strategy.sparsity.spend_all=false: a ceiling is not spent, so ranks keep to no multiples: leave out "
                "one of spend_all=false and rank_multiple"
            )
            yield Conflict(("strategy.sparsity.spend_all", "rank_multiple"), message)


class AutoLoRA(Strategy[Options]):
    """Selectors learned under a price on parameters; the module's docstring gives the method."""

    Options = Options

    def make_gate(self, name: str, rank: int) -> Gate:
        """A selector that begins open and does not learn yet."""
        import torch

        from autolora.adapters import SelectorGate

        selector = self.options.selector
        gate = SelectorGate(
            rank,
            selector.form,
            threshold=selector.threshold,
            tau=selector.tau,
            init=selector.init,
            generator=self.noise,
        )
        gate.fix(torch.ones(rank))
        return gate

    def param_groups(self, rates: Rates, total_steps: int) -> list[dict[str, Any]]:
        """The selectors have a group of their own, whose rate is constant and by default set by the phase's length."""
        prune_steps = max(1, round(self.options.phases.prune * total_steps))
        rate = min(_TRAVEL / prune_steps, _MAX_GATE_LR) if rates.gate.lr is None else rates.gate.lr
        gates = {"name": "gate", "params": self.adapters.gate_parameters(), **vars(rates.gate), "lr": rate}
        return [*super().param_groups(rates, total_steps), gates | {"constant": True}]

    def attach(self, model: nn.Module, settings: AdapterSettings) -> Adapters:
        """Adapters of maximum rank whose selectors are open and wait."""
        from autolora.adapters.attach import stream

        self.noise = stream(settings.seed, "selector noise")
        adapters = super().attach(model, settings)
        self.gates: dict[str, SelectorGate] = {name: layer.gate for name, layer in adapters.layers.items()}  # type: ignore[misc]
        self.owners = [name for name, layer in adapters.layers.items() for _ in range(layer.rank)]
        self.phase: Phase = "warmup"
        self._ended_in: Phase | None = None
        return adapters

    def begin(self, total_steps: int, optimizer: Optimizer) -> None:
        """Lay out the phases over the run.

        Raises:
            ConfigError: if there is no room for the selectors to learn.
        """
        import torch

        # Training may have moved the model, or changed its precision.
        device, dtype = next(((p.device, p.dtype) for p in self.adapters.gate_parameters()), (None, None))
        self.prices = Prices(self.adapters.attached_plan(), device, dtype)
        self.costs = self.prices.each
        self.integral = torch.tensor(0.0, device=device)
        self.price = torch.tensor(0.0, device=device)
        self.price_unit = torch.tensor(1.0, device=device)
        self.squared_gradient = torch.zeros_like(self.costs)
        self.initial_loss = torch.tensor(0.0, device=device)
        self.probability_sum = torch.zeros_like(self.costs)
        self.watched = 0
        shares = self.options.phases.shares()
        self.listen_from, self.settle_from = phase_ends("strategy.phases", shares, total_steps)
        steps = self.settle_from - self.listen_from
        if steps < 2:
            raise ConfigError(
                f"strategy.phases: of {total_steps} steps the prune phase has {steps}; expected at least 2, one to "
                "listen and one to learn: raise trainer.max_steps or strategy.phases.prune"
            )
        self.prune_from = self.listen_from + max(1, round(_LISTEN * (self.settle_from - self.listen_from)))
        self.calibration = max(1, total_steps // 100)
        self.losses_seen = self.step_seen = 0
        if self.listen_from == 0 and self.gates:
            self._begin_listening(optimizer)

    # During training -------------------------------------------------------------------------------------------------

    def penalty(self, loss: Tensor) -> Tensor | None:
        """The price of the expected cost, as a share of everything; only while pruning."""
        if self.step_seen < self.calibration:
            self.losses_seen += 1
            self.initial_loss += (loss.detach() - self.initial_loss) / self.losses_seen
        return self.price * self._expected_share() if self.phase == "prune" else None

    def after_backward(self) -> None:
        """Listen to the gates: sum the squares of their gradients."""
        if self.phase == "listen":
            sizes = [len(gate.logits) for gate in self.gates.values()]
            for heard, gate in zip(self.squared_gradient.split(sizes), self.gates.values(), strict=True):
                if gate.logits.grad is not None:
                    heard += gate.logits.grad.square()
                gate.logits.grad = None  # listening moves no selector, and has no part in the norm that clipping sees

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Move the price, and go from phase to phase."""
        self.step_seen = step
        if self.phase == "prune":
            self._move_price(step)
            if step > self.settle_from - _HOLD * (self.settle_from - self.prune_from):
                self.probability_sum += self._probability().detach()
                self.watched += 1
        if self.phase == "warmup" and step >= self.listen_from and self.gates:
            self._begin_listening(optimizer)
        if self.phase == "listen" and step >= self.prune_from:
            self._begin_pruning(optimizer)
        if self.phase == "prune" and step >= self.settle_from:
            self._settle(optimizer)

    def scheduled_cost(self, step: int) -> float:
        """The cost that a step of the prune phase aims at: cubic from everything to the budget, then level."""
        assert self.allowance is not None
        done = (step - self.prune_from) / max(1.0, (1 - _HOLD) * (self.settle_from - self.prune_from))
        return self.allowance + (self.largest.cost - self.allowance) * (1 - min(1.0, max(0.0, done))) ** 3

    def _target(self) -> float:
        """What the schedule asks for now."""
        if self.phase == "settle":
            assert self.allowance is not None
            return self.allowance
        return self.scheduled_cost(self.step_seen) if self.phase == "prune" else self.largest.cost

    def _begin_listening(self, optimizer: Optimizer) -> None:
        """Make components canonical, and give the selectors a gradient; every gate stays open."""
        import torch

        from autolora.adapters import canonicalize

        if self.options.rotate:
            for layer in self.adapters.layers.values():
                canonicalize(layer)
            reset_optimizer_state(optimizer, self.adapters.adapter_parameters())
        self._let_learn(torch.full_like(self.costs, self.options.selector.init))
        self.phase = "listen"

    def _begin_pruning(self, optimizer: Optimizer) -> None:
        """Start the selectors in the order of what their gates seem worth, and set the unit of the price."""
        import torch

        share = torch.autograd.grad(self._expected_share(), self.adapters.gate_parameters())
        push = torch.cat(share).abs()
        heard = self.squared_gradient.sqrt() / max(1, self.prune_from - self.listen_from) ** 0.5
        fixed_price = self.options.sparsity.weight * self.initial_loss
        if self.allowance is None:
            self.price = fixed_price
        else:  # where training has converged there is no noise left to go by, and on a simplex no push
            self.price_unit = torch.where(push > 0, heard / push, 0.0).median().clamp(min=fixed_price)
        # Estimates may be equal: the last components of even ranks are then the first to close.
        even = torch.tensor(even_components(self.largest)[::-1], dtype=torch.long, device=self.costs.device)
        order = even[(self.squared_gradient / self.costs)[even].argsort(stable=True)]
        below = torch.empty_like(self.costs)
        below[order] = self.costs[order].cumsum(0) / self.costs.sum()
        selector = self.options.selector
        self.adapters.fix_gates({name: torch.ones(layer.rank) for name, layer in self.adapters.layers.items()})
        self._let_learn(selector.init + selector.spread * below)
        reset_optimizer_state(optimizer, self.adapters.gate_parameters())
        self.phase = "prune"

    def _let_learn(self, logits: Tensor) -> None:
        """Set the selectors and let them gate; B takes the inverse of a soft gate, so that the output does not jump."""
        import torch

        with torch.no_grad():
            parts = logits.split([layer.rank for layer in self.adapters.layers.values()])
            for (name, gate), part in zip(self.gates.items(), parts, strict=True):
                gate.logits.copy_(part)
                gate.learn()
                self.adapters.layers[name].lora_B.div_(gate.value())

    def _move_price(self, step: int) -> None:
        """Dual ascent on the violation of the schedule, with a proportional term; a price is never negative."""
        if self.allowance is None:
            return
        violation = (self.prices.together(self._kept()) - self.scheduled_cost(step)) / self.largest.cost
        sparsity = self.options.sparsity
        rate = sparsity.ascent / max(1, self.settle_from - self.prune_from)
        self.integral = (self.integral + rate * violation).clamp(min=0.0)
        self.price = self.price_unit * (self.integral + sparsity.gain * violation).clamp(min=0.0)
        if not sparsity.spend_all:
            self.price = self.price.clamp(min=sparsity.weight * self.initial_loss)

    def _settle(self, optimizer: Optimizer | None = None) -> None:
        """Fix the gates: without a budget what the selectors keep, else the most probable components that it pays for.

        Both go by the mean probability over the last fifth of the prune phase: a selector that is worth its price dips
        below the threshold now and then, because only a closed gate shows what it is missed for, and is back soon.
        """
        import torch

        mean = self.probability_sum / self.watched if self.watched else self._probability().detach()
        if self.phase != "prune":  # training has ended before anything was judged
            mean = torch.ones_like(mean)
        thresholds = [torch.full_like(gate.logits, gate.least_probability) for gate in self.gates.values()]
        kept = (mean > torch.cat([*thresholds, mean[:0]])).to(mean.dtype)
        if self.allowance is not None:
            bought = best_components(self.largest, mean, self.allowance)
            kept = bought if self.options.sparsity.spend_all else kept * bought
        self.phase = "settle"
        keep(self.adapters, kept, optimizer)

    def _expected_share(self) -> Tensor:
        """Expected cost as a share of the largest, differentiable in the logits."""
        return (self._probability() @ self.costs) / self.costs.sum()

    def _probability(self) -> Tensor:
        """Of every component, over all modules in order; differentiable."""
        return self._flat(lambda gate, logits: gate.probability(logits))

    def _kept(self) -> Tensor:
        """Whether each component survives the threshold."""
        return self._flat(lambda gate, logits: gate.kept(logits))

    def _flat(self, read: Callable[[SelectorGate, Tensor], Tensor]) -> Tensor:
        """One number per component: in one call where no component depends on another's logit."""
        import torch

        gates = list(self.gates.values())
        if gates and gates[0].elementwise:
            return read(gates[0], torch.cat([gate.logits for gate in gates]))
        return torch.cat([read(gate, gate.logits) for gate in gates] or [torch.zeros(0)])

    @property
    def settled(self) -> bool:
        """Whether the gates are fixed for good."""
        return self.phase == "settle"

    def progress(self) -> dict[str, float]:
        """The multiplier, which is the weight of the penalty, and the cost that the schedule asks for."""
        numbers = {"sparsity_price": float(self.price)}
        return numbers if self.allowance is None else numbers | {"scheduled_cost": self._target()}

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
        how = "by what the selectors had come to" if self._ended_in == "prune" else "spread evenly, not learned"
        return [f"training ended in the {self._ended_in} phase: the ranks are {how}, and were never trained alone"]

    def state_dict(self) -> dict[str, Any]:
        """Phase, price and what was measured; the logits are parameters."""
        return {"phase": self.phase, "noise": self.noise.get_state()} | {key: getattr(self, key) for key in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the phase that was saved."""
        import torch

        self.phase = state["phase"]
        self.noise.set_state(state["noise"])
        for key in _STATE:
            value = state[key]
            setattr(self, key, value.to(self.costs.device) if isinstance(value, torch.Tensor) else value)
        for gate in self.gates.values():
            gate.learning = self.phase in ("listen", "prune")
