"""O-LoRA: where A begins, what the penalty is, and what it does over a training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.linalg import subspace_angles
from strategies.checks import begun, pair_of
from strategies.checks import run as run_small
from torch import nn

from autolora.adapters import AdapterSettings, attach, find_sites
from autolora.adapters.peft_format import save_peft
from autolora.errors import DataError, PlanError, TargetError
from autolora.plan import Budget, RankPlan
from autolora.strategies.o_lora import OLoRA, Options


def other(folder: Path, seed: int, rank: int = 3, modules: tuple[str, ...] = ("U0", "V0", "U1", "V1")) -> Path:
    """An adapter of another task, as a run leaves it."""
    model = pair_of().student
    sites = find_sites(model, AdapterSettings())
    adapters = attach(model, AdapterSettings(seed=seed), RankPlan(sites, dict.fromkeys(modules, rank)))
    for layer in adapters.layers.values():
        nn.init.normal_(layer.lora_B, std=0.1)
    save_peft(adapters, folder, base_model="planted", task_type=None)
    return folder


def strategy(others: list[Path], **options: Any) -> OLoRA:
    return OLoRA(Options(others=tuple(others), **options), budget=Budget(rank=2), max_rank=4)


def test_a_begins_outside_of_what_the_others_read(tmp_path: Path) -> None:
    others = [other(tmp_path / "one", 1), other(tmp_path / "two", 2, rank=2, modules=("U0", "V1"))]
    adapters, _ = begun(mine := strategy(others), pair_of(), 10)
    assert {name: basis.shape[1] for name, basis in mine.bases.items()} == {"U0": 5, "V0": 3, "U1": 3, "V1": 5}
    plain = attach(pair_of().student, AdapterSettings(), RankPlan.uniform(adapters.sites, 2))
    for name, layer in adapters.layers.items():
        a, basis = layer.lora_A.detach().double(), mine.bases[name].double()
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.double), atol=1e-6, rtol=0)
        assert subspace_angles(a.T.numpy(), basis.numpy()).min() == pytest.approx(torch.pi / 2, abs=1e-6)
        torch.testing.assert_close(a.norm(dim=1), plain.layers[name].lora_A.detach().double().norm(dim=1))
    assert float(mine.overlap()) == pytest.approx(0.0, abs=1e-10)


def test_the_penalty_by_hand(tmp_path: Path) -> None:
    adapters, _ = begun(mine := strategy([other(tmp_path / "one", 1, modules=("U0", "V1"))], weight=0.5), pair_of(), 10)
    with torch.no_grad():
        adapters.layers["U0"].lora_A.copy_(mine.bases["U0"].T[:2] * torch.tensor([[3.0], [1.0]]))  # all of it inside
        inside, outside = mine.bases["V1"][:, 0], adapters.layers["V1"].lora_A[0].clone()
        adapters.layers["V1"].lora_A[0] = inside  # energy 1 inside ...
        adapters.layers["V1"].lora_A[1] = 2 * outside / outside.norm()  # ... and 4 outside
    penalty = mine.penalty(torch.tensor(1.0))
    assert penalty is not None
    assert float(penalty) == pytest.approx(0.5 * (1 + 1 / 5) / 2)
    penalty.backward()
    assert adapters.layers["V1"].lora_A.grad.abs().sum() > 0
    assert adapters.layers["V0"].lora_A.grad is None
    assert mine.progress() == {"overlap": pytest.approx(0.6)}


def test_progress_warns_of_nothing(tmp_path: Path) -> None:
    begun(mine := strategy([other(tmp_path / "one", 1)]), pair_of(), 10)
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch says it once in a process otherwise
    try:
        with warnings.catch_warnings(action="error"):
            mine.progress()
    finally:
        torch.set_warn_always(before)


def test_training_drifts_into_the_others_subspaces_without_it_and_stays_out_with_it(tmp_path: Path) -> None:
    others = [other(tmp_path / "one", 1)]
    overlaps = {}
    for weight in (0.0, 10.0):
        run_small(mine := strategy(others, weight=weight), pair_of(), 60)
        overlaps[weight] = float(mine.overlap())
    assert overlaps[0.0] > 0.02
    assert overlaps[10.0] < overlaps[0.0] / 5


def test_without_others_it_is_uniform(tmp_path: Path) -> None:
    mine = strategy([])
    plan = run_small(mine, pair_of(), 20).plan
    assert set(plan.values()) == {2}
    assert mine.penalty(torch.tensor(1.0)) is None
    assert mine.progress() == {}


def test_ranks_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "ranks.json").write_text('{"U0": 1, "V1": 3}')
    mine = strategy([other(tmp_path / "one", 1)], path=tmp_path)
    assert dict(run_small(mine, pair_of(), 12).plan) == {"U0": 1, "V0": 0, "U1": 0, "V1": 3}
    (tmp_path / "ranks.json").write_text('{"U0": 8, "V1": 8}')
    with pytest.raises(PlanError, match="the budget is 256"):
        begun(strategy([], path=tmp_path), pair_of(), 12)


def test_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        begun(strategy([tmp_path / "nothing"]), pair_of(), 10)
    full = [other(tmp_path / str(seed), seed, rank=8, modules=("V0",)) for seed in range(1)]
    with pytest.raises(
        TargetError, match="V0: the other adapters read 8 of 8 directions, which leaves too few for rank 2"
    ):
        begun(strategy(full), pair_of(), 10)
