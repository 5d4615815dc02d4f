"""A toy data-driven initialiser: A from the top singular vectors of each module's inputs, ranks by their energy."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn

from autolora.adapters import compact
from autolora.plan import RankPlan, rank_by_score, spend
from autolora.strategies.base import Batch, Evaluate, LossFn, Strategy, StrategyOptions


class Options(StrategyOptions):
    """How many batches to look at."""

    batches: int = 4


class ActivationSVD(Strategy[Options]):
    """Ranks go to the directions that explain most of their module's input energy, as far as the budget reaches."""

    Options = Options

    def prepare(self, batches: Iterable[Batch], loss_fn: LossFn) -> None:
        energies: dict[str, Tensor] = {}
        for name, rows in self._inputs(batches, loss_fn).items():
            layer = self.adapters.layers[name]
            _, sigma, directions = torch.linalg.svd(rows, full_matrices=False)
            with torch.no_grad():
                layer.lora_A.copy_(directions[: layer.rank])
            energies[name] = (sigma**2 / (sigma**2).sum())[: layer.rank]
        owners = [name for name, share in energies.items() for _ in share]
        order = rank_by_score(owners, torch.cat(list(energies.values())).tolist())
        plan = spend(order, self.largest, self.allowance)
        self.adapters.fix_gates({name: torch.arange(len(share)) < plan[name] for name, share in energies.items()})
        compact(self.adapters)

    def finalize(self, evaluate: Evaluate) -> RankPlan:
        return self.adapters.active_plan()

    def _inputs(self, batches: Iterable[Batch], loss_fn: LossFn) -> dict[str, Tensor]:
        """Every module's inputs over a few batches, as rows."""
        seen: dict[str, list[Tensor]] = {name: [] for name in self.adapters.layers}

        def collect(name: str) -> None:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                seen[name].append(args[0].detach().flatten(0, -2).float())

            handles.append(self.adapters.layers[name].register_forward_pre_hook(hook))

        handles: list[torch.utils.hooks.RemovableHandle] = []
        for name in seen:
            collect(name)
        with torch.no_grad():
            for batch in islice(batches, self.options.batches):
                loss_fn(self.adapters.model, batch)
        for handle in handles:
            handle.remove()
        return {name: torch.cat(rows) for name, rows in seen.items()}
