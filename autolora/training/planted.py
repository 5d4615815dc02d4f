"""The planted regression as a problem to train on."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from autolora.plan import Budget, RankPlan
from autolora.strategies.base import Batch
from autolora.tasks.planted import TeacherStudent
from autolora.training.problem import Batches, Outputs, Problem, Scores, spread


class FreshBatches(IterableDataset[Batch]):
    """An endless stream of fresh batches, the same for every strategy with the same seed.

    The first ``start`` are drawn and passed over.
    """

    def __init__(self, pair: TeacherStudent, batch_size: int, seed: int, start: int = 0) -> None:
        self.pair, self.batch_size, self.seed, self.start = pair, batch_size, seed, start

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed)
        return islice(iter(lambda: self.pair.batch(self.batch_size, generator), None), self.start, None)


class FreshData(Batches):
    """Fresh batches to fit, and fixed rows to validate."""

    def __init__(self, fresh: FreshBatches, heldout: Batch) -> None:
        super().__init__()
        self.fresh, self.heldout = fresh, heldout

    def train_dataloader(self) -> DataLoader[Batch]:
        """An epoch without an end."""
        fresh = self.fresh
        return DataLoader(FreshBatches(fresh.pair, fresh.batch_size, fresh.seed, self.start[1]), batch_size=None)

    def val_dataloader(self) -> DataLoader[Batch]:
        """One batch."""
        return DataLoader([self.heldout], batch_size=None)  # type: ignore[arg-type]


class PlantedRegression(Problem):
    """Fit a teacher whose update has known ranks; see :mod:`autolora.tasks.planted`.

    The metric is the excess error: the student's mean squared error on noise-free targets, divided by what it is
    without adapters. 0 is perfect, 1 is no better than no adapter.

    Args:
        pair: teacher and student.
        fingerprint: identifies the configuration that made the pair.
        batch_size: fresh rows a step.
        eval_size: rows of the held-out and of the dev split.
        seed: of the inputs.
    """

    name = "planted"
    data_source = "planted"
    backbone = "none"
    primary = "excess_error"
    threads = 1  # the matrices are small: more threads wait for each other longer than they work

    def __init__(self, pair: TeacherStudent, *, fingerprint: str, batch_size: int, eval_size: int, seed: int) -> None:
        self.pair = pair
        self.data_fingerprint = fingerprint
        self.batch_size, self.eval_size, self.seed = batch_size, eval_size, seed
        self.true_plan: RankPlan = pair.true_plan
        self.default_budget = Budget(params=pair.true_plan.params)

    def build(self, *, all_rows: bool = False) -> None:
        """Take a student, and measure what it is worth without adapters; every batch is fresh, so all rows are."""
        self.model = copy.deepcopy(self.pair.student)
        self.datamodule = FreshData(FreshBatches(self.pair, self.batch_size, self.seed), self._rows("heldout"))
        with torch.no_grad():
            batch = self._rows("dev")
            self.bare_error = float(F.mse_loss(self.model(batch["inputs"]), batch["labels"]))

    def heldout_batches(self, start: int = 0) -> Iterable[Batch]:
        """Fresh batches that training does not see."""
        return FreshBatches(self.pair, self.batch_size, self.seed + 3, start)

    def eval_batches(self, split: str, limit: int | None = None) -> Iterable[Batch]:
        """One batch of fixed rows, without noise."""
        rows = spread(self.eval_size, limit)
        return [{key: value[rows] for key, value in self._rows(split).items()}]

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the student says, shape ``(batch, dim)``."""
        return model(batch["inputs"])

    def criterion(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(outputs, labels)

    def scores(self, outputs: dict[str, Outputs]) -> Scores:
        """Excess error and mean squared error of the first split."""
        first = next(iter(outputs.values()))
        error = float(F.mse_loss(first.logits, first.labels))
        excess = error / self.bare_error if self.bare_error else None
        notes = [] if excess is not None else ["nothing is planted: the excess error is undefined"]
        return Scores(self.primary, excess, {"excess_error": excess, "mse": error}, higher_is_better=False, notes=notes)

    def predictions(self, outputs: Outputs) -> list[float]:
        """The mean squared error of each row."""
        return (outputs.logits - outputs.labels).square().mean(1).tolist()

    def _rows(self, split: str) -> Batch:
        generator = torch.Generator().manual_seed(self.seed + {"heldout": 1, "dev": 2}[split])
        dim = next(iter(self.true_plan.sites.values())).in_features
        with torch.no_grad():
            inputs = torch.randn(self.eval_size, dim, generator=generator)
            return {"inputs": inputs, "labels": self.pair.teacher(inputs), "index": torch.arange(self.eval_size)}
