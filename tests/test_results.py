"""Identity of a run, its directory, and its result."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autolora import results
from autolora.compose import compose
from autolora.errors import BusyError, DataError, DiskFullError
from autolora.files import write_json_atomic
from autolora.locking import exclusive
from autolora.results import (
    Git,
    Metrics,
    Params,
    Planted,
    RunDirectory,
    RunResult,
    Seconds,
    config_hash,
    git_state,
    hardware,
    peak_memory_bytes,
    read_result,
    run_name,
    versions,
)

KEYS = {
    "schema", "status", "task", "data_source", "data_fingerprint", "backbone", "backbone_fingerprint", "strategy",
    "seed", "metrics",
    "selection_metrics", "params", "adapter_bytes", "ranks", "seconds", "examples_per_second", "peak_memory_bytes",
    "backbone_bytes",
    "steps", "compute", "retrain", "config_hash", "git", "versions", "hardware", "notes",
}  # fmt: skip


def make_result(**changes: Any) -> RunResult:
    values: dict[str, Any] = {
        "status": "complete",
        "task": "mnli",
        "data_source": "mini",
        "data_fingerprint": "f00",
        "backbone": "minilm",
        "strategy": "uniform",
        "seed": 0,
        "metrics": Metrics(primary="accuracy", value=0.5, all={"accuracy": 0.5}),
        "params": Params(adapter=10, head=2, peak_trainable=12, budget=None, backbone=100),
        "adapter_bytes": 40,
        "ranks": {"layer.0": 1},
        "seconds": Seconds(total=1.0),
        "examples_per_second": 3.0,
        "peak_memory_bytes": 1,
        "steps": 7,
        "config_hash": "abc",
        "git": Git(),
        "versions": {},
        "hardware": {},
    }
    return RunResult(**values | changes)


# Identity ------------------------------------------------------------------------------------------------------------


def digest(*overrides: str, source: str = "mini", fingerprint: str = "f", weights: str = "w") -> str:
    return config_hash(compose(list(overrides)), source, fingerprint, weights)


def test_hash_is_of_what_decides_the_outcome() -> None:
    base = digest()
    assert len(base) == 64
    different = [
        digest("seed=1"), digest("strategy=uniform"), digest("strategy.rotate=false"), digest("budget.rank=4"),
        digest("optim.adapter.lr=0.1"), digest("data.max_train=5"), digest(source="hub"), digest(fingerprint="g"),
        digest(weights="v"),
    ]  # fmt: skip
    assert len({base, *different}) == 1 + len(different)


def test_hash_does_not_depend_on_where_and_how_it_is_watched(tmp_path: Path) -> None:
    same = [f"run_root={tmp_path}", "force=true", "logger=csv", "data.source=mini", f"data.dir={tmp_path}"]
    same += [f"backbone.path={tmp_path}"]
    same += [f"data.cache_dir={tmp_path}", "data.num_workers=2", "trainer.enable_progress_bar=false"]
    same += [f"trainer.checkpoint_every_{key}=7" for key in ("n_steps", "minutes")] + ["trainer.keep_checkpoints=true"]
    assert digest(*same) == digest()


def test_run_name_is_safe_as_a_file_name() -> None:
    assert run_name("mnli", "mini", "org/my model", "uniform", 3, "0123456789abcdef") == (
        "mnli-mini-org_my_model-uniform-seed3-0123456789"
    )


def test_directory_carries_the_resolved_source() -> None:
    config = compose(["run_root=out"])
    mini, hub = (RunDirectory.of(config, source, "f", "w").path for source in ("mini", "hub"))
    assert mini.parent == Path("out")
    assert mini.name.startswith("mnli-mini-minilm-autolora-seed0-")
    assert mini.name.rpartition("-")[2] != hub.name.rpartition("-")[2]


# Result --------------------------------------------------------------------------------------------------------------


def test_result_has_the_fields_of_the_schema() -> None:
    data = json.loads(make_result().to_json())
    assert set(data) == KEYS
    assert data["schema"] == 1
    assert set(data["metrics"]) == {"primary", "value", "all"}
    assert set(data["params"]) == {"adapter", "extra", "head", "peak_trainable", "budget", "backbone"}
    assert set(data["compute"]) == {"fit_steps", "retrain_steps", "passes", "plans_measured", "plans_compared"}
    assert set(data["seconds"]) == {"total", "earlier", "fit", "select", "compare", "retrain", "evaluate"}
    assert set(data["git"]) == {"commit", "dirty"}


def test_planted_is_there_only_where_something_is_planted() -> None:
    planted = Planted(true={"U0": 1}, found={"U0": 2}, exact_fraction=0.0, excess_error=math.inf)
    data = json.loads(make_result(planted=planted).to_json())
    assert data["planted"] == {"true": {"U0": 1}, "found": {"U0": 2}, "exact_fraction": 0.0, "excess_error": None}
    assert data["notes"] == ["planted.excess_error was inf: stored as null"]


def test_undefined_metrics_become_null_and_are_said() -> None:
    metrics = Metrics(primary="pearson", value=math.nan, all={"pearson": math.nan, "spearman": 0.25})
    result = make_result(metrics=metrics, selection_metrics={"loss": -math.inf}, notes=["a note"])
    data = json.loads(result.to_json(), parse_constant=pytest.fail)
    assert data["metrics"] == {"primary": "pearson", "value": None, "all": {"pearson": None, "spearman": 0.25}}
    assert data["selection_metrics"] == {"loss": None}
    assert data["notes"] == [
        "a note",
        "metrics.value was nan: stored as null",
        "metrics.all.pearson was nan: stored as null",
        "selection_metrics.loss was -inf: stored as null",
    ]


def test_result_reads_back(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    result = make_result(metrics=Metrics(primary="matthews", value=math.nan), notes=("x",))
    directory.write_result(result)
    assert directory.read_result() == read_result(tmp_path) == read_result(directory.result) == result


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 1, "sta', "expected JSON"),
        ("[]", "expected a result of schema 1, got None"),
        ('{"schema": 0}', "expected a result of schema 1, got 0"),
        ('{"schema": 1, "status": "complete"}', "missing or malformed fields: adapter_bytes, backbone, "),
    ],
)
def test_damaged_results_are_named_and_do_not_count(tmp_path: Path, text: str, message: str) -> None:
    directory = RunDirectory(tmp_path)
    directory.result.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"result\.json: .*") as caught:
        directory.read_result()
    assert message in str(caught.value)
    assert not directory.is_complete()


def test_only_a_complete_result_counts(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert not directory.is_complete()
    with pytest.raises(DataError, match="there is no result"):
        directory.read_result()
    directory.write_result(make_result(status="interrupted"))
    assert not directory.is_complete()
    directory.write_result(make_result())
    assert directory.is_complete()


# Directory -----------------------------------------------------------------------------------------------------------


def test_start_takes_the_old_result_and_half_written_files_away(tmp_path: Path) -> None:
    config = compose([f"run_root={tmp_path}/deep/er"])
    directory = RunDirectory.of(config, "mini", "f", "w")
    with directory.held():
        directory.start(config)
        directory.write_result(make_result())
        (directory.path / ".ranks.json.77.tmp").touch()
        (directory.path / ".adapter.77.tmp" / "deep").mkdir(parents=True)
        directory.start(config)
        assert sorted(file.name for file in directory.path.iterdir()) == [".lock", "config.yaml"]
    assert directory.config.read_text(encoding="utf-8") == config.to_yaml()


def test_clear_takes_everything_away_that_a_run_leaves(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for path in (directory.ranks, directory.history, directory.predictions):
        path.touch()
    directory.write_result(make_result())
    for folder in (directory.checkpoints, directory.adapter):
        folder.mkdir()
        (folder / "x").touch()
    directory.clear()
    assert list(tmp_path.iterdir()) == []
    directory.clear()


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from autolora.locking import exclusive\n"
    code += "with exclusive(Path(sys.argv[1])): print(os.getpid(), flush=True); sys.stdin.read()"
    root = Path(__file__).resolve().parents[1]
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    pid = holder.stdout.readline().strip()
    with pytest.raises(BusyError, match=rf"process {pid} on .* is working here"), exclusive(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with exclusive(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_ranks_and_predictions(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.write_ranks({"b": 2, "a": 0})
    assert list(json.loads(directory.ranks.read_text(encoding="utf-8")).items()) == [("b", 2), ("a", 0)]
    directory.write_predictions(["index", "label"], [[0, "x,y"], [1, 'q"']])
    assert directory.predictions.read_text(encoding="utf-8") == 'index,label\n0,"x,y"\n1,"q"""\n'


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ranks.json"
    write_json_atomic(file, {"a": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match=r"ranks\.json: could not be written \(No space left on device\)"):
        write_json_atomic(file, {"a": 2})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="Out of range float"):
        write_json_atomic(file, {"a": math.nan})

    def rows() -> Any:
        yield ["1"]
        raise RuntimeError("evaluation failed")

    with pytest.raises(RuntimeError, match="evaluation failed"):
        RunDirectory(tmp_path).write_predictions(["x"], rows())
    assert [path.name for path in tmp_path.iterdir()] == ["ranks.json"]
    assert json.loads(file.read_text(encoding="utf-8")) == {"a": 1}


def test_the_new_content_is_complete_before_it_takes_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []
    replace = os.replace

    def watch(source: Path, target: Path) -> None:
        seen.append((source.parent.name, source.read_text(encoding="utf-8")))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    write_json_atomic(tmp_path / "x.json", [1])
    assert seen == [(tmp_path.name, "[\n  1\n]\n")]


# Where it ran --------------------------------------------------------------------------------------------------------


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", "-C", str(directory), *identity, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_git_state_of_a_repository(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    assert git_state(tmp_path) == Git()
    (tmp_path / "a").write_text("1", encoding="utf-8")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "--quiet", "-m", "x")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").touch()
    assert git_state(tmp_path) == Git(commit=commit, dirty=False)
    (tmp_path / "a").write_text("2", encoding="utf-8")
    assert git_state(tmp_path) == Git(commit=commit, dirty=True)


def test_git_state_without_a_repository_or_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) == Git()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state() == Git()


def test_git_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*arguments: Any, timeout: float, **options: Any) -> None:
        raise subprocess.TimeoutExpired("git", timeout)

    monkeypatch.setattr(results.subprocess, "run", hang)
    assert git_state(tmp_path) == Git()


def test_versions_are_those_of_the_packages() -> None:
    found = versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    import torch

    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_hardware_and_memory_are_plausible() -> None:
    machine = hardware("a gpu")
    assert machine["gpu"] == "a gpu"
    assert machine["cpu"]
    assert isinstance(machine["cores"], int)
    assert 1 <= machine["cores"] <= (os.cpu_count() or 1)
    if hasattr(os, "sched_setaffinity"):  # a process that may use one core has one
        allowed = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, {min(allowed)})
            assert hardware()["cores"] == 1
        finally:
            os.sched_setaffinity(0, allowed)
    assert isinstance(machine["memory_bytes"], int)
    block = bytearray(32 << 20)
    block[:] = b"x" * len(block)
    assert len(block) < peak_memory_bytes() < machine["memory_bytes"]
