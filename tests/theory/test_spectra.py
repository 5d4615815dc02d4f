"""Energies and principal directions, against numpy and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA, IncrementalPCA
from torch import Tensor

from autolora.theory.spectra import Principal, absorb, directions_needed, energies, spectrum_of


def decaying(rows: int, columns: int, seed: int, decay: float = 0.8) -> Tensor:
    """Correlated rows about a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=torch.Generator().manual_seed(0))).Q
    codes = torch.randn(rows, columns, generator=generator) * decay ** torch.arange(columns)
    return codes @ basis + 0.5


def absorbed(batches: list[Tensor], keep: int) -> Principal:
    principal = None
    for rows in batches:
        principal = absorb(principal, rows, keep)
    assert principal is not None
    return principal


def test_energies_are_squared_singular_values() -> None:
    matrix = torch.randn(7, 4)
    np.testing.assert_allclose(energies(matrix), np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("energy", "share", "needed"),
    [
        ([9.0, 4.0, 4.0, 1.0], 0.5, 1),
        ([9.0, 4.0, 4.0, 1.0], 0.51, 2),
        ([9.0, 4.0, 4.0, 1.0], 13 / 18, 2),
        ([9.0, 4.0, 4.0, 1.0], 1.0, 4),
        ([9.0, 0.0], 1.0, 1),
        ([0.0, 0.0], 0.9, 0),
        ([], 0.9, 0),
    ],
)
def test_directions_needed_by_hand(energy: list[float], share: float, needed: int) -> None:
    assert directions_needed(torch.tensor(energy), share) == needed


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=20), st.floats(0.01, 1))
def test_directions_needed_are_enough_and_one_fewer_is_not(values: list[float], share: float) -> None:
    energy = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    needed = directions_needed(energy, share)
    assert energy[:needed].sum() >= share * energy.sum() * (1 - 1e-9)
    assert energy[: needed - 1].sum() < share * energy.sum()


@pytest.mark.parametrize(("columns", "keep"), [(12, 12), (12, 5), (60, 8)])
def test_batches_are_decomposed_as_by_scikit_learn(columns: int, keep: int) -> None:
    """Several batches, of fewer rows than columns and of more, cut to a few directions after each."""
    batches = [decaying(rows, columns, seed) for seed, rows in enumerate((40, 15, 70))]
    principal, reference = absorbed(batches, keep), IncrementalPCA(n_components=keep)
    for rows in batches:
        reference.partial_fit(rows.double().numpy())
    np.testing.assert_allclose(principal.values, reference.singular_values_, rtol=1e-6)
    np.testing.assert_allclose(principal.explained, reference.explained_variance_ratio_, rtol=1e-6)
    np.testing.assert_allclose(principal.mean, reference.mean_, rtol=1e-6)
    cosines = (principal.directions * torch.from_numpy(reference.components_)).sum(1).abs()
    np.testing.assert_allclose(cosines, 1.0, rtol=1e-6)


def test_nothing_is_lost_until_something_is_cut() -> None:
    batches = [decaying(rows, 9, seed) for seed, rows in enumerate((4, 1, 30))]
    principal, reference = absorbed(batches, keep=9), PCA().fit(torch.cat(batches).double().numpy())
    assert principal.rows == 35
    np.testing.assert_allclose(principal.values, reference.singular_values_, rtol=1e-6)
    np.testing.assert_allclose(principal.explained, reference.explained_variance_ratio_, rtol=1e-6)
    assert float(principal.explained.sum()) == pytest.approx(1.0)


def test_rows_that_vary_in_few_directions_have_no_more() -> None:
    rows = torch.randn(20, 3) @ torch.randn(3, 10)
    principal = absorbed([rows, rows], keep=6)
    assert int((principal.values > 0).sum()) == 3
    assert float(principal.explained.sum()) == pytest.approx(1.0)


def test_equal_rows_explain_nothing() -> None:
    principal = absorbed([torch.ones(5, 4), torch.ones(1, 4)], keep=3)
    assert principal.explained.tolist() == [0.0] * len(principal.values)


def test_the_global_random_stream_is_left_alone() -> None:
    before = torch.get_rng_state()
    first = absorb(None, decaying(50, 80, 0), keep=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(1)
    assert torch.equal(absorb(None, decaying(50, 80, 0), keep=2).directions, first.directions)


# Spectra of matrices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "stable", "effective"),
    [
        ([2.0, 2.0, 2.0, 2.0], 4.0, 4.0),
        ([5.0, 0.0, 0.0], 1.0, 1.0),
        ([4.0, 2.0], 20 / 16, 3 / 2 ** (2 / 3)),  # p = 2/3, 1/3: exp(ln 3 - 2/3 ln 2)
        ([0.0, 0.0], 0.0, 0.0),
    ],
)
def test_ranks_of_hand_made_spectra(values: list[float], stable: float, effective: float) -> None:
    turned = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.double)).Q
    spectrum = spectrum_of(turned @ torch.diag(torch.tensor(values, dtype=torch.double)))
    assert spectrum.stable_rank == pytest.approx(stable)
    assert spectrum.effective_rank == pytest.approx(effective)
    assert spectrum.complete


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8), st.floats(0.01, 100))
def test_ranks_are_between_one_and_the_rank_and_free_of_scale(values: list[float], factor: float) -> None:
    spectrum, scaled = (spectrum_of(c * torch.diag(torch.tensor(values).double())) for c in (1, factor))
    assert spectrum.effective_rank is not None
    assert 1 - 1e-9 <= spectrum.stable_rank <= len(values) + 1e-9
    assert 1 - 1e-9 <= spectrum.effective_rank <= len(values) + 1e-9
    assert scaled.stable_rank == pytest.approx(spectrum.stable_rank)
    assert scaled.effective_rank == pytest.approx(spectrum.effective_rank)


@pytest.mark.parametrize("shape", [(300, 120), (120, 300)])
def test_the_largest_singular_values_of_a_large_matrix_are_the_exact_ones(shape: tuple[int, int]) -> None:
    """Directions that decay slowly under noise: the hard case of a random subspace."""
    matrix = decaying(*shape, seed=3, decay=0.97) + 0.05 * torch.randn(
        shape, generator=torch.Generator().manual_seed(0)
    )
    exact, found = spectrum_of(matrix), spectrum_of(matrix, exact_up_to=100, largest=40)
    assert (exact.complete, found.complete, len(found.values)) == (True, False, 40)
    np.testing.assert_allclose(found.values, exact.values[:40], rtol=1e-3)
    np.testing.assert_allclose(found.values[:10], exact.values[:10], rtol=1e-6)
    assert found.total == pytest.approx(exact.total)
    assert found.stable_rank == pytest.approx(exact.stable_rank)
    assert found.effective_rank is None
    needed = {share: exact.needed(share) for share in (0.3, 0.5, 0.7, 0.9, 0.99)}
    assert {share: found.needed(share) for share in needed} == {
        share: count if count is not None and count <= 40 else None for share, count in needed.items()
    }
    assert None in [found.needed(share) for share in needed]
