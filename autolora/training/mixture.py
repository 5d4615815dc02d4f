"""Several text tasks at once: one adapter for all, a head for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from autolora.adapters.attach import replace_modules
from autolora.backbones import head_modules
from autolora.plan import Budget
from autolora.strategies.base import Batch
from autolora.training.batches import BucketSampler
from autolora.training.data import FIT, HELDOUT, Loader, loader
from autolora.training.problem import Batches, Outputs, Problem, Scores
from autolora.training.text import TextProblem


class Heads(nn.Module):
    """The heads of all tasks in the place of one; :attr:`active` says which computes."""

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.of_task = nn.ModuleList(heads)
        self.active = 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the active head says."""
        output: Tensor = self.of_task[self.active](*args, **kwargs)
        return output


class Mixture(Problem):
    """Fine-tune one encoder on several tasks: the adapters are shared, the heads are not.

    A batch is of one task. An epoch has all batches of all tasks, in an order drawn anew for each; every task's own
    batches are those that it has alone with the same seed. A loss is that of the batch's task. The primary metric is
    the mean of the tasks' primary metrics, as GLUE's own average is.

    Where rows of several tasks are together (the held-out slice), logits are filled up with zeros to the widest, and
    labels have a second column, the task.

    Args:
        parts: the tasks, on one backbone.
    """

    default_budget = Budget(rank=4)

    def __init__(self, parts: Sequence[TextProblem]) -> None:
        first = parts[0]
        self.parts = list(parts)
        self.name, self.primary = "mixture", "average"
        self.data_source = first.data_source
        self.data_fingerprint = "-".join(part.data_fingerprint for part in parts)
        self.backbone, self.backbone_fingerprint = first.backbone, first.backbone_fingerprint
        self.dev_splits = tuple(f"{part.name}/{split}" for part in parts for split in part.dev_splits)
        self.widest = max(part.task.num_labels for part in parts)

    def build(self, *, all_rows: bool = False) -> None:
        """Load the encoder once, with the heads that the tasks have alone."""
        for part in self.parts:
            part.build(all_rows=all_rows)
        first = self.parts[0]
        self.model, self.fresh = first.model, first.fresh
        self.heads: list[Heads] = []
        for name in head_modules(self.model):
            heads = Heads([part.model.get_submodule(name) for part in self.parts])
            replace_modules(self.model, {self.model.get_submodule(name): heads})
            self.heads.append(heads)
        for part in self.parts:
            part.model = self.model
        self.datamodule: MixedBatches = MixedBatches(self.parts)

    @property
    def notes(self) -> list[str]:
        """Those of the tasks."""
        return [f"{part.name}: {note}" for part in self.parts for note in part.notes]

    def ids(self, split: str, rows: int) -> list[int]:
        """The rows' identifiers in their task's file."""
        part, own = self._of(split)
        return part.ids(own, rows)

    def heldout_batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches of the tasks' held-out slices in turns."""
        count = len(self.parts)
        streams = [part.heldout_batches((start + count - 1 - i) // count) for i, part in enumerate(self.parts)]
        position = start
        while True:
            task = position % count
            yield labelled(next(streams[task]), task)
            position += 1

    def eval_batches(self, split: str, limit: int | None = None) -> Iterable[Batch]:
        """The rows of all held-out slices, or of a task's dev split, each once."""
        if split != HELDOUT:
            part, own = self._of(split)
            task = self.parts.index(part)
            return (batch | {"task": torch.tensor(task)} for batch in part.eval_batches(own, limit))
        return self.datamodule.heldout(limit)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits of the batch's task in float32; of held-out rows filled up with zeros to the widest."""
        task = int(batch["task"])
        for heads in self.heads:
            heads.active = task
        inputs = {key: value for key, value in batch.items() if key not in ("task", "labels", "index")}
        logits: Tensor = model(**inputs).logits.float()
        if batch["labels"].dim() == 1:
            return logits
        return nn.functional.pad(logits, (0, self.widest - logits.shape[1]))

    def criterion(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean of the rows' losses, each that of its task."""
        total = outputs.new_zeros(())
        for part, rows, own in self._split(outputs, labels):
            total = total + part.criterion(rows, own) * len(own)
        return total / len(labels)

    def scores(self, outputs: dict[str, Outputs]) -> Scores:
        """The metrics of every task under its name, and the mean of the primary ones."""
        values: dict[str, float | None] = {}
        notes: list[str] = []
        primary: list[float | None] = []
        for part, own in self._by_task(outputs):
            scores = part.scores(own)
            values |= {f"{part.name}/{name}": value for name, value in scores.all.items()}
            notes += [f"{part.name}: {note}" for note in scores.notes]
            primary.append(scores.value)
        known = [value for value in primary if value is not None]
        average = fmean(known) if len(known) == len(primary) else None
        return Scores(self.primary, average, {"average": average, **values}, notes=notes)

    @contextmanager
    def alone(self, task: int) -> Iterator[TextProblem]:
        """Inside this context the model has one task's head in the place of all, as it has where the task is alone."""
        plain: dict[nn.Module, nn.Module] = {heads: heads.of_task[task] for heads in self.heads}
        replace_modules(self.model, plain)
        try:
            yield self.parts[task]
        finally:
            replace_modules(self.model, {own: heads for heads, own in plain.items()})

    def _by_task(self, outputs: dict[str, Outputs]) -> Iterator[tuple[TextProblem, dict[str, Outputs]]]:
        for part in self.parts:
            if HELDOUT in outputs:
                together = outputs[HELDOUT]
                of_task = {id(one): Outputs(*own) for one, *own in self._split(together.logits, together.labels)}
                yield part, {HELDOUT: of_task[id(part)]}
                continue
            prefix = f"{part.name}/"
            yield part, {name.removeprefix(prefix): own for name, own in outputs.items() if name.startswith(prefix)}

    def _split(self, outputs: Tensor, labels: Tensor) -> Iterator[tuple[TextProblem, Tensor, Tensor]]:
        """Logits and labels of each task that has rows here."""
        for task, part in enumerate(self.parts):
            rows = labels[:, 1] == task
            if bool(rows.any()):
                own = labels[rows, 0]
                yield part, outputs[rows, : part.task.num_labels], own if part.task.regression else own.long()

    def _of(self, split: str) -> tuple[TextProblem, str]:
        name, _, own = split.partition("/")
        return next(part for part in self.parts if part.name == name), own


def labelled(batch: Batch, task: int) -> Batch:
    """A batch with its task, as a number and as a second column of its labels."""
    labels = batch["labels"].float()
    return batch | {"task": torch.tensor(task), "labels": torch.stack([labels, torch.full_like(labels, task)], 1)}


class TaggedBatches(Dataset[Batch]):
    """The batches of one split of every task, each indexed by a task and rows of it.

    ``index`` counts the rows of all tasks, one after the other.
    """

    def __init__(self, of_task: Sequence[Any]) -> None:
        self.of_task = of_task
        self.offsets = [0, *accumulate(map(len, of_task))]

    def __len__(self) -> int:
        return self.offsets[-1]

    def __getitem__(self, key: tuple[int, list[int]]) -> Batch:
        task, rows = key
        batch = labelled(self.of_task[task][rows], task)
        return batch | {"index": batch["index"] + self.offsets[task]}


class MixedSampler(Sampler[tuple[int, list[int]]]):
    """The batches of several samplers in one epoch, in an order that is a function of (seed, epoch) alone.

    All processes get batches of the same task at the same step. What :class:`autolora.training.batches.BucketSampler`
    says of epochs holds here.
    """

    def __init__(self, of_task: Sequence[BucketSampler], seed: int) -> None:
        self.of_task, self.seed = of_task, seed
        self.epoch = self._start = 0

    def __len__(self) -> int:
        return sum(map(len, self.of_task))

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        epoch, start, self._start = self.epoch, self._start, 0
        batches = [(task, rows) for task, one in enumerate(self.of_task) for rows in one.batches(epoch)]
        order = np.random.default_rng((self.seed, epoch, len(batches))).permutation(len(batches))
        for position in order[start:]:
            yield batches[position]
        self.epoch = epoch + 1

    def set_epoch(self, epoch: int) -> None:
        """Make ``epoch`` the next one to be read; a position loaded for the same epoch is kept."""
        if epoch != self.epoch:
            self.epoch, self._start = epoch, 0

    def seek(self, epoch: int, batch: int) -> None:
        """Begin the next pass in the middle of an epoch."""
        self.epoch, self._start = epoch, batch


class MixedBatches(Batches):
    """The batches of a :class:`Mixture`, for Lightning."""

    def __init__(self, parts: Sequence[TextProblem]) -> None:
        super().__init__()
        self.of_task = [part.datamodule for part in parts]

    def prepare_data(self) -> None:
        """Fill the caches of all tasks."""
        for one in self.of_task:
            one.prepare_data()

    def train_dataloader(self) -> Loader:
        """Batches of all tasks, the first time from :attr:`start` on."""
        for one in self.of_task:
            one.trainer = self.trainer
        loaders = [one.shuffled_loader(FIT) for one in self.of_task]
        sampler = MixedSampler([loader.sampler for loader in loaders], self.of_task[0].seed)  # type: ignore[misc]
        sampler.seek(*self.start)
        return self._loader(loaders, sampler)

    def val_dataloader(self) -> list[Loader]:
        """The held-out rows of all tasks."""
        return [self.heldout()]

    def heldout(self, limit: int | None = None) -> Loader:
        """The held-out rows of all tasks, or so many of them, shared out evenly."""
        each = None if limit is None else max(1, limit // len(self.of_task))
        loaders = [one.ordered_loader(HELDOUT, each) for one in self.of_task]
        return self._loader(loaders, [(task, rows) for task, one in enumerate(loaders) for rows in one.sampler])

    def _loader(self, loaders: Sequence[Loader], sampler: Iterable[tuple[int, list[int]]]) -> Loader:
        first = self.of_task[0]
        rows = TaggedBatches([one.dataset for one in loaders])
        return loader(rows, sampler, workers=first.num_workers, seed=first.seed)
