"""What components are worth: gradients of single rows, and effective numbers in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from strategies.checks import pair_of
from torch import nn

from autolora.adapters import AdapterSettings, attach, find_sites
from autolora.errors import PlanError
from autolora.multitask.probe import Probe, component_values, effective_number, initial_plans
from autolora.plan import RankPlan, Site
from autolora.tasks.planted import TeacherStudent
from autolora.training.planted import PlantedRegression


@pytest.mark.parametrize(
    ("values", "number"),
    [([], 0.0), ([0.0], 0.0), ([3.0], 1.0), ([2.0] * 7, 7.0), ([1.0, 1.0, 0.0], 2.0), ([3.0, 1.0], 4 / 3**0.75)],
)
def test_effective_numbers(values: list[float], number: float) -> None:
    assert effective_number(values) == pytest.approx(number)


def problem_of(pair: TeacherStudent) -> PlantedRegression:
    return PlantedRegression(pair, fingerprint="x", batch_size=8, eval_size=16, seed=0)


def test_a_value_is_half_the_mean_squared_gradient_of_single_rows() -> None:
    """Against gradients of a loss that is written down anew: y = x + sum g_i b_i a_i x, gates outside the layers."""
    pair = pair_of()
    problem, model = problem_of(pair), pair.student
    problem.build()
    adapters = attach(model, AdapterSettings(scale=1.0), RankPlan.uniform(find_sites(model, AdapterSettings()), 3))
    torch.manual_seed(0)
    for layer in adapters.layers.values():
        nn.init.normal_(layer.lora_B, std=0.3)
    batch = pair.batch(6, torch.Generator().manual_seed(1))
    rows = [({key: value[i : i + 1] for key, value in batch.items()}, batch["labels"][i : i + 1]) for i in range(6)]
    values = component_values(adapters, problem, rows)

    name, layer = next(iter(adapters.layers.items()))
    assert values[name].shape == (3,)
    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    torch.testing.assert_close(a @ a.T, torch.diag(torch.diag(a @ a.T)), rtol=0, atol=1e-5)  # canonical
    expected = torch.zeros(3, dtype=torch.double)
    for row, _ in rows:
        gate = torch.ones(3, requires_grad=True)
        handle = layer.register_forward_hook(lambda _, args, out, gate=gate: out + (args[0] @ a.T * (gate - 1)) @ b.T)
        (gradient,) = torch.autograd.grad(problem.loss(model, row), gate)
        handle.remove()
        expected += gradient.double().square() / 12
    torch.testing.assert_close(values[name], expected, rtol=1e-4, atol=1e-9)
    assert all(layer.gate() is None for layer in adapters.layers.values())


SITES = {"q": Site(4, 4), "up": Site(4, 12)}
PROBES = {
    "easy": Probe(SITES, {"q": (8.0, 0.0), "up": (0.0, 0.0)}),
    "hard": Probe(SITES, {"q": (1.0, 1.0), "up": (3.0, 0.0)}),
}


def test_shares_go_by_complexity_and_ranks_by_value_per_parameter() -> None:
    easy, hard = PROBES["easy"].complexity, PROBES["hard"].complexity
    assert easy == 1.0
    assert hard == pytest.approx(math.exp(-(0.4 * math.log(0.2) + 0.6 * math.log(0.6))))
    plans = initial_plans(PROBES, budget=24, headroom=2.0)
    assert 48 * easy / (easy + hard) == pytest.approx(13.4, abs=0.1)
    assert dict(plans["easy"]) == {"q": 1, "up": 0}
    assert dict(plans["hard"]) == {"q": 2, "up": 1}  # 34.6: up (3 for 16) first, then q (1 for 8) twice


def test_tasks_that_need_nothing_are_refused() -> None:
    with pytest.raises(PlanError, match="no component is worth anything"):
        initial_plans({"rte": Probe(SITES, {"q": (0.0,), "up": (0.0,)})}, budget=24)
