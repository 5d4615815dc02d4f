"""From a command line to a configuration, with all its faults at once and before anything heavy loads. No torch.

Hydra stops at the first fault it meets. Here groups are checked against the files that exist, keys are passed to Hydra
in the form that adds what it does not know (``++key=value``), and :mod:`autolora.validate` judges the outcome: so a
misspelt key, an impossible value and an unknown choice are all reported together.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    Glob,
    Override,
    Quote,
    QuotedString,
    RangeSweep,
    Transformer,
)
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError, safe_load

from autolora.config import RunConfig
from autolora.errors import ConfigError
from autolora.paths import config_root
from autolora.results import config_hash
from autolora.validate import is_strategy, nearest, validate

VERSION_BASE = "1.3"
_COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, YAMLError)
_LAUNCHERS = "; joblib and submitit come with pip install 'autolora[sweep]', ray with pip install hydra-ray-launcher"
_HYDRA_COMMANDS = ("hydra_help", "info", "shell_completion", "experimental_rerun")


@dataclass(frozen=True)
class Grid:
    """A sweep as it was asked for.

    ``name`` is the choice of the group ``sweep``, or "sweep"; ``digest`` is the same for the same cells in the same
    order; ``cells`` is their number, ``None`` where another sweeper than Hydra's own decides it; ``run_root`` is
    absolute; ``local`` says that they run in this process, one after the other, ``force`` that all run again; ``flags``
    are the options of the command line that are no overrides, which every cell needs.
    """

    name: str
    digest: str
    cells: int | None
    run_root: Path
    local: bool
    force: bool = False
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class CommandLine:
    """A command line that was checked: in the form that Hydra takes, and the sweep that it asks for, if it does."""

    arguments: list[str]
    grid: Grid | None = None


@dataclass(frozen=True)
class _Setting:
    """What the user set: a key or group, and one override for each value that it is to take (several in a sweep)."""

    key: str
    group: bool
    overrides: tuple[str, ...]
    typed: str

    def written(self, override: str) -> str:
        """One of the overrides as the user would have typed it."""
        return self.typed if len(self.overrides) == 1 else override.removeprefix("++")


@dataclass
class _Request:
    """A command line taken apart; ``plain`` are overrides that go to Hydra as they are."""

    settings: list[_Setting] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def compose(
    overrides: Sequence[str] = (),
    *,
    root: Path | None = None,
    config_dir: Path | None = None,
    beside: Sequence[str] = (),
) -> RunConfig:
    """The configuration that ``python -m autolora.train *overrides`` would run.

    Args:
        overrides: ``key=value`` and ``group=choice``, as on the command line; no sweeps.
        root: folder of the configuration files; :func:`config_root` by default.
        config_dir: a further folder with groups, as ``--config-dir``.
        beside: keys that a command line has besides, to be suggested in place of one that is unknown.

    Raises:
        ConfigError: with every fault, a line each.
    """
    with _Composer(root or config_root(), "config", config_dir).ready() as composer:
        config, faults, _ = composer.check(overrides, multirun=False, beside=beside)
    if faults or config is None:
        raise ConfigError("\n".join(faults))
    return config


def in_quotes(value: object) -> str:
    """A text as a value of an override, whatever characters it has: ``f"strategy.path={in_quotes(path)}"``."""
    return QuotedString(str(value), Quote.single).with_quotes()


def check_command_line(argv: Sequence[str]) -> CommandLine:
    """Check a command line of ``autolora.train`` and give it back in the form that Hydra takes.

    In a sweep every value of every key is checked, each with the first value of the others.

    Raises:
        ConfigError: with every fault that can be decided from the configuration, a line each.
    """
    parser = get_args_parser()
    args = parser.parse_intermixed_args(list(argv))
    if any(getattr(args, command) for command in _HYDRA_COMMANDS):
        return CommandLine(list(argv))
    root, config_dir = _folders(args)
    with _Composer(root, args.config_name or "config", config_dir).ready() as composer:
        _, faults, grid = composer.check(args.overrides, multirun=args.multirun)
        if faults:
            raise ConfigError("\n".join(faults))
        request = composer.take_apart(args.overrides)
    flags = list(argv)
    for override in args.overrides:
        flags.remove(override)
    joined = (_joined(setting, by_file=setting.key in composer.swept) for setting in request.settings)
    if grid is not None:
        kept = [flag for flag in flags if flag not in ("-m", "--multirun")]
        grid = replace(grid, flags=(*kept, *(text for text in request.plain if "searchpath" in text)))
    return CommandLine([*flags, *request.plain, *joined], None if args.cfg else grid)


def _folders(args: argparse.Namespace) -> tuple[Path, Path | None]:
    root = Path(args.config_path).resolve() if args.config_path else config_root()
    config_dir = Path(args.config_dir).resolve() if args.config_dir else None
    for option, folder in (("--config-path", root), ("--config-dir", config_dir)):
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"{option} {folder}: there is no such folder")
    return root, config_dir


def _joined(setting: _Setting, *, by_file: bool) -> str:
    """A setting as one override again; a sweep keeps the form in which it was typed.

    What a file sweeps over is set in the form that it has there: Hydra takes ``++seed`` for something besides ``seed``.
    """
    if by_file and not setting.group:
        return setting.typed.lstrip("+")
    if len(setting.overrides) == 1:
        return setting.overrides[0]
    return setting.typed if setting.group else f"++{setting.typed.lstrip('+')}"


class _Composer:
    """Hydra on our files. Use it inside :meth:`ready`."""

    def __init__(self, root: Path, name: str, config_dir: Path | None) -> None:
        self.root, self.name = root, name.removesuffix(".yaml")
        self.base = [] if config_dir is None else [f"hydra.searchpath=['file://{config_dir}']"]
        self.defaults = _defaults([folder for folder in (root, config_dir) if folder], self.name)
        self.parser = OverridesParser.create()
        self.swept: set[str] = set()  # keys that a file sweeps over

    @contextmanager
    def ready(self) -> Iterator[_Composer]:
        with initialize_config_dir(str(self.root), version_base=VERSION_BASE, job_name="train"):
            yield self

    def check(
        self, overrides: Sequence[str], *, multirun: bool, beside: Sequence[str] = ()
    ) -> tuple[RunConfig | None, list[str], Grid | None]:
        """The configuration with the first value of everything, the faults of all values, and the sweep."""
        request = self.take_apart(overrides)
        faults = request.faults
        first = {setting.key: setting.overrides[0] for setting in request.settings}
        base = self._base(request, first)
        if base is None:
            return None, faults, None
        raw, hydra = base
        config, found = validate(raw, {s.key: s.written(s.overrides[0]) for s in request.settings}, beside)
        faults += found
        swept = [setting for setting in request.settings if len(setting.overrides) > 1]
        grid = None
        if multirun or hydra.mode == RunMode.MULTIRUN:
            by_file = self._swept_by_file(hydra, request)
            swept += by_file
            faults += self._check_sweep(raw, first, request, swept)
            if config is not None:
                grid = _grid(request.settings, by_file, hydra, config)
        else:
            faults += [
                f"{s.typed}: several values: add -m to sweep over them, or write {s.key}=[...] for one list"
                for s in swept
            ]
        return config, list(dict.fromkeys(faults)), grid

    def _base(self, request: _Request, first: Mapping[str, str]) -> tuple[dict[str, Any], DictConfig] | None:
        """Compose with the first value of everything; if that fails, without what only Hydra understands.

        The failure is a fault, and what else is wrong can still be told.
        """
        for plain in dict.fromkeys((tuple(request.plain), ())):
            try:
                composed = self._composed([*plain, *first.values()])
            except _COMPOSE_ERRORS as error:
                words = _first_words(error)
                request.faults.append(words + (_LAUNCHERS if "hydra/launcher" in words else ""))
            else:
                request.plain = list(plain)
                return composed
        return None

    def take_apart(self, overrides: Sequence[str]) -> _Request:
        """Sort overrides into groups, keys, and what only Hydra understands; unknown choices become faults."""
        request = _Request()
        for text in overrides:
            try:
                override = self.parser.parse_override(text)
            except HydraException as error:
                hint = "; special characters need quotes: \"key='value'\"" if "=" in text else ""
                request.faults.append(f"{text}: expected key=value or group=choice ({_first_words(error)}){hint}")
                continue
            key = override.key_or_group
            if override.is_delete() and not key.startswith("hydra"):
                choices = self._loader().get_group_options(key, config_name=self.name, overrides=self.base)
                instead = f"{key}=none" if "none" in choices else f"{key}=..."
                request.faults.append(
                    f"{text}: every key has a value, and one that is taken away comes back with its default: "
                    f"write what you want, {instead}"
                )
                continue
            if override.is_delete() or override.package is not None or key.startswith(("hydra.", "hydra/")):
                request.plain.append(text)
                continue
            setting = self._setting(override, text, request.faults)
            if setting is None:
                continue
            previous = next((s for s in request.settings if s.key == key), None)
            if previous is not None:
                request.faults.append(f"{text}: {key} is set already by {previous.typed}: keep one")
            else:
                request.settings.append(setting)
        return request

    def _setting(self, override: Override, text: str, faults: list[str]) -> _Setting | None:
        key = override.key_or_group
        choices = self._loader().get_group_options(key, config_name=self.name, overrides=self.base)
        values = _values(override, choices)
        if not choices:
            return _Setting(key, False, tuple(f"++{key}={value}" for value in values), text)
        # Hydra refuses to add what stands in the defaults list already, as our groups do.
        plus = "+" if override.is_add() and key not in self.defaults else ""
        good = []
        for value in values:
            if value in choices:
                good.append(f"{plus}{key}={value}")
            elif key == "strategy" and is_strategy(value):
                faults.append(
                    f"strategy={value}: its module is there, its defaults are not: write conf/strategy/{value}.yaml "
                    f"with 'name: {value}' and its options, or give the folder of your own with --config-dir"
                )
            else:
                close = nearest(value, choices)
                hint = f"; did you mean {close!r}?" if close else ""
                faults.append(f"{key}={value}: unknown {key} {value!r}{hint} (available: {', '.join(choices)})")
        return _Setting(key, True, tuple(good), text) if good else None

    def _check_sweep(
        self, raw: Mapping[str, Any], first: Mapping[str, str], request: _Request, swept: Sequence[_Setting]
    ) -> list[str]:
        """Faults of every value of a sweep, each tried with the first value of everything else."""
        faults: list[str] = []
        typed = {setting.key: setting.written(setting.overrides[0]) for setting in request.settings}
        for setting in swept:
            for override in setting.overrides:
                quoted = typed | {setting.key: setting.written(override)}
                if setting.group:
                    try:
                        cell, _ = self._composed([*request.plain, *{**first, setting.key: override}.values()])
                    except _COMPOSE_ERRORS as error:
                        faults.append(_first_words(error))
                        continue
                else:
                    cell = _with(raw, setting.key, self.parser.parse_override(override).value())
                faults += validate(cell, quoted)[1]
        return faults

    def _swept_by_file(self, hydra: DictConfig, request: _Request) -> list[_Setting]:
        """What a file of the ``sweep`` group sweeps over, unless the command line sets it."""
        params = hydra.sweeper.get("params") or {}
        self.swept = set(params)
        typed = {setting.key for setting in request.settings}
        inner = self.take_apart([f"{key}={value}" for key, value in params.items() if key not in typed])
        request.faults += inner.faults
        return inner.settings

    def _composed(self, overrides: Sequence[str]) -> tuple[dict[str, Any], DictConfig]:
        own = [] if any(text.startswith("hydra.searchpath") for text in overrides) else self.base
        # Hydra reads `hydra.mode` from the files as well; composing as one run is what each cell of a sweep does.
        cfg = hydra_compose(self.name, [*own, *overrides], return_hydra_config=True)
        hydra = cfg.hydra
        return plain_tree(cfg), hydra

    @staticmethod
    def _loader() -> ConfigLoader:
        return GlobalHydra.instance().config_loader()


def _defaults(folders: Sequence[Path], name: str) -> dict[str, str | None]:
    """The groups in the defaults list of the primary file, with their choices."""
    for file in (folder / f"{name}.yaml" for folder in folders):
        if file.is_file():
            entries = (safe_load(file.read_text(encoding="utf-8")) or {}).get("defaults", [])
            return {key: value for entry in entries if isinstance(entry, dict) for key, value in entry.items()}
    return {}


def plain_tree(cfg: DictConfig) -> dict[str, Any]:
    """A composed configuration as plain dictionaries, interpolations resolved, without Hydra's own part."""
    ours = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    tree = OmegaConf.to_container(ours, resolve=True, throw_on_missing=True)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _grid(typed: Sequence[_Setting], by_file: Sequence[_Setting], hydra: DictConfig, first: RunConfig) -> Grid:
    """The sweep over everything that was set. How runs are kept and shown does not make it another one."""
    settings = [*typed, *by_file]
    told = [f"{s.key}: {s.overrides}" for s in settings if len(s.overrides) > 1 or s in by_file]
    told += [config_hash(first, first.data.source, str(first.data.dir), str(first.backbone.path))]
    own = hydra.sweeper._target_.endswith("BasicSweeper")
    return Grid(
        name=hydra.runtime.choices.get("sweep") or "sweep",
        digest=hashlib.sha256("\n".join(told).encode()).hexdigest()[:10],
        cells=math.prod(len(setting.overrides) for setting in settings) if own else None,
        run_root=first.run_root.absolute(),
        force=first.force,
        local=hydra.launcher._target_.endswith("BasicLauncher"),
    )


def _values(override: Override, choices: Sequence[str]) -> list[str]:
    """The values of an override in Hydra's grammar: one, or those of a sweep."""
    value = override.value()
    if isinstance(value, Glob):
        return value.filter(list(choices))
    if isinstance(value, ChoiceSweep | RangeSweep):
        return [str(item) for item in override.sweep_iterator(transformer=Transformer.encode)]
    return [override.get_value_string()]


def _with(tree: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    result = copy.deepcopy(dict(tree))
    *parents, last = key.split(".")
    node = result
    for parent in parents:
        if not isinstance(node.get(parent), dict):
            node[parent] = {}
        node = node[parent]
    node[last] = value
    return result


def _first_words(error: BaseException) -> str:
    """The message of one of Hydra's errors in one line; it hides some behind an empty one."""
    while not str(error).strip() and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
