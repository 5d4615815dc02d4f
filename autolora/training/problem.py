"""What a run is about: a model, data, a loss and metrics, behind one small interface.

A :class:`Problem` hides whether a run learns a GLUE task with a pretrained encoder or a planted regression, so that
:mod:`autolora.run` reads the same for both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from autolora.errors import NonFiniteLossError
from autolora.plan import Budget, RankPlan
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


class Batches(LightningDataModule):
    """The batches of a problem, for Lightning.

    Attributes:
        start: epoch, and batch of it, that the loader of training begins with: where a run that is resumed stood.
    """

    start: tuple[int, int] = (0, 0)


class Problem(ABC):
    """A model and what it has to learn.

    Attributes:
        name: the task.
        data_source, data_fingerprint: where the data came from, and a hash of it.
        backbone, backbone_fingerprint: name of the pretrained model, and a hash of its weights where it has any.
        backbone_bytes: memory of its weights as they are stored, from :meth:`build` on, where it has any.
        model: the model, from :meth:`build` on; without adapters until a strategy attaches them.
        datamodule: the batches, from :meth:`build` on: to fit, and the held-out slice to validate.
        default_budget: the budget where the user names none.
        primary: name of the primary metric.
        threads: CPU threads that its operations are worth; ``None`` leaves torch's choice.
        dev_splits: names of the evaluation splits, the main one first.
        true_plan: the ranks that are to be found, where they are known.
        peft_task_type: what PEFT calls the task of the model, if anything.
        fresh: names of what the model has and its pretrained weights lack, from :meth:`build` on.
    """

    name: str
    data_source: str
    data_fingerprint: str
    backbone: str
    backbone_fingerprint: str = ""
    backbone_bytes: int | None = None
    model: nn.Module
    datamodule: Batches
    default_budget: Budget
    primary: str
    threads: int | None = None
    dev_splits: tuple[str, ...] = ("dev",)
    true_plan: RankPlan | None = None
    peft_task_type: str | None = None
    fresh: Sequence[str] = ()

    @property
    def notes(self) -> list[str]:
        """What the user should know of the data, for the result."""
        return []

    def ids(self, split: str, rows: int) -> Sequence[int]:
        """Identifiers of a split's rows, which predictions are saved under; positions by default."""
        return range(rows)

    @abstractmethod
    def build(self, *, all_rows: bool = False) -> None:
        """Load what is heavy: the model and the batches; each time afresh, and the same.

        ``all_rows``: fit the held-out rows too.
        """

    @abstractmethod
    def heldout_batches(self, start: int = 0) -> Iterable[Batch]:
        """Batches of the held-out slice as in training, without end: what a bilevel strategy learns from.

        ``start``: how many to pass over.
        """

    @abstractmethod
    def eval_batches(self, split: str, limit: int | None = None) -> Iterable[Batch]:
        """The rows of ``heldout`` (a slice of train, for every choice that is made) or of a dev split, each once.

        ``limit``: only so many of them (:func:`spread`).
        """

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Outputs of the model, shape ``(batch, k)``."""

    @abstractmethod
    def criterion(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean loss."""

    @abstractmethod
    def scores(self, outputs: dict[str, Outputs]) -> Scores:
        """Metrics of the outputs on one or more splits; the primary metric is that of the first."""

    def labels(self, batch: Batch) -> Tensor:
        """What the outputs shall be."""
        return batch["labels"]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch, with its graph."""
        return self.criterion(self.forward(model, batch), self.labels(batch))

    def predictions(self, outputs: Outputs) -> Sequence[float]:
        """What the model predicts for each row: a class, or a score."""
        values = outputs.logits.argmax(1) if outputs.labels.dtype == torch.long else outputs.logits[:, 0]
        return values.tolist()


Labelled = tuple[Batch, Tensor]
"""A batch on the model's device, and what its outputs shall be."""


@torch.no_grad()
def read(problem: Problem, model: nn.Module, split: str, limit: int | None = None) -> Iterator[Labelled]:
    """The rows of a split, or so many of them, ready to be evaluated."""
    device = next(model.parameters()).device
    for batch in problem.eval_batches(split, limit):
        batch = {key: value.to(device) for key, value in batch.items()}
        yield batch, problem.labels(batch).cpu()


@torch.no_grad()
def evaluate(problem: Problem, model: nn.Module, split: str, rows: Iterable[Labelled] | None = None) -> Outputs:
    """Run the model over a split in evaluation mode, in float32, and put its outputs back into the order of the rows.

    Batches may come in any order: each carries the positions of its rows as ``index``.

    Args:
        problem: what the outputs are for.
        model: the model.
        split: name of the split.
        rows: what :func:`read` gave of it, where it is evaluated again and again; by default it is read now.

    Raises:
        NonFiniteLossError: if an output is not finite: the largest of them would still pass for a prediction.
    """
    was_training = model.training
    model.eval()
    index, logits, labels = [], [], []
    for batch, target in read(problem, model, split) if rows is None else rows:
        logits.append(problem.forward(model, batch).float().cpu())
        labels.append(target)
        index.append(batch["index"].cpu())
    model.train(was_training)
    return in_order(index, logits, labels, split)


def spread(rows: int, limit: int | None) -> list[int]:
    """Positions of at most ``limit`` of so many rows, at equal distances."""
    count = rows if limit is None else min(rows, limit)
    return [i * rows // count for i in range(count)]


def in_order(index: Sequence[Tensor], logits: Sequence[Tensor], labels: Sequence[Tensor], split: str) -> Outputs:
    """The outputs of all batches of a split in the order of its rows.

    Raises:
        NonFiniteLossError: if one is not finite.
    """
    order = torch.cat(list(index)).argsort()
    outputs = Outputs(torch.cat(list(logits))[order], torch.cat(list(labels))[order])
    wrong = int((~outputs.logits.isfinite()).any(1).sum())
    if wrong:
        raise NonFiniteLossError(
            f"training has diverged: the outputs of {wrong} of {len(order)} {split} rows are not finite; lower "
            "optim.adapter.lr or optim.head.lr"
        )
    return outputs
