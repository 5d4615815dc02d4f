"""Tasks on images and sound with a pretrained encoder: rows of one size, as a problem to train on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from autolora.backbones import Modality, head_modules, load_classifier
from autolora.tasks.records import Arrays
from autolora.training.data import FIT, HELDOUT, SplitBatches
from autolora.training.text import TextProblem

Prepare = Callable[[NDArray[np.float32]], Tensor]
"""From what was recorded to what the model reads, both with a row for each example."""


class ArrayBatches(Dataset[dict[str, Tensor]]):
    """A split that is indexed by a list of rows and gives a batch: inputs, ``labels`` and ``index``.

    Args:
        rows: the split.
        name: of the inputs, in the model's words.
        prepare: makes them of what was recorded.
    """

    def __init__(self, rows: Arrays, name: str, prepare: Prepare) -> None:
        self.rows, self.name, self.prepare = rows, name, prepare
        self.labels = torch.tensor(rows.labels)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        index = torch.tensor(list(rows))
        return {self.name: self.prepare(self.rows.inputs[list(rows)]), "labels": self.labels[index], "index": index}


class ArrayDataModule(SplitBatches):
    """Splits of rows that are all of one size.

    Args:
        splits: rows by split name.
        name, prepare: of the inputs (:class:`ArrayBatches`).
        batch_size, eval_batch_size, seed, num_workers: of :class:`SplitBatches`.
    """

    def __init__(
        self,
        splits: Mapping[str, Arrays],
        name: str,
        prepare: Prepare,
        *,
        batch_size: int,
        eval_batch_size: int,
        seed: int,
        num_workers: int,
    ) -> None:
        super().__init__(
            splits, batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed, num_workers=num_workers
        )
        self.splits = dict(splits)
        self.input_name, self.prepare_rows = name, prepare

    def lengths(self, name: str) -> NDArray[np.int64]:
        """One for every row."""
        return np.ones(len(self.splits[name]), dtype=np.int64)

    def rows(self, name: str) -> ArrayBatches:
        """A split whose recordings are prepared batch by batch."""
        return ArrayBatches(self.splits[name], self.input_name, self.prepare_rows)


class ArrayProblem(TextProblem):
    """Fine-tune a classifier of images or sound; all but its model and its batches is as with text.

    Args:
        modality: what the model reads.
        prepare: from a model to what makes its inputs of recordings.
        arguments: as for :class:`TextProblem`, with :class:`Arrays` for splits.
    """

    peft_task_type = None  # PEFT has no name for it
    splits: dict[str, Arrays]  # type: ignore[assignment]
    datamodule: ArrayDataModule  # type: ignore[assignment]

    def __init__(self, *args: Any, modality: Modality, prepare: Callable[[Any], Prepare], **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        self.modality, self._prepare = modality, prepare

    def build(self, *, all_rows: bool = False) -> None:
        """Load the pretrained model and make the batches."""
        settings, task = self.settings, self.task
        assert task.labels is not None
        model, fresh = load_classifier(self.modality, **self._weights, labels=task.labels, head_seed=settings.head_seed)
        self.model = model
        self.fresh = (*fresh, *head_modules(model))
        splits = self.splits
        if all_rows:
            splits = splits | {FIT: splits[FIT] + splits[HELDOUT]}
        self.datamodule = ArrayDataModule(
            splits,
            str(model.main_input_name),
            self._prepare(model),
            batch_size=settings.batch_size,
            eval_batch_size=settings.eval_batch_size,
            seed=settings.data_seed,
            num_workers=settings.num_workers,
        )

    @property
    def tokenizer(self) -> None:
        """None."""
        return None

    @property
    def notes(self) -> list[str]:
        """What is odd about the data."""
        return self.data_notes
