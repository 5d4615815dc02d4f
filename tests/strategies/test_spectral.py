"""Ranks from spectra: counted by squares, scaled to the budget."""

from __future__ import annotations

import pytest
import torch
from adapters.tiny_models import make
from strategies.trees import tree
from torch import Tensor, nn

from autolora.adapters import AdapterSettings
from autolora.adapters.compress import Compression, compress, restore
from autolora.errors import PlanError
from autolora.plan import Budget, RankPlan
from autolora.strategies.spectral import Spectral, weight_matrix


def with_spectrum(shape: tuple[int, int], values: list[float]) -> Tensor:
    """A matrix with these singular values and random directions."""
    left, right = (torch.linalg.qr(torch.randn(n, len(values))).Q for n in shape)
    return left @ torch.diag(torch.tensor(values)) @ right.T


def model_of(spectra: dict[str, list[float]], n: int = 12) -> nn.Module:
    model = tree(dict.fromkeys(spectra, (n, n)))
    with torch.no_grad():
        for name, values in spectra.items():
            model.get_submodule(name).weight.copy_(with_spectrum((n, n), values))
    return model


def plan_of(model: nn.Module, budget: Budget, max_rank: int = 8, energy: float = 0.9) -> RankPlan:
    strategy = Spectral(Spectral.Options(energy=energy), budget=budget, max_rank=max_rank)
    adapters = strategy.attach(model, AdapterSettings())
    plan = strategy.finalize(lambda plan: 0.0)
    assert adapters.attached_plan() == plan
    return plan


# Of a's energy 100 + 4 + 4 the first value explains 93 %; of the sum of plain values it would be 71 %.
SPECTRA = {"a": [10.0, 2.0, 2.0], "b": [3.0] * 4, "c": [2.0] * 2}


def test_directions_by_hand_scaled_to_the_budget() -> None:
    """a, b, c count 1, 4 and 2 directions (90 % of four equal ones takes four), and so are their ranks at 7, and at 14
    they are twice that.
    """
    for times in (1, 2):
        plan = plan_of(model_of(SPECTRA), Budget(params=7 * times * 24))
        assert list(plan.values()) == [times, 4 * times, 2 * times]


def test_without_a_budget_the_largest_rank_is_the_maximum() -> None:
    assert list(plan_of(model_of(SPECTRA), Budget(), max_rank=8).values()) == [2, 8, 4]


def test_a_smaller_share_needs_fewer_directions() -> None:
    assert list(plan_of(model_of(SPECTRA), Budget(), max_rank=8, energy=0.5).values()) == [4, 8, 4]  # 1, 2, 1


def test_the_scale_of_a_weight_does_not_matter_and_zeros_get_nothing() -> None:
    model = model_of(SPECTRA)
    with torch.no_grad():
        model.get_submodule("a").weight.mul_(100)
        model.get_submodule("c").weight.zero_()
    assert list(plan_of(model, Budget(params=5 * 24)).values()) == [1, 4, 0]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("budget", [Budget(rank=1.5), Budget(params=2001)])
def test_a_budget_is_spent_whatever_way_weights_are_laid_out(family: str, budget: Budget) -> None:
    plan = plan_of(make(family), budget)
    allowance = budget.resolve(RankPlan.uniform(plan.sites, 8))
    assert allowance is not None
    assert 0.98 * allowance <= plan.params <= allowance


def test_a_module_without_a_weight_matrix_is_refused() -> None:
    class Quantised(nn.Module):
        in_features = out_features = 8

    with pytest.raises(PlanError, match=r"packed: expected a floating-point weight matrix, got none; choose another"):
        weight_matrix(nn.ModuleDict({"packed": Quantised()}), "packed")


def test_a_quantised_model_has_the_ranks_of_the_weights_that_its_codes_stand_for() -> None:
    def quantised() -> nn.Module:
        model = model_of(SPECTRA)
        compress(model, Compression(quantization="nf4"), [])
        return model

    torch.manual_seed(0)
    on_codes = plan_of(quantised(), Budget(params=14 * 24))
    torch.manual_seed(0)
    model = quantised()
    restore(model)
    assert plan_of(model, Budget(params=14 * 24)) == on_codes
    assert on_codes["b"] > on_codes["c"] > 0
