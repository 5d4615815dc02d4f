"""Numbers of weights and updates whose directions are known."""

from __future__ import annotations

import pytest
import torch

from autolora.theory.modules import update_numbers, weight_numbers
from autolora.theory.spectra import spectrum_of

N, M = 12, 8
LEFT = torch.linalg.qr(torch.randn(N, N, generator=torch.Generator().manual_seed(0), dtype=torch.double)).Q
RIGHT = torch.linalg.qr(torch.randn(M, M, generator=torch.Generator().manual_seed(1), dtype=torch.double)).Q
WEIGHT = LEFT[:, :M] @ torch.diag(torch.arange(M, 0, -1).double()) @ RIGHT.T
"""Singular values 8 to 1."""


def test_an_update_of_the_weight_s_largest_directions() -> None:
    update = LEFT[:, :2] @ torch.diag(torch.tensor([3.0, 1.0]).double()) @ RIGHT[:, :2].T
    found = update_numbers(update, WEIGHT, rank=3)
    assert found.singular_values == pytest.approx((3.0, 1.0, 0.0), abs=1e-12)
    assert found.relative_size == pytest.approx((10 / 204) ** 0.5)
    assert (found.rank, found.needed) == (3, 1)  # 9 of 10
    assert found.effective_rank == pytest.approx(4 / 27**0.25)  # p = 3/4, 1/4
    assert (found.output_overlap, found.input_overlap) == pytest.approx((1.0, 1.0))
    assert found.output_angles == pytest.approx((0.0, 0.0), abs=1e-5)
    assert (found.output_chance, found.input_chance) == pytest.approx((2 / N, 2 / M))


def test_an_update_beside_the_weight_s_largest_directions() -> None:
    """Its outputs are new directions; of its inputs one is the weight's second, the other its third."""
    update = LEFT[:, M : M + 2] @ RIGHT[:, 1:3].T
    found = update_numbers(update, WEIGHT, rank=2)
    assert found.output_angles == pytest.approx((90.0, 90.0))
    assert found.input_angles == pytest.approx((0.0, 90.0), abs=1e-5)
    assert (found.output_overlap, found.input_overlap) == pytest.approx((0.0, 0.5), abs=1e-9)


def test_an_update_that_was_never_trained() -> None:
    found = update_numbers(torch.zeros(N, M), WEIGHT, rank=2)
    assert (found.effective_rank, found.needed, found.output_overlap, found.output_angles) == (0.0, 0, 0.0, ())


def test_numbers_of_a_weight_are_those_of_its_spectrum() -> None:
    found = weight_numbers(spectrum_of(WEIGHT))
    assert found.shape == (N, M)
    assert found.stable_rank == pytest.approx(204 / 64)
    assert found.needed == (4, 5, 6)  # of 204: 174, 190, 199
    assert found.edge < found.hard
