"""The command line of training, with a stand-in for the run itself."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from autolora.config import RunConfig
from autolora.errors import ConfigError, DataError
from autolora.paths import config_root
from autolora.results import RunDirectory
from autolora.train import main
from autolora.validate import require

Runs = list[RunConfig]

STRATEGIES = ", ".join(sorted(path.stem for path in (config_root() / "strategy").glob("*.yaml")))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runs:
    """Configurations that were run, in an empty current folder."""
    seen: Runs = []
    monkeypatch.chdir(tmp_path)
    install(monkeypatch, seen.append)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    return seen


def install(monkeypatch: pytest.MonkeyPatch, run_one: Callable[[RunConfig], Any]) -> None:
    module = types.ModuleType("autolora.run")
    result = SimpleNamespace(data_source="mini", data_fingerprint="0", backbone_fingerprint="0")
    module.run_one = lambda cfg: run_one(cfg) or result  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "autolora.run", module)
    monkeypatch.setattr("autolora.reporting.summary.print_summary", lambda result, directory: None)
    monkeypatch.setattr("autolora.results.RunDirectory.of", lambda *identity: RunDirectory(Path("run")))
    monkeypatch.setattr("autolora.sweep.Sweep._write_report", lambda *_: 0)
    Path("run").mkdir(exist_ok=True)
    Path("run/result.json").touch()


def exit_code(*argv: str) -> int:
    try:
        main(list(argv))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_runs_what_was_asked_for_and_leaves_nothing_behind(runs: Runs, tmp_path: Path) -> None:
    before = list(sys.argv)
    assert exit_code("strategy=autolora", "task=mnli", "data.source=mini", "+budget.rank=2", "+experiment=quick") == 0
    (config,) = runs
    assert (config.strategy.name, config.task.name, config.data.source) == ("autolora", "mnli", "mini")
    assert (config.budget.rank, config.trainer.max_steps) == (2, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert Path.cwd() == tmp_path
    assert sys.argv == before


def test_arguments_come_from_the_command_line(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["autolora-train", "seed=3"])
    main()
    assert [config.seed for config in runs] == [3]


def test_sweep_runs_every_combination(runs: Runs, tmp_path: Path) -> None:
    assert exit_code("task=sst2,mnli", "-m", "strategy=uniform,autolora", "seed=range(0,2)") == 0
    cells = [(config.task.name, config.strategy.name, config.seed) for config in runs]
    assert cells == [(t, s, n) for t in ("sst2", "mnli") for s in ("uniform", "autolora") for n in (0, 1)]
    written = {str(file.relative_to(tmp_path)) for file in (tmp_path / "runs").rglob("*") if file.is_file()}
    (sweep,) = (tmp_path / "runs/sweeps").iterdir()
    files = {str((sweep / "cells" / f"{number:05d}.json").relative_to(tmp_path)) for number in range(8)}
    own = {str((sweep / name).relative_to(tmp_path)) for name in (".lock", "sweep.json")}
    assert written == {"runs/multirun.yaml", *own, *files}


def test_sweep_file_runs_every_combination(runs: Runs) -> None:
    assert exit_code("sweep=seeds", "task=mrpc") == 0
    cells = [(config.task.name, config.strategy.name, config.seed) for config in runs]
    assert cells == [("mrpc", s, n) for s in ("uniform", "autolora") for n in (0, 1, 2)]


def test_of_several_processes_the_first_keeps_the_records_of_a_sweep(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert exit_code("-m", "seed=0,1") == 0
    assert [config.seed for config in runs] == [0, 1]
    assert not (tmp_path / "runs/sweeps").exists()


def test_faults_stop_before_any_run(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("-m", "strategy=uniform,autolara", "budget.rnk=4") == 2
    assert runs == []
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "error: 2 faults in the configuration",
        f"  strategy=autolara: unknown strategy 'autolara'; did you mean 'autolora'? (available: {STRATEGIES})",
        "  budget.rnk=4: unknown key budget.rnk; did you mean budget.rank?",
    ]


def test_one_fault_is_one_line(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("max_rank=0") == 2
    assert capsys.readouterr().err == "error: max_rank=0: expected an integer >= 1, got 0\n"


def test_missing_config_dir_is_a_fault(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--config-dir", "nowhere") == 2
    assert capsys.readouterr().err.endswith("nowhere: there is no such folder\n")


@pytest.mark.parametrize(
    ("error", "code"), [(DataError("train.tsv, line 3: too few columns"), 1), (ConfigError("x"), 2)]
)
def test_user_errors_are_a_message_and_a_code(
    error: Exception, code: int, runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: RunConfig) -> None:
        raise error

    install(monkeypatch, fail)
    assert exit_code() == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_ctrl_c_before_a_run_is_no_traceback(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_one(config: RunConfig) -> None:
        raise KeyboardInterrupt

    install(monkeypatch, run_one)
    assert exit_code() == 130


def test_errors_that_are_ours_keep_their_traceback(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: RunConfig) -> None:
        raise ZeroDivisionError("a mistake of ours")

    install(monkeypatch, fail)
    with pytest.raises(ZeroDivisionError, match="a mistake of ours"):
        main([])


def test_config_dir_adds_choices(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    text = "# @package _global_\nseed: 11\noptim: {head: {lr: 0.5}}\n"
    (tmp_path / "mine" / "experiment" / "large.yaml").write_text(text, encoding="utf-8")
    assert exit_code("--config-dir", "mine", "experiment=large", "task=rte") == 0
    assert [(config.seed, config.optim.head.lr, config.task.name) for config in runs] == [(11, 0.5, "rte")]


def test_printed_configuration_is_the_one_that_runs(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--cfg", "job", "task=planted", "seed=4") == 0
    printed = require(yaml.safe_load(capsys.readouterr().out))
    assert exit_code("task=planted", "seed=4") == 0
    assert runs == [printed]


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_names_groups_choices_and_examples(option: str, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("task=nonsense", option) == 0
    text = capsys.readouterr().out
    for line in (
        f"  strategy    {STRATEGIES}",
        "  task        cola, digits, mixture, mnli, mnli_5k, mrpc, planted, planted_encoder, qnli",
        "budget.rank=4",
        "-m task=",
    ):
        assert line in text
    assert runs == []


def test_help_shows_choices_of_a_config_dir(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.yaml").touch()
    main(["--help", f"--config-dir={tmp_path}"])
    main(["--help", "--config-dir", str(tmp_path)])
    assert capsys.readouterr().out.count("wnli, mine\n") == 2


def test_examples_of_the_help_are_valid(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    examples = [
        line.split("autolora.train ")[1]
        for line in capsys.readouterr().out.split("Examples:")[1].splitlines()
        if "  " in line
    ]
    (tmp_path / "DIR").mkdir()
    assert len(examples) == 3
    for example in examples:
        assert exit_code(*example.split()) == 0
    assert len(runs) == 1 + 1 + 12
