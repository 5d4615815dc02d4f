"""Tasks on tokens whose labels are what some model says of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.nn import functional as F

from autolora.strategies.base import Batch
from autolora.training.problem import Outputs, Problem, Scores


class ToyData(LightningDataModule):
    def __init__(self, batches: Sequence[Batch]) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> Sequence[Batch]:
        return self.batches


class ToyTask(Problem):
    """Batches of rows, all of one length."""

    def __init__(self, name: str, ids: Tensor, labels: Tensor, batch_size: int = 8) -> None:
        self.name, self.primary, self.labels_of_all = name, "accuracy", labels
        rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        rows["index"] = torch.arange(len(ids))
        starts = range(0, len(ids), batch_size)
        self.datamodule: Any = ToyData(
            [{key: value[start : start + batch_size] for key, value in rows.items()} for start in starts]
        )

    def build(self, *, all_rows: bool = False) -> None: ...

    def heldout_batches(self, start: int = 0) -> Iterable[Batch]:
        return self.datamodule.batches

    def eval_batches(self, split: str, limit: int | None = None) -> Iterable[Batch]:
        return reversed(self.datamodule.batches)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def criterion(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels)

    def scores(self, outputs: dict[str, Outputs]) -> Scores:
        output = next(iter(outputs.values()))
        accuracy = float((output.logits.argmax(1) == output.labels).float().mean())
        return Scores("accuracy", accuracy, {"accuracy": accuracy})


def tokens(low: int, high: int, rows: int, seed: int, length: int = 7) -> Tensor:
    return torch.randint(low, high, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def labelled(name: str, model: nn.Module, ids: Tensor) -> ToyTask:
    """A task whose labels are the classes that the model says now."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return ToyTask(name, ids, logits.argmax(1))
