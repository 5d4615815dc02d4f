"""Lightning data modules: splits as loaders of whole batches, and those of text tasks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from autolora.errors import DataError
from autolora.signals import held_back, leave_to_parent
from autolora.tasks.records import Split
from autolora.training.batches import BucketSampler, TokenBatches, Tokens, batches_by_length, tokenize_cached
from autolora.training.problem import Batches, spread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIT, HELDOUT = "fit", "heldout"


class Loader(DataLoader[dict[str, Tensor]]):
    """A loader whose worker processes never run the signal handlers of the process that they are copied from."""

    def __iter__(self) -> Any:
        """A pass over the batches."""
        with held_back():
            return super().__iter__()


def loader(dataset: Dataset[dict[str, Tensor]], sampler: Iterable[Any], *, workers: int, seed: int) -> Loader:
    """Whole batches, as the sampler asks a dataset for them.

    Args:
        dataset: gives a batch for each item of the sampler.
        sampler: what to read.
        workers: processes that read; 0 for none beside this one.
        seed: of what the workers draw.
    """
    return Loader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=leave_to_parent,
        pin_memory=torch.cuda.is_available(),
        # Without a generator of its own, every pass over a loader would draw from the global stream.
        generator=torch.Generator().manual_seed(seed),
    )


class SplitBatches(Batches):
    """Splits as loaders of whole batches, of rows of similar length.

    Training reads ``fit`` in shuffled batches; validation reads ``heldout``. Everything but training is read sorted by
    length and complete; ``index`` puts predictions back in order. Batches depend on ``seed`` and the epoch, never on
    the global random state.

    With several processes, shuffled batches are divided among them, and ordered ones are read in full by each, so that
    all come to the same choices. Give the Trainer ``use_distributed_sampler=False``.

    Args:
        names: of the splits.
        batch_size: rows of a training batch in each process.
        eval_batch_size: rows of any other batch; twice ``batch_size`` by default.
        seed: of the data order.
        num_workers: processes that make batches; 0 is fastest for all but very large ones.
    """

    def __init__(
        self, names: Iterable[str], *, batch_size: int, eval_batch_size: int | None, seed: int, num_workers: int
    ) -> None:
        super().__init__()
        self.names = list(names)
        self.batch_size = batch_size
        self.eval_batch_size = 2 * batch_size if eval_batch_size is None else eval_batch_size
        self.seed = seed
        self.num_workers = num_workers

    @abstractmethod
    def lengths(self, name: str) -> NDArray[np.int64]:
        """What the rows of a split take, in any unit."""

    @abstractmethod
    def rows(self, name: str) -> Dataset[dict[str, Tensor]]:
        """A split that is indexed by a list of rows and gives a batch."""

    @property
    def dev_names(self) -> list[str]:
        """Names of the splits that are neither trained nor chosen on."""
        return [name for name in self.names if name not in (FIT, HELDOUT)]

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
        """Batches of ``heldout``, if there is one."""
        return [self.ordered_loader(HELDOUT)] if HELDOUT in self.names else []

    def test_dataloader(self) -> list[Loader]:
        """Batches of each dev split."""
        return [self.ordered_loader(name) for name in self.dev_names]

    def predict_dataloader(self) -> list[Loader]:
        """The same as for test."""
        return self.test_dataloader()

    def shuffled_loader(self, name: str) -> Loader:
        """Batches as in training, of any split: what a bilevel strategy reads from ``heldout``."""
        replicas, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler = BucketSampler(self.lengths(name), self.batch_size, seed=self.seed, num_replicas=replicas, rank=rank)
        return self._loader(name, sampler)

    def ordered_loader(self, name: str, limit: int | None = None) -> Loader:
        """Batches as in evaluation, of any split or so many rows of it (:func:`autolora.training.problem.spread`)."""
        lengths = self.lengths(name)
        rows = spread(len(lengths), limit)
        batches = batches_by_length(lengths[rows], self.eval_batch_size)
        return self._loader(name, [[rows[i] for i in batch] for batch in batches])

    def _loader(self, name: str, sampler: Iterable[list[int]]) -> Loader:
        return loader(self.rows(name), sampler, workers=self.num_workers, seed=self.seed)


class TextDataModule(SplitBatches):
    """Splits of a text task, padded batch by batch (:class:`autolora.training.batches.TokenBatches`).

    Validation reads ``heldout`` if there is one; test and prediction read the other splits, one loader each in the
    order of :attr:`dev_names`. A split is tokenised when it is first read, once, and cached in ``cache_dir``.

    Args:
        splits: rows by split name: ``fit``, usually ``heldout``, and the dev splits.
        tokenizer: with a padding token.
        batch_size, eval_batch_size, seed, num_workers: of :class:`SplitBatches`.
        max_length: tokens that a row is cut to.
        cache_dir: folder of tokenised splits; ``None`` keeps them in memory only.
        regression: labels are scores.

    Raises:
        DataError: if there is no ``fit``, a split is empty, or ``max_length`` is more than the tokenizer allows.
    """

    def __init__(
        self,
        splits: Mapping[str, Split],
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        max_length: int = 128,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | Path | None = None,
        regression: bool = False,
    ) -> None:
        _check(splits, tokenizer, max_length)
        super().__init__(
            splits, batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed, num_workers=num_workers
        )
        self.splits = dict(splits)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.regression = regression
        self._tokens: dict[str, Tokens] = {}

    @property
    def truncated(self) -> int:
        """Rows that lost tokens to ``max_length``, in the splits that have been read so far."""
        return sum(tokens.truncated for tokens in self._tokens.values())

    def tokens(self, name: str) -> Tokens:
        """A split, tokenised; from memory or the cache if it has been before."""
        if name not in self._tokens:
            self._tokens[name] = tokenize_cached(self.splits[name], self.tokenizer, self.max_length, self.cache_dir)
        return self._tokens[name]

    def prepare_data(self) -> None:
        """Fill the cache for training; Lightning calls this in one process, before the others read."""
        for name in (FIT, HELDOUT):
            if name in self.splits:
                self.tokens(name)

    def lengths(self, name: str) -> NDArray[np.int64]:
        """Tokens of every row."""
        return self.tokens(name).lengths

    def rows(self, name: str) -> TokenBatches:
        """A split, tokenised, whose batches are padded."""
        pad_id = self.tokenizer.pad_token_id
        assert isinstance(pad_id, int)
        return TokenBatches(
            self.tokens(name),
            self.splits[name].labels,
            pad_id=pad_id,
            max_length=self.max_length,
            regression=self.regression,
            pad_type=self.tokenizer.pad_token_type_id,
        )


def _check(splits: Mapping[str, Split], tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    if FIT not in splits:
        raise DataError(f"expected a split named {FIT!r} to train on, got {', '.join(splits) or 'no splits'}")
    empty = [name for name, split in splits.items() if not len(split)]
    if empty:
        raise DataError(f"no rows in {', '.join(empty)}: check the data files, or raise data.max_train")
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if not special < max_length <= tokenizer.model_max_length:
        raise DataError(
            f"data.max_length: expected {special + 1} to {tokenizer.model_max_length} (what the tokenizer allows), "
            f"got {max_length}"
        )
