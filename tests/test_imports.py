"""What answers at once may not load what takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {
    "torch", "lightning", "pytorch_lightning", "transformers", "datasets", "torchmetrics", "wandb", "sklearn", "scipy",
    "matplotlib", "peft", "pandas", "onnx", "onnxruntime", "onnxscript",
}  # fmt: skip
LIGHT_MODULES = [
    "autolora.analyze",
    "autolora.compose",
    "autolora.config",
    "autolora.export",
    "autolora.onnx_format",
    "autolora.paths",
    "autolora.plan",
    "autolora.predict",
    "autolora.results",
    "autolora.roles",
    "autolora.strategies.autolora",
    "autolora.strategies.base",
    "autolora.strategies.uniform",
    "autolora.tasks.examples",
    "autolora.tasks.glue",
    "autolora.train",
    "autolora.validate",
]


def loaded_by(code: str) -> set[str]:
    """Heavy packages that a fresh interpreter has loaded after running the code."""
    script = f"import json, sys\n{code}\nprint(json.dumps(sorted(m for m in sys.modules if '.' not in m)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return HEAVY & set(json.loads(done.stdout.splitlines()[-1]))


def test_the_probe_sees_a_heavy_import() -> None:
    assert "scipy" in loaded_by("import scipy")


def test_light_modules_load_nothing_heavy() -> None:
    assert loaded_by("\n".join(f"import {module}" for module in LIGHT_MODULES)) == set()


@pytest.mark.parametrize(
    ("command", "argv", "code"),
    [
        ("train", ["--help"], 0),
        ("train", ["--cfg", "job"], 0),
        ("train", ["strategy=autolara", "budget.rnk=4"], 2),
        ("train", ["task=planted", "strategy.phases.warmup=2"], 2),
        ("train", ["-m", "strategy=uniform,autolora", "seed=0,-1"], 2),
        ("analyze", ["--help"], 0),
        ("analyze", ["out=x", "backbone=minilmm"], 2),
    ],
)
def test_help_and_configuration_errors_load_nothing_heavy(command: str, argv: list[str], code: int) -> None:
    script = f"""
from autolora.{command} import main
try:
    main({argv!r})
    code = 0
except SystemExit as stop:
    code = stop.code
assert code == {code}, code
"""
    assert loaded_by(script) == set()


@pytest.mark.parametrize(
    ("argv", "code"), [(["--help"], 0), (["rnu=a"], 2), (["run=/not/there"], 1), (["run=a", "input=/not/there"], 1)]
)
def test_help_and_errors_of_predict_load_nothing_heavy(argv: list[str], code: int) -> None:
    script = f"""
from autolora.predict import main
try:
    main({argv!r})
    code = 0
except SystemExit as stop:
    code = stop.code
assert code == {code}, code
"""
    assert loaded_by(script) == set()
