"""What counts as a linear map, and how its weight lies in memory."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from autolora.adapters.linear_like import site_of, weight_is_transposed
from autolora.plan import Site


class Custom(nn.Module):
    def __init__(self, n_in: int, n_out: int, *shape: int) -> None:
        super().__init__()
        self.in_features, self.out_features = n_in, n_out
        self.weight = nn.Parameter(torch.zeros(shape))


def test_linear_like() -> None:
    assert site_of(nn.Linear(5, 3)) == Site(5, 3)
    assert site_of(Conv1D(3, 5)) == Site(5, 3)  # Conv1D takes the output width first
    assert site_of(Custom(5, 3, 15)) == Site(5, 3)


def test_not_linear_like() -> None:
    for module in (nn.Embedding(5, 3), nn.LayerNorm(5), nn.Conv1d(5, 3, 1), nn.Bilinear(5, 4, 3), nn.Sequential()):
        assert site_of(module) is None


def test_a_projection_whose_forward_is_never_called_is_not_adapted() -> None:
    """nn.MultiheadAttention reads out_proj.weight itself: an adapter there would not be in the forward path."""
    assert site_of(nn.MultiheadAttention(4, 2).out_proj) is None


@pytest.mark.parametrize(
    ("module", "transposed"),
    [
        (nn.Linear(5, 3), False),
        (nn.Linear(4, 4), False),
        (Conv1D(3, 5), True),
        (Conv1D(4, 4), True),
        (Custom(5, 3, 3, 5), False),
        (Custom(5, 3, 5, 3), True),
        (Custom(4, 4, 4, 4), False),
        (Custom(5, 3, 15), False),
    ],
)
def test_layout_is_detected(module: nn.Module, transposed: bool) -> None:
    assert weight_is_transposed(module) is transposed


def test_layout_can_be_set_where_the_shape_does_not_tell() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert weight_is_transposed(Custom(4, 4, 4, 4), fan_in_fan_out=True)
        assert weight_is_transposed(Conv1D(4, 4), fan_in_fan_out=True)


@pytest.mark.parametrize("module", [nn.Linear(4, 4), Custom(5, 3, 3, 5)])
def test_a_wrong_layout_is_ignored_and_said(module: nn.Module) -> None:
    with pytest.warns(UserWarning, match=r"fan_in_fan_out=True is ignored for \w+, whose weight is \(out, in\)"):
        assert not weight_is_transposed(module, fan_in_fan_out=True)
