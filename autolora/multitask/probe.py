r"""How much adapter a task needs, measured: a short training at the highest ranks, and what its components are worth.

After the training every adapter is made canonical, and every component i gets a gate :math:`g_i = 1`. Its value is half
the mean squared gradient of the loss of a held-out row by that gate,

.. math:: v_i = \tfrac12 \, E_n[(\partial \ell_n / \partial g_i)^2],

an estimate of what the loss rises by when the gate is closed: the second order of its Taylor series with the Fisher
information for the curvature (LeCun, Denker & Solla, "Optimal brain damage", NIPS 1989; with the Fisher information:
Theis et al., arXiv 1801.05787, section 2.1). Losses of tasks differ in size, so values are shares of what the best
constant predictor loses on the same rows, and can be compared across tasks.

A task's *complexity* is the effective number of its components, :math:`\exp(-\sum_i p_i \ln p_i)` with
:math:`p_i = v_i / \sum_j v_j`, as the effective rank is one of singular values (Roy & Vetterli, EUSIPCO 2007). It is
measured: nothing goes by the name of a task.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from autolora.errors import NonFiniteLossError, PlanError
from autolora.plan import RankPlan, Site, even_order, rank_by_score, spend

if TYPE_CHECKING:
    from torch import Tensor

    from autolora.adapters import Adapters
    from autolora.training.problem import Labelled, Problem


@dataclass(frozen=True)
class Probe:
    """What was measured of one task.

    Args:
        sites: the modules.
        values: of each component, by module, the largest first, as shares of the loss of a constant predictor.
    """

    sites: dict[str, Site]
    values: dict[str, tuple[float, ...]]

    @property
    def complexity(self) -> float:
        """The effective number of components."""
        return effective_number(list(chain.from_iterable(self.values.values())))


def effective_number(values: Iterable[float]) -> float:
    """The exponential of the entropy of shares: k for k equal values, 1 for a single one, 0 for none.

    Args:
        values: none below 0.
    """
    kept = [value for value in values if value > 0]
    total = math.fsum(kept)
    return math.exp(-math.fsum(v / total * math.log(v / total) for v in kept)) if kept else 0.0


def component_values(adapters: Adapters, problem: Problem, rows: Iterable[Labelled]) -> dict[str, Tensor]:
    """The value of every component, by module, shape ``(r,)``, float64: :math:`v_i`, in units of the loss.

    The adapters become canonical, and have plain gates afterwards; parameters keep their values.

    Args:
        adapters: trained.
        problem: its loss.
        rows: batches of one row, on the model's device.

    Raises:
        NonFiniteLossError: if a loss is not finite.
    """
    import torch

    from autolora.adapters import ScaleGate, canonicalize

    gates = {}
    for name, layer in adapters.layers.items():
        canonicalize(layer)
        layer.gate = gates[name] = ScaleGate(layer.rank, init=1.0).to(layer.lora_A.device)
    parameters = [gate.values for gate in gates.values()]
    total = [torch.zeros_like(values, dtype=torch.double) for values in parameters]
    count = 0
    adapters.model.eval()
    for batch, _ in rows:
        loss = problem.loss(adapters.model, batch)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"a held-out row has the loss {float(loss)} after the probe: lower optim.adapter.lr"
            )
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for known, gradient in zip(total, gradients, strict=True):
            if gradient is not None:
                known += gradient.double().square()
        count += 1
    adapters.fix_gates({name: torch.ones(layer.rank) for name, layer in adapters.layers.items()})
    return {name: values.cpu() / (2 * max(1, count)) for name, values in zip(gates, total, strict=True)}


def initial_plans(probes: Mapping[str, Probe], budget: int, headroom: float = 2.0) -> dict[str, RankPlan]:
    """Ranks to begin with: every task a share of the budget by its complexity, spent on its most valuable components.

    Args:
        probes: by task.
        budget: of all tasks together.
        headroom: how many times the budget the plans may cost, of which :func:`autolora.multitask.allocate.merge` then
            removes what is worth least over all tasks.

    Raises:
        PlanError: if nothing is worth anything to any task.
    """
    total = math.fsum(probe.complexity for probe in probes.values())
    if not total:
        raise PlanError("no component is worth anything to any task: raise probe_steps, or the learning rate")
    plans = {}
    for task, probe in probes.items():
        largest = RankPlan(probe.sites, {name: len(own) for name, own in probe.values.items()})
        worth = {name: iter(own) for name, own in probe.values.items()}
        names = even_order(largest)
        scores = [next(worth[name]) / largest.sites[name].cost for name in names]
        share = int(headroom * budget * probe.complexity / total)
        plans[task] = spend(rank_by_score(names, scores), largest, min(share, largest.cost))
    return plans
