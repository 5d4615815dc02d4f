"""A rank for every row: the ends of the threshold, rows that are done stay done, and compute counted by hand."""

from __future__ import annotations

import pytest
import torch
from adapters.tiny_models import randomize
from multitask.small_bank import make
from multitask.toy_tasks import ToyTask, tokens
from torch import Tensor

from autolora.adapters import Adapters, AdapterSettings, attach, find_sites, largest_plan
from autolora.errors import PlanError
from autolora.multitask.cascade import Cascade, trade
from autolora.plan import RankPlan

RANKS = [0, 1, 3]


@pytest.fixture
def adapters() -> Adapters:
    model, settings = make(3), AdapterSettings()
    found = attach(model, settings, largest_plan(find_sites(model, settings), settings, 3))
    randomize(found)
    with torch.no_grad():
        for parameter in found.head_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return found


@pytest.fixture
def task() -> ToyTask:
    return ToyTask("toy", tokens(1, 64, 20, 5), torch.arange(20) % 3)


def at_rank(adapters: Adapters, task: ToyTask, rank: int) -> Tensor:
    plan = adapters.attached_plan()
    with adapters.masked(RankPlan(plan.sites, {name: min(rank, own) for name, own in plan.items()})), torch.no_grad():
        return torch.cat([task.forward(adapters.model, batch) for batch in task.datamodule.batches])


def test_the_ends_of_the_threshold_are_the_lowest_and_the_highest_rank(adapters: Adapters, task: ToyTask) -> None:
    cascade = Cascade(adapters, task, RANKS)
    for threshold, rank, passes in ((0.0, 0, 1), (1.1, 3, 3)):
        answers = [cascade.answer(batch, threshold) for batch in task.datamodule.batches]
        assert torch.equal(torch.cat([answer.logits for answer in answers]), at_rank(adapters, task, rank))
        assert {int(r) for answer in answers for r in answer.ranks} == {rank}
        assert sum(answer.passes for answer in answers) == 20 * passes


def test_rows_go_on_while_they_are_unsure_and_rows_that_are_done_stay_as_they_were(
    adapters: Adapters, task: ToyTask
) -> None:
    alone = {rank: at_rank(adapters, task, rank) for rank in RANKS}
    sure = {rank: logits.softmax(1).amax(1) for rank, logits in alone.items()}
    threshold = float(sure[0].median())
    expected = [0 if sure[0][i] >= threshold else 1 if sure[1][i] >= threshold else 3 for i in range(20)]
    assert set(expected) == set(RANKS)
    answers = [Cascade(adapters, task, RANKS).answer(batch, threshold) for batch in task.datamodule.batches]
    found, logits = torch.cat([a.ranks for a in answers]), torch.cat([a.logits for a in answers])
    assert found.tolist() == expected
    for i, rank in enumerate(expected):
        torch.testing.assert_close(logits[i], alone[rank][i], rtol=1e-5, atol=1e-5)
        if rank == 0:
            assert torch.equal(logits[i], alone[0][i])
    assert sum(a.passes for a in answers) == sum({0: 1, 1: 2, 3: 3}[rank] for rank in expected)


def test_compute_by_hand(adapters: Adapters) -> None:
    """Two layers of width 16 and 24 on 7 tokens, and a pooler on one."""
    task = ToyTask("toy", tokens(1, 64, 2, 5), torch.tensor([0, 1]))
    [batch] = task.datamodule.batches
    widths = {(16, 16): 8, (16, 24): 2, (24, 16): 2}  # of the modules that read every token
    across = 7 * sum(count * (a + b) for (a, b), count in widths.items()) + (16 + 16)
    frozen = 7 * sum(count * a * b for (a, b), count in widths.items()) + 16 * 16
    sure = at_rank(adapters, task, 1).softmax(1).amax(1)
    early, late = sure.max(), sure.min()
    assert early > late
    answer = Cascade(adapters, task, [1, 3]).answer(batch, float((early + late) / 2))
    assert sorted(answer.ranks.tolist()) == [1, 3]
    assert answer.passes == 3
    assert answer.adapter_flops == 2 * across * (2 * 1 + 1 * 3)
    assert answer.backbone_flops == 2 * frozen * 3
    assert answer.seconds > 0


def test_the_table_over_thresholds(adapters: Adapters, task: ToyTask) -> None:
    highest = at_rank(adapters, task, 3).argmax(1)
    task = ToyTask("toy", torch.cat([b["input_ids"] for b in task.datamodule.batches]), highest)
    lowest = at_rank(adapters, task, 0)
    unsure = float(lowest.softmax(1).amax(1).median())
    first, middle, last = trade(Cascade(adapters, task, RANKS), [0.0, unsure, 1.1])
    assert last.scores.value == 1
    assert first.scores.value == pytest.approx(float((lowest.argmax(1) == highest).float().mean()))
    assert (first.passes, last.passes) == (1, 3)
    assert first.adapter_flops == 0 < middle.adapter_flops < last.adapter_flops
    assert first.shares == {0: 1.0, 1: 0.0, 3: 0.0}
    assert sum(middle.shares.values()) == pytest.approx(1)
    assert middle.passes == pytest.approx(middle.shares[0] + 2 * middle.shares[1] + 3 * middle.shares[3])


def test_adapters_are_left_as_they_were(adapters: Adapters, task: ToyTask) -> None:
    before = at_rank(adapters, task, 3)
    trade(Cascade(adapters, task, RANKS), [0.5])
    with torch.no_grad():
        after = torch.cat([task.forward(adapters.model, batch) for batch in task.datamodule.batches])
    assert torch.equal(before, after)


@pytest.mark.parametrize("ranks", [[], [2, 1], [1, 1], [1, 4], [-1, 2]])
def test_ranks_that_cannot_be(adapters: Adapters, task: ToyTask, ranks: list[int]) -> None:
    with pytest.raises(PlanError, match="rising ones from 0 to 3"):
        Cascade(adapters, task, ranks)
