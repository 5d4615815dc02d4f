r"""Which directions of a matrix are more than noise, by the theory of random matrices.

A matrix ``(m, n)`` of independent entries of mean 0 and variance :math:`\sigma^2` has no direction that means anything,
and yet a spectrum. With p and q the smaller and the larger of m and n, and :math:`\beta = p / q`, its squared singular
values over :math:`q \sigma^2` are spread as the Marchenko-Pastur law says (Marchenko & Pastur, 1967),

.. math:: f(x) = \frac{\sqrt{(b_+ - x)(x - b_-)}}{2 \pi \beta x}, \qquad b_\pm = (1 \pm \sqrt\beta)^2,

so that none is above the edge :math:`\sigma (\sqrt m + \sqrt n)` when the matrix is large. A direction that was added
to the noise is seen above the edge if its own singular value is above :math:`\sigma q^{1/2} \beta^{1/4}` (Baik, Ben
Arous & Péché, Annals of Probability 2005; Benaych-Georges & Nadakuditi, J. Multivariate Analysis 2012, section 3.1),
and keeping it brings a reconstruction nearer to what was added if its singular value *here* is above the optimal hard
threshold (Gavish & Donoho, IEEE Trans. Information Theory 2014, section III)

.. math:: \lambda(\beta) \sqrt q \, \sigma, \qquad
   \lambda(\beta) = \sqrt{2 (\beta + 1) + \frac{8 \beta}{\beta + 1 + \sqrt{\beta^2 + 14 \beta + 1}}},

which is above the edge. How large the noise is is estimated from the bulk of the spectrum, which few directions do not
move (:func:`noise_level`). That a pretrained weight is noise and a few directions is a model of it, not a fact.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from autolora.theory.spectra import Spectrum

Threshold = Literal["hard", "edge"]
TRACY_WIDOM_99 = 2.02345
"""The 99 % quantile of the Tracy-Widom law for real matrices (Bejan, "Largest eigenvalues and sample covariance
matrices", 2005, table of quantiles; Johnstone, Annals of Statistics 2001, table 1, has 2.02)."""
_CELLS = 1 << 14


@lru_cache(maxsize=64)
def _law(beta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""Points of the law's support, its mass in a cell around each, and the points' upper edges.

    With :math:`x = 1 + \beta - 2 \sqrt\beta \cos \theta` the density has no root left, and the midpoint rule over
    :math:`\theta` is exact to rounding.
    """
    if not 0 < beta <= 1:
        raise ValueError(f"beta: expected the smaller side over the larger, above 0 and at most 1, got {beta}")
    middles = (np.arange(_CELLS) + 0.5) * np.pi / _CELLS
    edges = (np.arange(_CELLS) + 1.0) * np.pi / _CELLS
    points, upper = (1 + beta - 2 * np.sqrt(beta) * np.cos(angle) for angle in (middles, edges))
    return points, 2 * np.sin(middles) ** 2 / (np.pi * points) * np.pi / _CELLS, upper


def mp_density(x: np.ndarray, beta: float) -> np.ndarray:
    """The density f at some x; 0 outside its support."""
    low, high = (1 - beta**0.5) ** 2, (1 + beta**0.5) ** 2
    return np.sqrt(np.clip((high - x) * (x - low), 0, None)) / (2 * np.pi * beta * x)


def mp_moment(order: int, beta: float, below: float = 1.0) -> float:
    r"""The integral of :math:`x^{order} f(x)` over the smallest values, which have a share ``below`` of the mass."""
    points, mass, _ = _law(beta)
    before = np.concatenate([[0.0], mass.cumsum()[:-1]])
    return float((points**order * np.clip(below - before, 0, mass)).sum())


def mp_quantile(share: float, beta: float) -> float:
    """The value below which the law has a share of its mass."""
    _, mass, upper = _law(beta)
    lowest = (1 - beta**0.5) ** 2
    return float(np.interp(share, np.concatenate([[0.0], mass.cumsum()]), np.concatenate([[lowest], upper])))


def hard_coefficient(beta: float) -> float:
    r""":math:`\lambda(\beta)`: the optimal hard threshold over :math:`\sqrt q \, \sigma`; 4/√3 for square matrices."""
    return float(np.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + np.sqrt(beta**2 + 14 * beta + 1))))


def hard_coefficient_of_median(beta: float) -> float:
    r""":math:`\omega(\beta) = \lambda(\beta) / \sqrt{\mu_\beta}`, the threshold over the *median singular value*.

    (Gavish & Donoho, section III.E.) :math:`\mu_\beta` is the median of the law. 2.858 for square matrices.
    """
    return hard_coefficient(beta) / mp_quantile(0.5, beta) ** 0.5


def noise_level(spectrum: Spectrum) -> float:
    r"""An estimate of :math:`\sigma` from the bulk of a spectrum.

    Where all singular values are known it is that of Gavish & Donoho: their median over :math:`\sqrt{q \mu_\beta}`.
    Where only the k largest are, it is the energy of the others over what the law says that the smallest
    :math:`1 - k/p` of pure noise have. Both are right to the extent that directions beyond noise are few, of the first
    half and of the k largest.
    """
    p, q = sorted(spectrum.shape)
    beta = p / q
    if spectrum.complete:
        return float(spectrum.values.quantile(0.5)) / (q * mp_quantile(0.5, beta)) ** 0.5
    left = max(0.0, spectrum.total - float(spectrum.values.square().sum()))
    return (left / (q * p * mp_moment(1, beta, below=1 - len(spectrum.values) / p))) ** 0.5


def largest_noise(shape: tuple[int, int], noise: float) -> float:
    r"""What the largest singular value of pure noise stays below in 99 of 100 matrices of this size.

    The edge :math:`\sigma (\sqrt m + \sqrt n)`, raised by as much as the largest value moves about it: its square has
    centre :math:`(\sqrt{q - 1} + \sqrt p)^2` and scale
    :math:`(\sqrt{q - 1} + \sqrt p) (1 / \sqrt{q - 1} + 1 / \sqrt p)^{1/3}`, over :math:`\sigma^2`, about which it is
    spread as Tracy and Widom's law (Johnstone, Annals of Statistics 2001, theorem 1). In large matrices it is the edge.
    """
    p, q = sorted(shape)
    roots = max(q - 1, 1) ** 0.5, p**0.5
    scale = sum(roots) * sum(1 / root for root in roots) ** (1 / 3)
    return noise * (sum(roots) ** 2 + TRACY_WIDOM_99 * scale) ** 0.5


def threshold_of(spectrum: Spectrum, kind: Threshold, noise: float | None = None) -> float:
    """The singular value above which a direction is signal.

    Args:
        spectrum: of the matrix.
        kind: ``hard``, the optimal hard threshold; ``edge``, what noise reaches (:func:`largest_noise`).
        noise: the standard deviation of the noise's entries; estimated by :func:`noise_level` if ``None``.
    """
    p, q = sorted(spectrum.shape)
    noise = noise_level(spectrum) if noise is None else noise
    return hard_coefficient(p / q) * q**0.5 * noise if kind == "hard" else largest_noise(spectrum.shape, noise)


def signal_directions(spectrum: Spectrum, kind: Threshold, noise: float | None = None) -> int:
    """How many directions are signal: known singular values above the threshold, and above rounding errors."""
    if not len(spectrum.values):
        return 0
    rounding = float(spectrum.values[0]) * max(spectrum.shape) * torch.finfo(torch.float32).eps
    return int((spectrum.values > max(threshold_of(spectrum, kind, noise), rounding)).sum())
