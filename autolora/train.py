"""Train one configuration, or a sweep: ``python -m autolora.train key=value ...``; ``--help`` says more."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from autolora.errors import AutoLoRAError, ConfigError, DiskFullError
from autolora.paths import config_root
from autolora.signals import Interrupted, Signals

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from autolora.compose import Grid
    from autolora.results import RunDirectory

_HELP = """\
usage: {program} [-m] [--config-dir DIR] [group=choice ...] [key=value ...]

Learn the ranks of LoRA adapters on a task, within a budget of parameters, and write a run directory under ./runs.

Groups and their choices:
{groups}

Keys that are used most (every key and its default: --cfg job):
  budget.rank=4        as many parameters as uniform rank 4; or budget.params=300000, budget.fraction=0.25
  max_rank=16          components of every adapter before selection
  data.source=auto     auto, local (with data.dir=DIR), hub, mini (embedded)
  data.max_train=N     use only so many training rows
  backbone.path=DIR    a folder with the model; backbone.id=ORG/NAME for any other model of the hub
  trainer.max_epochs=3, trainer.max_steps=N, trainer.<argument of lightning's Trainer>=...
  seed=0, run_root=runs, force=true (run again what is complete)

Examples:
  {program} strategy=autolora task=mnli data.source=mini
  {program} task=mrpc data.source=local data.dir=DIR budget.rank=2
  {program} -m task=sst2,mrpc strategy=uniform,autolora seed=0,1,2

-m runs every combination of values separated by commas, and ends with a report on them; hydra/launcher=joblib runs
several at a time, submitit_slurm on a cluster. --config-dir DIR adds groups and choices of your own.
A run that was killed or stopped goes on from its last checkpoint when the same command is given again, and a sweep with
what is not complete.
Exit codes: 0 done, 1 a run failed, 2 the configuration is wrong, 130 Ctrl-C, 143 SIGTERM.
Hydra's own options: --hydra-help.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Check the command line, then run it.

    Args:
        argv: arguments in place of ``sys.argv[1:]``.

    Raises:
        SystemExit: 1 if a run fails with an error that the user can mend, 2 if the configuration is wrong, 130 after
            Ctrl-C, 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        print(_help(arguments), end="")
        return
    try:
        code = _checked(arguments)
    except KeyboardInterrupt:  # before a run has begun, or between two
        code = 130
    if code:
        sys.exit(code)


def _checked(arguments: Sequence[str]) -> int:
    from autolora.compose import check_command_line

    try:
        line = check_command_line(arguments)
    except ConfigError as error:
        _complain(error)
        return 2
    # Hydra shortens tracebacks; what is not an error for the user is one for us, and is shown whole.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    from autolora.parts import is_main_process

    # Of several processes that were started from outside, the first one keeps the records of a sweep.
    if line.grid is not None and is_main_process():
        return _sweep(line.arguments, line.grid)
    return _one(line.arguments)


def _one(arguments: Sequence[str]) -> int:
    """A single run, or runs that another process keeps the records of."""
    from autolora.parts import is_main_process

    codes: list[int] = []

    def job(cfg: DictConfig) -> None:
        try:
            with Signals(quiet=True) as signals:
                _run(cfg, signals)
        except Interrupted as stop:
            codes.append(stop.exit_code)
        except AutoLoRAError as error:
            _complain(error)
            codes.append(2 if isinstance(error, ConfigError) else 1)
        except Exception:
            from autolora.sweep import IN_CELL

            if IN_CELL not in os.environ:
                raise
            traceback.print_exc()

    _hydra(job, arguments)
    # A worker process that exits with an error would have Lightning kill the first one, which tells of it too.
    return max(codes, default=0) if is_main_process() else 0


def _sweep(arguments: Sequence[str], grid: Grid) -> int:
    """A run for each combination, in whatever process Hydra's launcher chooses."""
    from autolora.sweep import Sweep

    sweep = Sweep(grid)

    def job(cfg: DictConfig) -> None:
        sweep.run_cell(cfg, _run)

    try:
        return sweep.carry_out(lambda: _hydra(job, arguments))
    except AutoLoRAError as error:  # no place for its records
        _complain(error)
        return 1


def _hydra(job: Callable[[DictConfig], None], arguments: Sequence[str]) -> None:
    """Hand the command line to Hydra, which calls the job once, or once for each cell of a sweep."""
    import hydra

    from autolora.compose import VERSION_BASE

    before, sys.argv = sys.argv, [sys.argv[0], *arguments]
    try:
        hydra.main(config_path=str(config_root()), config_name="config", version_base=VERSION_BASE)(job)()
    finally:
        sys.argv = before


def _run(cfg: DictConfig, signals: Signals) -> RunDirectory:
    """Run one configuration; a signal that came while that failed counts more than the failure."""
    from autolora.compose import plain_tree
    from autolora.validate import require

    config = require(plain_tree(cfg))
    from autolora.parts import is_main_process
    from autolora.run import run_one

    signals.check()
    began = time.time()
    try:
        result = run_one(config)
    except Exception:
        signals.check()
        raise
    from autolora.reporting.summary import print_summary
    from autolora.results import RunDirectory
    from autolora.sweep import IN_CELL

    directory = RunDirectory.of(config, result.data_source, result.data_fingerprint, result.backbone_fingerprint)
    again = IN_CELL in os.environ and directory.result.stat().st_mtime < began
    if is_main_process() and not again:  # a sweep that is given again says one line of what is complete
        print_summary(result, directory.path)
    return directory


def _complain(error: AutoLoRAError) -> None:
    lines = str(error).splitlines()
    if isinstance(error, ConfigError) and len(lines) > 1:
        print(f"error: {len(lines)} faults in the configuration", *lines, sep="\n  ", file=sys.stderr)
    else:
        more = ": the run goes on from its last checkpoint" if isinstance(error, DiskFullError) else ""
        print(f"error: {error}{more}", file=sys.stderr)


def _help(arguments: Sequence[str]) -> str:
    """The help text, with the choices that the configuration folders hold."""
    roots = [config_root(), *map(Path, _values_of("--config-dir", arguments))]
    choices: dict[str, list[str]] = {}
    for root in roots:
        for file in sorted(root.glob("*/*.yaml")):
            choices.setdefault(file.parent.name, []).append(file.stem)
    groups = "\n".join(f"  {group:<11} {', '.join(names)}" for group, names in choices.items())
    program = "autolora-train" if Path(sys.argv[0]).name == "autolora-train" else "python -m autolora.train"
    return _HELP.format(program=program, groups=groups)


def _values_of(option: str, arguments: Sequence[str]) -> list[str]:
    """Values of an option that is written ``--option VALUE`` or ``--option=VALUE``."""
    joined = [part.partition("=")[2] for part in arguments if part.startswith(option + "=")]
    return joined + [value for part, value in pairwise(arguments) if part == option]


if __name__ == "__main__":
    main()
