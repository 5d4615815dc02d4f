r"""What tasks do to each other in a shared adapter: how far their gradients agree, and what sharing costs each.

With :math:`h_t` the mean gradient of task t's held-out loss by all A and B of the shared adapter, two tasks agree by

.. math:: \cos(h_t, h_u) = \frac{h_t \cdot h_u}{\|h_t\| \|h_u\|},

below 0 where what helps one harms the other (Yu et al., "Gradient surgery for multi-task learning", NeurIPS 2020,
section 2.2). Differences of dev scores between two arms are tested in pairs, by example and seed
(:func:`autolora.reporting.statistics.paired_test`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from autolora.multitask.arms import Bench, Outcome, rows_of
from autolora.reporting.runs import read_split
from autolora.reporting.statistics import Difference, Scored, paired_test
from autolora.results import RunDirectory

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 256


def agreement(bench: Bench, merged: Mapping[str, Outcome]) -> dict[str, float]:
    """The cosine of the gradients of every two tasks, by ``"one, other"``, at the end of the training on all."""
    gradients = {task: _gradient(bench, outcome) for task, outcome in merged.items()}
    return {
        f"{one}, {other}": float(gradients[one] @ gradients[other] / (gradients[one].norm() * gradients[other].norm()))
        for one, other in combinations(gradients, 2)
    }


def _gradient(bench: Bench, outcome: Outcome) -> Tensor:
    """The mean gradient of a task's held-out loss by the adapter's parameters, one after the other, float64."""
    import torch

    from autolora.adapters import Adapters
    from autolora.export import load
    from autolora.training.problem import read

    cfg = bench.config(outcome.task, "strategy=uniform")
    problem = rows_of(cfg)
    adapters, _ = load(cfg, "LORA", outcome.adapter)
    assert isinstance(adapters, Adapters)
    adapters.model.eval()
    parameters = [p for layer in adapters.layers.values() for p in (layer.lora_A, layer.lora_B)]
    total, rows = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.double), 0
    for batch, labels in read(problem, adapters.model, "heldout", _ROWS):
        gradients = torch.autograd.grad(problem.loss(adapters.model, batch), parameters)
        total += len(labels) * torch.cat([gradient.flatten().double().cpu() for gradient in gradients])
        rows += len(labels)
    return total / rows


def difference(arm: Sequence[Outcome], other: Sequence[Outcome]) -> Difference | None:
    """How far one arm is ahead of another on one task, in the task's metric.

    Args:
        arm: the task's outcomes, one for each seed.
        other: the same of the arm to compare with.

    Returns:
        ``None`` where a score is undefined, or predictions are missing.
    """
    if any(outcome.value is None for outcome in (*arm, *other)):
        return None
    sides = []
    for side in (arm, other):
        columns = [read_split(RunDirectory(outcome.run).predictions, outcome.split) for outcome in side]
        sides.append([Scored.of(side[0].metric, *found).pseudovalues() for found in columns if found is not None])
    return paired_test(*map(np.stack, sides)) if len(sides[0]) == len(sides[1]) == len(arm) else None
