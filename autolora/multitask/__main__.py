"""Several tasks, one budget: ``python -m autolora.multitask tasks=[mrpc,rte,cola] budget.rank=4``; see ``--help``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Len
from pydantic import Strict

from autolora.command import carry_out
from autolora.config import Conflict, Count, GlueName, Judged, NonNegative, PathLike, Seed
from autolora.errors import ConfigError
from autolora.validate import parse

_HELP = """\
usage: python -m autolora.multitask tasks=[mrpc,rte,cola] [budget.rank=4] [out=DIR] [key=value ...]

One frozen backbone, adapters for several tasks, and one budget for all of them: measure what each task needs, merge the
plans, train, and say what sharing does to the tasks.

  tasks=[...]            at least two tasks of GLUE
  budget.rank=4          as many parameters as uniform rank 4 for each of them; or budget.params=N for all together
  arms=[separate,isolated,merged]
                         separate: equal shares, uniform ranks; isolated: merged plans, every task its own components;
                         merged: one adapter with all these components, trained on all tasks
  orthogonality=0        isolated: weight of the overlap of a task's A with those of the tasks before it (0: none)
  probe_steps=200        steps of the training that measures what a task needs, at rank
  probe_rank=8           everywhere
  seeds=[0]              one or several
  out=multitask          plans and multitask.json
  any other key=value    of python -m autolora.train, for all runs (data.source=local data.dir=DIR, ...),
                         but for rank_multiple

The same command goes on after an interruption. Exit codes: 0 done, 1 something that can be mended went wrong, 2 the
command line is wrong, 130 and 143 after Ctrl-C and SIGTERM.
"""


class Settings(Judged):
    """The command line, without what belongs to the runs."""

    tasks: Annotated[tuple[GlueName, ...], Strict(False), Len(2)]
    arms: Annotated[tuple[Literal["separate", "isolated", "merged"], ...], Strict(False), Len(1)] = (
        "separate", "isolated", "merged",
    )  # fmt: skip
    orthogonality: NonNegative = 0.0
    probe_steps: Count = 200
    probe_rank: Count = 8
    seeds: Annotated[tuple[Seed, ...], Strict(False), Len(1)] = (0,)
    out: PathLike = Path("multitask")

    def conflicts(self) -> Iterator[Conflict]:
        """Everything once."""
        for key, values in (("tasks", self.tasks), ("arms", self.arms), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                yield Conflict((key,), f"{key}: expected each once, got {', '.join(map(str, values))}")


def main(argv: Sequence[str] | None = None) -> None:
    """Check the command line, then carry out the study.

    Args:
        argv: arguments in place of ``sys.argv[1:]``.

    Raises:
        SystemExit: 1 for an error that the user can mend, 2 if the command line is wrong, 130 after Ctrl-C, 143 after
            SIGTERM.
    """
    carry_out(_study, argv, _HELP)


def _study(arguments: Sequence[str]) -> None:
    own = [argument for argument in arguments if argument.partition("=")[0] in Settings.model_fields]
    rest = [argument for argument in arguments if argument not in own]
    settings = parse(Settings, own)
    if faults := list(_refused(rest)):
        raise ConfigError("\n".join(faults))
    budget = [argument for argument in rest if argument.lstrip("+").startswith("budget.")]
    from autolora.multitask.arms import Bench
    from autolora.multitask.study import print_study, study

    others = [argument for argument in rest if argument not in budget]
    bench = Bench(settings.tasks, others, budget, settings.orthogonality)
    bench.check(settings.arms, settings.probe_steps, settings.probe_rank)
    summary = study(
        bench,
        settings.seeds,
        settings.arms,
        settings.out,
        probe_steps=settings.probe_steps,
        probe_rank=settings.probe_rank,
    )
    print_study(summary)
    print(f"written to {settings.out / 'multitask.json'}")


def _refused(arguments: Sequence[str]) -> Iterator[str]:
    """What a run may be told, and several tasks with one budget may not."""
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key.partition(".")[0] in ("task", "strategy", "seed") or key == "budget":
            yield f"{argument}: expected tasks=, arms=, seeds= and budget.rank= or budget.params="
        elif key.startswith("budget.") and key not in ("budget.rank", "budget.params"):
            message = "the budget of many tasks is counted in parameters: expected budget.rank=R or budget.params=N"
            yield f"{argument}: {message}"
        elif key == "rank_multiple" and value != "1":
            yield f"{argument}: plans of tasks are merged one component at a time, not in multiples: leave it out"


if __name__ == "__main__":
    main()
