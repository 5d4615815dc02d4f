"""Gates: values and gradients by hand, closed forms against samples, and what evaluation does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from autolora.adapters import FixedGate, SelectorGate
from autolora.adapters.gates import SELECTOR_FORMS

LOGITS = (-2.0, -0.1, 0.0, 0.3, 1.5)
SIGMA = [1 / (1 + math.exp(-x)) for x in LOGITS]
NOISY = ("hard_concrete", "gumbel", "gumbel_softmax")


def selector(form: str, logits: tuple[float, ...] = LOGITS, **kwargs: object) -> SelectorGate:
    gate = SelectorGate(len(logits), form, **kwargs)  # type: ignore[arg-type]
    with torch.no_grad():
        gate.logits.copy_(torch.tensor(logits))
    return gate


def gradient(value: Tensor, gate: SelectorGate, cotangent: Tensor) -> Tensor:
    return torch.autograd.grad(value, gate.logits, cotangent)[0]


def softmax(logits: tuple[float, ...]) -> list[float]:
    weights = [math.exp(x) for x in logits]
    return [w / sum(weights) for w in weights]


def assert_gate(gate: Tensor | None, expected: list[float]) -> None:
    assert gate is not None
    torch.testing.assert_close(gate.detach(), torch.tensor(expected))


# Fixed ----------------------------------------------------------------------------------------------------------------


def test_an_open_gate_costs_nothing() -> None:
    assert FixedGate(3)() is None
    assert FixedGate(3).evaluation_gate().tolist() == [1, 1, 1]


def test_fixed_masks() -> None:
    gate = FixedGate(3, torch.tensor([1, 0, 0.5]))
    assert_gate(gate(), [1.0, 0.0, 1.0])
    gate.set_mask(torch.ones(3, dtype=torch.bool))
    assert gate() is None
    with pytest.raises(ValueError, match=r"mask: expected shape \(3,\), got \(2,\)"):
        gate.set_mask(torch.ones(2))


def test_a_loaded_mask_is_applied() -> None:
    closed, fresh = FixedGate(2, torch.tensor([0, 1])), FixedGate(2)
    fresh.load_state_dict(closed.state_dict())
    assert_gate(fresh(), [0.0, 1.0])
    fresh.load_state_dict(FixedGate(2).state_dict())
    assert fresh() is None


# In training ----------------------------------------------------------------------------------------------------------


def test_straight_through_is_0_or_1_forward_and_a_sigmoid_backward() -> None:
    gate = selector("straight_through")
    value, cotangent = gate(), torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0])
    assert value is not None
    assert value.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]
    by_hand = [c * s * (1 - s) for c, s in zip(cotangent.tolist(), SIGMA, strict=True)]
    torch.testing.assert_close(gradient(value, gate, cotangent), torch.tensor(by_hand))


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_sigmoid(tau: float) -> None:
    gate = selector("sigmoid", tau=tau)
    value, cotangent = gate(), torch.ones(5)
    by_hand = [1 / (1 + math.exp(-x / tau)) for x in LOGITS]
    assert_gate(value, by_hand)
    assert value is not None
    torch.testing.assert_close(gradient(value, gate, cotangent), torch.tensor([s * (1 - s) / tau for s in by_hand]))


def test_simplex_sums_to_1() -> None:
    gate = selector("simplex")
    value, p = gate(), softmax(LOGITS)
    assert_gate(value, p)
    assert value is not None
    assert value.sum().item() == pytest.approx(1)
    cotangent = [1.0, 0.0, 2.0, 0.0, -1.0]
    mean = sum(a * b for a, b in zip(cotangent, p, strict=True))
    by_hand = [a * (c - mean) for a, c in zip(p, cotangent, strict=True)]
    torch.testing.assert_close(gradient(value, gate, torch.tensor(cotangent)), torch.tensor(by_hand))


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_gumbel_by_hand(tau: float) -> None:
    gate = selector("gumbel", tau=tau, generator=torch.Generator().manual_seed(3))
    u = torch.rand(5, generator=torch.Generator().manual_seed(3)).tolist()
    by_hand = [1 / (1 + math.exp(-(x + math.log(v / (1 - v))) / tau)) for x, v in zip(LOGITS, u, strict=True)]
    value = gate()
    assert_gate(value, by_hand)
    assert value is not None
    expected = torch.tensor([s * (1 - s) / tau for s in by_hand])
    torch.testing.assert_close(gradient(value, gate, torch.ones(5)), expected)


def test_gumbel_softmax_by_hand() -> None:
    gate = selector("gumbel_softmax", tau=0.5, generator=torch.Generator().manual_seed(3))
    u = torch.rand(5, generator=torch.Generator().manual_seed(3)).tolist()
    noisy = tuple((x - math.log(-math.log(v))) / 0.5 for x, v in zip(LOGITS, u, strict=True))
    value = gate()
    assert_gate(value, softmax(noisy))
    assert value is not None
    assert value.requires_grad
    assert value.sum().item() == pytest.approx(1)


def test_hard_concrete_by_hand() -> None:
    gate = selector("hard_concrete", tau=2 / 3, generator=torch.Generator().manual_seed(3))
    u = torch.rand(5, generator=torch.Generator().manual_seed(3)).tolist()
    soft = [1 / (1 + math.exp(-(x + math.log(v / (1 - v))) / (2 / 3))) for x, v in zip(LOGITS, u, strict=True)]
    assert_gate(gate(), [min(1, max(0, s * 1.2 - 0.1)) for s in soft])


# Probabilities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 2 / 3])
def test_hard_concrete_probability_is_that_of_its_samples(tau: float) -> None:
    """P(g != 0) in closed form against 80,000 draws of each logit: six standard errors are 0.0106."""
    gate = selector("hard_concrete", LOGITS * 80_000, tau=tau, generator=torch.Generator().manual_seed(0))
    sample = gate()
    assert sample is not None
    share = (sample.detach() != 0).float().view(80_000, 5).mean(0)
    torch.testing.assert_close(share, gate.probability().detach()[:5], rtol=0, atol=0.0106)


def test_gumbel_probability_is_that_of_its_samples() -> None:
    gate = selector("gumbel", LOGITS * 80_000, tau=0.3, generator=torch.Generator().manual_seed(0))
    sample = gate()
    assert sample is not None
    share = (sample.detach() > 0.5).float().view(80_000, 5).mean(0)
    torch.testing.assert_close(share, gate.probability().detach()[:5], rtol=0, atol=0.0106)


def test_gumbel_softmax_probability_is_how_often_a_component_wins() -> None:
    gate = selector("gumbel_softmax", generator=torch.Generator().manual_seed(0))
    wins = torch.stack([gate().detach() for _ in range(8000)]).argmax(1)  # type: ignore[union-attr]
    share = torch.bincount(wins, minlength=5) / 8000
    torch.testing.assert_close(share, gate.probability().detach(), rtol=0, atol=0.03)


@pytest.mark.parametrize("form", SELECTOR_FORMS)
def test_probability_is_differentiable_and_rises_with_the_logit(form: str) -> None:
    gate = selector(form)
    probability = gate.probability()
    assert (probability >= 0).all()
    assert (probability <= 1).all()
    assert (probability.diff() > 0).all()
    own = torch.stack([torch.autograd.grad(p, gate.logits, retain_graph=True)[0][i] for i, p in enumerate(probability)])
    assert (own > 0).all()


# At evaluation --------------------------------------------------------------------------------------------------------

AT_EVALUATION = {
    "straight_through": [0, 0, 0, 1, 1],
    "sigmoid": [0, 0, 0, SIGMA[3], SIGMA[4]],
    "hard_concrete": [0, 0, 0, SIGMA[3] * 1.2 - 0.1, SIGMA[4] * 1.2 - 0.1],
    "gumbel": [0, 0, 0, SIGMA[3], SIGMA[4]],
    "gumbel_softmax": [0, 0, 0, 0, softmax(LOGITS)[4]],
    "simplex": [0, 0, 0, 0, softmax(LOGITS)[4]],
}


@pytest.mark.parametrize("form", SELECTOR_FORMS)
def test_evaluation_is_deterministic_and_hard_thresholded(form: str) -> None:
    gate = selector(form).eval()
    expected = [float(x) for x in AT_EVALUATION[form]]
    for value in (gate(), gate(), gate.evaluation_gate(), gate.train().evaluation_gate()):
        assert_gate(value, expected)
        assert value is not None
        assert not value.requires_grad
    assert gate.kept().tolist() == [x > 0 for x in expected]
    first, second = gate(), gate()
    assert first is not None
    assert second is not None
    assert torch.equal(first, second) is (form not in NOISY)


@pytest.mark.parametrize("form", SELECTOR_FORMS)
def test_default_thresholds(form: str) -> None:
    expected = 1 / 5 if form in ("simplex", "gumbel_softmax") else 0.5
    assert selector(form).threshold == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("form", ["simplex", "gumbel_softmax"])
@pytest.mark.parametrize("rank", [1, 2, 3, 7, 16])
def test_equal_shares_pass_the_threshold_of_the_simplex(form: str, rank: int) -> None:
    """A single component is always kept: its share is 1 whatever its logit."""
    assert selector(form, (0.7,) * rank).kept().all()


def test_thresholds_can_be_set() -> None:
    assert selector("straight_through", threshold=0.8).kept().tolist() == [False, False, False, False, True]
    assert selector("straight_through", threshold=0.4)().tolist() == [0, 1, 1, 1, 1]  # type: ignore[union-attr]
    assert selector("sigmoid", threshold=0.0).kept().all()


# Fixing and learning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", SELECTOR_FORMS)
def test_fix_and_learn(form: str) -> None:
    gate = selector(form)
    gate.fix(torch.tensor([1, 0, 0, 0, 1]))
    for mode in (True, False):
        value = gate.train(mode)()
        assert_gate(value, [1.0, 0.0, 0.0, 0.0, 1.0])
        assert value is not None
        assert not value.requires_grad
    gate.fix(torch.ones(5))
    assert gate() is None
    gate.learn()
    learned = gate.train()()
    assert learned is not None
    assert learned.requires_grad


def test_a_refused_mask_leaves_the_selector_learning() -> None:
    gate = selector("sigmoid")
    with pytest.raises(ValueError, match=r"mask: expected shape \(5,\), got \(4,\)"):
        gate.fix(torch.ones(4))
    assert gate.learning


def test_state_dict_round_trip() -> None:
    gate, other = selector("sigmoid"), SelectorGate(5, "sigmoid")
    gate.fix(torch.tensor([0, 1, 1, 0, 0]))
    other.load_state_dict(gate.state_dict())
    assert not other.learning
    assert_gate(other(), [0.0, 1.0, 1.0, 0.0, 0.0])
    assert torch.equal(other.logits, gate.logits)
    gate.learn()
    other.load_state_dict(gate.state_dict())
    assert other.learning


def test_noise_has_a_stream_of_its_own() -> None:
    state = torch.get_rng_state()
    one = selector("gumbel", generator=torch.Generator().manual_seed(1))
    two = selector("gumbel", generator=torch.Generator().manual_seed(1))
    first = one()
    assert first is not None
    assert torch.equal(first, two())  # type: ignore[arg-type]
    assert not torch.equal(first, one())  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"selector form: expected one of straight_through, .*, got 'relu'"):
        SelectorGate(3, "relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tau: expected a temperature > 0, got 0"):
        SelectorGate(3, tau=0)
