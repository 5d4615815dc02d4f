"""Batches of tokenised text: what is in them, in which order, and what is kept on disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from autolora.backbones import load_tokenizer
from autolora.errors import DataError
from autolora.tasks.records import Split
from autolora.training import batches as batches_module
from autolora.training.batches import (
    BucketSampler,
    TokenBatches,
    batch_sizes,
    batches_by_length,
    tokenize,
    tokenize_cached,
    tokenizer_fingerprint,
)
from autolora.training.data import TextDataModule

WORDS = [
    "a",
    "the",
    "man",
    "woman",
    "dog",
    "sees",
    "runs",
    "not",
    "every",
    "red",
    "car",
    "school",
    "at",
    "night",
    "zebra",
]


def make_split(rows: int, *, pair: bool = True, seed: int = 0) -> Split:
    rng = np.random.default_rng(seed)

    def sentence() -> str:
        return " ".join(rng.choice(WORDS, size=rng.integers(1, 40)))

    return Split(
        text_a=[sentence() for _ in range(rows)],
        text_b=[sentence() for _ in range(rows)] if pair else None,
        labels=[int(label) for label in rng.integers(0, 3, rows)],
        ids=list(range(100, 100 + rows)),
    )


@pytest.fixture(scope="module")
def tokenizer(tiny_bert_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(path=tiny_bert_dir)


@pytest.fixture
def module(tokenizer: PreTrainedTokenizerBase) -> TextDataModule:
    splits = {"fit": make_split(103), "heldout": make_split(21, seed=1), "dev": make_split(37, seed=2)}
    return TextDataModule(splits, tokenizer, batch_size=8, max_length=64, seed=5)


def rows_of(loader: Iterable[dict[str, Tensor]]) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader]


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


# Order ---------------------------------------------------------------------------------------------------------------


def test_training_reads_every_row_once_an_epoch(module: TextDataModule) -> None:
    batches = rows_of(module.train_dataloader())
    assert sorted(flat(batches)) == list(range(103))
    assert sorted(map(len, batches)) == [7] + [8] * 12
    assert len(module.train_dataloader()) == 13


def test_the_order_does_not_depend_on_the_global_random_state(module: TextDataModule) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = rows_of(module.train_dataloader())
    torch.manual_seed(2)
    np.random.seed(2)
    torch.rand(1000)
    assert rows_of(module.train_dataloader()) == first


def test_reading_leaves_the_global_random_state_alone(module: TextDataModule) -> None:
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    rows_of(module.train_dataloader())
    rows_of(module.ordered_loader("dev"))
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(before_numpy, np.random.get_state()[1])


def test_epochs_and_seeds_differ(tokenizer: PreTrainedTokenizerBase, module: TextDataModule) -> None:
    loader = module.train_dataloader()
    first, second = rows_of(loader), rows_of(loader)
    assert first != second
    loader.sampler.set_epoch(0)
    assert rows_of(loader) == first
    other = TextDataModule(module.splits, tokenizer, batch_size=8, max_length=64, seed=6)
    assert rows_of(other.train_dataloader()) != first


def test_worker_processes_give_the_same_batches(module: TextDataModule, tokenizer: PreTrainedTokenizerBase) -> None:
    other = TextDataModule(module.splits, tokenizer, batch_size=8, max_length=64, seed=5, num_workers=1)
    for ours, theirs in zip(module.train_dataloader(), other.train_dataloader(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_buckets_waste_less_padding_than_no_buckets() -> None:
    lengths = np.random.default_rng(0).integers(5, 120, 3000)

    def padding(batches: list[list[int]]) -> int:
        return sum(int(lengths[rows].max() * len(rows) - lengths[rows].sum()) for rows in batches)

    bucketed = padding(BucketSampler(lengths, 16).batches(0))
    shuffled = np.random.default_rng(1).permutation(3000).tolist()
    unsorted = padding([shuffled[i : i + 16] for i in range(0, 3000, 16)])
    by_length = np.argsort(lengths).tolist()
    best = padding([by_length[i : i + 16] for i in range(0, 3000, 16)])
    assert best <= bucketed < unsorted / 5


def test_short_and_long_batches_are_mixed_over_the_epoch() -> None:
    lengths = np.random.default_rng(0).integers(5, 120, 3000)
    means = [lengths[rows].mean() for rows in BucketSampler(lengths, 16).batches(0)]
    neighbours = np.corrcoef(means[:-1], means[1:])[0, 1]
    assert abs(neighbours) < 0.3


def test_evaluation_reads_every_row_and_hardly_pads(module: TextDataModule) -> None:
    (loader,) = module.val_dataloader()
    assert sorted(flat(rows_of(loader))) == list(range(21))
    for batch in loader:
        width = batch["input_ids"].shape[1]
        lengths = batch["attention_mask"].sum(1)
        assert lengths.max() == width < lengths.min() + 4


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60), batch_size=st.integers(1, 9))
def test_batches_of_rows_of_about_one_length(lengths: list[int], batch_size: int) -> None:
    batches = batches_by_length(np.array(lengths), batch_size)
    assert sorted(flat(batches)) == list(range(len(lengths)))
    assert all(0 < len(batch) <= batch_size for batch in batches)
    inside = [[lengths[row] for row in batch] for batch in batches]
    assert all(max(batch) < min(batch) + 4 for batch in inside)
    assert flat(inside) == sorted(lengths, reverse=True)


def test_some_rows_are_spread_over_the_split(module: TextDataModule) -> None:
    few = module.ordered_loader("heldout", 5)
    every = {row: text for batch in module.ordered_loader("heldout") for row, text in by_row(batch).items()}
    assert sorted(flat(rows_of(few))) == [0, 4, 8, 12, 16]  # of 21
    assert all(every[row] == text for batch in few for row, text in by_row(batch).items())
    assert sorted(flat(rows_of(module.ordered_loader("heldout", 99)))) == list(range(21))


def by_row(batch: dict[str, Tensor]) -> dict[int, list[int]]:
    return {
        int(row): ids[mask.bool()].tolist()
        for row, ids, mask in zip(batch["index"], batch["input_ids"], batch["attention_mask"], strict=True)
    }


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 200),
    batch_size=st.integers(1, 9),
    replicas=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_ranks_divide_the_rows_among_them(rows: int, batch_size: int, replicas: int, epoch: int) -> None:
    if rows < replicas:
        with pytest.raises(DataError, match="processes"):
            batch_sizes(rows, batch_size, replicas)
        return
    lengths = np.random.default_rng(rows).integers(1, 50, rows)
    ranks = [BucketSampler(lengths, batch_size, num_replicas=replicas, rank=rank) for rank in range(replicas)]
    parts = [sampler.batches(epoch) for sampler in ranks]
    assert {len(part) for part in parts} == {len(ranks[0])}
    assert sorted(row for part in parts for row in flat(part)) == list(range(rows))
    assert all(0 < len(batch) <= batch_size + 1 for part in parts for batch in part)


def test_reading_continues_in_the_middle_of_an_epoch() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 100)
    sampler = BucketSampler(lengths, 8, seed=3)
    list(sampler)
    reader = iter(sampler)
    head = [next(reader) for _ in range(5)]
    state = sampler.state_dict()
    assert state == {"epoch": 1, "batch": 5}
    resumed = BucketSampler(lengths, 8, seed=3)
    resumed.load_state_dict(state)
    resumed.set_epoch(1)
    rest = iter(resumed)
    head += [next(rest)]
    assert resumed.state_dict() == {"epoch": 1, "batch": 6}
    assert head + list(rest) == sampler.batches(1)
    assert list(resumed) == sampler.batches(2)
    assert resumed.state_dict() == {"epoch": 3, "batch": 0}


# Content -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [True, False])
def test_batches_are_what_the_tokenizer_makes(tokenizer: PreTrainedTokenizerBase, pair: bool) -> None:
    split = make_split(30, pair=pair)
    data = TextDataModule({"fit": split}, tokenizer, batch_size=4, max_length=40, seed=0)
    for batch in data.train_dataloader():
        rows = batch["index"].tolist()
        texts = [[split.text_a[i] for i in rows], *([[split.text_b[i] for i in rows]] if split.text_b else [])]
        expected = tokenizer(*texts, truncation=True, max_length=40, padding=True, return_tensors="pt")
        assert set(batch) == {*expected, "labels", "index"}
        for key in expected:
            assert torch.equal(batch[key], expected[key]), key
        assert batch["labels"].tolist() == [split.labels[i] for i in rows]
        assert {batch[key].dtype for key in batch} == {torch.int64}


def test_the_width_is_not_rounded_above_the_maximum(tokenizer: PreTrainedTokenizerBase) -> None:
    data = TextDataModule({"fit": make_split(20)}, tokenizer, batch_size=20, max_length=30)
    (batch,) = data.train_dataloader()
    assert batch["input_ids"].shape == (20, 30)


def test_truncated_rows_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    split = Split(["a", "the " * 28, "dog " * 30], None, [0, 1, 0], [0, 1, 2])
    data = TextDataModule({"fit": split}, tokenizer, max_length=30)
    assert data.truncated == 0
    data.prepare_data()
    assert data.tokens("fit").lengths.tolist() == [3, 30, 30]
    assert data.truncated == 1


def test_tokenising_in_chunks_changes_nothing(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = make_split(50)
    whole = tokenize(split, tokenizer, 32)
    monkeypatch.setattr(batches_module, "CHUNK_ROWS", 7)
    assert_same(whole, tokenize(split, tokenizer, 32))


def test_scores_are_floats(tokenizer: PreTrainedTokenizerBase) -> None:
    split = Split(["a dog", "the car"], ["x", "y"], [2.5, 4.75], [0, 1])
    data = TextDataModule({"fit": split}, tokenizer, regression=True)
    (batch,) = data.train_dataloader()
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"][batch["index"].argsort()].tolist() == [2.5, 4.75]


def test_segments_are_left_out_where_the_tokenizer_has_none(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenize(make_split(5), tokenizer, 32)
    bare = batches_module.Tokens(tokens.ids, tokens.offsets, None, 0)
    batch = TokenBatches(bare, [0] * 5, pad_id=0, max_length=32)[[3, 1]]
    assert set(batch) == {"input_ids", "attention_mask", "labels", "index"}


@pytest.mark.parametrize(
    ("splits", "max_length", "message"),
    [
        ({"dev": make_split(3)}, 32, "expected a split named 'fit'"),
        ({"fit": make_split(3), "dev": make_split(0)}, 32, "no rows in dev"),
        ({"fit": make_split(3)}, 513, "expected 4 to 512"),
        ({"fit": make_split(3)}, 3, "expected 4 to 512"),
    ],
)
def test_impossible_data_is_refused(
    tokenizer: PreTrainedTokenizerBase, splits: dict[str, Split], max_length: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        TextDataModule(splits, tokenizer, max_length=max_length)


# Cache ---------------------------------------------------------------------------------------------------------------


def assert_same(one: batches_module.Tokens, other: batches_module.Tokens) -> None:
    for field in ("ids", "offsets", "types"):
        assert np.array_equal(getattr(one, field), getattr(other, field)), field
        assert getattr(one, field).dtype == getattr(other, field).dtype
    assert one.truncated == other.truncated


def test_a_cached_split_is_the_same_and_is_not_tokenised_again(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = make_split(40)
    missed = tokenize_cached(split, tokenizer, 32, tmp_path / "cache")
    assert missed.truncated > 0
    monkeypatch.setattr(batches_module, "tokenize", lambda *args: pytest.fail("tokenised again"))
    assert_same(missed, tokenize_cached(split, tokenizer, 32, tmp_path / "cache"))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other rows", "text"])
def test_a_damaged_cache_file_is_made_again(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, damage: str) -> None:
    split = make_split(40)
    good = tokenize_cached(split, tokenizer, 32, tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    if damage == "other rows":
        fewer = tokenize(split.take(range(10)), tokenizer, 32)
        np.savez(file, ids=fewer.ids, offsets=fewer.offsets, truncated=np.int64(0))
    else:
        file.write_bytes(
            {
                "cut": content[: len(content) // 2],
                "flip": content[:900] + bytes([content[900] ^ 255]) + content[901:],
                "empty": b"",
                "text": b"not an archive",
            }[damage]
        )
    assert_same(good, tokenize_cached(split, tokenizer, 32, tmp_path))
    assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file]


def test_the_cache_tells_texts_lengths_and_tokenizers_apart(
    tokenizer: PreTrainedTokenizerBase, tiny_bert_dir: Path, tmp_path: Path
) -> None:
    split = make_split(10)
    changed = load_tokenizer(path=tiny_bert_dir)
    changed.add_tokens(["zebra"])
    swapped = Split(split.text_b or [], split.text_a, split.labels, split.ids)
    tokenize_cached(split, tokenizer, 32, tmp_path)
    tokenize_cached(split, tokenizer, 31, tmp_path)
    tokenize_cached(split, changed, 32, tmp_path)
    tokenize_cached(swapped, tokenizer, 32, tmp_path)
    tokenize_cached(Split(split.text_a, None, split.labels, split.ids), tokenizer, 32, tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


def test_the_fingerprint_of_a_tokenizer_does_not_change_with_use(tiny_bert_dir: Path) -> None:
    tokenizer = load_tokenizer(path=tiny_bert_dir)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer("a dog " * 50, truncation=True, max_length=10, padding="max_length")
    assert tokenizer_fingerprint(tokenizer) == before


# Lightning -----------------------------------------------------------------------------------------------------------


class Recorder(LightningModule):
    """Notes the rows that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[list[int]]] = {"train": [], "val": [], "test": []}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen["train"].append(batch["index"].tolist())
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.seen["val"].append(batch["index"].tolist())

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen["test"].append(batch["index"].tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_advances_the_epoch_and_reads_dev_only_when_testing(module: TextDataModule, tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(recorder, datamodule=module)
    sampler = BucketSampler(module.tokens("fit").lengths, 8, seed=5)
    assert recorder.seen["train"] == sampler.batches(0) + sampler.batches(1)
    assert sorted(flat(recorder.seen["val"])) == sorted(2 * list(range(21)))
    assert "dev" not in module._tokens
    trainer.test(recorder, datamodule=module, verbose=False)
    assert sorted(flat(recorder.seen["test"])) == list(range(37))
