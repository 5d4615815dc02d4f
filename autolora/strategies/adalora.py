r"""AdaLoRA: singular values that are masked by importance (Zhang et al., ICLR 2023, arXiv 2303.10512).

Every update has the form of a singular value decomposition,

.. math:: y = W x + s \cdot P \, \mathrm{diag}(\lambda) \, Q \, x

with P of shape ``(out, r)``, :math:`\lambda` of shape ``(r,)`` and Q of shape ``(r, in)``: B, the gate and A of
:class:`autolora.adapters.LoRALinear`. P and Q start gaussian and :math:`\lambda` at 0, so that the model computes what
it did before. P and Q are held near orthogonality by a regulariser of the training loss (equation 4),

.. math:: \gamma \cdot \mathrm{mean}_M \, \|M M^T - I\|_F^2, \qquad M = Q_k \text{ or } P_k^T \text{ of module } k.

The paper has the squares, and a sum over modules; its code and PEFT have a mean, which does not grow with the model,
but of norms that are not squared, whose gradient does not vanish at orthogonality. Here it is the mean of the squares.

Importance (section 3.2, equations 8 to 11). Of every entry w of P, :math:`\lambda` and Q, at every step t,

.. math::

    I^{(t)} = |w \, \partial L / \partial w|, \quad
    \bar I \leftarrow \beta_1 \bar I + (1 - \beta_1) I, \quad
    \bar U \leftarrow \beta_2 \bar U + (1 - \beta_2) |I - \bar I|, \quad s(w) = \bar I \, \bar U

with the gradient of the whole loss, before it is clipped, at the weights before the step. A component (triplet) has the
score :math:`S_i = s(\lambda_i) + \mathrm{mean}_j s(P_{ji}) + \mathrm{mean}_j s(Q_{ij})`.

Allocation (equations 6 and 12). With :math:`b_0` the cost of everything, :math:`b_T` the budget, and N steps,

.. math::

    b(t) = b_0 \; (t \le t_i), \qquad
    b(t) = b_T + (b_0 - b_T) \Bigl(1 - \frac{t - t_i}{N - t_i - t_f}\Bigr)^3, \qquad
    b(t) = b_T \; (t \ge N - t_f).

(The numerator is that of the published code; the paper prints :math:`t - t_i - t_f`, which begins above b_0.) Between,
every ``delta_t`` steps, the components are bought in the order of their scores while b(t) pays for them, and the
:math:`\lambda` of all others are set to 0. These go on receiving a gradient and may come back. At :math:`N - t_f` the
allocation is final: what is outside it is removed, :math:`\lambda` goes into B, and the rest trains on as plain LoRA,
without the regulariser.

The budget is in parameters, where a component costs in + out; the order is that of the published scores, not of scores
per parameter. ``count: components`` counts components on the way, as published: b_T is the number of components that
the budget pays for at the mean cost, and the final allocation leaves out those that would exceed the parameters, so
that less than the budget can be spent. Without a budget nothing is masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from autolora.errors import ConfigError
from autolora.plan import RankPlan
from autolora.strategies.base import Evaluate, Rates, Strategy, StrategyOptions
from autolora.strategies.pruning import best_components, settle

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from autolora.adapters import Adapters, AdapterSettings, Gate
    from autolora.adapters.layer import Init


class Options(StrategyOptions):
    """Options of :class:`AdaLoRA`.

    ``t_init`` and ``t_final`` are shares of the run's steps (published on GLUE: 0.09 to 0.18 and 0.44 to 0.58);
    ``orthogonality`` is the weight of the regulariser.
    """

    t_init: float = Field(default=0.1, ge=0, lt=1)
    t_final: float = Field(default=0.5, ge=0, lt=1)
    delta_t: int = Field(default=10, ge=1)
    beta1: float = Field(default=0.85, gt=0, lt=1)
    beta2: float = Field(default=0.85, gt=0, lt=1)
    orthogonality: float = Field(default=0.1, ge=0)
    count: Literal["parameters", "components"] = "parameters"

    @model_validator(mode="after")
    def _leave_room(self) -> Options:
        if self.t_init + self.t_final >= 1:
            raise ValueError(f"t_init + t_final: expected less than 1, got {self.t_init} + {self.t_final}")
        return self


class AdaLoRA(Strategy[Options]):
    """Allocates by sensitivity times uncertainty; the module's docstring gives the method."""

    Options = Options

    def make_gate(self, name: str, rank: int) -> Gate:
        """The singular values, at 0."""
        from autolora.adapters import ScaleGate

        return ScaleGate(rank)

    def attach(self, model: nn.Module, settings: AdapterSettings) -> Adapters:
        """Adapters of maximum rank with gaussian P and Q; both are orthogonal where the settings say so of A."""
        from dataclasses import replace

        import torch

        from autolora.adapters.attach import stream
        from autolora.adapters.layer import init_a

        init: Init = "orthogonal" if settings.init == "orthogonal" else "gaussian"
        adapters = super().attach(model, replace(settings, init=init))
        for name, layer in adapters.layers.items():
            p = torch.empty(layer.rank, layer.out_features)
            init_a(p, init, settings.init_std, stream(settings.seed, f"{name} P"))
            layer.lora_B.detach().copy_(p.T)
        self._ended_early = False
        return adapters

    def param_groups(self, rates: Rates, total_steps: int) -> list[dict[str, Any]]:
        """The singular values have a group of their own, at the rate of P and Q unless there is one for gates."""
        rate = rates.adapter.lr if rates.gate.lr is None else rates.gate.lr
        gates = {"name": "gate", "params": self.adapters.gate_parameters(), **vars(rates.gate), "lr": rate}
        return [*super().param_groups(rates, total_steps), gates]

    def begin(self, total_steps: int, optimizer: Optimizer) -> None:
        """Lay out the schedule.

        Raises:
            ConfigError: if it leaves no step for an allocation.
        """
        import torch

        options = self.options
        self.allocate_from = round(options.t_init * total_steps)
        self.settle_from = total_steps - round(options.t_final * total_steps)
        if options.t_final and self.settle_from == total_steps:
            raise ConfigError(
                f"strategy=adalora: t_final={options.t_final} of {total_steps} steps is none, and the ranks would "
                "never be trained alone: raise trainer.max_steps or t_final (0 leaves that phase out)"
            )
        if self.settle_from <= self.allocate_from:
            raise ConfigError(
                f"strategy=adalora: t_init={options.t_init} and t_final={options.t_final} of {total_steps} steps are "
                f"{self.allocate_from} and {total_steps - self.settle_from}, which leaves none to allocate in: train "
                "longer, or lower one of them"
            )
        layers = list(self.adapters.layers.values())
        self.q: list[Tensor] = [layer.lora_A for layer in layers]
        self.p: list[Tensor] = [layer.lora_B for layer in layers]
        self.singular_values: list[Tensor] = [*self.adapters.gate_parameters()]
        self.entries = [*self.q, *self.p, *self.singular_values]
        self.sensitivity = [torch.zeros_like(entry) for entry in self.entries]
        self.uncertainty = [torch.zeros_like(entry) for entry in self.entries]
        self.final = not layers
        self.steps_seen = 0

    # During training -------------------------------------------------------------------------------------------------

    def penalty(self, loss: Tensor) -> Tensor | None:
        """The orthogonality regulariser, until the allocation is final."""
        if self.final or not self.options.orthogonality:
            return None
        return self.options.orthogonality * orthogonality([*self.q, *(p.mT for p in self.p)])

    def after_backward(self) -> None:
        """Move the averages of sensitivity and uncertainty."""
        import torch

        if self.final:
            return
        gradients = [torch.zeros_like(entry) if entry.grad is None else entry.grad for entry in self.entries]
        with torch.no_grad():
            now = torch._foreach_mul(self.entries, gradients)
            torch._foreach_abs_(now)
            torch._foreach_lerp_(self.sensitivity, now, 1 - self.options.beta1)
            torch._foreach_sub_(now, self.sensitivity)
            torch._foreach_abs_(now)
            torch._foreach_lerp_(self.uncertainty, now, 1 - self.options.beta2)

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Allocate when it is time to, and for good at the end of the schedule."""
        import torch

        self.steps_seen = step
        if self.final:
            return
        if step >= self.settle_from:
            self._settle(optimizer)
        elif step > self.allocate_from and step % self.options.delta_t == 0 and self.allowance is not None:
            kept = self._bought(step)
            with torch.no_grad():
                torch._foreach_mul_(self.singular_values, kept.split([len(values) for values in self.singular_values]))

    def scheduled(self, step: int) -> int:
        """What may be kept after a step: parameters, or components where they are counted."""
        assert self.allowance is not None
        first, last = self.largest.cost, self.allowance
        if self.options.count == "components":
            first, last = self.largest.components, self.largest.components * self.allowance // self.largest.cost
        done = (step - self.allocate_from) / (self.settle_from - self.allocate_from)
        return int(last + (first - last) * (1 - min(1.0, max(0.0, done))) ** 3)

    def scores(self) -> Tensor:
        """Of every component, module by module, shape ``(components,)``."""
        import torch

        count = len(self.q)
        s = torch._foreach_mul(self.sensitivity, self.uncertainty)
        q, p = [entry.mean(1) for entry in s[:count]], [entry.mean(0) for entry in s[count : 2 * count]]
        return torch.cat(s[2 * count :]) + torch.cat(p) + torch.cat(q)

    def _bought(self, step: int) -> Tensor:
        """What the allocation of this step keeps: 0/1 for every component, module by module."""
        plan, limit = self.adapters.attached_plan(), self.scheduled(step)
        if self.options.count == "parameters":
            return best_components(plan, self.scores(), limit)
        return best_components(plan, self.scores(), self.allowance if step >= self.settle_from else None, most=limit)

    def _settle(self, optimizer: Optimizer | None = None) -> None:
        """Make the last allocation, and go on without what it leaves out, as far as that is possible."""
        import torch

        everything = torch.ones(self.largest.components)
        settle(self.adapters, everything if self.allowance is None else self._bought(self.settle_from), optimizer)
        self.final = True
        self.sensitivity, self.uncertainty = [], []

    @property
    def settled(self) -> bool:
        """Whether the last allocation was made."""
        return self.final

    def progress(self) -> dict[str, float]:
        """What the schedule allows."""
        if self.allowance is None:
            return {}
        return {f"scheduled_{self.options.count}": float(self.scheduled(self.steps_seen))}

    # After training --------------------------------------------------------------------------------------------------

    def finalize(self, evaluate: Evaluate) -> RankPlan:
        """The plan of the last allocation."""
        if not self.final:
            self._ended_early = True
            self._settle()
        return self.adapters.active_plan()

    @property
    def notes(self) -> list[str]:
        """Whether training ended before the schedule did."""
        if not self._ended_early:
            return []
        return [f"training ended before the last allocation (step {self.settle_from}), which was made afterwards"]

    def state_dict(self) -> dict[str, Any]:
        """The averages, and how far the schedule has come; the rest is in parameters and gates."""
        return {
            "final": self.final,
            "steps_seen": self.steps_seen,
            "sensitivity": self.sensitivity,
            "uncertainty": self.uncertainty,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the schedule stood."""
        self.final, self.steps_seen = state["final"], state["steps_seen"]
        for name in ("sensitivity", "uncertainty"):
            moved = [average.to(entry.device) for average, entry in zip(state[name], self.entries, strict=False)]
            setattr(self, name, moved)


def orthogonality(matrices: Sequence[Tensor]) -> Tensor:
    r"""The mean of :math:`\|M M^T - I\|_F^2` over matrices M with few rows; those of one shape share a product."""
    import torch

    alike: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        alike.setdefault(matrix.shape, []).append(matrix)
    total = matrices[0].new_zeros(())
    with torch.autocast(matrices[0].device.type, enabled=False):
        for group in alike.values():
            stack = torch.stack(group)
            identity = torch.eye(stack.shape[1], dtype=stack.dtype, device=stack.device)
            total = total + (stack @ stack.mT - identity).square().sum()
    return total / len(matrices)
