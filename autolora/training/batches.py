"""Tokenised splits: the flat token store, its cache on disk, collation, and length-bucketed batches."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from autolora.errors import DataError
from autolora.files import replacing
from autolora.tasks.records import Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_ROWS = 10_000
MEGA_BATCHES = 50
_CACHE_LAYOUT = 1


@dataclass(frozen=True)
class Tokens:
    """Token ids of all rows of a split, one after the other, without padding.

    Args:
        ids: shape ``(tokens,)``, int32.
        offsets: shape ``(rows + 1,)``, int64; row i is ``ids[offsets[i]:offsets[i + 1]]``.
        types: segment of each token, shape ``(tokens,)``, uint8, where the tokenizer gives segments.
        truncated: rows that lost tokens to the maximum length.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    types: NDArray[np.uint8] | None
    truncated: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self.offsets)


# Tokenisation --------------------------------------------------------------------------------------------------------


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = sorted(tokenizer.get_vocab().items())
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.update(truncation=None, padding=None)  # left behind by the last call
    state = [type(tokenizer).__name__, tokenizer.model_input_names, tokenizer.truncation_side, rules]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def tokenize(split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokens:
    """Tokenise a split; rows longer than ``max_length`` are cut, the longer sentence of a pair first."""
    names = ("input_ids", "token_type_ids")
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in names if name in tokenizer.model_input_names}
    lengths: list[int] = []
    truncated = 0
    for start in range(0, len(split), CHUNK_ROWS):
        rows = range(start, min(start + CHUNK_ROWS, len(split)))
        encoded = _encode(split, rows, tokenizer)
        long = [i for i, ids in enumerate(encoded["input_ids"]) if len(ids) > max_length]
        if long:
            cut = _encode(split, [rows[i] for i in long], tokenizer, truncation=True, max_length=max_length)
            for name in columns:
                for i, values in zip(long, cut[name], strict=True):
                    encoded[name][i] = values
        truncated += len(long)
        lengths += map(len, encoded["input_ids"])
        for name, parts in columns.items():
            kind = np.int32 if name == "input_ids" else np.uint8
            parts.append(np.fromiter(chain.from_iterable(encoded[name]), dtype=kind))
    flat = {name: np.concatenate(parts) for name, parts in columns.items()}
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Tokens(flat["input_ids"], offsets, flat.get("token_type_ids"), truncated)


def _encode(split: Split, rows: Sequence[int], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    first = [split.text_a[i] for i in rows]
    second = None if split.text_b is None else [split.text_b[i] for i in rows]
    return tokenizer(first, second, return_attention_mask=False, verbose=False, **options)


def tokenize_cached(
    split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int, cache_dir: Path | None
) -> Tokens:
    """:func:`tokenize`, kept in a file that is named after the tokenizer, the texts and the maximum length.

    A file that cannot be read (cut short, damaged) is made again.
    """
    if cache_dir is None:
        return tokenize(split, tokenizer, max_length)
    key = [_CACHE_LAYOUT, tokenizer_fingerprint(tokenizer), max_length, split.text_a, split.text_b]
    file = cache_dir / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npz"
    tokens = _read_cache(file, len(split))
    if tokens is None:
        tokens = tokenize(split, tokenizer, max_length)
        _write_cache(file, tokens)
    return tokens


def _read_cache(file: Path, rows: int) -> Tokens | None:
    # An npz member carries a checksum, so damage inside the arrays is noticed too.
    try:
        with np.load(file, allow_pickle=False) as stored:
            types = stored["types"] if "types" in stored.files else None
            tokens = Tokens(stored["ids"], stored["offsets"], types, int(stored["truncated"]))
    except (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return None
    whole = len(tokens) == rows and tokens.offsets[-1] == len(tokens.ids)
    return tokens if whole else None


def _write_cache(file: Path, tokens: Tokens) -> None:
    arrays: dict[str, Any] = {"ids": tokens.ids, "offsets": tokens.offsets, "truncated": np.int64(tokens.truncated)}
    if tokens.types is not None:
        arrays["types"] = tokens.types
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file, binary=True) as stream:
        np.savez(stream, **arrays)


# Batches -------------------------------------------------------------------------------------------------------------


class TokenBatches(Dataset[dict[str, Tensor]]):
    """A tokenised split that is indexed by a list of rows and gives a padded batch.

    The batch is a dictionary with ``input_ids``, ``attention_mask`` and, where the tokenizer gives them,
    ``token_type_ids``, all of shape ``(batch, width)``; ``labels`` and ``index`` (the row's position in the split) of
    shape ``(batch,)``. The width is that of the longest row.

    Args:
        tokens: the rows.
        labels: one for each row.
        pad_id: token that rows are filled up with, on the right.
        max_length: no row is longer; for those who have to know before they have read all rows.
        regression: labels are float32 instead of int64.
        pad_type: segment of padding.
    """

    def __init__(
        self,
        tokens: Tokens,
        labels: Sequence[float],
        *,
        pad_id: int,
        max_length: int,
        regression: bool = False,
        pad_type: int = 0,
    ) -> None:
        assert len(tokens) == len(labels)
        self.tokens = tokens
        self.labels = torch.tensor(labels, dtype=torch.float32 if regression else torch.int64)
        self.pad_id, self.pad_type, self.max_length = pad_id, pad_type, max_length

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        tokens, index = self.tokens, np.asarray(rows, dtype=np.int64)
        lengths = tokens.lengths[index]
        mask = np.arange(lengths.max()) < lengths[:, None]

        def padded(flat: NDArray[Any], fill: int) -> Tensor:
            table = np.full(mask.shape, fill, dtype=np.int64)
            table[mask] = np.concatenate([flat[tokens.offsets[i] : tokens.offsets[i + 1]] for i in index])
            return torch.from_numpy(table)

        batch = {
            "input_ids": padded(tokens.ids, self.pad_id),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        }
        if tokens.types is not None:
            batch["token_type_ids"] = padded(tokens.types, self.pad_type)
        where = torch.from_numpy(index)
        return batch | {"labels": self.labels[where], "index": where}


def batches_by_length(lengths: NDArray[np.int64], batch_size: int) -> list[list[int]]:
    """All rows, the longest first, at most ``batch_size`` together, so that none is padded by 4 tokens or more.

    256 sentences of CoLA with 2,925 tokens fill 3,303 places.
    """
    order = np.argsort(-lengths, kind="stable")
    fours = (lengths[order] - 1) // 4
    groups = np.split(order, np.flatnonzero(np.diff(fours)) + 1)
    return [group[i : i + batch_size].tolist() for group in groups for i in range(0, len(group), batch_size)]


class BucketSampler(Sampler[list[int]]):
    """Batches of rows of similar length; each row once an epoch, on one rank.

    Rows are permuted, sorted by length inside stretches of 50 batches, cut into batches, and the batches permuted. The
    order is a function of (seed, epoch) alone.

    All ranks get the same number of batches. What is left over at the end is spread over the last batches, so that
    nothing is dropped or repeated; with one rank it is a last, smaller batch.

    The epoch advances by itself when it has been read to its end; :meth:`set_epoch` sets it. Pass the sampler to a
    ``DataLoader`` as ``sampler`` with ``batch_size=None``: Lightning then calls :meth:`set_epoch` (and must be told
    ``use_distributed_sampler=False``).

    Args:
        lengths: tokens of each row.
        batch_size: rows of a batch on one rank.
        seed: of the order.
        num_replicas, rank: number of processes, and which one this is.

    Raises:
        DataError: if there are no rows, or fewer than ranks.
    """

    def __init__(
        self,
        lengths: Sequence[int] | NDArray[np.int64],
        batch_size: int,
        *,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        assert batch_size >= 1
        assert 0 <= rank < num_replicas
        self.lengths = np.asarray(lengths)
        self.seed = seed
        self.num_replicas, self.rank = num_replicas, rank
        self.sizes = batch_sizes(len(self.lengths), batch_size, num_replicas)
        self._stretch = MEGA_BATCHES * batch_size * num_replicas
        self.epoch = 0
        self._given = 0
        self._start = 0

    def __len__(self) -> int:
        """Batches of one rank in a whole epoch."""
        return len(self.sizes) // self.num_replicas

    def __iter__(self) -> Iterator[list[int]]:
        epoch, start, self._start = self.epoch, self._start, 0
        for position, rows in enumerate(self.batches(epoch)[start:], start=start):
            self._given = position + 1
            yield rows
        self.epoch, self._given = epoch + 1, 0

    def batches(self, epoch: int) -> list[list[int]]:
        """All batches of this rank in an epoch, in order."""
        rng = np.random.default_rng((self.seed, epoch))
        rows = rng.permutation(len(self.lengths))
        stretches = [rows[i : i + self._stretch] for i in range(0, len(rows), self._stretch)]
        rows = np.concatenate([part[np.argsort(-self.lengths[part], kind="stable")] for part in stretches])
        cuts = np.split(rows, np.cumsum(self.sizes)[:-1])
        # Batches at the same step have similar lengths on all ranks, so that no rank waits for another.
        return [cuts[step * self.num_replicas + self.rank].tolist() for step in rng.permutation(len(self))]

    def set_epoch(self, epoch: int) -> None:
        """Make ``epoch`` the next one to be read; a position loaded for the same epoch is kept."""
        if epoch != self.epoch:
            self.epoch, self._given, self._start = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """Where reading stands: the epoch, and how many of its batches have been given out.

        Worker processes read ahead; with them, the number of batches that were trained on has to come from the trainer.
        """
        return {"epoch": self.epoch, "batch": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next pass over the batches in the middle of an epoch."""
        self.epoch, self._given, self._start = state["epoch"], state["batch"], state["batch"]


def batch_sizes(rows: int, batch_size: int, num_replicas: int) -> list[int]:
    """Sizes of all batches: a multiple of ``num_replicas`` of them, that add up to ``rows`` and are never empty.

    Raises:
        DataError: if there are no rows, or fewer than replicas.
    """
    if rows < num_replicas:
        raise DataError(f"a split of {rows} rows cannot be spread over {num_replicas} processes: give it more rows")
    full, rest = divmod(rows, batch_size * num_replicas)
    sizes = [batch_size] * (full * num_replicas)
    if rest >= num_replicas:
        each, extra = divmod(rest, num_replicas)
        sizes += [each + (i < extra) for i in range(num_replicas)]
    else:
        for i in range(rest):
            sizes[-1 - i] += 1
    return sizes
