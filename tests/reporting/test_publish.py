"""What would be published on Weights & Biases, checked on a stand-in on loopback; nothing goes further."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pty
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from reporting.fake_runs import write_run
from reporting.wandb_stand_in import StandIn, stand_in

from autolora.compose import compose
from autolora.report import main
from autolora.reporting import publish
from autolora.reporting.report import make_arenas
from autolora.reporting.runs import load_runs
from autolora.run import run_one

ROOT = Path(__file__).parents[2]
SECONDS = 120
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")  # wandb-workspaces has some


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks and two strategies, two seeds each; one folder was renamed after its run."""
    root = tmp_path_factory.mktemp("runs")
    for task in ("sst2", "rte"):
        for seed in range(2):
            write_run(root, task=task, seed=seed, accuracy=0.7)
            last = write_run(root, task=task, seed=seed, strategy="autolora", accuracy=0.8, params=900)
    last.rename(root / "renamed <=> 'later'")
    return root


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run, where only the way to the server counts."""
    root = tmp_path_factory.mktemp("few")
    write_run(root)
    return root


@pytest.fixture
def service() -> Iterator[StandIn]:
    with stand_in() as running:
        yield running


def command(runs: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "autolora.report", f"runs={runs}", f"out={out}", "wandb=true", "title=Two strategies"]


def report(runs: Path, out: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(runs, out), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS
    )


def assert_written(out: Path) -> None:
    assert all((out / name).stat().st_size for name in publish.FILES)
    assert list((out / "figures").glob("*.svg"))


@pytest.fixture(scope="module")
def published(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StandIn, Path]]:
    """What the stand-in was sent by one report, in an environment that keeps runs offline; and the report's folder."""
    home, out = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("report") / "out"
    with stand_in() as running:
        done = report(runs, out, running.environment(home, WANDB_MODE="offline"))
        assert (done.returncode, done.stderr) == (0, "")
        address = f"{running.url}/me/autolora/reports/Two-strategies--Vmlldzox"
        assert done.stdout.splitlines()[-1] == f"published as {address}"
        yield running, out


# The Report ----------------------------------------------------------------------------------------------------------


def blocks(service: StandIn) -> list[dict[str, Any]]:
    (view,) = service.all_of("upsertView")
    assert (view["entityName"], view["projectName"], view["type"]) == ("me", "autolora", "runs")
    assert view["displayName"] == "Two strategies"
    return json.loads(view["spec"])["blocks"]


def text_of(block: Mapping[str, Any]) -> str:
    return block.get("text", "") + "".join(map(text_of, block.get("children", [])))


def test_sentences_and_table_are_in_the_report(published: tuple[StandIn, Path]) -> None:
    service, out = published
    found = blocks(service)
    (listed,) = [block for block in found if block["type"] == "list"]
    name, *lines = (out / "sentences.txt").read_text().splitlines()
    said = [f"- {text_of(item)}" for item in listed["children"]]
    assert said == lines[: len(said)]
    assert lines[len(said)].startswith("- Runs are paired by task, seed and example.")  # how to read them
    assert [text_of(block) for block in found if block["type"] == "heading"] == [name, "rte", "sst2"]
    (table,) = [block["content"] for block in found if block["type"] == "markdown-block"]
    assert f"## {name}\n\n{table}" == (out / "table.md").read_text()


def test_there_is_a_run_set_for_every_strategy(runs: Path, published: tuple[StandIn, Path]) -> None:
    grids = [block for block in blocks(published[0]) if block["type"] == "panel-grid"]
    assert len(grids) == 2
    for task, grid in zip(("rte", "sst2"), grids, strict=True):
        sets = grid["metadata"]["runSets"]
        assert [one["name"] for one in sets] == ["autolora", "uniform"]
        assert {one["project"]["entityName"] + "/" + one["project"]["name"] for one in sets} == {"me/autolora"}
        for strategy, one in zip(("autolora", "uniform"), sets, strict=True):
            by_strategy, by_name = one["filters"]["filters"]
            assert by_strategy["key"] == {"section": "config", "name": "strategy.value.name"}
            assert (by_strategy["op"], by_strategy["value"]) == ("IN", [strategy])
            assert by_name["key"] == {"section": "run", "name": "displayName"}
            assert (by_name["op"], by_name["connector"]) == ("IN", "AND")
            names = {path.name for path in runs.glob(f"{task}-*-{strategy}-seed*")}
            if (task, strategy) == ("rte", "autolora"):
                (renamed,) = set(by_name["value"]) - names
                assert renamed.startswith("rte-local-minilm-autolora-seed1-")
                names |= {renamed}
            assert set(by_name["value"]) == names
            assert len(names) == 2


def test_there_are_a_bar_a_scatter_and_a_parallel_plot(published: tuple[StandIn, Path]) -> None:
    for block in blocks(published[0]):
        if block["type"] != "panel-grid":
            continue
        bar, scatter, parallel = block["metadata"]["panelBankSectionConfig"]["panels"]
        assert bar["viewType"] == "Bar Chart"
        assert bar["config"]["metrics"] == ["dev/accuracy"]
        assert (bar["config"]["groupBy"], bar["config"]["groupAgg"]) == ("strategy.value.name", "mean")
        assert scatter["viewType"] == "Scatter Plot"
        assert (scatter["config"]["xAxis"], scatter["config"]["yAxis"]) == (
            "summary:params/adapter", "summary:dev/accuracy",
        )  # fmt: skip
        assert parallel["viewType"] == "Parallel Coordinates Plot"
        assert [column["accessor"] for column in parallel["config"]["columns"]] == [
            "config:strategy.value.name", "config:seed.value", "summary:params/adapter", "summary:seconds/total",
            "summary:dev/accuracy",
        ]  # fmt: skip


def test_budgets_of_a_strategy_are_not_averaged(tmp_path: Path) -> None:
    for rank in (1, 4):
        write_run(tmp_path, f"budget.rank={rank}", budget=1000 * rank)
    (arena,) = make_arenas(load_runs([tmp_path]))
    report = publish.make_report([arena], title="T" * 200, project="p", entity="e")
    grid = report.blocks[-1]
    assert [one.name for one in grid.runsets] == ["uniform (rank 1)", "uniform (rank 4)"]
    assert len({one.filters for one in grid.runsets}) == 2
    assert grid.panels[0].groupby is None
    assert report.title == "T" * 128


# The Artifact --------------------------------------------------------------------------------------------------------


def test_the_files_are_an_artifact(published: tuple[StandIn, Path]) -> None:
    service, out = published
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert {"index.html", "results.csv", "table.md", "table.tex", "sentences.txt"} < files.keys()
    (artifact,) = service.all_of("CreateArtifact")
    assert artifact["input"]["artifactTypeName"] == artifact["input"]["artifactCollectionName"] == "comparison"
    (first, *_) = service.all_of("UpsertBucket")
    assert (first["project"], first["entity"], first["jobType"]) == ("autolora", "me", "comparison")
    manifest = json.loads(service.put["/put/manifest"])["contents"]
    assert {name: entry["digest"] for name, entry in manifest.items()} == {
        name: base64.b64encode(hashlib.md5(content).digest()).decode() for name, content in files.items()
    }
    sent = {path.removeprefix("/put/artifact/"): content for path, content in service.put.items()}
    assert {name: sent.get(name) for name in files} == files
    assert len(service.all_of("CommitArtifact")) == 1


def test_nothing_goes_elsewhere(published: tuple[StandIn, Path]) -> None:
    """Other addresses are asked of the proxy, which is the stand-in."""
    assert published[0].asked
    assert published[0].elsewhere == []


def test_what_goes_elsewhere_is_seen(few: Path, tmp_path: Path, service: StandIn) -> None:
    environment = service.environment(tmp_path, WANDB_BASE_URL="http://wandb.example")
    assert report(few, tmp_path / "out", environment).returncode == 1
    assert service.elsewhere
    assert all(address.startswith("http://wandb.example") for address in service.elsewhere)


# Where it cannot be --------------------------------------------------------------------------------------------------


def test_without_an_account_it_says_so_and_the_rest_is_written(few: Path, tmp_path: Path, service: StandIn) -> None:
    environment = service.environment(tmp_path)
    del environment["WANDB_API_KEY"]
    done = report(few, tmp_path / "out", environment)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: wandb=true: expected an account at {service.url}, found none: `wandb login`, or set WANDB_API_KEY\n"
    )
    assert_written(tmp_path / "out")
    assert service.asked == []


def test_in_a_terminal_it_does_not_ask_for_an_account(few: Path, tmp_path: Path, service: StandIn) -> None:
    environment = service.environment(tmp_path)
    del environment["WANDB_API_KEY"]
    terminal, its = pty.openpty()
    process = subprocess.Popen(
        command(few, tmp_path / "out"), cwd=ROOT, env=environment, stdin=its, stdout=its, stderr=its
    )
    os.close(its)
    said = b""
    try:
        while part := os.read(terminal, 4096):
            said += part
            assert b"choice" not in said.lower(), said.decode()
    except OSError:  # as Linux says that the other end is closed
        pass
    finally:
        process.kill()
        os.close(terminal)
    assert b"expected an account" in said
    assert_written(tmp_path / "out")


def test_a_server_that_is_not_there(few: Path, tmp_path: Path, service: StandIn) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"  # nobody listens there
        done = report(few, tmp_path / "out", service.environment(tmp_path, WANDB_BASE_URL=address))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: wandb=true: {address} cannot be reached (")
    assert done.stderr.count("\n") == 1
    assert_written(tmp_path / "out")


def test_a_server_that_refuses(few: Path, tmp_path: Path, service: StandIn) -> None:
    service.refuses = True
    done = report(few, tmp_path / "out", service.environment(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: wandb=true: {service.url}: ")
    assert "permission denied" in done.stderr
    assert done.stderr.count("\n") == 1
    assert_written(tmp_path / "out")


def test_without_the_package(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(publish, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main([f"runs={few}", f"out={tmp_path / 'out'}", "wandb=true"])
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        "error: wandb=true: wandb-workspaces is not installed: pip install 'autolora[wandb]'\n"
    )
    assert_written(tmp_path / "out")


# The runs that panels plot ------------------------------------------------------------------------------------------


def test_offline_runs_are_synced_with_all_that_panels_plot(tmp_path: Path, service: StandIn) -> None:
    """By the command of the README: group, type of job and tags, and every number and key of the Report's panels."""
    base = ("task=planted", "strategy=uniform", "trainer.max_steps=2", "logger=wandb", f"run_root={tmp_path / 'runs'}")
    run_one(compose([*base]))
    own = ("logger.group=mine", "logger.job_type=sort", "logger.tags=[a]", "logger.project=other")
    run_one(compose([*base, "seed=1", *own]))
    folders = sorted((tmp_path / "runs").glob("*/wandb/offline-run-*"))
    assert len(folders) == 2
    subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *map(str, folders)],
        env=service.environment(tmp_path), check=True, capture_output=True, timeout=SECONDS,
    )  # fmt: skip
    synced = {one["displayName"]: one for one in service.all_of("UpsertBucket") if one["displayName"]}
    assert sorted(synced) == sorted(path.name for path in (tmp_path / "runs").iterdir())
    first, second = (synced[name] for name in sorted(synced))
    assert (first["project"], first["groupName"], first["jobType"]) == ("autolora", "planted-planted-none", "uniform")
    assert first["tags"] == ["planted", "uniform", "seed0"]
    assert (second["project"], second["groupName"], second["jobType"]) == ("other", "mine", "sort")
    assert second["tags"] == ["a", "planted", "uniform", "seed1"]

    (arena,) = make_arenas(load_runs([tmp_path / "runs"]))
    grid = publish.make_report([arena], title="T", project="p", entity="e").blocks[-1]
    bar, scatter, parallel = grid.panels
    shown = [bar.metrics[0], scatter.x.name, scatter.y.name]
    keys = [column.metric for column in parallel.columns]
    shown += [key.name for key in keys if type(key).__name__ == "SummaryMetric"]
    configured = [key.name for key in keys if type(key).__name__ == "Config"]
    assert (len(shown), configured) == (6, ["strategy.name", "seed"])
    summary = json.loads(service.put[f"/put/{first['name']}/wandb-summary.json"])
    assert all(isinstance(summary[name], int | float) for name in shown)
    result = next(run.result for run in load_runs([tmp_path / "runs"]).runs if run.result.seed == 0)
    assert summary["dev/excess_error"] == result.metrics.all["excess_error"]
    assert summary["params/adapter"] == result.params.adapter > 0
    config = json.loads(first["config"])
    assert (config["strategy"]["value"]["name"], config["seed"]["value"]) == ("uniform", 0)
    assert first["displayName"] in grid.runsets[0].filters
