"""Sub-samples and held-out slices: sizes, proportions, determinism, and refusals."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autolora.errors import DataError
from autolora.tasks.records import Split
from autolora.tasks.splits import hold_out, subsample


def classes(*counts: int) -> Split:
    """A split with that many rows of each class, the classes interleaved."""
    labels = sorted((i / count, label) for label, count in enumerate(counts) for i in range(count))
    n = len(labels)
    return Split([f"row {i}" for i in range(n)], None, [label for _, label in labels], list(range(n)))


def scores(n: int) -> Split:
    return Split([f"row {i}" for i in range(n)], None, [(i * 37 % n) * 5.0 / n for i in range(n)], list(range(n)))


def test_subsample_keeps_the_proportions() -> None:
    assert Counter(subsample(classes(700, 200, 100), 50, seed=0).labels) == {0: 35, 1: 10, 2: 5}


def test_subsample_by_largest_remainder() -> None:
    # Quotas 3.5, 3.5, 3: the tie for the tenth row goes to the lower class.
    assert Counter(subsample(classes(7, 7, 6), 10, seed=0).labels) == {0: 4, 1: 3, 2: 3}


def test_subsample_keeps_a_row_of_a_rare_class() -> None:
    assert Counter(subsample(classes(997, 3), 20, seed=0).labels) == {0: 19, 1: 1}


def test_subsample_smaller_than_the_number_of_classes() -> None:
    assert len(subsample(classes(5, 5, 5), 1, seed=0)) == 1


def test_subsample_by_seed() -> None:
    split = classes(60, 40)
    assert subsample(split, 30, seed=1) == subsample(split, 30, seed=1)
    assert subsample(split, 30, seed=1) != subsample(split, 30, seed=2)


def test_subsample_keeps_order_and_all_rows_when_n_is_large() -> None:
    split = classes(6, 4)
    ids = subsample(split, 5, seed=3).ids
    assert ids == sorted(ids)
    assert subsample(split, 10, seed=3) is split
    assert subsample(split, 99, seed=3) is split


def test_subsample_unstratified_is_plain_sampling() -> None:
    counts = {subsample(classes(50, 50), 10, seed=seed, stratify=False).labels.count(0) for seed in range(20)}
    assert len(counts) > 1


def test_subsample_of_scores_covers_the_range() -> None:
    chosen = subsample(scores(1000), 20, seed=0).labels
    assert Counter(int(score * 2) for score in chosen) == dict.fromkeys(range(10), 2)


@pytest.mark.parametrize("n", [0, -5])
def test_subsample_of_nothing(n: int) -> None:
    with pytest.raises(DataError, match=rf"data\.max_train must be at least 1, got {n}"):
        subsample(classes(2, 2), n, seed=0)


def test_hold_out_is_a_stratified_partition() -> None:
    split = classes(600, 300, 100)
    fit, held = hold_out(split, 0.1, None, seed=0)
    assert Counter(held.labels) == {0: 60, 1: 30, 2: 10}
    assert sorted(fit.ids + held.ids) == split.ids
    assert fit.ids == sorted(fit.ids)
    assert held.ids == sorted(held.ids)


def test_hold_out_is_capped() -> None:
    fit, held = hold_out(classes(600, 400), 0.5, 100, seed=0)
    assert Counter(held.labels) == {0: 60, 1: 40}
    assert len(fit) == 900


def test_hold_out_of_scores_covers_the_range() -> None:
    _, held = hold_out(scores(500), 0.1, None, seed=0)
    assert Counter(int(score * 2) for score in held.labels) == dict.fromkeys(range(10), 5)


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(2, 60), min_size=1, max_size=4),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_every_class_is_on_both_sides(counts: list[int], fraction: float, seed: int) -> None:
    split = classes(*counts)
    fit, held = hold_out(split, fraction, None, seed)
    assert set(fit.labels) == set(held.labels) == set(split.labels)
    wanted = min(max(round(fraction * len(split)), len(counts)), len(split) - len(counts))
    assert len(held) == wanted
    assert sorted(fit.ids + held.ids) == split.ids


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 60), min_size=1, max_size=5), n=st.integers(1, 400), seed=st.integers(0, 5))
def test_subsample_shares(counts: list[int], n: int, seed: int) -> None:
    split = classes(*counts)
    chosen = subsample(split, n, seed)
    assert len(chosen) == min(n, len(split))
    if n >= len(counts):
        assert set(chosen.labels) == set(split.labels)
    for label, count in enumerate(counts):
        # Within one row of the share, and beyond it only where a rare class was given its one row.
        share = min(n, len(split)) * count / len(split)
        assert chosen.labels.count(label) - share < 1 or chosen.labels.count(label) == 1
        assert chosen.labels.count(label) - share > -len(counts)


@settings(deadline=None)
@given(n=st.integers(6, 60), fraction=st.floats(0.01, 0.99))
def test_hold_out_of_few_scores(n: int, fraction: float) -> None:
    fit, held = hold_out(scores(n), fraction, None, seed=0)
    assert len(fit) >= 3
    assert len(held) >= 3
    assert len(fit) + len(held) == n


def test_two_scores_always_correlate_and_are_too_few_to_choose_by() -> None:
    with pytest.raises(DataError, match=r"needs at least 3 rows; its limit is 2: raise the limit"):
        hold_out(scores(64), 0.1, 2, seed=0)
    with pytest.raises(DataError, match=r"5 rows .*expected at least six rows"):
        hold_out(scores(5), 0.4, None, seed=0)


def test_hold_out_leaves_a_rare_class_a_row_to_fit() -> None:
    # 59 of 62 rows: the share of class 0 rounds to both of its rows.
    fit, held = hold_out(classes(2, 60), 0.95, None, seed=0)
    assert Counter(held.labels) == {0: 1, 1: 58}
    assert Counter(fit.labels) == {0: 1, 1: 2}


@pytest.mark.parametrize("split", [classes(1, 5), classes(1), scores(3), Split([], None, [], [])])
def test_hold_out_of_too_few_rows(split: Split) -> None:
    with pytest.raises(DataError, match=rf"too few rows to hold a slice out: {len(split)} rows .*data\.max_train"):
        hold_out(split, 0.5, None, seed=0)


def test_hold_out_says_which_class_is_short() -> None:
    with pytest.raises(DataError, match=r"class 0: 9, class 1: 1.*at least two of each class"):
        hold_out(classes(9, 1), 0.1, None, seed=0)


def test_hold_out_limit_below_the_classes() -> None:
    with pytest.raises(DataError, match="at least 3 rows, one of each class; its limit is 2"):
        hold_out(classes(9, 9, 9), 0.1, 2, seed=0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_hold_out_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(DataError, match="held-out fraction must be between 0 and 1"):
        hold_out(classes(9, 9), fraction, None, seed=0)


def test_rows_do_not_depend_on_the_interpreter_or_other_random_streams() -> None:
    code = (
        "import random; random.random()\n"
        "from autolora.tasks.records import Split; from autolora.tasks.splits import hold_out, subsample\n"
        "s = Split([''] * 40, None, [i % 2 for i in range(40)], list(range(40)))\n"
        "print(hold_out(s, 0.2, None, 5)[1].ids, subsample(s, 8, 5).ids)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }  # fmt: skip
    assert len(outputs) == 1
    # Other rows under the same seed would make finished runs and new ones incomparable.
    assert outputs == {"[4, 9, 14, 19, 20, 31, 36, 39] [0, 1, 8, 11, 14, 21, 32, 35]\n"}
