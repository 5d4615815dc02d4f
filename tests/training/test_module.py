"""The Lightning module: schedule, hooks, clipping, accumulation, and a loss that stops being finite."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training.small import autolora, small_planted, train, uniform

from autolora.errors import NonFiniteLossError
from autolora.strategies.base import GroupRates, Rates
from autolora.training.fit import resolve_precision
from autolora.training.module import schedule_factor


def test_schedule_by_hand() -> None:
    linear = [schedule_factor(step, 10, 0.2, "linear") for step in range(11)]
    assert linear == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0])
    assert schedule_factor(6, 10, 0.2, "cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert schedule_factor(9, 10, 0.2, "constant") == 1.0


def test_training_learns_and_leaves_the_base_alone(tmp_path: Path) -> None:
    problem = small_planted()
    before = {name: p.detach().clone() for name, p in problem.model.named_parameters()}
    strategy = uniform()
    train(problem, strategy, tmp_path, steps=600)
    base = {name.replace(".base_layer", ""): p for name, p in problem.model.named_parameters() if "lora" not in name}
    assert base.keys() == before.keys()
    assert all(torch.equal(base[name], before[name]) for name in before)
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert float(rows[-1]["loss"]) < 0.05 * float(rows[0]["loss"])


def test_accumulating_two_batches_is_one_double_batch(tmp_path: Path) -> None:
    """The gradients of the two halves average to that of the whole; uniform has no state per batch."""

    class Halves:
        """Hands out each batch of a double-sized problem in two parts."""

        def __init__(self, batches: Any) -> None:
            self.batches = batches

        def __iter__(self) -> Any:
            for batch in self.batches:
                for part in (slice(0, 32), slice(32, 64)):
                    yield {key: value[part] for key, value in batch.items()}

    whole = small_planted(batch_size=64)
    halves = small_planted(batch_size=64)
    loader = halves.datamodule.train_dataloader()
    halves.datamodule.train_dataloader = lambda: Halves(loader)  # type: ignore[method-assign, assignment, return-value]
    one, two = uniform(), uniform()
    train(whole, one, tmp_path, steps=5)
    train(halves, two, tmp_path, steps=5, accumulate_grad_batches=2)
    for a, b in zip(one.adapters.adapter_parameters(), two.adapters.adapter_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_before_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    original = torch.optim.AdamW.step

    def step(self: Any, closure: Any = None) -> Any:
        def watched() -> Any:
            loss = closure()
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            norms.append(float(torch.stack([g.norm() for g in grads]).norm()))
            return loss

        return original(self, watched)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(small_planted(), uniform(), tmp_path, steps=3, gradient_clip_val=1e-3)
    assert len(norms) == 3
    assert all(norm <= 1.001e-3 for norm in norms)


def test_the_gate_group_keeps_its_rate_and_the_others_follow_the_schedule(tmp_path: Path) -> None:
    train(small_planted(), autolora(), tmp_path, steps=20)
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert len({row["lr_gate"] for row in rows}) == 1
    assert float(rows[-1]["lr_adapter"]) == 0.0 < float(rows[5]["lr_adapter"])


def test_history_tells_ranks_and_the_budget_is_kept(tmp_path: Path) -> None:
    problem, strategy = small_planted(), autolora()
    train(problem, strategy, tmp_path, steps=40)
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 41))
    assert int(rows[0]["active_params"]) == strategy.largest.params
    assert int(rows[-1]["active_params"]) <= (strategy.allowance or 0)
    assert sum(int(rows[-1][f"rank:{name}"]) for name in strategy.largest) == int(rows[-1]["active_components"])
    gates = [float(row["mean_gate"]) for row in rows if row["mean_gate"]]
    assert rows[-1]["mean_gate"] == ""  # settled
    assert 0.0 < min(gates) < gates[0] < 1.0


def test_non_finite_loss_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    problem, strategy = small_planted(), uniform()
    wild = Rates(GroupRates(1e18), GroupRates(None), GroupRates(1e-3))
    with pytest.raises(NonFiniteLossError, match=r"at step \d+.*last good.*last_good\.safetensors"):
        train(problem, strategy, tmp_path, steps=50, rates=wild, gradient_clip_val=None)
    state = load_file(tmp_path / "checkpoints" / "last_good.safetensors")
    assert state.keys() == strategy.adapters.trainable_state().keys()
    assert all(value.isfinite().all() for value in state.values())


def test_same_seed_same_batches_for_two_strategies(tmp_path: Path) -> None:
    """What a strategy draws for itself does not move the data."""
    one, two = small_planted(), small_planted()
    loader, other = iter(one.datamodule.train_dataloader()), iter(two.datamodule.train_dataloader())
    torch.rand(17)
    for _ in range(3):
        assert torch.equal(next(loader)["inputs"], next(other)["inputs"])


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_named_precision_is_kept(precision: str) -> None:
    assert resolve_precision(precision, "cpu") == precision


def test_auto_precision_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for native, expected in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        assert resolve_precision("auto", "cpu") == expected
