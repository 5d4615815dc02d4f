"""The command line of the benchmark: ``python -m autolora.bench key=value ...``; ``--help`` says more."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, get_args

from autolora.bench import settings as options
from autolora.bench.report import Row, Suite, machine, read_report, write_report
from autolora.bench.settings import AnySettings, RunSettings, StrategiesSettings, TableSettings, read_command_line
from autolora.bench.tables import line, markdown
from autolora.command import carry_out
from autolora.errors import ConfigError

_HELP = f"""\
usage: python -m autolora.bench [suite=steps|run|strategies|comparison] [key=value ...]

Measure this project beside PEFT, print what comes out, and write it to bench.json.

suite=steps: training steps and forward passes, in one process, in turns; ratios to PEFT and to the limit
  rounds=50 warmup=2     turns of every contender, and those before them that do not count
  shapes=32x32,16x128    rows x tokens
  precision=float32,bf16 where this is left out: bf16 only where the hardware multiplies it
  max_seconds=600        no further round of a shape and precision begins after this time
  parts={",".join(get_args(options.Part))}
  only=NAME,...          {", ".join((*get_args(options.Training),))},
                         {", ".join((*get_args(options.Forward),))},
                         {", ".join((*get_args(options.Once),))}
  threads=N              torch's own choice where this is left out
  device=auto            auto, cpu, cuda

suite=run: whole runs from process start to the final metric, each in a process of its own
  rounds=3 warmup=0 only={",".join(get_args(options.Run))}
  task=mrpc epochs=2 learning_rate=1e-3 precision=auto (auto, float32, bf16)
  data.dir=DIR           GLUE's TSV files; embedded data where this is left out. data.max_train=N, data.batch_size=32
  imports=true           where the time of the imports goes, too

suite=strategies: what every strategy spends on itself, as a share of a step, and how that grows with the modules
  rounds=3 steps=100     runs of each, and their length
  shape=32x32            of the step that it is a share of
  modules=100,1000       of the chains that tell how it grows
  only=NAME,...          names of strategies

suite=comparison: the report over many runs, the fixed cost of a cell of a sweep, evaluation against training
  runs=1000 cells=4 steps=40 task=mnli precision=float32,bf16

All: out=bench.json (the other suites' part of the file stays), backbone=minilm, backbone.path=DIR, seed=0,
clock=wall (or cpu: processor time, for a machine that is busy with other things)

table=FILE: print the tables of a bench.json as Markdown

A quick look at a step: rounds=20 shapes=32x32 precision=float32 parts=train only=limit,uniform8,peft8
Exit codes: 0 done, 1 something that can be mended went wrong, 2 the command line is wrong.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Check the command line, measure, print and write.

    Args:
        argv: arguments in place of ``sys.argv[1:]``.

    Raises:
        SystemExit: 1 for an error that the user can mend, 2 if the command line is wrong.
    """
    carry_out(lambda arguments: _execute(read_command_line(arguments)), argv, _HELP)


def _execute(settings: AnySettings) -> None:
    if isinstance(settings, TableSettings):
        print(markdown(read_report(settings.table)), end="")
        return
    missing = [name for name in ("peft", "accelerate") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"what is compared with is not installed: pip install {' '.join(missing)}")
    if settings.out.exists():
        read_report(settings.out)  # what cannot be kept is said before anything is measured
    gpu, threads, measured = _prepare(settings)
    place = machine(gpu, threads)
    places: Any = {"out": True, "data": {"dir", "cache_dir"}, "backbone": {"path"}}
    asked = settings.model_dump(mode="json", exclude=places)
    rows: list[Row] = []
    for row in measured:
        print(line(row), flush=True)
        rows.append(row)
        write_report(settings.out, settings.suite, Suite(settings=asked, machine=place, rows=tuple(rows)))
    if not rows:
        raise ConfigError("nothing was measured: expected names in only= that belong to the parts")
    print(f"written: {settings.out}")


def _prepare(settings: options.Settings) -> tuple[str | None, int | None, Iterator[Row]]:
    """The accelerator in use, torch's threads where this process is what is measured, and the rows to come."""
    if isinstance(settings, RunSettings):
        from autolora.bench.runs import run_suite

        return None, None, run_suite(settings)
    if isinstance(settings, StrategiesSettings):
        import torch

        from autolora.bench.bookkeeping import strategies_suite

        return None, torch.get_num_threads(), strategies_suite(settings)
    if isinstance(settings, options.ComparisonSettings):
        from autolora.bench.comparison import comparison_suite

        return None, None, comparison_suite(settings)
    assert isinstance(settings, options.StepsSettings)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which measures memory, notes its start and stop
    import torch

    from autolora.bench.steps import device_of, steps_suite

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    on_gpu = device_of(settings).type == "cuda"
    return torch.cuda.get_device_name() if on_gpu else None, torch.get_num_threads(), steps_suite(settings)


if __name__ == "__main__":
    main()
