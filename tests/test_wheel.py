"""The wheel, away from the checkout: what is in it, and the commands from an empty folder."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLANTED = ["task=planted", "task.eval_size=64", "trainer.max_steps=12", "logger=csv", "trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by hatchling as pip would build it, without isolation: it is one of our development tools."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content alone; everything else comes from the environment of the tests."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True, capture_output=True, timeout=120)
    return target


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def run(installed: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command with the installed wheel before the development install on the path."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment["PYTHONPATH"] = str(installed)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


def test_one_top_level_name_and_every_configuration_file(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"autolora"}
    assert len(tops) == 2
    travelled = {name.removeprefix("autolora/conf/") for name in names if name.startswith("autolora/conf/")}
    assert travelled == {str(file.relative_to(ROOT / "conf")) for file in (ROOT / "conf").rglob("*.yaml")}
    assert {name for name in names if name.endswith(".py")} == {
        str(file.relative_to(ROOT)) for file in (ROOT / "autolora").rglob("*.py")
    }
    assert not any(name.endswith(".pyc") for name in names)


def test_what_runs_is_the_wheel(installed: Path, empty: Path) -> None:
    code = "import autolora; from autolora.paths import config_root; print(autolora.__file__, config_root())"
    done = run(installed, empty, sys.executable, "-c", code)
    assert done.stdout.split() == [str(installed / "autolora" / "__init__.py"), str(installed / "autolora" / "conf")]


@pytest.mark.parametrize("module", ["train", "export", "predict"])
def test_help_by_module_and_by_script(module: str, installed: Path, empty: Path) -> None:
    by_module = run(installed, empty, sys.executable, "-m", f"autolora.{module}", "--help")
    by_script = run(installed, empty, str(installed / "bin" / f"autolora-{module}"), "--help")
    assert by_module.returncode == by_script.returncode == 0, by_module.stderr + by_script.stderr
    assert f"usage: python -m autolora.{module} " in by_module.stdout
    assert by_script.stdout == by_module.stdout.replace(f"python -m autolora.{module}", f"autolora-{module}")
    assert list(empty.iterdir()) == []


def test_configuration_is_the_same_as_in_the_checkout(installed: Path, empty: Path) -> None:
    command = [sys.executable, "-m", "autolora.train", "--cfg", "job", "task=mrpc", "seed=3"]
    away = run(installed, empty, *command)
    here = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert away.returncode == 0, away.stderr
    assert away.stdout == here.stdout != ""


def test_a_run_and_its_export_from_an_empty_folder(installed: Path, empty: Path) -> None:
    (empty / "mine" / "experiment").mkdir(parents=True)
    text = "# @package _global_\nmax_rank: 3\nbudget: {rank: 1}\n"
    (empty / "mine" / "experiment" / "small.yaml").write_text(text, encoding="utf-8")
    script = str(installed / "bin" / "autolora-train")
    done = run(installed, empty, script, "--config-dir", "mine", "experiment=small", *PLANTED)
    assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = (empty / "runs").iterdir()
    assert "max_rank: 3\n" in (folder / "config.yaml").read_text()
    assert [int(row["step"]) for row in csv.DictReader((folder / "history.csv").open())][-1] >= 10
    export = [sys.executable, "-m", "autolora.export", f"run={folder}", "out=out"]
    done = run(installed, empty, *export)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (empty / "out" / "adapter_model.safetensors").is_file()
    assert {path.name for path in empty.iterdir()} == {"mine", "out", "runs"}
