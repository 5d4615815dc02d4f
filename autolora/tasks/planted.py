"""A regression whose true ranks are known, to see whether a strategy finds them.

Teacher and student are the same small residual network,

    x <- x + V_i gelu(U_i x),    i = 0, 1, ...    U_i: (width_i, dim)   V_i: (dim, width_i)

with frozen gaussian weights W. The teacher's weights are ``W + dW``, where dW of each module has a rank that is given
and singular values that are given; the student starts from W and learns the rest through its adapters. Inputs are
fresh standard gaussians, the loss is the mean squared error. A strategy that works finds the ranks of dW.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autolora.errors import ConfigError
from autolora.plan import RankPlan, Site

Profile = Literal["equal", "decaying"]


class ResidualNet(nn.Module):
    """Blocks ``x + V gelu(U x)``; the Linears are named U0, V0, U1, V1, ... and have no bias."""

    def __init__(self, dim: int, widths: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        for i, width in enumerate(widths):
            for name, (n_in, n_out) in {f"U{i}": (dim, width), f"V{i}": (width, dim)}.items():
                linear = nn.Linear(n_in, n_out, bias=False)
                with torch.no_grad():
                    linear.weight.normal_(0.0, n_in**-0.5, generator=generator)
                self.add_module(name, linear)
        self.depth = len(widths)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(batch, dim)`` to ``(batch, dim)``."""
        x = inputs
        for i in range(self.depth):
            x = x + self.get_submodule(f"V{i}")(F.gelu(self.get_submodule(f"U{i}")(x)))
        return x


@dataclass(frozen=True)
class TeacherStudent:
    """Teacher, student and the true ranks. Made by :func:`plant`."""

    teacher: ResidualNet
    student: ResidualNet
    true_plan: RankPlan
    noise: float

    @torch.no_grad()
    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh inputs and what the teacher says of them, plus gaussian noise of the given standard deviation."""
        dim = next(iter(self.true_plan.sites.values())).in_features
        inputs = torch.randn(size, dim, generator=generator)
        targets = self.teacher(inputs)
        if self.noise:
            targets = targets + self.noise * torch.randn(targets.shape, generator=generator)
        return {"inputs": inputs, "labels": targets}


def plant(
    *,
    dim: int = 64,
    widths: Sequence[int] = (32, 64, 128),
    ranks: Sequence[int] = (0, 1, 2, 4, 8, 3),
    singular_value: float = 1.5,
    profile: Profile = "equal",
    noise: float = 0.0,
    seed: int = 0,
) -> TeacherStudent:
    """Make a teacher with updates of known rank.

    Args:
        dim: width of the residual stream.
        widths: hidden width of each block.
        ranks: rank of dW of U0, V0, U1, V1, ... in this order.
        singular_value: the largest singular value of every dW.
        profile: ``equal``: all singular values of a dW are the same; ``decaying``: the k-th is ``singular_value / k``.
        noise: standard deviation of gaussian noise on the targets in training.
        seed: of the weights and the updates.

    Raises:
        ConfigError: if there are not two ranks per width, or a rank is above min(in, out).
    """
    if len(ranks) != 2 * len(widths):
        raise ConfigError(f"task.ranks: expected {2 * len(widths)} ranks (U and V of each width), got {len(ranks)}")
    student = ResidualNet(dim, widths, torch.Generator().manual_seed(seed))
    teacher = ResidualNet(dim, widths, torch.Generator().manual_seed(seed))
    sites = {name: Site(m.in_features, m.out_features) for name, m in student.named_children()}  # type: ignore[arg-type]
    for (name, site), rank in zip(sites.items(), ranks, strict=True):
        if not 0 <= rank <= site.full_rank:
            raise ConfigError(f"task.ranks: {name} takes 0 to {site.full_rank} (min(in, out)), got {rank}")
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    for (name, site), rank in zip(sites.items(), ranks, strict=True):
        with torch.no_grad():
            teacher.get_parameter(f"{name}.weight").add_(update(site, rank, singular_value, profile, generator))
    teacher.requires_grad_(False)
    return TeacherStudent(teacher, student, RankPlan(sites, dict(zip(sites, ranks, strict=True))), noise)


def update(site: Site, rank: int, singular_value: float, profile: Profile, generator: torch.Generator) -> Tensor:
    """A dW of known rank: ``(out, in)``, with random singular vectors; see :func:`plant`."""
    left, _ = torch.linalg.qr(torch.randn(site.out_features, max(rank, 1), generator=generator))
    right, _ = torch.linalg.qr(torch.randn(site.in_features, max(rank, 1), generator=generator))
    decay = torch.arange(1, rank + 1) if profile == "decaying" else torch.ones(rank)
    return (left[:, :rank] * (singular_value / decay)) @ right[:, :rank].T


def exact_fraction(true: Mapping[str, int], found: Mapping[str, int]) -> float:
    """Share of modules whose found rank is the true one."""
    return sum(found.get(name, 0) == rank for name, rank in true.items()) / len(true)
