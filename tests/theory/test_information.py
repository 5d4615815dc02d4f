"""Matrix-based information where the answer is known: identical, independent and gaussian variables, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from autolora.theory.information import (
    Code,
    codes_of,
    entropy,
    gaussian_gram,
    label_gram,
    median_width,
    mutual_information,
    permutations_of,
    price_of_labels,
    ranks_to_try,
    squared_distances,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def gram_of(rows: Tensor, width: float | None = None) -> Tensor:
    distances = squared_distances(rows.reshape(len(rows), -1))
    return gaussian_gram(distances, median_width(distances) if width is None else width)


def correlated(rho: float, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x, y = drawn(2, count, seed=seed)
    return x, rho * x + math.sqrt(1 - rho**2) * y


# Entropy --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.01, 2.0])
def test_entropy_of_all_different_all_equal_and_classes(alpha: float) -> None:
    assert float(entropy(torch.eye(32), alpha)) == pytest.approx(5.0)
    assert float(entropy(torch.ones(32, 32), alpha)) == pytest.approx(0.0, abs=1e-6)
    assert float(entropy(label_gram(torch.arange(40) % 4), alpha)) == pytest.approx(2.0)


def test_entropy_of_classes_is_that_of_their_frequencies() -> None:
    gram = label_gram(torch.tensor([0] * 6 + [1] * 3 + [2]))
    assert float(entropy(gram, 2.0)) == pytest.approx(-math.log2(0.36 + 0.09 + 0.01))
    shannon = -sum(p * math.log2(p) for p in (0.6, 0.3, 0.1))
    assert float(entropy(gram, 1.0)) == pytest.approx(shannon)
    assert float(entropy(gram)) == pytest.approx(shannon, abs=0.005)


def test_several_matrices_at_once_are_each_by_itself() -> None:
    grams = torch.stack([gram_of(drawn(20, 3, seed=seed)) for seed in range(3)])
    assert entropy(grams).tolist() == pytest.approx([float(entropy(gram)) for gram in grams])


# Mutual information ---------------------------------------------------------------------------------------------------


def test_identical_variables_share_all_that_a_kernel_tells_apart() -> None:
    """I = S for classes; a Gaussian kernel blurs, the less the narrower it is."""
    classes = label_gram(torch.arange(30) % 3)
    assert float(mutual_information(classes, classes)) == pytest.approx(float(entropy(classes)))
    rows, shares = drawn(60, 2), []
    for width in (10.0, 1.0, 0.1, 1e-4):
        gram = gram_of(rows, width)
        shares.append(float(mutual_information(gram, gram) / entropy(gram)))
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0, abs=1e-3)


def test_independent_variables_share_little_and_the_less_the_more_examples_there_are() -> None:
    means = []
    for count in (32, 96, 288):
        shared = [
            mutual_information(gram_of(drawn(count, seed=seed)), gram_of(drawn(count, seed=100 + seed)))
            / entropy(gram_of(drawn(count, seed=seed)))
            for seed in range(4)
        ]
        means.append(float(torch.stack(shared).mean()))
    assert means[0] > 1.8 * means[1] > 1.8**2 * means[2]
    assert means[2] < 0.03


def geometric_entropy(variance: float, width: float) -> float:
    """Von Neumann's entropy, in nats, of a Gaussian kernel on a normal variable of this variance.

    The eigenvalues of the kernel's operator are (1 - B) B^k with B = b / (a + b + c), a = 1 / (4 variance),
    b = 1 / (2 width), c² = a² + 2 a b (Rasmussen & Williams 2006, section 4.3.1).
    """
    a, b = 1 / (4 * variance), 1 / (2 * width)
    ratio = b / (a + b + math.sqrt(a * a + 2 * a * b))
    return -math.log(1 - ratio) - ratio * math.log(ratio) / (1 - ratio)


def gaussian_information(rho: float, width: float) -> float:
    """What the estimate tends to, in bits: along the axes of the correlation the joint kernel is a product."""
    joint = geometric_entropy(1 + rho, width) + geometric_entropy(1 - rho, width)
    return (2 * geometric_entropy(1, width) - joint) / math.log(2)


def test_gaussian_variables_have_the_information_of_the_closed_form() -> None:
    """The estimate, in excess of chance, tends to that of the kernels' operators, which is Shannon's at width 0."""
    for rho in (0.3, 0.6, 0.9):
        shannon = -0.5 * math.log2(1 - rho**2)
        apart = [shannon - gaussian_information(rho, width) for width in (1.0, 0.1, 0.01, 1e-5)]
        assert apart == sorted(apart, reverse=True)
        assert 0 < apart[-1] < 0.01
        found = []
        for seed in range(8):
            x, y = (gram_of(values, 1.0) for values in correlated(rho, 250, seed))
            chance = mutual_information(x, permutations_of(y, 4), alpha=1.0).mean()
            found.append(float(mutual_information(x, y, alpha=1.0) - chance))
        assert sum(found) / len(found) == pytest.approx(gaussian_information(rho, 1.0), abs=0.04)


def test_information_grows_with_the_correlation() -> None:
    found = []
    for rho in (0.0, 0.3, 0.6, 0.9, 0.99):
        x, y = correlated(rho, 200)
        found.append(float(mutual_information(gram_of(x), gram_of(y))))
    assert found == sorted(found)
    assert found[-1] > 5 * found[1]


@given(st.integers(2, 12), st.integers(1, 3), st.integers(0, 10**6), st.floats(0.05, 20), st.booleans())
def test_information_is_between_zero_and_the_smaller_entropy_and_symmetric(
    count: int, dims: int, seed: int, width: float, classes: bool
) -> None:
    a = gram_of(drawn(count, dims, seed=seed), width)
    # several places of classes: the share of places at which two examples agree
    places = (drawn(count, dims, seed=seed + 1) > 0).long()
    b = label_gram(places) if classes else gram_of(drawn(count, seed=seed + 1), width)
    shared = float(mutual_information(a, b))
    assert -1e-7 <= shared <= min(float(entropy(a)), float(entropy(b))) + 1e-7
    assert shared == pytest.approx(float(mutual_information(b, a)), abs=1e-9)


# Kernels --------------------------------------------------------------------------------------------------------------


def test_labels_of_every_kind() -> None:
    assert label_gram(torch.tensor([1, 0, 1])).tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    scores = label_gram(torch.tensor([0.0, 1.0, 3.0]))  # squared distances 1, 4, 9: the median is 4
    assert scores[0].tolist() == pytest.approx([1.0, math.exp(-1 / 8), math.exp(-9 / 8)])
    assert torch.equal(label_gram(torch.ones(3)), torch.ones(3, 3).double())
    assert label_gram(torch.randn(4, 2)).shape == (4, 4)
    tokens = label_gram(torch.tensor([[5, 6, 7, -100], [5, 0, 7, -100], [1, 2, 3, 4]]))
    torch.testing.assert_close(tokens, torch.tensor([[1, 0.75, 0], [0.75, 1, 0], [0, 0, 1]]).double())
    for wrong in (torch.zeros(3, 2, 2).long(), torch.zeros(3, 2, 2)):
        with pytest.raises(ValueError, match="expected a class, a score or a row of them for each example, got shape"):
            label_gram(wrong)


def test_the_width_is_the_median_or_the_mean_where_most_examples_are_the_same() -> None:
    assert median_width(squared_distances(torch.tensor([[0.0], [1.0], [3.0]]))) == 4
    assert median_width(squared_distances(torch.tensor([[0.0]] * 9 + [[2.0]]))) == pytest.approx(4 * 9 / 45)
    assert median_width(squared_distances(torch.zeros(1, 2))) == 0


# Codes ----------------------------------------------------------------------------------------------------------------


def test_ranks_to_try() -> None:
    assert ranks_to_try(1) == [1]
    assert ranks_to_try(5) == [1, 2, 3, 4, 5]
    assert ranks_to_try(40) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40]


CODE = Code((1, 2, 4), (0.5, 0.8, 1.0), (0.1, 0.25, 0.25), (0.01, -0.02))


@pytest.mark.parametrize(("beta", "optimum"), [(0.0, 0), (3.0, 0), (4.0, 2), (5.5, 2), (100.0, 2)])
def test_the_optimum_by_hand(beta: float, optimum: int) -> None:
    """At 4 the criterion is 0.1, -0.2, 0."""
    assert CODE.optimum(beta) == optimum


def test_the_criterion_by_hand() -> None:
    assert CODE.criterion(4.0) == pytest.approx((0.1, -0.2, 0.0))


def test_the_price_by_hand() -> None:
    other = Code((1,), (2.0,), (0.35,), (0.5, 0.1))
    assert price_of_labels([CODE]) == pytest.approx(1.0 / 0.25)
    assert price_of_labels([CODE, other]) == pytest.approx(3.0 / 0.6)
    silent = Code((1,), (2.0,), (0.2,), (0.5, 0.1))  # 0.45 together, and the first permutation has 0.51
    assert price_of_labels([CODE, silent]) is None
    assert price_of_labels([Code((1,), (1.0,), (-0.1,), (-0.2, -0.3))]) is None
    assert price_of_labels([]) is None


def spread_rows(count: int = 160, seed: int = 0) -> Tensor:
    """Ten directions that are less and less wide."""
    return drawn(count, 10, seed=seed) * torch.tensor([4.0, 3.4, 2.9, 2.5, 2.1, 1.8, 1.5, 1.3, 1.1, 0.9]).double()


def code_of(rows: Tensor, labels: Tensor) -> Code:
    gram = label_gram(labels)
    code = codes_of(rows, gram, permutations_of(gram, 9))
    assert code is not None
    return code


def test_labels_of_more_directions_want_a_larger_code() -> None:
    """Signs of the first one and three principal directions: two and eight classes."""
    rows = spread_rows()
    left, values, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    codes = []
    for directions in (1, 3):
        signs = ((left * values)[:, :directions] > 0).long()
        codes.append(code_of(rows, (signs * 2 ** torch.arange(directions)).sum(1)))
    prices = [price_of_labels([code]) for code in codes]
    assert None not in prices
    assert [code.optimum(price or 0.0) for code, price in zip(codes, prices, strict=True)] == [1, 3]


def test_the_last_code_says_what_the_inputs_say_and_smaller_ones_less() -> None:
    rows = spread_rows()
    code = code_of(rows, torch.arange(160) % 2)
    gram = gram_of(rows)
    assert code.ranks == (1, 2, 3, 4, 6, 8, 10)
    assert code.about_inputs[-1] == pytest.approx(float(mutual_information(gram, gram)))
    assert list(code.about_inputs) == sorted(code.about_inputs)


def test_labels_in_excess_of_chance_are_about_zero_where_they_say_nothing() -> None:
    """Without the excess a code of all directions seems to know nearly a tenth of a bit."""
    rows, labels = spread_rows(), (drawn(160, seed=7) > 0).long()
    code = code_of(rows, labels)
    assert abs(code.about_labels[-1]) < 0.02
    assert float(mutual_information(gram_of(rows), label_gram(labels))) > 0.05
    assert sum(code.by_chance) == pytest.approx(0, abs=1e-9)
    assert price_of_labels([code]) is None


def test_rows_that_are_all_the_same_have_no_code() -> None:
    gram = label_gram(torch.arange(6) % 2)
    assert codes_of(torch.ones(6, 4), gram, permutations_of(gram, 2)) is None


def test_permutations_are_the_same_every_time_and_leave_the_random_stream_alone() -> None:
    gram, before = label_gram(torch.arange(9) % 2), torch.get_rng_state()
    first = permutations_of(gram, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(permutations_of(gram, 3), first)
    assert first.sum((1, 2)).tolist() == [float(gram.sum())] * 3
