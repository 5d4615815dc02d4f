"""Random matrix theory: the law against its closed forms, thresholds against the paper's table, and what is counted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq
from torch import Tensor

from autolora.theory.random_matrix import (
    hard_coefficient,
    hard_coefficient_of_median,
    largest_noise,
    mp_density,
    mp_moment,
    mp_quantile,
    noise_level,
    signal_directions,
    threshold_of,
)
from autolora.theory.spectra import Spectrum, spectrum_of

SHAPES = [(300, 300), (400, 100), (150, 450)]


def noise(shape: tuple[int, int], seed: int, level: float = 0.3) -> Tensor:
    return level * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def spiked(shape: tuple[int, int], strengths: list[float], seed: int, level: float = 0.3) -> Tensor:
    """Noise, and directions whose own singular values are so many times ``level sqrt(q)``."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, len(strengths), generator=generator).double()).Q for n in shape)
    values = level * max(shape) ** 0.5 * torch.tensor(strengths, dtype=torch.double)
    return noise(shape, seed + 1000, level) + left @ torch.diag(values) @ right.T


def seen(strength: float, beta: float) -> float:
    """Where a direction of this strength is seen in the noise (Benaych-Georges & Nadakuditi 2012, section 3.1)."""
    return math.sqrt((strength + 1 / strength) * (strength + beta / strength))


# The law --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.01, 0.25, 0.7, 1.0])
def test_moments_are_the_closed_forms(beta: float) -> None:
    """Narayana polynomials: 1, 1, 1 + b, 1 + 3 b + b², 1 + 6 b + 6 b² + b³."""
    closed = [1, 1, 1 + beta, 1 + 3 * beta + beta**2, 1 + 6 * beta + 6 * beta**2 + beta**3]
    assert [mp_moment(k, beta) for k in range(5)] == pytest.approx(closed, rel=1e-9)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_quantiles_and_truncated_moments_are_integrals_of_the_density(beta: float, share: float) -> None:
    low, place = (1 - beta**0.5) ** 2, mp_quantile(share, beta)
    of_mass, of_mean = (
        quad(lambda x, k=k: x**k * mp_density(np.array(x), beta), low, place, limit=200)[0] for k in (0, 1)
    )
    assert of_mass == pytest.approx(share, abs=2e-6)
    assert mp_moment(1, beta, below=share) == pytest.approx(of_mean, abs=1e-4)


def test_the_law_is_that_of_random_matrices() -> None:
    squares = spectrum_of(noise((1200, 600), 0, 1.0)).values.square() / 1200
    for share in (0.1, 0.5, 0.9):
        assert float(squares.quantile(share)) == pytest.approx(mp_quantile(share, 0.5), abs=0.02)


@pytest.mark.parametrize("beta", [0.0, -0.1, 1.1])
def test_an_impossible_ratio_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="expected the smaller side over the larger"):
        mp_quantile(0.5, beta)


# Thresholds -----------------------------------------------------------------------------------------------------------


def test_thresholds_are_those_of_the_paper() -> None:
    """Gavish & Donoho 2014: 4/√3 for square matrices, and rows of the table of the coefficient of the median."""
    assert hard_coefficient(1.0) == pytest.approx(4 / math.sqrt(3), rel=1e-12)
    assert hard_coefficient(1e-12) == pytest.approx(math.sqrt(2), rel=1e-5)
    table = {0.05: 1.5194, 0.1: 1.6089, 0.5: 2.1711, 0.75: 2.5011, 1.0: 2.8582}
    found = {beta: hard_coefficient_of_median(beta) for beta in table}
    assert found == pytest.approx(table, abs=5e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_unknown_noise_is_the_median_and_its_coefficient(shape: tuple[int, int]) -> None:
    spectrum = spectrum_of(spiked(shape, [3.0, 2.0], 0))
    p, q = sorted(shape)
    median = float(np.median(spectrum.values))
    assert threshold_of(spectrum, "hard") == pytest.approx(hard_coefficient_of_median(p / q) * median, rel=1e-9)
    assert threshold_of(spectrum, "hard", noise=2.0) == pytest.approx(hard_coefficient(p / q) * math.sqrt(q) * 2)


def test_what_noise_reaches_is_the_edge_and_a_little_that_vanishes() -> None:
    for size, excess in ((50, 0.06), (1000, 0.01), (10**6, 1e-4)):
        edge = 0.5 * (math.sqrt(size) + math.sqrt(4 * size))
        assert edge < largest_noise((4 * size, size), 0.5) < (1 + excess) * edge


@pytest.mark.parametrize("shape", [*SHAPES, (40, 20)])
@pytest.mark.parametrize("known", [1.0, 0.2])
def test_the_noise_is_found_from_all_or_the_largest_singular_values(shape: tuple[int, int], known: float) -> None:
    matrix = spiked(shape, [5.0, 3.0], 3)
    whole = spectrum_of(matrix)
    spectrum = Spectrum(whole.shape, whole.values[: int(known * len(whole.values))], whole.total)
    assert spectrum.complete == (known == 1)
    assert noise_level(spectrum) == pytest.approx(0.3, rel=0.03 if min(shape) >= 100 else 0.15)


# What is counted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(60, 60), (200, 50), (180, 180)])
def test_noise_has_no_directions(shape: tuple[int, int]) -> None:
    """The edge is to be passed by 1 % of matrices, up to what the estimate of the noise adds."""
    spectra = [spectrum_of(noise(shape, seed)) for seed in range(100)]
    assert sum(signal_directions(spectrum, "hard") for spectrum in spectra) == 0
    assert sum(signal_directions(spectrum, "edge", noise=0.3) > 0 for spectrum in spectra) <= 5
    assert sum(signal_directions(spectrum, "edge") > 0 for spectrum in spectra) <= 12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 6])
def test_directions_above_the_transition_are_counted_and_those_below_are_not(
    shape: tuple[int, int], count: int
) -> None:
    transition = (min(shape) / max(shape)) ** 0.25
    for seed in range(3):
        above = spectrum_of(spiked(shape, [(1.7 + 0.2 * i) * transition for i in range(count)], seed))
        below = spectrum_of(spiked(shape, [(0.4 + 0.05 * i) * transition for i in range(count)], seed))
        assert signal_directions(above, "edge") == count
        assert signal_directions(below, "edge") == 0


def test_directions_are_seen_where_theory_says_and_between_the_thresholds_they_are_not_worth_keeping() -> None:
    shape, beta = (400, 200), 0.5
    worth = brentq(lambda strength: seen(strength, beta) - hard_coefficient(beta), beta**0.25, 5)
    strengths = [1.7 * worth, 1.3 * worth, 0.94 * worth]
    spectra = [spectrum_of(spiked(shape, strengths, seed)) for seed in range(8)]
    places = torch.stack([spectrum.values[:3] for spectrum in spectra]).mean(0) / (0.3 * math.sqrt(400))
    assert places.tolist() == pytest.approx([seen(strength, beta) for strength in strengths], rel=0.015)
    for spectrum in spectra:
        assert signal_directions(spectrum, "hard") in (2, 3)
        assert signal_directions(spectrum, "edge") == 3
    assert sum(signal_directions(spectrum, "hard") == 2 for spectrum in spectra) >= 6


def test_without_noise_every_direction_counts_and_zeros_have_none() -> None:
    low = noise((40, 3), 0) @ noise((3, 30), 1)
    for kind in ("hard", "edge"):
        assert signal_directions(spectrum_of(low.float()), kind) == 3
        assert signal_directions(spectrum_of(torch.zeros(8, 5)), kind) == 0


@given(st.floats(1e-3, 1e3), st.sampled_from(["hard", "edge"]), st.booleans())
def test_neither_the_scale_of_a_weight_nor_its_layout_matters(factor: float, kind: str, transposed: bool) -> None:
    matrix = spiked((60, 40), [2.5, 1.9, 1.2], 5)
    other = factor * (matrix.T if transposed else matrix)
    assert signal_directions(spectrum_of(other), kind) == signal_directions(spectrum_of(matrix), kind)  # type: ignore[arg-type]
