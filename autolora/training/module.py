"""The Lightning module: one training step, with a strategy's hooks in their places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from autolora.errors import NonFiniteLossError
from autolora.strategies.base import Batch, Rates, Strategy
from autolora.training.problem import Outputs, Problem

Schedule = Literal["linear", "cosine", "constant"]


def schedule_factor(step: int, total_steps: int, warmup: float, schedule: Schedule) -> float:
    """Factor on the learning rate at a step: a linear rise over the ``warmup`` share, then decay to 0.

    Args:
        step: optimizer steps already made, from 0.
        total_steps: of the run.
        warmup: share of the run, 0 to 1.
        schedule: ``linear`` or ``cosine`` decay, or ``constant``.
    """
    warmup_steps = round(warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * min(1.0, done)))))
    return max(0.0, 1 - done)


class AdapterModule(pl.LightningModule):
    """Trains a problem's model under a strategy, with AdamW and automatic optimization.

    Clipping and accumulation are Lightning's own: strategies with an optimizer of their own step it inside
    ``heldout_step``.

    Args:
        problem: model, data and loss.
        strategy: already attached to the model.
        rates: learning rates of the parameter groups.
        betas, eps: of AdamW.
        schedule, warmup: of the learning rate (:func:`schedule_factor`).
        snapshot_every: steps between copies of the trainable state, kept for the case that the loss stops being finite.
    """

    def __init__(
        self,
        problem: Problem,
        strategy: Strategy[Any],
        rates: Rates,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        schedule: Schedule = "linear",
        warmup: float = 0.06,
        snapshot_every: int = 50,
    ) -> None:
        super().__init__()
        self.model = problem.model
        self.problem, self.strategy, self.rates = problem, strategy, rates
        self.betas, self.eps, self.schedule, self.warmup = betas, eps, schedule, warmup
        self.snapshot_every = snapshot_every
        self.steps_done = 0
        self.examples_seen = 0
        self.last_loss: Tensor | None = None
        self.last_good: tuple[int, dict[str, Tensor]] = (0, strategy.adapters.trainable_state())
        self._heldout: Iterator[Batch] | None = None
        self._heldout_outputs: list[tuple[Tensor, Tensor, Tensor]] = []

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over the strategy's parameter groups, with a schedule by step for all groups that are not constant."""
        total = int(self.trainer.estimated_stepping_batches)
        groups = self.strategy.param_groups(self.rates, total)
        optimizer = torch.optim.AdamW(groups, betas=self.betas, eps=self.eps)
        constant = [bool(group.get("constant")) for group in optimizer.param_groups]

        def factor(step: int) -> float:
            return schedule_factor(step, total, self.warmup, self.schedule)

        scheduler = LambdaLR(optimizer, [(lambda step: 1.0) if fixed else factor for fixed in constant])
        self.strategy.begin(total, optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Give the strategy its held-out step, once for each optimizer step.

        It runs in an autocast context of its own: one shared with the training step would reuse casts of weights that
        the strategy may have changed.
        """
        if self.strategy.wants_heldout and batch_idx % self.trainer.accumulate_grad_batches == 0:
            with self.trainer.precision_plugin.forward_context():
                self.strategy.heldout_step(batch, self._next_heldout(), self.problem.loss)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Task loss plus the strategy's penalty.

        Raises:
            NonFiniteLossError: if the task loss is NaN or infinite.
        """
        loss = self.problem.loss(self.model, batch)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"the training loss became {float(loss.detach())} at step {self.steps_done + 1}; the last good state "
                f"is that of step {self.last_good[0]}. Lower optim.adapter.lr or optim.head.lr, or use "
                "trainer.precision=32-true"
            )
        self.last_loss = loss.detach()
        self.examples_seen += len(batch["labels"])
        penalty = self.strategy.penalty(loss)
        return loss if penalty is None else loss + penalty

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect the outputs on the held-out slice."""
        logits = self.problem.forward(self.model, batch).float().cpu()
        self._heldout_outputs.append((batch["index"].cpu(), logits, batch["labels"].cpu()))

    def on_validation_epoch_end(self) -> None:
        """Score the held-out slice: ``heldout`` is the primary metric, as a number to maximise."""
        index, logits, labels = (torch.cat(parts) for parts in zip(*self._heldout_outputs, strict=True))
        self._heldout_outputs = []
        order = index.argsort()
        scores = self.problem.scores({"heldout": Outputs(logits[order], labels[order])})
        self.log("heldout", scores.utility(), prog_bar=True)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The gradients are complete."""
        self.strategy.after_backward()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """One step of the optimizer, then the strategy's."""
        snapshot_due = self.steps_done % self.snapshot_every == 0
        state = self.strategy.adapters.trainable_state() if snapshot_due else None
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if state is not None:  # the closure ran on this state and its loss was finite
            self.last_good = (self.steps_done, state)
        self.steps_done += 1
        raw = optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer
        self.strategy.after_step(self.steps_done, raw)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the strategy's state, and keep only what training can change."""
        checkpoint["state_dict"] = self.strategy.adapters.trainable_state()
        checkpoint["strategy"] = self.strategy.state_dict()
        checkpoint["steps_done"] = self.steps_done

    def _next_heldout(self) -> Batch:
        """The next held-out batch on the model's device; it starts again at its end."""
        batch = next(self._heldout, None) if self._heldout is not None else None
        if batch is None:
            self._heldout = iter(self.problem.heldout_batches())
            batch = next(self._heldout)
        return self.transfer_batch_to_device(batch, self.device, 0)
