"""``suite=strategies``: what each strategy spends on itself, beside the step that it is part of.

Bookkeeping is everything that a strategy does in a step besides losses, their gradients and the optimizer of the
weights: its penalty and that penalty's gradient, its look at the gradients, moving gates and prices, drawing plans and
switching to them, scoring, projection and compaction. It does not depend on the batch, so a short run on small batches
tells it; its share is of a step of uniform LoRA of the same largest rank. A second measurement, on chains of small
Linears, tells how it grows with the number of modules. More losses in a step (of held-out batches, of several plans)
are learning, and are not counted: ``compute.passes`` of a result has them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autolora.adapters import AdapterSettings
from autolora.bench.contenders import BUDGET_RANK, Ours, make_strategy
from autolora.bench.measure import Interval, median_interval
from autolora.bench.model import Subject, loss_of, run_config
from autolora.bench.report import Row
from autolora.bench.settings import StrategiesSettings
from autolora.bench.steps import CLOCKS
from autolora.parts import adapter_settings, optimization
from autolora.strategies.base import Batch, LossFn, Strategy
from autolora.training.optimizer import make_optimizer

_SMALL = (4, 8)  # rows and tokens: what strategies do for themselves does not depend on them
_WIDTH = 32


@dataclass(frozen=True)
class Learner:
    """A model and a strategy that is to train it."""

    model: nn.Module
    batch: Callable[[], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    settings: AdapterSettings


class Chain(nn.Module):
    """``count`` square Linears, one after the other."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(count))
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, width)`` to ``(batch, width)``."""
        for layer in self.layers:
            x = layer(x)
        return x


def strategies_suite(settings: StrategiesSettings) -> Iterator[Row]:
    """A row for each strategy: milliseconds a step, their share of a step, and their growth with the modules.

    Raises:
        BackboneError: if the model cannot be loaded.
    """
    subject = Subject.load(settings.backbone, torch.device("cpu"))
    step = step_milliseconds(subject, settings)
    for name in settings.chosen():
        times = [1e3 * seconds_per_step(name, of_text(subject, name), settings) for _ in range(settings.rounds)]
        value = median_interval(times)
        share = Interval(median=value.median / step, low=value.low / step, high=value.high / step)
        per_module = [
            median_interval(
                [seconds_per_step(name, of_chain(count), settings) / count for _ in range(settings.rounds)]
            ).median
            for count in settings.modules
        ]
        growth = median_interval([per_module[-1] / per_module[0] if per_module[0] else 0.0])
        yield Row(
            part="bookkeeping",
            name=name,
            shape=settings.shape,
            precision="float32",
            rounds=settings.rounds,
            value=value,
            ratios={"step": share, "growth": growth},
        )


def step_milliseconds(subject: Subject, settings: StrategiesSettings) -> float:
    """The median of steps of uniform LoRA at the default largest rank, at the shape of the settings."""
    contender = Ours(subject, "float32", "uniform", run_config("uniform").max_rank)
    rows, tokens = map(int, settings.shape.split("x"))
    generator = torch.Generator().manual_seed(settings.seed)
    clock, times = CLOCKS[settings.clock], []
    for _ in range(2 + settings.reference_steps):
        batch = subject.batch((rows, tokens), generator)
        started = clock()
        contender.step(batch)
        times.append(1e3 * (clock() - started))
    return statistics.median(times[2:])


def of_text(subject: Subject, name: str) -> Learner:
    """The backbone with small batches."""
    generator = torch.Generator().manual_seed(0)
    settings = adapter_settings(run_config(name))
    return Learner(subject.copy(), lambda: subject.batch(_SMALL, generator), loss_of, settings)


def of_chain(count: int) -> Learner:
    """A chain of small Linears, every one of them adapted, fitting noise."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    def batch() -> Batch:
        inputs, labels = torch.randn(2, 4, _WIDTH, generator=generator)
        return {"inputs": inputs, "labels": labels}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(model(batch["inputs"]), batch["labels"])

    return Learner(Chain(count), batch, loss, AdapterSettings(modules_to_save=()))


def seconds_per_step(name: str, learner: Learner, settings: StrategiesSettings) -> float:
    """The mean over a run, which goes through all phases of the strategy."""
    steps, clock = settings.steps, CLOCKS[settings.clock]
    strategy = make_strategy(name, BUDGET_RANK)
    model = strategy.attach(learner.model, learner.settings).model
    strategy.prepare((learner.batch() for _ in iter(int, 1)), learner.loss)
    rates = optimization(run_config(name))
    optimizer = make_optimizer(strategy.param_groups(rates["rates"], steps), betas=rates["betas"], eps=rates["eps"])
    strategy.begin(steps, optimizer)
    with _watched(learner.loss, clock) as losses:
        spent = [_bookkeeping(strategy, model, learner, losses, optimizer, step) for step in range(1, steps + 1)]
    return sum(spent) / steps


class _Losses:
    """A loss, with the time that it and its gradients take."""

    def __init__(self, loss: LossFn, clock: Callable[[], float]) -> None:
        self.function, self.clock = loss, clock
        self.seconds = 0.0
        self.given: list[Tensor] = []

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss."""
        self.given.append(self.timed(self.function, model, batch))
        return self.given[-1]

    def timed(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function in time that is not bookkeeping."""
        started = self.clock()
        result = function(*args, **kwargs)
        self.seconds += self.clock() - started
        return result


@contextmanager
def _watched(loss: LossFn, clock: Callable[[], float]) -> Iterator[_Losses]:
    """Inside this context gradients of what the loss has given are its own time."""
    losses, grad, backward = _Losses(loss, clock), torch.autograd.grad, Tensor.backward

    def of(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(outputs: Any, *args: Any, **kwargs: Any) -> Any:
            if any(outputs is one for one in losses.given):
                return losses.timed(function, outputs, *args, **kwargs)
            return function(outputs, *args, **kwargs)

        return call

    with patch.object(torch.autograd, "grad", of(grad)), patch.object(Tensor, "backward", of(backward)):
        yield losses


def _bookkeeping(
    strategy: Strategy[Any], model: nn.Module, learner: Learner, losses: _Losses, optimizer: Any, step: int
) -> float:
    """One step; gives the seconds that the strategy took for itself."""
    clock = losses.clock
    losses.seconds, losses.given = 0.0, []
    batch, heldout = learner.batch(), learner.batch()
    optimizer.zero_grad()
    started = clock()
    if strategy.wants_heldout:
        strategy.heldout_step(batch, heldout, losses)
    loss = strategy.training_loss(model, batch, losses)
    penalty = strategy.penalty(loss)
    if penalty is not None and penalty.requires_grad:
        penalty.backward()
    spent = clock() - started - losses.seconds
    loss.backward()
    started = clock()
    strategy.after_backward()
    spent += clock() - started
    optimizer.step()
    started = clock()
    strategy.after_step(step, optimizer)
    return spent + clock() - started
