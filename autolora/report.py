"""Compare runs: ``python -m autolora.report runs=DIR[,DIR...] out=DIR``. Reads run directories and never trains.

Nothing leaves the machine unless ``wandb=true`` asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autolora.command import carry_out
from autolora.config import PathLike, Section, Text, WandbConfig
from autolora.validate import parse

_HELP = """\
usage: python -m autolora.report runs=DIR[,DIR...] out=DIR [reference=STRATEGY] [title=TEXT]
                                 [wandb=true [project=NAME] [entity=NAME]]

Compare the runs under some folders and write the report: index.html (opens offline), results.csv, table.md, table.tex,
sentences.txt and figures/.

  runs=DIR,DIR         folders of run directories, or run directories
  out=DIR              where the report goes; what is there already is replaced
  reference=STRATEGY   what the others are compared with (default: uniform); a strategy or a label of the table
  title=TEXT           of the page
  wandb=true           then publish it on Weights & Biases too: a Report on the runs there, and an Artifact of the
                       files; offline runs get there by: wandb sync DIR/*/wandb/offline-run-*
  project=NAME         on W&B (default: autolora)
  entity=NAME          on W&B: a user or a team (default: the account's)

Exit codes: 0 done, 1 nothing to report, or it cannot be written or published, 2 the command line is wrong.
"""


class Settings(Section):
    """The command line."""

    runs: Text
    out: PathLike
    reference: Text | None = None
    title: Text = "Rank selection"
    wandb: bool = False
    project: Text = WandbConfig().project
    entity: Text | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """Check the command line, then write the report.

    Args:
        argv: arguments in place of ``sys.argv[1:]``.

    Raises:
        SystemExit: 1 if there is nothing to report, or it cannot be written or published, 2 if the command line is
            wrong.
    """
    carry_out(lambda arguments: report(parse(Settings, arguments)), argv, _HELP)


def report(settings: Settings) -> None:
    """Write the report, and print what it says and what it could not use; then publish it, if that is asked for.

    Raises:
        AutoLoRAError: if there is nothing to report, no such reference, or no place to write to; or if it is written
            and cannot be published.
    """
    from autolora.reporting.report import write_report
    from autolora.reporting.runs import load_runs

    found = load_runs([Path(part) for part in settings.runs.split(",") if part])
    arenas = write_report(found, settings.out, title=settings.title, reference=settings.reference)
    for arena in arenas:
        print(arena.name, *(f"  {line}" for line in arena.sentences()), sep="\n")
    for line in found.flagged:
        print(f"warning: {line}")
    if found.skipped:
        print(f"{len(found.skipped)} {'directory was' if len(found.skipped) == 1 else 'directories were'} not used:")
        print(*(f"  {path}: {reason.splitlines()[0]}" for path, reason in found.skipped), sep="\n")
    print(f"written to {settings.out / 'index.html'}", flush=True)
    if settings.wandb:
        from autolora.reporting.publish import publish

        address = publish(arenas, settings.out, title=settings.title, project=settings.project, entity=settings.entity)
        print(f"published as {address}")


if __name__ == "__main__":
    main()
