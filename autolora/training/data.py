"""The Lightning data module for text tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

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


class TextDataModule(Batches):
    """Splits of a text task as loaders of padded batches (:class:`autolora.training.batches.TokenBatches`).

    Training reads ``fit`` in shuffled, length-bucketed batches; validation reads ``heldout``; test and prediction read
    the other splits, one loader each in the order of :attr:`dev_names`. Everything but training is read sorted by
    length and complete; ``index`` puts predictions back in order. Batches depend on ``seed`` and the epoch, never on
    the global random state. A split is tokenised when it is first read, once, and cached in ``cache_dir``.

    With several processes, shuffled batches are divided among them, and ordered ones are read in full by each, so that
    all come to the same choices. Give the Trainer ``use_distributed_sampler=False``.

    Args:
        splits: rows by split name: ``fit``, usually ``heldout``, and the dev splits.
        tokenizer: with a padding token.
        batch_size: rows of a training batch in each process.
        eval_batch_size: rows of any other batch; twice ``batch_size`` by default.
        max_length: tokens that a row is cut to.
        seed: of the data order.
        num_workers: processes that collate; 0 is fastest for all but very large batches.
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
        super().__init__()
        _check(splits, tokenizer, max_length)
        self.splits = dict(splits)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.eval_batch_size = 2 * batch_size if eval_batch_size is None else eval_batch_size
        self.max_length = max_length
        self.seed = seed
        self.num_workers = num_workers
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.regression = regression
        self._tokens: dict[str, Tokens] = {}

    @property
    def dev_names(self) -> list[str]:
        """Names of the splits that are neither trained nor chosen on."""
        return [name for name in self.splits if name not in (FIT, HELDOUT)]

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
        return [self.ordered_loader(HELDOUT)] if HELDOUT in self.splits else []

    def test_dataloader(self) -> list[Loader]:
        """Batches of each dev split."""
        return [self.ordered_loader(name) for name in self.dev_names]

    def predict_dataloader(self) -> list[Loader]:
        """The same as for test."""
        return self.test_dataloader()

    def shuffled_loader(self, name: str) -> Loader:
        """Batches as in training, of any split: what a bilevel strategy reads from ``heldout``."""
        replicas, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        lengths = self.tokens(name).lengths
        sampler = BucketSampler(lengths, self.batch_size, seed=self.seed, num_replicas=replicas, rank=rank)
        return self._loader(name, sampler)

    def ordered_loader(self, name: str, limit: int | None = None) -> Loader:
        """Batches as in evaluation, of any split or so many rows of it (:func:`autolora.training.problem.spread`)."""
        lengths = self.tokens(name).lengths
        rows = spread(len(lengths), limit)
        batches = batches_by_length(lengths[rows], self.eval_batch_size)
        return self._loader(name, [[rows[i] for i in batch] for batch in batches])

    def _loader(self, name: str, sampler: Iterable[list[int]]) -> Loader:
        pad_id = self.tokenizer.pad_token_id
        assert isinstance(pad_id, int)
        batches = TokenBatches(
            self.tokens(name),
            self.splits[name].labels,
            pad_id=pad_id,
            max_length=self.max_length,
            regression=self.regression,
            pad_type=self.tokenizer.pad_token_type_id,
        )
        return Loader(
            batches,
            batch_size=None,  # the sampler yields whole batches
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=leave_to_parent,
            pin_memory=torch.cuda.is_available(),
            # Without a generator of its own, every pass over a loader would draw from the global stream.
            generator=torch.Generator().manual_seed(self.seed),
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
