"""The command line of the benchmark, as models. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from annotated_types import Ge, Gt, Len
from pydantic import AfterValidator, BaseModel, BeforeValidator

from autolora.config import BackboneConfig, Count, DataConfig, PathLike, Section, Whole
from autolora.errors import ConfigError
from autolora.paths import config_root
from autolora.validate import parse

Training = Literal[
    "limit", "uniform8", "uniform16", "autolora16-prune", "autolora16-settle", "peft8", "peft16", "adalora16"
]
Forward = Literal["bare", "merged", "compact", "peft-pattern"]
Once = Literal["attach-uniform8", "attach-autolora16", "attach-peft8", "attach-peft16", "select-autolora16"]
Run = Literal["uniform8", "autolora8", "peft8-usual", "peft8-best"]
Part = Literal["train", "evaluate", "memory", "overhead", "once"]
Suite = Literal["steps", "run", "strategies", "comparison"]
Name = TypeVar("Name", bound=str)
WITHOUT_BOOKKEEPING = ("head", "bitfit", "full", "prompt", "prefix", "ia3", "manual")
"""Strategies that ``suite=strategies`` leaves out: no ranks, or none without a file."""


def _separated(value: Any) -> Any:
    """``a,b`` means the same as ``[a,b]``."""
    if isinstance(value, list | tuple):
        return tuple(value)
    return value if value is None else tuple(str(value).split(","))


def _numbers(value: Any) -> Any:
    """``a,b`` means the same as ``[a,b]``, in whole numbers."""
    return tuple(int(text) for text in value.split(",")) if isinstance(value, str) else value


def _shapes(texts: tuple[str, ...]) -> tuple[str, ...]:
    wrong = [text for text in texts if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text)]
    if wrong or not texts:
        raise ValueError(f"expected ROWSxTOKENS such as 32x32, got {', '.join(wrong) or 'none'}")
    return texts


def _by_name(value: Any) -> Any:
    """``backbone=minilm``, as for training."""
    return {"name": value} if isinstance(value, str) else value


def _in_float(model: BackboneConfig) -> BackboneConfig:
    """What it is compared with computes with the weights as they are published."""
    if (model.quantization, model.sparsity.method) != ("none", "none"):
        raise ValueError(
            "expected a backbone that is neither quantised nor pruned: leave quantization and sparsity out"
        )
    return model


def _embedded(value: Any) -> Any:
    """Embedded data, unless a folder or another source is named: nothing is measured on what a network gives."""
    return {"source": "local" if value.get("dir") else "mini", **value} if isinstance(value, dict) else value


Shapes = Annotated[tuple[str, ...], AfterValidator(_shapes), BeforeValidator(_separated)]
Data = Annotated[DataConfig, BeforeValidator(_embedded)]
Model = Annotated[BackboneConfig, AfterValidator(_in_float), BeforeValidator(_by_name)]


class Settings(Section):
    """What both suites have."""

    suite: Suite = "steps"
    out: PathLike = Path("bench.json")
    warmup: Whole = 2
    seed: int = 0
    clock: Literal["wall", "cpu"] = "wall"
    backbone: Model = BackboneConfig()


class StepsSettings(Settings):
    """``suite=steps``."""

    rounds: Count = 50
    max_seconds: Annotated[float, Gt(0)] = 600.0
    shapes: Shapes = ("32x32", "16x128")
    precision: Annotated[tuple[Literal["float32", "bf16"], ...] | None, BeforeValidator(_separated)] = None
    parts: Annotated[tuple[Part, ...], BeforeValidator(_separated)] = get_args(Part)
    only: Annotated[tuple[Training | Forward | Once, ...] | None, BeforeValidator(_separated)] = None
    threads: Count | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def chosen(self, names: Iterable[Name]) -> list[Name]:
        """Those of these contenders that are to be measured."""
        return [name for name in names if self.only is None or name in self.only]


class RunSettings(Settings):
    """``suite=run``."""

    rounds: Count = 3
    warmup: Whole = 0
    only: Annotated[tuple[Run, ...] | None, BeforeValidator(_separated)] = None
    precision: Literal["auto", "float32", "bf16"] = "auto"
    task: Literal["mrpc", "cola", "sst2", "rte", "qnli"] = "mrpc"
    epochs: Count = 2
    learning_rate: Annotated[float, Ge(0)] = 1e-3
    data: Data = DataConfig(source="mini")
    imports: bool = True

    def chosen(self) -> list[Run]:
        """The contenders that are to be measured."""
        return [name for name in get_args(Run) if self.only is None or name in self.only]


class StrategiesSettings(Settings):
    """``suite=strategies``."""

    rounds: Count = 3
    steps: Count = 100
    reference_steps: Count = 10
    shape: Annotated[str, AfterValidator(lambda text: _shapes((text,))[0])] = "32x32"
    modules: Annotated[tuple[Count, ...], Len(2, 2), BeforeValidator(_numbers)] = (100, 1000)
    only: Annotated[tuple[str, ...] | None, BeforeValidator(_separated)] = None

    def chosen(self) -> list[str]:
        """The strategies that are to be measured: those that choose ranks.

        Raises:
            ConfigError: if one does not exist.
        """
        names = sorted(path.stem for path in (config_root() / "strategy").glob("*.yaml"))
        unknown = [name for name in self.only or () if name not in names]
        if unknown:
            raise ConfigError(f"only={','.join(unknown)}: expected strategies among {', '.join(names)}")
        return [name for name in names if name not in WITHOUT_BOOKKEEPING] if self.only is None else list(self.only)


class ComparisonSettings(Settings):
    """``suite=comparison``."""

    runs: Count = 1000
    cells: Annotated[int, Ge(2)] = 4
    steps: Count = 40
    task: Literal["mnli", "mrpc", "sst2", "rte", "qnli", "qqp"] = "mnli"
    precision: Annotated[tuple[Literal["float32", "bf16"], ...], BeforeValidator(_separated)] = ("float32",)


class TableSettings(Section):
    """``table=FILE``."""

    table: PathLike


AnySettings = StepsSettings | RunSettings | StrategiesSettings | ComparisonSettings | TableSettings


def read_command_line(arguments: list[str]) -> AnySettings:
    """The settings that a command line asks for.

    Raises:
        ConfigError: with every fault, a line each.
    """
    keys = {argument.partition("=")[0] for argument in arguments}
    model: type[BaseModel] = StepsSettings
    if "table" in keys:
        model = TableSettings
    elif "suite=run" in arguments:
        model = RunSettings
    elif "suite=strategies" in arguments:
        model = StrategiesSettings
    elif "suite=comparison" in arguments:
        model = ComparisonSettings
    settings = parse(model, arguments)
    assert isinstance(settings, AnySettings)
    if isinstance(settings, Settings) and settings.out.is_dir():
        raise ConfigError(f"out={settings.out}: expected a file to write, got a folder")
    return settings
