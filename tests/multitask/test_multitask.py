"""The command on a tiny encoder: what it trains, what it writes, and that it goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from autolora.adapters.peft_format.load import read_factors
from autolora.compose import compose
from autolora.config import RunConfig
from autolora.errors import ConfigError
from autolora.multitask.__main__ import main
from autolora.multitask.arms import Bench
from autolora.plan import Site
from autolora.results import read_result

TASKS = ["rte", "stsb", "mnli"]  # two classes, a score, three classes


@pytest.fixture
def command(tiny_bert_dir: Path, tmp_path: Path) -> Any:
    def make(*more: str) -> list[str]:
        fixed = (
            f"tasks=[{','.join(TASKS)}]", "probe_steps=12", "probe_rank=3", "budget.rank=2", "data.source=mini",
            "data.max_train=120", f"data.cache_dir={tmp_path / 'cache'}", f"backbone.path={tiny_bert_dir}",
            f"run_root={tmp_path / 'runs'}", f"out={tmp_path / 'out'}", "logger=csv", "trainer.accelerator=cpu",
            "trainer.precision=32-true", "trainer.enable_progress_bar=false", "trainer.max_epochs=1",
        )  # fmt: skip
        given = {one.partition("=")[0]: one for one in (*fixed, *more)}
        return list(given.values())

    return make


def test_the_budget_is_of_all_tasks_together() -> None:
    """Uniform rank 2 costs 32 on each of two modules, 64, and as much for every task; 10,000 are as given."""
    sites = {"a": Site(8, 8), "b": Site(8, 8)}
    assert Bench(TASKS, [], ["budget.rank=2"]).total_budget(sites) == 3 * 64
    assert Bench(TASKS, [], ["budget.params=10000"]).total_budget(sites) == 10_000
    assert Bench(TASKS, []).total_budget(sites) == 3 * 128


def test_the_arms_share_one_budget(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(command())
    written = json.loads((tmp_path / "out" / "multitask.json").read_text())
    (seed,) = written["seeds"]
    assert seed["cost"] == sum(seed["params"].values()) <= seed["budget"]
    assert seed["budget"] - seed["cost"] < seed["cheapest_left"]
    assert 0 <= seed["gap"] < 0.1
    assert seed["optimal_value"] >= seed["value"] > 0
    assert all(complexity >= 1 for complexity in seed["complexity"].values())
    assert set(seed["gradient_cosines"]) == {"rte, stsb", "rte, mnli", "stsb, mnli"}
    assert all(-1 <= cosine <= 1 for cosine in seed["gradient_cosines"].values())

    arms = written["arms"]
    for task in TASKS:
        assert arms["isolated"][task]["adapter_params"] == [seed["params"][task]]
        assert arms["separate"][task]["adapter_params"][0] <= seed["budget"] // 3
        plan = json.loads((tmp_path / "out" / "seed0" / f"{task}.json").read_text())
        assert read_result(Path(arms["isolated"][task]["runs"][0])).ranks == plan
    merged = json.loads((tmp_path / "out" / "seed0" / "merged.json").read_text())
    assert all(arms["merged"][task]["adapter_params"] == [seed["cost"]] for task in TASKS)
    assert merged == read_result(Path(arms["merged"]["rte"]["runs"][0])).ranks
    said = capsys.readouterr().out
    assert "value" in said
    assert all(task in said for task in TASKS)

    results = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/result.json")}
    assert len(results) == 3 + 3 + 3 + 1
    main(command())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/result.json")} == results
    assert json.loads((tmp_path / "out" / "multitask.json").read_text()) == written


def test_isolated_tasks_may_keep_out_of_each_others_subspaces(command: Any, tmp_path: Path) -> None:
    overlaps = []
    for weight in (0, 5):
        out = tmp_path / f"it's {weight}, (a=1)"  # no name of a folder is too odd
        main(command("arms=[isolated]", f"orthogonality={weight}", f"out={out}", "tasks=[rte,mnli]"))
        isolated = json.loads((out / "multitask.json").read_text())["arms"]["isolated"]
        first, second = (read_factors(Path(isolated[task]["runs"][0]) / "adapter") for task in ("rte", "mnli"))
        shares = []
        for name in first.keys() & second.keys():
            basis = torch.linalg.qr(first[name][0].T).Q
            a = second[name][0]
            shares.append(float((a @ basis).square().sum() / a.square().sum()))
        overlaps.append(sum(shares) / len(shares))
    assert overlaps[1] < overlaps[0] / 5


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["tasks=[rte]"], 2, "tasks=[rte]: expected a list of at least 2 names among cola, "),
        (["tasks=rte"], 2, "tasks=rte: expected a list of at least 2 names among cola, "),
        (["tasks=[rte,rte]"], 2, "tasks: expected each once, got rte, rte"),
        (["tasks=[rte,rte,nope]"], 2, "rte, wnli, got 'nope'\nerror: tasks: expected each once, got rte, rte\n"),
        (["tasks=[rte,nope,mnil]"], 2, "rte, wnli, got 'nope', 'mnil'; did you mean mnli?\n"),
        (["seeds=[]"], 2, "seeds=[]: expected a list of one or more integers >= 0 and < 4294967296, got []"),
        (["seeds=[0,4294967296]"], 2, "integers >= 0 and < 4294967296, got 4294967296\n"),
        (["strategy=autolora"], 2, "strategy=autolora: expected tasks=, arms=, seeds="),
        (["task.name=mnli"], 2, "task.name=mnli: expected tasks=, arms=, seeds="),
        (["budget.cost=latency"], 2, "budget.cost=latency: the budget of many tasks is counted in parameters"),
        (["++budget.cost=flops"], 2, "budget.cost=flops: the budget of many tasks is counted in parameters"),
        (["budget.fraction=0.1"], 2, "budget.fraction=0.1: the budget of many tasks is counted in parameters"),
        (["budget.params=9"], 2, "budget.rank=2 and budget.params=9: expected at most one of"),
        (["rank_multiple=8"], 2, "rank_multiple=8: plans of tasks are merged one component at a time"),
        (["arms=[joint]"], 2, "arms=[joint]: expected"),
        (["trainer.max_epoch=3"], 2, "unknown key trainer.max_epoch"),
        (["budget.rank=0.01"], 1, "does not pay for one component for each of 3 tasks"),
        (["data.source=local", "data.dir=/"], 1, "RTE"),
    ],
)
def test_bad_input(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: int, message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command(*more))
    assert stop.value.code == code
    said = capsys.readouterr()
    assert message in said.err
    assert "probing" not in said.out
    assert not (tmp_path / "runs").exists()


def test_rows_of_a_later_task_are_missed_before_anything_trains(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "glue" / "RTE"
    folder.mkdir(parents=True)
    for split in ("train", "dev"):
        rows = "".join(f"{i}\tpremise {i}\thypothesis\t{'not_' * (i % 2)}entailment\n" for i in range(40))
        (folder / f"{split}.tsv").write_text(f"index\tsentence1\tsentence2\tlabel\n{rows}")
    with pytest.raises(SystemExit) as stop:
        main(command("tasks=[rte,qnli]", "data.source=local", f"data.dir={folder.parent}"))
    assert stop.value.code == 1
    said = capsys.readouterr()
    assert "QNLI" in said.err
    assert "RTE" in said.out
    assert "probing" not in said.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arms", "of_arms"),
    [
        ("arms=[separate,isolated,merged]", [("rte", "uniform", 1), ("rte", "manual", 0), ("mixture", "manual", 0)]),
        ("arms=[isolated] orthogonality=0.5", [("rte", "o_lora", 0)]),
    ],
)
def test_the_first_check_makes_every_configuration_that_is_used(
    command: Any, monkeypatch: pytest.MonkeyPatch, arms: str, of_arms: list[tuple[str, str, int]]
) -> None:
    """What is refused in one kind of configuration alone is refused before rows are read."""
    made: list[RunConfig] = []

    def remember(overrides: list[str]) -> RunConfig:
        made.append(compose(overrides))
        return made[-1]

    def reached(bench: Bench) -> None:
        raise ConfigError("rows are read")

    monkeypatch.setattr("autolora.multitask.arms.compose", remember)
    monkeypatch.setattr(Bench, "read_rows", reached)
    with pytest.raises(SystemExit):
        main(command(*arms.split()))
    kinds = [(cfg.task.name, cfg.strategy.name, int(cfg.budget.enabled)) for cfg in made]
    assert kinds == [("rte", "uniform", 1), ("rte", "uniform", 0), *of_arms]
    assert [cfg.trainer.max_steps for cfg in made] == [-1, 12] + [-1] * len(of_arms)


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from autolora.multitask.__main__ import main; main(['--help']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m autolora.multitask")
