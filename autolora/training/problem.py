"""What a run is about: a model, data, a loss and metrics, behind one small interface.

A :class:`Problem` hides whether a run learns a GLUE task with a pretrained encoder or a planted regression, so that
:mod:`autolora.run` reads the same for both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from autolora.plan import Budget
from autolora.strategies.base import Batch


@dataclass(frozen=True)
class Outputs:
    """What the model says of one split, in the order of its rows.

    ``logits`` are the raw outputs, shape ``(rows, k)``, float32; ``labels`` the truth, ``(rows,)`` or ``(rows, k)``.
    """

    logits: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Scores:
    """Metrics of a model. ``value`` is the primary one; undefined metrics are ``None``, with a note."""

    primary: str
    value: float | None
    all: dict[str, float | None]
    higher_is_better: bool = True
    notes: list[str] = field(default_factory=list)

    def utility(self) -> float:
        """The primary metric as a number to maximise; undefined counts as worst."""
        if self.value is None:
            return float("-inf")
        return self.value if self.higher_is_better else -self.value


class Problem(ABC):
    """A model and what it has to learn.

    Attributes:
        name: the task.
        data_source, data_fingerprint: where the data came from, and a hash of it.
        backbone: name of the pretrained model.
        model: the model, from :meth:`build` on; without adapters until a strategy attaches them.
        datamodule: the batches, from :meth:`build` on: to fit, and the held-out slice to validate.
        default_budget: the budget where the user names none.
        threads: CPU threads that its operations are worth; ``None`` leaves torch's choice.
        dev_splits: names of the evaluation splits, the main one first.
    """

    name: str
    data_source: str
    data_fingerprint: str
    backbone: str
    model: nn.Module
    datamodule: LightningDataModule
    default_budget: Budget
    threads: int | None = None
    dev_splits: tuple[str, ...] = ("dev",)

    @property
    def notes(self) -> list[str]:
        """What the user should know of the data, for the result."""
        return []

    def ids(self, split: str, rows: int) -> Sequence[int]:
        """Identifiers of a split's rows, which predictions are saved under; positions by default."""
        return range(rows)

    @abstractmethod
    def build(self) -> None:
        """Load what is heavy: the model and the batches."""

    @abstractmethod
    def heldout_batches(self) -> Iterable[Batch]:
        """Batches of the held-out slice as in training: what a bilevel strategy learns from."""

    @abstractmethod
    def eval_batches(self, split: str) -> Iterable[Batch]:
        """Every row of ``heldout`` (a slice of train, for every choice that is made) or of a dev split, once."""

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Outputs of the model, shape ``(batch, k)``."""

    @abstractmethod
    def criterion(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean loss."""

    @abstractmethod
    def scores(self, outputs: dict[str, Outputs]) -> Scores:
        """Metrics of the outputs on one or more splits; the primary metric is that of the first."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch, with its graph."""
        return self.criterion(self.forward(model, batch), batch["labels"])

    def predictions(self, outputs: Outputs) -> Sequence[float]:
        """What the model predicts for each row: a class, or a score."""
        values = outputs.logits.argmax(1) if outputs.labels.dtype == torch.long else outputs.logits[:, 0]
        return values.tolist()


@torch.no_grad()
def evaluate(problem: Problem, model: nn.Module, split: str, device: torch.device | None = None) -> Outputs:
    """Run the model over a split in evaluation mode, in float32, and put its outputs back into the order of the rows.

    Batches may come in any order: each carries the positions of its rows as ``index``.
    """
    device = device or next(model.parameters()).device
    was_training = model.training
    model.eval()
    index, logits, labels = [], [], []
    for batch in problem.eval_batches(split):
        batch = {key: value.to(device) for key, value in batch.items()}
        logits.append(problem.forward(model, batch).float().cpu())
        labels.append(batch["labels"].cpu())
        index.append(batch["index"].cpu())
    model.train(was_training)
    order = torch.cat(index).argsort()
    return Outputs(torch.cat(logits)[order], torch.cat(labels)[order])
