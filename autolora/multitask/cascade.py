r"""A rank for every input: nested adapters answer at a low rank, and go on to a higher one where they are not sure.

Where any first components of an adapter are an adapter (DyLoRA, Valipour et al., EACL 2023, arXiv 2210.07558), one set
of weights has a model for each of some ranks :math:`r_1 < \dots < r_m`. Row x is answered at the first one at which its
largest probability reaches a threshold,

.. math:: \max_y p_{r_j}(y \mid x) \ge \tau,

and at :math:`r_m` in any case. This is a cascade of classifiers (Viola and Jones, CVPR 2001, for one of many) whose
stages are ranks.

What it costs has to be said plainly: the ranks share no activation but those before the first adapter, so every rise is
another pass of the whole model. A pass at rank 1 costs nearly what a pass at rank 16 does, because the backbone is most
of both; a cascade of ranks therefore computes *more* than the highest rank alone unless adapters are a large part of
the model. It is worth something where the threshold finds rows that the low rank answers better.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autolora.adapters import Adapters
from autolora.adapters.prices import calls_of, flops
from autolora.errors import PlanError
from autolora.plan import RankPlan
from autolora.strategies.base import Batch
from autolora.training.problem import Outputs, Problem, Scores, in_order, read


@dataclass(frozen=True)
class Answers:
    """What a cascade says of some rows, and what it took.

    Args:
        logits: ``(rows, labels)``, of the rank at which a row was answered.
        ranks: that rank, ``(rows,)``.
        passes: rows that went through the model, over all ranks.
        adapter_flops: operations of the adapters (:func:`autolora.adapters.prices.flops`).
        backbone_flops: operations of the frozen products of the adapted modules, two for each entry and vector.
        seconds: of the wall clock.
    """

    logits: Tensor
    ranks: Tensor
    passes: int
    adapter_flops: int
    backbone_flops: int
    seconds: float


class Cascade:
    """Nested adapters at several ranks.

    Args:
        adapters: of a classifier, nested: any first components of them are an adapter.
        problem: what the model is called for.
        ranks: in rising order; a module that has fewer components uses all of its.

    Raises:
        PlanError: if the ranks are not rising, or no module has as many components as one of them.
    """

    def __init__(self, adapters: Adapters, problem: Problem, ranks: Sequence[int]) -> None:
        attached = adapters.attached_plan()
        most = max(attached.values(), default=0)
        if not ranks or list(ranks) != sorted({*ranks}) or ranks[0] < 0 or ranks[-1] > most:
            text = ", ".join(map(str, ranks)) or "none"
            raise PlanError(f"ranks of a cascade: expected rising ones from 0 to {most}, got {text}")
        self.adapters, self.problem = adapters, problem
        self.plans = {
            rank: RankPlan(attached.sites, {name: min(rank, own) for name, own in attached.items()}) for rank in ranks
        }

    @torch.no_grad()
    def answer(self, batch: Batch, threshold: float) -> Answers:
        """Answer the rows of a batch, in evaluation mode.

        Args:
            batch: on the model's device.
            threshold: least probability with which a row is answered before the highest rank: at 0 the lowest rank
                answers all, above 1 the highest.
        """
        model = self.adapters.model
        start = time.perf_counter()
        rows = torch.arange(len(next(iter(batch.values()))), device=next(model.parameters()).device)
        left, passes, of_adapters, of_backbone = rows, 0, 0, 0
        ranks, logits = torch.zeros_like(rows), None
        last = list(self.plans)[-1]
        for rank, plan in self.plans.items():
            some = batch if len(left) == len(rows) else {key: value[left] for key, value in batch.items()}
            found, costs = self._pass(some, plan)
            passes, of_adapters, of_backbone = passes + len(left), of_adapters + costs[0], of_backbone + costs[1]
            logits = found.clone() if logits is None else logits.index_copy(0, left, found)
            ranks[left] = rank
            left = left[found.softmax(1).amax(1) < threshold]
            if rank == last or not len(left):
                break
        assert logits is not None
        return Answers(logits, ranks, passes, of_adapters, of_backbone, time.perf_counter() - start)

    def _pass(self, batch: Batch, plan: RankPlan) -> tuple[Tensor, tuple[int, int]]:
        """Logits at a plan, and the operations of adapters and of the products that they are added to."""
        model, found = self.adapters.model, []
        with self.adapters.masked(plan):
            calls = calls_of(model, plan.sites, lambda: found.append(self.problem.forward(model, batch).float()))
        prices = flops(plan, calls)
        vectors = {name: sum(call.rows for call in calls[name]) for name in plan.sites}
        frozen = sum(2 * vectors[name] * site.in_features * site.out_features for name, site in plan.sites.items())
        return found[0], (sum(prices[name][rank] for name, rank in plan.items()), frozen)


@dataclass(frozen=True)
class Trade:
    """What a threshold gives and takes on a split.

    Args:
        threshold: as in :meth:`Cascade.answer`.
        scores: the task's metrics.
        passes: passes of the model for each row.
        adapter_flops, backbone_flops: as in :class:`Answers`, for each row.
        seconds: of all rows together, data excluded.
        shares: share of the rows that was answered at each rank.
    """

    threshold: float
    scores: Scores
    passes: float
    adapter_flops: float
    backbone_flops: float
    seconds: float
    shares: dict[int, float]


def trade(cascade: Cascade, thresholds: Iterable[float], split: str = "dev") -> list[Trade]:
    """Measure thresholds on a split: accuracy against compute."""
    problem, model = cascade.problem, cascade.adapters.model
    batches = list(read(problem, model, split))
    found = []
    for threshold in thresholds:
        answers = [cascade.answer(batch, threshold) for batch, _ in batches]
        outputs = in_order(
            [batch["index"].cpu() for batch, _ in batches],
            [answer.logits.cpu() for answer in answers],
            [labels for _, labels in batches],
            split,
        )
        found.append(_trade(threshold, problem, split, outputs, answers, list(cascade.plans)))
    return found


def _trade(
    threshold: float, problem: Problem, split: str, outputs: Outputs, answers: Sequence[Answers], ranks: Sequence[int]
) -> Trade:
    rows = len(outputs.labels)
    at = torch.cat([answer.ranks for answer in answers])
    return Trade(
        threshold,
        problem.scores({split: outputs}),
        sum(answer.passes for answer in answers) / rows,
        sum(answer.adapter_flops for answer in answers) / rows,
        sum(answer.backbone_flops for answer in answers) / rows,
        sum(answer.seconds for answer in answers),
        {rank: int((at == rank).sum()) / rows for rank in ranks},
    )
