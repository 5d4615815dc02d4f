"""Forward passes without gradients that can be timed against each other, and what happens once in a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle

import torch
from torch import Tensor, nn

from autolora.adapters import Adapters, attach, compact, find_sites, largest_plan
from autolora.bench.contenders import BUDGET_RANK, autolora_in, make_strategy, with_peft
from autolora.bench.model import Precision, Subject, run_config
from autolora.parts import adapter_settings
from autolora.plan import RankPlan
from autolora.strategies.base import Batch

_MIXED = (8, 4, 2, 6, 0)  # 4 on average, as the budget


def mixed_plan(subject: Subject) -> RankPlan:
    """Ranks such as a selection leaves them: unequal, and 0 for one module in five."""
    sites = find_sites(subject.backbone.model, adapter_settings(run_config("uniform")))
    return RankPlan(sites, {name: min(r, sites[name].full_rank) for name, r in zip(sites, cycle(_MIXED), strict=False)})


def compacted(subject: Subject) -> Adapters:
    """Adapters of the largest rank that a mask and compaction have brought to the mixed plan; B is not 0."""
    config, plan = run_config("uniform"), mixed_plan(subject)
    settings = adapter_settings(config)
    adapters = attach(subject.copy(), settings, largest_plan(plan.sites, settings, config.max_rank))
    generator = torch.Generator().manual_seed(0)
    for layer in adapters.layers.values():
        b = torch.empty(layer.lora_B.shape).normal_(0, 0.02, generator=generator)
        layer.lora_B.data.copy_(b)
    adapters.fix_gates({n: (torch.arange(layer.rank) < plan[n]).float() for n, layer in adapters.layers.items()})
    compact(adapters)
    return adapters


def _merged(subject: Subject) -> nn.Module:
    adapters = compacted(subject)
    adapters.merge()
    return adapters.model


def _peft(subject: Subject) -> nn.Module:
    pattern = {name: rank for name, rank in mixed_plan(subject).items() if rank}
    return with_peft(subject, subject.copy(), max(pattern.values()), pattern)


MODELS: dict[str, Callable[[Subject], nn.Module]] = {
    "bare": lambda subject: subject.copy(),
    "merged": _merged,
    "compact": lambda subject: compacted(subject).model,
    "peft-pattern": _peft,
}
PEFT_OF = {"compact": "peft-pattern"}


def predictor(subject: Subject, precision: Precision, name: str) -> Callable[[Batch], Tensor]:
    """A forward pass in evaluation mode that gives the logits of a batch."""
    model = MODELS[name](subject).eval()

    @torch.no_grad()
    def predict(batch: Batch) -> Tensor:
        with subject.autocast(precision):
            logits: Tensor = model(**batch).logits
        return logits

    return predict


# Once in a run -------------------------------------------------------------------------------------------------------


def _attach_ours(subject: Subject, strategy: str, rank: int) -> Callable[[], object]:
    model = subject.copy()
    chosen = make_strategy(strategy, rank)
    settings = adapter_settings(run_config(strategy))
    return lambda: chosen.attach(model, settings)


def _attach_peft(subject: Subject, rank: int) -> Callable[[], object]:
    model = subject.copy()
    return lambda: with_peft(subject, model, rank)


def _select(subject: Subject) -> Callable[[], object]:
    contender = autolora_in("prune", subject, "float32")

    def select() -> None:
        contender.strategy.finalize(lambda plan: 0.0)
        compact(contender.adapters)

    return select


ONCE: dict[str, Callable[[Subject], Callable[[], object]]] = {
    "attach-uniform8": partial(_attach_ours, strategy="uniform", rank=8),
    "attach-autolora16": partial(_attach_ours, strategy="autolora", rank=BUDGET_RANK),
    "attach-peft8": partial(_attach_peft, rank=8),
    "attach-peft16": partial(_attach_peft, rank=16),
    "select-autolora16": _select,
}
"""By name: what prepares a model (untimed) and gives the call that is timed, which it allows once."""
ONCE_PEFT_OF = {"attach-uniform8": "attach-peft8", "attach-autolora16": "attach-peft16"}
