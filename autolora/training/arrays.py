"""Tasks on images and sound with a pretrained encoder: rows of one size, as a problem to train on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from autolora.backbones import Modality, head_modules, load_classifier
from autolora.signals import leave_to_parent
from autolora.tasks.records import Arrays
from autolora.training.batches import BucketSampler
from autolora.training.data import FIT, HELDOUT, Loader
from autolora.training.problem import Batches, spread
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


class ArrayDataModule(Batches):
    """Splits as loaders: ``fit`` shuffled, the others in order and complete.

    Args:
        splits: rows by split name.
        name, prepare: of the inputs (:class:`ArrayBatches`).
        batch_size: rows of a training batch in each process.
        eval_batch_size: rows of any other batch.
        seed: of the data order.
        num_workers: processes that prepare.
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
        super().__init__()
        self.splits = dict(splits)
        self.input_name, self.prepare_rows = name, prepare
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.seed, self.num_workers = seed, num_workers

    def train_dataloader(self) -> Loader:
        """Shuffled batches of ``fit``, the first time from :attr:`start` on."""
        loader = self.shuffled_loader(FIT)
        self.seek(loader, *self.start)
        return loader

    @staticmethod
    def seek(loader: Loader, epoch: int, batch: int) -> None:
        """Let a loader of ours begin in the middle of an epoch."""
        assert isinstance(loader.sampler, BucketSampler)
        loader.sampler.load_state_dict({"epoch": epoch, "batch": batch})

    def val_dataloader(self) -> list[Loader]:
        """Batches of ``heldout``."""
        return [self.ordered_loader(HELDOUT)]

    def shuffled_loader(self, name: str) -> Loader:
        """Batches as in training, of any split."""
        replicas, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        equal = np.ones(len(self.splits[name]), dtype=np.int64)
        sampler = BucketSampler(equal, self.batch_size, seed=self.seed, num_replicas=replicas, rank=rank)
        return self._loader(name, sampler)

    def ordered_loader(self, name: str, limit: int | None = None) -> Loader:
        """The rows of a split in order, or so many of them (:func:`autolora.training.problem.spread`)."""
        rows = spread(len(self.splits[name]), limit)
        size = self.eval_batch_size
        return self._loader(name, [rows[i : i + size] for i in range(0, len(rows), size)])

    def _loader(self, name: str, sampler: Iterable[list[int]]) -> Loader:
        return Loader(
            ArrayBatches(self.splits[name], self.input_name, self.prepare_rows),
            batch_size=None,  # the sampler yields whole batches
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=leave_to_parent,
            pin_memory=torch.cuda.is_available(),
            # Without a generator of its own, every pass over a loader would draw from the global stream.
            generator=torch.Generator().manual_seed(self.seed),
        )


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
