"""A loop written by hand around the strategy interface: exactly the one in its docstring, with clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from autolora.adapters import Adapters, AdapterSettings
from autolora.plan import RankPlan
from autolora.strategies.base import Batch, GroupRates, LossFn, Rates, Strategy
from autolora.tasks.planted import TeacherStudent

EveryStep = Callable[[int, Optimizer], None]


def mse(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch["inputs"]), batch["labels"])


def planted_batches(pair: TeacherStudent, size: int, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield pair.batch(size, generator)


@dataclass
class Fitted:
    """What a run leaves behind."""

    adapters: Adapters
    plan: RankPlan
    losses: list[float] = field(default_factory=list)


def fit(
    strategy: Strategy,
    model: nn.Module,
    batches: Iterator[Batch],
    heldout: Iterator[Batch],
    *,
    steps: int,
    lr: float = 3e-3,
    loss_fn: LossFn = mse,
    settings: AdapterSettings | None = None,
    clip: float = 1.0,
    warmup: float = 0.06,
    every_step: EveryStep | None = None,
) -> Fitted:
    """Train under a strategy, with a linear schedule after a linear warm-up, and take its plan.

    ``every_step`` is called after the strategy has seen a step.
    """
    adapters = strategy.attach(model, settings or AdapterSettings())
    strategy.prepare(batches, loss_fn)
    rates = Rates(adapter=GroupRates(lr), gate=GroupRates(None), head=GroupRates(lr))
    optimizer = AdamW(strategy.param_groups(rates, steps))
    strategy.begin(steps, optimizer)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    model.train()
    losses = []
    for step in range(1, steps + 1):
        factor = linear(step - 1, steps, warmup)
        for group, base in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = base if group.get("constant") else base * factor
        batch = next(batches)
        if strategy.wants_heldout:
            strategy.heldout_step(batch, next(heldout), loss_fn)
        loss = strategy.training_loss(model, batch, loss_fn)
        penalty = strategy.penalty(loss)
        optimizer.zero_grad()
        (loss if penalty is None else loss + penalty).backward()
        strategy.after_backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
        optimizer.step()
        strategy.after_step(step, optimizer)
        losses.append(loss.detach())
        if every_step is not None:
            every_step(step, optimizer)
    model.eval()
    batch = next(heldout)

    @torch.no_grad()
    def evaluate(plan: RankPlan) -> float:
        with adapters.masked(plan):
            return -float(loss_fn(model, batch))

    plan = strategy.finalize(evaluate)
    return Fitted(adapters, plan, torch.stack(losses).tolist())


def linear(step: int, steps: int, warmup: float) -> float:
    rising = round(warmup * steps)
    return (step + 1) / rising if step < rising else 1 - (step - rising) / (steps - rising)


@torch.no_grad()
def excess_error(pair: TeacherStudent, adapters: Adapters, rows: int = 2000) -> float:
    """Mean squared error on fresh rows, relative to no adapter."""
    batch = pair.batch(rows, torch.Generator().manual_seed(99))
    labels = pair.teacher(batch["inputs"])
    error = F.mse_loss(pair.student(batch["inputs"]), labels)
    with adapters.disabled():
        return float(error / F.mse_loss(pair.student(batch["inputs"]), labels))
