"""The time that the adapters of a plan add to a forward pass: predicted from prices in time, and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle

import torch
from torch import Tensor, nn

from autolora.adapters import attach, find_sites
from autolora.adapters.prices import calls_of, latency
from autolora.bench.measure import Interval, median_interval
from autolora.bench.model import Subject, run_config
from autolora.parts import adapter_settings
from autolora.plan import RankPlan, Site
from autolora.strategies.base import Batch

BARE = "bare"
_SETTINGS = adapter_settings(run_config("uniform"))


def plans(sites: Mapping[str, Site]) -> dict[str, RankPlan]:
    """Plans whose adapters take very different times: many and few modules, low and high ranks."""
    names = list(sites)
    return {
        "all at 1": RankPlan.uniform(sites, 1),
        "all at 8": RankPlan.uniform(sites, 8),
        "all at 64": RankPlan.uniform(sites, 64),
        "one in three at 16": RankPlan(sites, dict.fromkeys(names[::3], 16)),
        "one in six at 4": RankPlan(sites, dict.fromkeys(names[::6], 4)),
        "mixed": RankPlan(sites, dict(zip(names, cycle((8, 4, 2, 6, 0)), strict=False))),
    }


def priced(subject: Subject, batch: Batch) -> dict[str, RankPlan]:
    """The plans, with the prices that were measured for this batch, module by module."""
    model = subject.copy().eval()
    sites = find_sites(model, _SETTINGS)
    highest = RankPlan.uniform(sites, 64)
    prices = latency(model, highest, calls_of(model, sites, lambda: model(**batch)), subject.device)
    settings = adapter_settings(run_config("uniform"), prices)
    return plans(find_sites(model, settings))


def predictors(subject: Subject) -> dict[str, Callable[[Batch], Tensor]]:
    """Forward passes of the bare model, and of one with the adapters of each plan."""
    bare = subject.copy().eval()
    predict = {BARE: _forward(bare)}
    for name, plan in plans(find_sites(bare, _SETTINGS)).items():
        adapters = attach(subject.copy(), _SETTINGS, plan)
        for layer in adapters.layers.values():
            nn.init.normal_(layer.lora_B, std=0.02)
        predict[name] = _forward(adapters.model.eval())
    return predict


def _forward(model: nn.Module) -> Callable[[Batch], Tensor]:
    @torch.no_grad()
    def forward(batch: Batch) -> Tensor:
        logits: Tensor = model(**batch).logits
        return logits

    return forward


def compared(
    times: Mapping[str, Sequence[float]], predicted: Mapping[str, RankPlan]
) -> Iterator[tuple[str, Interval, dict[str, Interval]]]:
    """Name, measured milliseconds and, by ``predicted``, the prediction over the measurement, of every plan.

    The measured overhead is the median of the differences to the bare model in the same round. Where its interval
    reaches 0 it is lost among what else the machine does, and there is no ratio.
    """
    for name, plan in predicted.items():
        overhead = [1e3 * (time - bare) for time, bare in zip(times[name], times[BARE], strict=True)]
        measured, guess = median_interval(overhead), plan.cost / 1e6
        if measured.low <= 0:
            yield name, measured, {}
            continue
        interval = Interval(median=guess / measured.median, low=guess / measured.high, high=guess / measured.low)
        yield name, measured, {"predicted": interval}
