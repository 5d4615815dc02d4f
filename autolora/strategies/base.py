"""The interface between a way of choosing ranks and whatever loop trains the model.

A strategy owns the gates of the adapters: where they come from, who moves them and when, and which plan comes out. The
loop owns data, weights and time, and calls, in this order::

    adapters = strategy.attach(model, settings)        # adapters are in the model, which computes what it did before
    strategy.prepare(batches, loss_fn)                 # look at data before training (initialisation from activations)
    optimizer = AdamW(strategy.param_groups(rates, total_steps))
    strategy.begin(total_steps, optimizer)
    for every batch of training:
        strategy.heldout_step(batch, heldout, loss_fn) # only if wants_heldout, once per optimizer step
        loss = strategy.training_loss(model, batch, loss_fn)
        (loss + strategy.penalty(loss)).backward()     # without a penalty where it is None
        strategy.after_backward()                      # every gradient of the step is there
        optimizer.step(); strategy.after_step(step, optimizer)
    plan = strategy.finalize(evaluate)                 # gates are fixed 0/1 masks from here on

A run that is resumed attaches, takes parameter groups and begins in the same way, but without ``prepare``. Then the
parameters of the checkpoint are loaded, which may take components away, :meth:`Strategy.load_state_dict` has the last
word, and parameter groups are taken again. So what ``prepare`` has found out must be in parameters or the state dict.

Only :meth:`Strategy.finalize` has to say something about ranks; all the rest has defaults that do nothing. Nothing here
knows Lightning, so that another loop can call it. This module and the options of every strategy import no torch, so
that a configuration is checked before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from autolora.config import Conflict
from autolora.plan import Budget, RankPlan

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from autolora.adapters import Adapters, AdapterSettings, Gate
    from autolora.config import RunConfig

Batch = dict[str, Any]
LossFn = Callable[["nn.Module", Batch], "Tensor"]
"""The task's loss of a batch, with its graph and without any penalty."""
Evaluate = Callable[[RankPlan], float]
"""The score of the model under a plan, measured on the held-out slice; higher is better."""


class StrategyOptions(BaseModel):
    """Base of every strategy's options: what may stand under ``strategy`` in the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def conflicts_with(self, config: RunConfig) -> Iterator[Conflict]:
        """What of the rest of the configuration does not go with the strategy."""
        yield from ()


def needs_float_weights(config: RunConfig, why: str) -> Iterator[Conflict]:
    """What a strategy says that needs the frozen weights as numbers with a gradient, which codes have not."""
    if (kind := config.backbone.quantization) != "none":
        message = f"backbone.quantization={kind}: strategy={config.strategy.name} {why}: take another strategy or none"
        yield Conflict(("backbone.quantization", "strategy.name"), message)


@dataclass(frozen=True)
class GroupRates:
    """Learning rate and weight decay of one parameter group; a rate of ``None`` leaves it to the strategy."""

    lr: float | None
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Rates:
    """Learning rates of adapters (A and B), gates (selector logits) and head (fully trained modules).

    The rate of B is ``loraplus_lr_ratio`` times that of A (LoRA+: Hayou, Ghosh & Yu, ICML 2024, section 4).
    """

    adapter: GroupRates
    gate: GroupRates
    head: GroupRates
    loraplus_lr_ratio: float = 1.0


OptionsT = TypeVar("OptionsT", bound=StrategyOptions)


class Strategy(Generic[OptionsT]):
    """Base class of every way to choose ranks.

    Args:
        options: the strategy's own options.
        budget: how many adapter parameters the final plan may have.
        max_rank: the largest rank of any module, but where a strategy brings a table or a plan of its own.

    Attributes:
        scored_by: what the score of a plan is: the primary metric, or the negative loss, which is finer.
        scored_rows: how many rows of the held-out slice it is measured on; ``None``: on all.
        largest: the plan of maximum ranks, from :meth:`attach` on.
        allowance: the budget in parameters, ``None`` without one, from :meth:`attach` on.
        model: what :meth:`attach` was given.
        adapters: the adapters, from :meth:`attach` on; ``adapters.model`` is the model to train.
    """

    Options: ClassVar[type[StrategyOptions]]
    wants_heldout: ClassVar[bool] = False
    scored_by: Literal["metric", "loss"] = "metric"
    scored_rows: int | None = None
    largest: RankPlan
    allowance: int | None
    model: nn.Module
    adapters: Adapters

    def __init__(self, options: OptionsT, *, budget: Budget, max_rank: int) -> None:
        self.options = options
        self.budget = budget
        self.max_rank = max_rank

    # Before training -------------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module, settings: AdapterSettings) -> Adapters:
        """Put adapters into the model: the ranks of :meth:`initial_plan`, the gates of :meth:`make_gate`."""
        from autolora.adapters import attach, find_sites, largest_plan

        self.model = model
        self.largest = largest_plan(find_sites(model, settings), settings, self.max_rank)
        self.allowance = self.budget.resolve(self.largest)
        self.adapters = attach(model, settings, self.initial_plan(), self.make_gate)
        return self.adapters

    @property
    def trainable(self) -> int:
        """Parameters that training moves at present, by whatever optimizer."""
        return self.adapters.count()["trainable"]

    def initial_plan(self) -> RankPlan:
        """Ranks at the start of training; the largest plan by default."""
        return self.largest

    def make_gate(self, name: str, rank: int) -> Gate:
        """The gate of one module at the start; all ones by default."""
        from autolora.adapters import FixedGate

        return FixedGate(rank)

    def prepare(self, batches: Iterable[Batch], loss_fn: LossFn) -> None:
        """Look at training data before training; ``batches`` may be endless, so take a few.

        It is not called again when a run is resumed: what it leaves has to be in parameters or the state dict.
        """

    def param_groups(self, rates: Rates, total_steps: int) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer: ``adapter`` and ``head``, each with its learning rate and decay.

        B has a group of its own, ``adapter_b``, where its rate is another. A group with ``"constant": True`` keeps its
        learning rate; the others follow the run's schedule.
        """
        adapter, faster = self.adapters.adapter_parameters(), []
        if rates.loraplus_lr_ratio != 1:
            faster = [layer.lora_B for layer in self.adapters.layers.values()]
            adapter = [p for p in adapter if all(p is not b for b in faster)]
        fast = vars(rates.adapter) | {"lr": (rates.adapter.lr or 0.0) * rates.loraplus_lr_ratio}
        groups = [
            {"name": "adapter", "params": adapter, **vars(rates.adapter)},
            {"name": "adapter_b", "params": faster, **fast},
            {"name": "head", "params": self.adapters.head_parameters(), **vars(rates.head)},
        ]
        return [group for group in groups if group["params"]]

    def begin(self, total_steps: int, optimizer: Optimizer) -> None:
        """Training starts: ``total_steps`` optimizer steps are to come."""

    # During training -------------------------------------------------------------------------------------------------

    def heldout_step(self, batch: Batch, heldout: Batch, loss_fn: LossFn) -> None:
        """Learn from a held-out batch before the step on ``batch``; called only if ``wants_heldout``."""

    def training_loss(self, model: nn.Module, batch: Batch, loss_fn: LossFn) -> Tensor:
        """The loss of a batch that training descends; strategies that train several plans at once average theirs."""
        return loss_fn(model, batch)

    def penalty(self, loss: Tensor) -> Tensor | None:
        """A regulariser to add to the training loss ``loss``, or ``None``; never part of a loss that is reported."""
        return None

    def after_backward(self) -> None:
        """The gradients of a step are complete (all accumulated batches), before clipping and the optimizer's step."""

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """The optimizer has made its ``step``-th step, counted from 1."""

    @property
    def settled(self) -> bool:
        """Whether the ranks will not change any more; only then may a checkpoint be chosen."""
        return True

    def progress(self) -> dict[str, float]:
        """Numbers worth logging, besides the active plan (a multiplier, for example)."""
        return {}

    @property
    def notes(self) -> list[str]:
        """What the user should know of the plan that came out, for the result."""
        return []

    # After training --------------------------------------------------------------------------------------------------

    def finalize(self, evaluate: Evaluate) -> RankPlan:
        """Settle the plan, within the budget, and fix the gates to 0/1 masks that realise it."""
        raise NotImplementedError(f"{type(self).__name__} has to say which plan comes out: implement finalize()")

    def compare(self, evaluate: Evaluate) -> None:
        """Measure what the plan is to be compared with, once it is settled: only for what :attr:`notes` say."""

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the strategy needs to go on besides parameters and gates: tensors, numbers, text, lists and mappings."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""


class Planned(Strategy[OptionsT]):
    """Base class of strategies whose ranks are known before training: all they have to say is :meth:`plan`."""

    def plan(self) -> RankPlan:
        """The ranks, within the budget; :attr:`model` is there, without adapters, and so is :attr:`largest`."""
        raise NotImplementedError(f"{type(self).__name__} has to say which ranks to train at: implement plan()")

    def initial_plan(self) -> RankPlan:
        """The plan."""
        return self.plan()

    def finalize(self, evaluate: Evaluate) -> RankPlan:
        """The plan it began with."""
        return self.adapters.active_plan()


def reset_optimizer_state(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Forget moments and step counts of these parameters, as for parameters that are new."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
