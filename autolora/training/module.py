"""The Lightning module: one training step, with a strategy's hooks in their places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from autolora.errors import CheckpointError, NonFiniteLossError
from autolora.strategies.base import Batch, Rates, Strategy
from autolora.training.optimizer import make_optimizer
from autolora.training.problem import Problem, in_order

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
        self.strict_loading = False  # checkpoints hold what training changes, which is loaded here
        self.steps_done = self.total_steps = 0
        self.peak_trainable = 0  # parameters; strategies only take away once they have begun
        self.processes = 1
        self.examples_seen = 0  # by this process
        self.passes = 0  # of batches through the model, in this process
        self.last_loss: Tensor | None = None
        self.last_good: tuple[int, dict[str, Tensor]] = (0, strategy.adapters.trainable_state())
        self._heldout: Iterator[Batch] | None = None
        self._heldout_taken = 0
        self._restored: dict[str, Any] | None = None
        self._heldout_outputs: list[tuple[Tensor, Tensor, Tensor]] = []

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over the strategy's parameter groups, with a schedule by step for all groups that are not constant."""
        self.total_steps = total = int(self.trainer.estimated_stepping_batches)
        self.processes = self.trainer.world_size
        optimizer = self._optimizer()
        self.strategy.begin(total, optimizer)
        self.peak_trainable = self.strategy.trainable
        if self._restored is not None:  # the model that begin() saw had its first ranks
            self._restore(self._restored)
            optimizer = self._optimizer()
        constant = [bool(group.get("constant")) for group in optimizer.param_groups]

        def factor(step: int) -> float:
            return schedule_factor(step, total, self.warmup, self.schedule)

        scheduler = LambdaLR(optimizer, [(lambda step: 1.0) if fixed else factor for fixed in constant])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _optimizer(self) -> Optimizer:
        groups = self.strategy.param_groups(self.rates, self.total_steps)
        return make_optimizer(groups, betas=self.betas, eps=self.eps, fused=self._fused)

    @property
    def _fused(self) -> bool:
        """Whether the optimizer updates all at once: not where gradients are sharded, or scaled for float16."""
        plain = isinstance(self.trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        return plain and self.trainer.precision != "16-mixed"

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by norm or value; Lightning's own clipping refuses every fused optimizer under autocast."""
        if not self._fused:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            if gradient_clip_algorithm == "value":
                torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
            else:
                torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The problem's loss, counted: what the strategy is given."""
        self.passes += 1
        return self.problem.loss(model, batch)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Give the strategy its held-out step, once for each optimizer step.

        Where batches are accumulated it sees the first of them, and one held-out batch of that size: what is learned
        from held-out rows then has more noise than with one large batch.

        It runs in an autocast context of its own: one shared with the training step would reuse casts of weights that
        the strategy may have changed.
        """
        if self.strategy.wants_heldout and batch_idx % self.trainer.accumulate_grad_batches == 0:
            with self.trainer.precision_plugin.forward_context():
                self.strategy.heldout_step(batch, self._next_heldout(), self.loss)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Task loss plus the strategy's penalty.

        Raises:
            NonFiniteLossError: if the task loss is NaN or infinite.
        """
        loss = self.strategy.training_loss(self.model, batch, self.loss)
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
        self._heldout_outputs.append((batch["index"].cpu(), logits, self.problem.labels(batch).cpu()))

    def on_validation_epoch_end(self) -> None:
        """Score the held-out slice: ``heldout`` is the primary metric, as a number to maximise."""
        index, logits, labels = zip(*self._heldout_outputs, strict=True)
        self._heldout_outputs = []
        outputs = in_order(index, logits, labels, "heldout")
        scores = self.problem.scores({"heldout": outputs})
        self.log("heldout", scores.utility(), prog_bar=True, logger=False)  # History tells the logger

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
        """What training can change in place of the whole model, the strategy's state, and the counters."""
        checkpoint["state_dict"] = {}
        checkpoint["trainable"] = self.strategy.adapters.trainable_state()
        checkpoint["strategy"] = self.strategy.state_dict()
        checkpoint["steps_done"] = self.steps_done
        checkpoint["peak_trainable"] = self.peak_trainable
        checkpoint["examples_seen"] = self.examples_seen
        checkpoint["passes"] = self.passes
        checkpoint["heldout_taken"] = self._heldout_taken

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Wait with it until the strategy has begun."""
        self._restored = checkpoint

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        """Take back what :meth:`on_save_checkpoint` gave.

        Raises:
            CheckpointError: if it does not fit the model.
        """
        try:
            self.strategy.adapters.load_trainable_state(checkpoint["trainable"])
        except ValueError as error:
            raise CheckpointError(f"{error}; start again with force=true") from None
        self.strategy.load_state_dict(checkpoint["strategy"])
        self.steps_done, self.examples_seen = checkpoint["steps_done"], checkpoint["examples_seen"]
        self._heldout_taken, self.passes = checkpoint["heldout_taken"], checkpoint["passes"]
        self.peak_trainable = checkpoint["peak_trainable"]
        self.last_good = (self.steps_done, checkpoint["trainable"])
        self._restored = None

    def _next_heldout(self) -> Batch:
        """The next held-out batch on the model's device."""
        if self._heldout is None:
            self._heldout = iter(self.problem.heldout_batches(self._heldout_taken))
        self._heldout_taken += 1
        return self.transfer_batch_to_device(next(self._heldout), self.device, 0)
