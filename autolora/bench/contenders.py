"""Training steps that can be timed against each other.

Every step is ``zero_grad``, forward, loss, backward, optimizer step, and what its method does besides; without gradient
clipping, schedules and data loading, which are the same for all. All contenders have copies of one model with its own
dropout on, adapters without dropout on the same modules, the head trained in full, and AdamW with the same rates. What
differs is how it is done: ours through the strategy's hooks and the optimizer of our training, PEFT as its
documentation shows it, with ``torch.optim.AdamW`` left at its default implementation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from autolora import strategies
from autolora.adapters import Adapters, SelectorGate
from autolora.bench.model import Precision, Subject, first_adapted, loss_of, run_config
from autolora.parts import adapter_settings, optimization
from autolora.plan import Budget
from autolora.strategies.base import Batch, Strategy
from autolora.training.optimizer import make_optimizer

BUDGET_RANK = 4
_WITHOUT_BUDGET = ("autolora_paper",)
_SETTLING_STEPS = 3  # in a phase, before the next begins


class Contender(ABC):
    """One model with a training step of its own.

    Attributes:
        model: what is trained.
        steps: how many steps were made.
    """

    model: nn.Module

    def __init__(self, subject: Subject, precision: Precision) -> None:
        self.subject, self.precision = subject, precision
        self.steps = 0

    @abstractmethod
    def step(self, batch: Batch) -> Tensor:
        """One training step; gives the loss without penalties."""


class Limit(Contender):
    """What no LoRA method can beat with the same operations: the forward pass and the activations' gradients.

    The model has no adapters and no trainable parameter. The outputs of the first adapted modules (those that no other
    adapted module comes before: query, key and value of the first layer of BERT) are made to require a gradient. So
    backward goes from the loss down to these outputs and no further, and computes the gradient of every activation on
    the way and of no parameter. Every adapted module's factors need the gradient of its output, so a method that trains
    adapters on these modules has all of this to do. What it does besides (low-rank products and their gradients, those
    of the head, the optimizer) is not counted here.
    """

    def __init__(self, subject: Subject, precision: Precision) -> None:
        super().__init__(subject, precision)
        self.model = subject.copy().requires_grad_(False)
        self.first = first_adapted(self.model, subject.targets, subject.batch((1, 4), torch.Generator()))
        for name in self.first:
            self.model.get_submodule(name).register_forward_hook(_require_gradient)

    def step(self, batch: Batch) -> Tensor:
        """Forward and backward."""
        self.steps += 1
        with self.subject.autocast(self.precision):
            loss = loss_of(self.model, batch)
        loss.backward()
        return loss.detach()


def _require_gradient(module: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_()


class Ours(Contender):
    """A strategy of ours, driven as the training module drives it."""

    strategy: Strategy[Any]
    optimizer: Optimizer

    def __init__(
        self, subject: Subject, precision: Precision, strategy: str, rank: float, total_steps: int = 10_000
    ) -> None:
        super().__init__(subject, precision)
        self.model = subject.copy()
        self.total_steps = total_steps
        self.strategy = make_strategy(strategy, rank)
        self.adapters: Adapters = self.strategy.attach(self.model, adapter_settings(run_config(strategy)))
        rates = optimization(run_config(strategy))
        groups = self.strategy.param_groups(rates["rates"], total_steps)
        self.optimizer = make_optimizer(groups, betas=rates["betas"], eps=rates["eps"])
        self.strategy.begin(total_steps, self.optimizer)

    def step(self, batch: Batch) -> Tensor:
        """Loss and penalty, backward and the optimizer, with the strategy's hooks."""
        self.optimizer.zero_grad()
        with self.subject.autocast(self.precision):
            loss = loss_of(self.model, batch)
            penalty = self.strategy.penalty(loss)
        (loss if penalty is None else loss + penalty).backward()
        self.strategy.after_backward()
        self.optimizer.step()
        self.steps += 1
        self.strategy.after_step(self.steps, self.optimizer)
        return loss.detach()


def make_strategy(name: str, budget_rank: float) -> Strategy[Any]:
    """A strategy with its default options and the default largest rank, under a budget if it takes one."""
    config = run_config(name)
    budget = Budget() if name in _WITHOUT_BUDGET else Budget(rank=budget_rank)
    return strategies.make_strategy(name, config.strategy.options, budget=budget, max_rank=config.max_rank)


def autolora_in(phase: str, subject: Subject, precision: Precision) -> Ours:
    """AutoLoRA after a few steps in each phase up to ``prune`` (its middle) or ``settle``, with the budget of rank 4.

    The steps between are skipped: the strategy goes by the number of the step that it is told. What they would have
    done to the selectors is done at once: as many are closed as the schedule asks for at this step.
    """
    contender = Ours(subject, precision, "autolora", BUDGET_RANK)
    strategy: Any = contender.strategy
    middle = (strategy.prune_from + strategy.settle_from) // 2
    stops = [strategy.listen_from, strategy.prune_from, middle, strategy.settle_from]
    generator = torch.Generator().manual_seed(0)
    for stop in stops[: 3 if phase == "prune" else 4]:
        if stop == middle:
            close_selectors(contender.adapters, strategy.scheduled_cost(middle))
        for _ in range(_SETTLING_STEPS):
            contender.step(subject.batch((4, 8), generator))
        contender.steps = stop - 1
        contender.step(subject.batch((4, 8), generator))
    assert strategy.phase == phase
    return contender


@torch.no_grad()
def close_selectors(adapters: Adapters, cost: float) -> None:
    """Shift all logits together, so that the open components cost at most so many parameters."""
    gates = {name: cast(SelectorGate, layer.gate) for name, layer in adapters.layers.items()}
    layers = [(adapters.sites[name].cost, gate.logits) for name, gate in gates.items()]
    ranked = sorted(((logit, price) for price, logits in layers for logit in logits.tolist()), reverse=True)
    within = sum(total <= cost for total in accumulate(price for _, price in ranked))
    edges = [logit for logit, _ in ranked[max(0, within - 1) : within + 1]]
    for _, logits in layers:
        logits.sub_(sum(edges) / len(edges))


class Peft(Contender):
    """PEFT's LoRA on the same modules."""

    def __init__(self, subject: Subject, precision: Precision, rank: int) -> None:
        super().__init__(subject, precision)
        self.model = self.wrap(subject.copy(), rank)
        optim = run_config("uniform").optim
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if "lora_" in name], **optim.adapter.model_dump()},
            {"params": [p for name, p in named if "lora_" not in name], **optim.head.model_dump()},
        ]
        self.optimizer = AdamW(groups, betas=optim.betas, eps=optim.eps)

    def wrap(self, model: nn.Module, rank: int) -> nn.Module:
        """The model with PEFT's adapters."""
        return with_peft(self.subject, model, rank)

    def step(self, batch: Batch) -> Tensor:
        """As the documentation of PEFT has it."""
        self.optimizer.zero_grad()
        with self.subject.autocast(self.precision):
            loss = loss_of(self.model, batch)
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        return loss.detach()


class AdaLora(Peft):
    """PEFT's AdaLoRA, allocating at every step towards an average rank of 4.

    The model's forward pass adds the orthogonal regularisation to the loss.
    """

    def wrap(self, model: nn.Module, rank: int) -> nn.Module:
        """The model with PEFT's SVD adapters."""
        from peft import AdaLoraConfig, get_peft_model

        config = AdaLoraConfig(
            **_common(self.subject), init_r=rank, target_r=BUDGET_RANK, lora_alpha=_alpha(rank), tinit=1, deltaT=1,
            total_step=10_000,
        )  # fmt: skip
        return get_peft_model(model, config)

    def step(self, batch: Batch) -> Tensor:
        """A step of LoRA, then the allocation."""
        loss = super().step(batch)
        self.model.base_model.update_and_allocate(self.steps)  # type: ignore[union-attr, operator]
        return loss


def with_peft(subject: Subject, model: nn.Module, rank: int, rank_pattern: dict[str, int] | None = None) -> nn.Module:
    """The model with PEFT's LoRA on the targets, or on those of ``rank_pattern``, scaled as ours."""
    from peft import LoraConfig, get_peft_model

    common = _common(subject)
    if rank_pattern is not None:
        common["target_modules"] = list(rank_pattern)
        common["rank_pattern"] = {f"^{name.replace('.', '[.]')}": r for name, r in rank_pattern.items()}
        common["alpha_pattern"] = {key: _alpha(r) for key, r in common["rank_pattern"].items()}
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=_alpha(rank), **common))


def _common(subject: Subject) -> dict[str, Any]:
    return {
        "task_type": "SEQ_CLS",
        "target_modules": list(subject.targets),
        "modules_to_save": list(subject.heads),
        "lora_dropout": 0.0,
    }


def _alpha(rank: int) -> int:
    """PEFT's scale is alpha / r; ours does not depend on r."""
    return round(run_config("uniform").adapter.effective_scale() * rank)


CONTENDERS: dict[str, Callable[[Subject, Precision], Contender]] = {
    "limit": Limit,
    "uniform8": partial(Ours, strategy="uniform", rank=8),
    "uniform16": partial(Ours, strategy="uniform", rank=16),
    "autolora16-prune": partial(autolora_in, "prune"),
    "autolora16-settle": partial(autolora_in, "settle"),
    "peft8": partial(Peft, rank=8),
    "peft16": partial(Peft, rank=16),
    "adalora16": partial(AdaLora, rank=16),
}
PEFT_OF = {
    "uniform8": "peft8",
    "uniform16": "peft16",
    "autolora16-prune": "peft16",
    "autolora16-settle": "peft16",
    "adalora16": "peft16",
}
ADALORA_OF = {"autolora16-prune": "adalora16", "autolora16-settle": "adalora16"}
