"""Checkpoints of a fit: when they are written, what they bring back, and how they are read."""

from __future__ import annotations

import random
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from strategies.toys.activation_svd import ActivationSVD
from strategies.toys.one_step_bilevel import OneStepBilevel
from training.small import autolora, small_planted, train

from autolora.errors import CheckpointError
from autolora.plan import Budget
from autolora.signals import Interrupted, Signals
from autolora.training.checkpoints import Checkpoints, newest, random_state, read, set_random_state


class StopBefore(Checkpoints):
    """Asks to stop before a batch, as a signal would."""

    def __init__(self, folder: Path, batch: int | None, every_steps: int | None = None) -> None:
        super().__init__(folder, "run", Signals(), lambda: {"total": 1.0}, every_steps=every_steps, every_minutes=None)
        self.batch = batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            self.signals.received = 15
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("batch", [3, 8, 11])
def test_held_out_batches_go_on_where_they_were(tmp_path: Path, accumulate: int, batch: int) -> None:
    """A bilevel strategy has an optimizer and a stream of batches of its own; stops wait for the end of a step."""

    def fit(folder: Path, stop: int | None, resume: Path | None = None) -> Any:
        strategy = OneStepBilevel(OneStepBilevel.Options(), budget=Budget(rank=1), max_rank=4)
        saving = StopBefore(folder / "checkpoints", stop)
        folder.mkdir(exist_ok=True)
        with suppress(Interrupted):
            train(
                small_planted(), strategy, folder, steps=12, saving=saving, resume=resume,
                accumulate_grad_batches=accumulate,
            )  # fmt: skip
        return strategy.adapters.trainable_state()

    whole = fit(tmp_path / "whole", None)
    broken = tmp_path / "broken"
    fit(broken, batch)
    found = newest(broken / "checkpoints", "run", pytest.fail)
    assert found is not None
    assert found.step == -(-batch // accumulate) <= 12
    again = fit(broken, None, found.path)
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_what_prepare_has_found_is_kept_and_not_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(folder: Path, stop: int | None, resume: Path | None = None) -> Any:
        strategy = ActivationSVD(ActivationSVD.Options(), budget=Budget(rank=1), max_rank=4)
        with suppress(Interrupted):
            train(small_planted(), strategy, folder, steps=8, saving=StopBefore(folder / "c", stop), resume=resume)
        return strategy.adapters.trainable_state()

    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = fit(tmp_path / "whole", None)
    fit(tmp_path / "broken", 5)
    found = newest(tmp_path / "broken" / "c", "run", pytest.fail)
    assert found is not None
    monkeypatch.setattr(ActivationSVD, "prepare", lambda *_: pytest.fail("prepared again"))
    again = fit(tmp_path / "broken", None, found.path)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_batches_of_a_stream_can_be_passed_over() -> None:
    problem = small_planted()
    every = [batch["inputs"] for batch in islice(problem.heldout_batches(), 9)]
    rest = [batch["inputs"] for batch in islice(problem.heldout_batches(4), 5)]
    assert all(torch.equal(a, b) for a, b in zip(every[4:], rest, strict=True))


def test_written_by_steps_and_by_minutes_and_two_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    original = Checkpoints.on_save_checkpoint

    def on_save_checkpoint(self: Any, trainer: Any, module: Any, checkpoint: Any) -> None:
        written.append(module.steps_done)
        original(self, trainer, module, checkpoint)

    monkeypatch.setattr(Checkpoints, "on_save_checkpoint", on_save_checkpoint)
    for name in "ab":
        (tmp_path / name).mkdir()
    train(small_planted(), autolora(), tmp_path / "a", steps=10, saving=StopBefore(tmp_path / "a" / "c", None, 4))
    assert written == [4, 8, 10]
    assert sorted(path.name for path in (tmp_path / "a" / "c").iterdir()) == [
        "step-00000008.ckpt",
        "step-00000010.ckpt",
    ]
    written.clear()
    now = [0.0]
    monkeypatch.setattr(
        "autolora.training.checkpoints.time.monotonic", lambda: now.__setitem__(0, now[0] + 20) or now[0]
    )
    saving = Checkpoints(tmp_path / "b" / "c", "run", Signals(), dict, every_steps=None, every_minutes=1.0)
    train(small_planted(), autolora(), tmp_path / "b", steps=10, saving=saving)
    assert len(written) >= 3
    assert written[-1] == 10
    assert (np.diff(written[:-1]) == written[1] - written[0]).all()


def test_a_checkpoint_holds_what_training_changes_and_not_the_model(tmp_path: Path) -> None:
    strategy = autolora()
    train(small_planted(), strategy, tmp_path, steps=4, saving=StopBefore(tmp_path / "c", None))
    (path,) = (tmp_path / "c").iterdir()
    checkpoint = read(path)
    assert checkpoint["state_dict"] == {}
    assert checkpoint["trainable"].keys() == strategy.adapters.trainable_state().keys()
    assert not any("base_layer" in name for name in checkpoint["trainable"])


def test_a_checkpoint_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    train(small_planted(), autolora(), tmp_path, steps=4, saving=StopBefore(tmp_path / "c", None))
    (path,) = (tmp_path / "c").iterdir()
    checkpoint = read(path)
    checkpoint["trainable"]["of another model"] = torch.zeros(2)
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match=r"of another model.*; start again with force=true"):
        train(small_planted(), autolora(), tmp_path, steps=4, saving=StopBefore(tmp_path / "c", None), resume=path)


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    train(small_planted(), autolora(), tmp_path, steps=4, saving=StopBefore(tmp_path / "c", None))
    (path,) = (tmp_path / "c").iterdir()
    checkpoint = read(path)
    checkpoint["autolora"]["random"] *= 2
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match="is of 2 processes, and here are 1"):
        train(small_planted(), autolora(), tmp_path, steps=4, saving=StopBefore(tmp_path / "c", None), resume=path)


def test_random_streams_come_back() -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), float(np.random.rand()), random.random()

    np.random.standard_normal()  # leaves the second of a pair waiting
    state = random_state()
    first = draw()
    assert draw() != first
    set_random_state(state)
    assert draw() == first


def test_tensors_without_a_header_are_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.ckpt"
    torch.save({"a": torch.zeros(1)}, path)
    said: list[str] = []
    assert newest(tmp_path, "run", said.append) is None
    assert said == [f"{path} is damaged (it does not say whose it is): set aside as {path.name}.damaged"]
