r"""O-LoRA: A stays out of the subspaces of other tasks' adapters (Wang et al., Findings of EMNLP 2023).

With the rows of A of the other adapters of a module stacked, and Q an orthonormal basis of their span, the penalty on
this adapter's A is

.. math:: \lambda \, \frac{1}{M} \sum_m \frac{\|A_m Q_m\|_F^2}{\|A_m\|_F^2},

the mean over modules of the share of A's energy that reads what the others read: 0 where it reads nothing of it, 1
where it reads nothing else. (Published, section 3.2, is the sum of the inner products of the rows themselves, which a
smaller A makes smaller too.) A begins outside of the span: what it draws is projected, and its rows get their lengths
back, so that the penalty starts at 0. The ranks are those of a plan, as with ``strategy=manual``, or uniform at the
budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, Strict, field_validator

from autolora.config import PathLike
from autolora.errors import TargetError
from autolora.plan import RankPlan, even_order, spend
from autolora.strategies.base import Planned
from autolora.strategies.manual import Options as ManualOptions
from autolora.strategies.manual import find_plan, plan_in_file

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autolora.adapters import Adapters, AdapterSettings


class Options(ManualOptions):
    """``path`` of a plan (uniform ranks without one), folders of the ``others``' adapters, and ``weight``, lambda."""

    others: Annotated[tuple[PathLike, ...], Strict(False)] = ()
    weight: float = Field(default=1.0, ge=0)

    @field_validator("path")
    @classmethod
    def _given(cls, path: Path | None) -> Path | None:
        return None if path is None else find_plan(path)


class OLoRA(Planned[Options]):
    """Adapters beside others; the module's docstring gives the penalty."""

    Options = Options

    def plan(self) -> RankPlan:
        """The plan of the file, or uniform ranks."""
        if self.options.path is not None:
            return plan_in_file(self, self.options)
        return spend(even_order(self.largest), self.largest, self.allowance)

    def attach(self, model: nn.Module, settings: AdapterSettings) -> Adapters:
        """Adapters that begin outside of the others' subspaces.

        Raises:
            TargetError: if the others leave a module no direction of its own.
        """
        adapters = super().attach(model, settings)
        widths = {name: layer.in_features for name, layer in adapters.layers.items()}
        self.bases = subspaces(self.options.others, widths)
        for name, basis in self.bases.items():
            layer = adapters.layers[name]
            if basis.shape[1] + layer.rank > layer.in_features:
                raise TargetError(
                    f"{name}: the other adapters read {basis.shape[1]} of {layer.in_features} directions, which leaves "
                    f"too few for rank {layer.rank}: lower the ranks, or leave some of strategy.others out"
                )
            a = layer.lora_A.data
            lengths = a.norm(dim=1, keepdim=True)
            a -= a @ basis.to(a) @ basis.to(a).T
            a *= lengths / a.norm(dim=1, keepdim=True)
        return adapters

    def overlap(self) -> Tensor | None:
        """The mean share of A's energy in the others' subspaces; ``None`` where there are no others."""
        import torch

        shares = []
        for name, basis in self.bases.items():
            a = self.adapters.layers[name].lora_A
            if basis.device != a.device or basis.dtype != a.dtype:
                self.bases[name] = basis = basis.to(a)
            shares.append((a @ basis).square().sum() / a.square().sum())
        return torch.stack(shares).mean() if shares else None

    def penalty(self, loss: Tensor) -> Tensor | None:
        """The weight times the overlap."""
        overlap = self.overlap() if self.options.weight else None
        return None if overlap is None else self.options.weight * overlap

    def progress(self) -> dict[str, float]:
        """The overlap."""
        overlap = self.overlap()
        return {} if overlap is None else {"overlap": float(overlap.detach())}


def subspaces(others: Sequence[Path], widths: dict[str, int]) -> dict[str, Tensor]:
    """An orthonormal basis of what other adapters read, ``(in, k)``, by module; modules that none adapts are left out.

    Args:
        others: folders of PEFT adapters.
        widths: inputs of the modules that matter.

    Raises:
        DataError: if a folder has no adapter.
        TargetError: if an adapter is of another width.
    """
    import torch

    from autolora.adapters.peft_format.load import read_factors

    rows: dict[str, list[Tensor]] = {}
    for folder in others:
        for name, (a, _) in read_factors(folder).items():
            if name in widths:
                if a.shape[1] != widths[name]:
                    raise TargetError(f"{folder}: {name} reads {a.shape[1]} inputs, expected {widths[name]}")
                rows.setdefault(name, []).append(a.float())
    found = {}
    for name, parts in rows.items():
        _, values, directions = torch.linalg.svd(torch.cat(parts), full_matrices=False)
        found[name] = directions[values > 1e-6 * values.max()].T
    return {name: basis for name, basis in found.items() if basis.shape[1]}
