"""What theory says of one module: numbers of its weight, and of the update that training has made to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autolora.theory.random_matrix import noise_level, signal_directions, threshold_of
from autolora.theory.spectra import Spectrum, spectrum_of
from autolora.theory.subspaces import overlap, principal_angles

SHARES = (0.8, 0.9, 0.95)
"""Of a weight's energy; the middle one is what ``strategy=spectral`` goes by unless it is told otherwise."""


@dataclass(frozen=True)
class WeightNumbers:
    """Numbers of a weight ``(m, n)``; see :mod:`autolora.theory.spectra` and :mod:`autolora.theory.random_matrix`.

    Args:
        shape: of the weight as it is stored.
        stable_rank, effective_rank: ``None`` where a large weight is known in part.
        needed: directions that explain :data:`SHARES` of the energy; ``None`` where they are more than are known.
        noise: estimated standard deviation of an entry's noise.
        edge, hard: singular values that noise reaches, and that a direction is worth keeping above.
        above_edge, above_hard: directions above them.
    """

    shape: tuple[int, int]
    stable_rank: float
    effective_rank: float | None
    needed: tuple[int | None, ...]
    noise: float
    edge: float
    hard: float
    above_edge: int
    above_hard: int


def weight_numbers(spectrum: Spectrum) -> WeightNumbers:
    """The numbers of a weight from its spectrum."""
    noise = noise_level(spectrum)
    return WeightNumbers(
        shape=spectrum.shape,
        stable_rank=spectrum.stable_rank,
        effective_rank=spectrum.effective_rank,
        needed=tuple(spectrum.needed(share) for share in SHARES),
        noise=noise,
        edge=threshold_of(spectrum, "edge", noise),
        hard=threshold_of(spectrum, "hard", noise),
        above_edge=signal_directions(spectrum, "edge", noise),
        above_hard=signal_directions(spectrum, "hard", noise),
    )


@dataclass(frozen=True)
class UpdateNumbers:
    """Numbers of the update of a weight, both ``(out, in)``.

    Args:
        rank: components that the adapter has.
        singular_values: of the update, the scale s included, one for each component.
        relative_size: the update's Frobenius norm over the weight's.
        effective_rank, needed: how many of the components the task has used: :attr:`Spectrum.effective_rank`, and the
            directions that explain 90 % of the update's energy.
        output_angles, input_angles: principal angles in degrees, ascending, between the update's column (row) space and
            that of as many of the weight's largest singular directions.
        output_overlap, input_overlap: the mean squared cosines of these angles.
        output_chance, input_chance: what two random subspaces of this size have on average: rank / out, rank / in.
    """

    rank: int
    singular_values: tuple[float, ...]
    relative_size: float
    effective_rank: float
    needed: int
    output_angles: tuple[float, ...]
    input_angles: tuple[float, ...]
    output_overlap: float
    input_overlap: float
    output_chance: float
    input_chance: float


def update_numbers(update: Tensor, weight: Tensor, rank: int) -> UpdateNumbers:
    """Compare an update ``(out, in)`` of a given rank, at least 1, with the weight that it is added to."""
    update, weight = update.detach().cpu().double(), weight.detach().cpu().double()
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    values = values[:rank]
    rounding = float(values[0]) * max(update.shape) * torch.finfo(torch.float32).eps
    used = int((values > rounding).sum())
    left, right = left[:, :used], right[:used].T
    own_left, _, own_right = torch.linalg.svd(weight, full_matrices=False)
    own_left, own_right = own_left[:, :used], own_right[:used].T
    spectrum = spectrum_of(torch.diag(values))
    size = float(weight.norm())
    out_features, in_features = update.shape
    return UpdateNumbers(
        rank=rank,
        singular_values=tuple(values.tolist()),
        relative_size=float(update.norm()) / size if size else 0.0,
        effective_rank=spectrum.effective_rank or 0.0,
        needed=spectrum.needed(0.9) or 0,
        output_angles=_degrees(left, own_left),
        input_angles=_degrees(right, own_right),
        output_overlap=overlap(left, own_left),
        input_overlap=overlap(right, own_right),
        output_chance=used / out_features,
        input_chance=used / in_features,
    )


def _degrees(a: Tensor, b: Tensor) -> tuple[float, ...]:
    return tuple(principal_angles(a, b).rad2deg().tolist())
