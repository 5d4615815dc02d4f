"""Principal angles against scipy, and overlaps by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from autolora.theory.subspaces import overlap, principal_angles


@pytest.mark.parametrize(("n", "j", "k"), [(10, 3, 3), (12, 5, 2), (12, 2, 5), (6, 4, 4), (3, 1, 1)])
def test_angles_are_those_of_scipy(n: int, j: int, k: int) -> None:
    """Where two spaces are too large to avoid each other, some angles are 0."""
    generator = torch.Generator().manual_seed(n + j + k)
    a, b = (torch.randn(n, columns, generator=generator, dtype=torch.double) for columns in (j, k))
    expected = np.sort(subspace_angles(a.numpy(), b.numpy()))
    np.testing.assert_allclose(principal_angles(a, b), expected, atol=1e-9)
    np.testing.assert_allclose(principal_angles(b, a), expected, atol=1e-9)
    assert overlap(a, b) == pytest.approx(float((np.cos(expected) ** 2).mean()))


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-5, 0.3, math.pi / 2 - 1e-9, math.pi / 2])
def test_small_and_large_angles_are_exact(angle: float) -> None:
    a = torch.eye(5, dtype=torch.double)[:, :2]
    b = a.clone()
    b[0, 0], b[3, 0] = math.cos(angle), math.sin(angle)
    np.testing.assert_allclose(principal_angles(a, b), [0.0, angle], atol=1e-15, rtol=1e-6)


def test_columns_that_repeat_a_direction_do_not_count_and_zeros_have_none() -> None:
    a = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, 2.0]])
    assert principal_angles(a, torch.eye(3)[:, :1]).tolist() == pytest.approx([math.pi / 4])
    assert overlap(a, torch.zeros(3, 2)) == 0.0


def test_overlap_of_random_spaces_is_what_chance_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [
        overlap(torch.randn(40, 6, generator=generator), torch.randn(40, 3, generator=generator)) for _ in range(300)
    ]
    assert sum(draws) / len(draws) == pytest.approx(6 / 40, abs=0.01)
