"""The comparison on Weights & Biases: a Report whose panels plot the runs that are there, and an Artifact of the files.

A panel grid is about one task of one arena, so that no panel averages over tasks, data or backbones. Its run sets are
those of the comparison, one for each variant: a run is known on W&B by the name of its directory. Runs that were kept
offline appear once they are synced.

Source: https://docs.coreweave.com/products/wandb/reports/edit-a-report (the package ``wandb-workspaces``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from autolora.errors import ServiceError
from autolora.network import why_unreachable
from autolora.reporting.report import Arena
from autolora.reporting.runs import Run, Variant
from autolora.results import run_name
from autolora.training.loggers import ADAPTER_PARAMETERS, DEV, TOTAL_SECONDS

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr

ARTIFACT = "comparison"
"""Name and type of the artifact, and type of the job that logs it."""
FILES = ("index.html", "results.csv", "table.md", "table.tex", "sentences.txt")
_LONGEST_TITLE = 128  # W&B refuses longer ones
_STRATEGY = "strategy.value.name"  # as W&B's own filters name the key "strategy.name" of a configuration


def publish(arenas: Sequence[Arena], folder: Path, *, title: str, project: str, entity: str | None) -> str:
    """Log the files of a report as an Artifact, and save the Report.

    Args:
        arenas: what was compared.
        folder: where :func:`autolora.reporting.report.write_report` has written it.
        title: of the Report.
        project: on W&B; it is made if there is none.
        entity: user or team; ``None`` is the account's default.

    Returns:
        The address of the Report.

    Raises:
        ServiceError: without wandb-workspaces or an account, or if the server cannot be reached or refuses.
    """
    if find_spec("wandb_workspaces") is None:
        raise ServiceError("wandb=true: wandb-workspaces is not installed: pip install 'autolora[wandb]'")
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    server = wandb.setup(wandb.Settings(mode="online")).settings.base_url
    with _refusals_of(server):
        known = wandb.login(prompt=False, verify=False)
    if not known:
        raise ServiceError(
            f"wandb=true: expected an account at {server}, found none: `wandb login`, or set WANDB_API_KEY"
        )
    if problem := why_unreachable(server, any_answer=True):
        raise ServiceError(f"wandb=true: {problem}: repeat the command where it can be, or set WANDB_BASE_URL")
    with _refusals_of(server):
        entity = entity or wandb.Api().default_entity
    if entity is None:
        raise ServiceError("wandb=true: the account has no default entity: add entity=USER or entity=TEAM")
    with _refusals_of(server):
        _log_files(folder, title, project, entity)  # first: it makes the project, which run sets have to be of
    report = make_report(arenas, title=title, project=project, entity=entity)
    with _refusals_of(server):
        return str(report.save().url)


@contextmanager
def _refusals_of(server: str) -> Iterator[None]:
    """Say in one line what W&B's client raises, which has no common base."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ServiceError(
            f"wandb=true: {server}: {said}: check project=, entity= and the account (`wandb login --relogin`)"
        ) from error


def _log_files(folder: Path, title: str, project: str, entity: str) -> None:
    import wandb

    artifact = wandb.Artifact(ARTIFACT, type=ARTIFACT, description=title)
    figures = sorted(path for path in (folder / "figures").rglob("*") if path.is_file())
    for path in (*(folder / name for name in FILES), *figures):
        artifact.add_file(str(path), name=path.relative_to(folder).as_posix(), skip_cache=True, policy="immutable")
    with (
        TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
        wandb.init(
            project=project,
            entity=entity,
            job_type=ARTIFACT,
            name=title,
            mode="online",
            dir=scratch,
            settings=wandb.Settings(console="off", silent=True),
        ) as run,
    ):
        run.log_artifact(artifact).wait()


def make_report(arenas: Sequence[Arena], *, title: str, project: str, entity: str) -> wr.Report:
    """The Report: of every arena its sentences, table and limits, and of each of its tasks the panels."""
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [wr.P(text=f"All runs, tables and figures are in the artifact “{ARTIFACT}” of this project.")]
    for arena in arenas:
        blocks += [
            wr.H2(text=arena.name),
            wr.UnorderedList(items=[*arena.sentences()]),
            wr.MarkdownBlock(text=arena.markdown()),
            *(wr.P(text=line) for line in arena.limits()),
        ]
        for task in arena.table.tasks:
            blocks += [wr.H3(text=task), _grid(arena, task, project, entity)]
    return wr.Report(project=project, entity=entity, title=title[:_LONGEST_TITLE], blocks=blocks)


def _grid(arena: Arena, task: str, project: str, entity: str) -> wr.PanelGrid:
    """A run set for each variant, and score by strategy, against parameters, and beside what it took."""
    import wandb_workspaces.reports.v2 as wr

    those = [variant for variant in arena.variants if task in variant.runs]
    metric = next(iter(those[0].runs[task].values())).result.metrics.primary
    score, strategy = DEV.format(metric), wr.Config("strategy.name")
    # Bars are means by strategy only where a strategy has one variant: budgets are never averaged.
    alone = len({variant.strategy for variant in those}) == len(those)
    columns = (
        (strategy, "strategy"),
        (wr.Config("seed"), "seed"),
        (wr.SummaryMetric(ADAPTER_PARAMETERS), "adapter parameters"),
        (wr.SummaryMetric(TOTAL_SECONDS), "seconds"),
        (wr.SummaryMetric(score), metric),
    )
    return wr.PanelGrid(
        runsets=[
            wr.Runset(project=project, entity=entity, name=variant.label, filters=_filter(variant, task))
            for variant in those
        ],
        panels=[
            wr.BarPlot(
                title=f"{metric} on dev",
                metrics=[score],
                groupby=strategy if alone else None,
                groupby_aggfunc="mean" if alone else None,
                groupby_rangefunc="stddev" if alone else None,
                layout=wr.Layout(w=12, h=8),
            ),
            wr.ScatterPlot(
                title=f"{metric} on dev against adapter parameters",
                x=wr.SummaryMetric(ADAPTER_PARAMETERS),
                y=wr.SummaryMetric(score),
                layout=wr.Layout(x=12, w=12, h=8),
            ),
            wr.ParallelCoordinatesPlot(
                title="Every run",
                columns=[wr.ParallelCoordinatesPlotColumn(key, display_name=name) for key, name in columns],
                layout=wr.Layout(y=8, w=24, h=10),
            ),
        ],
    )


def _filter(variant: Variant, task: str) -> str:
    """The runs of a variant on a task, in the language of W&B's filters; names have no quotes in them."""
    names = [_name(run) for run in variant.runs[task].values()]
    return f"Config({_STRATEGY!r}) in {[variant.strategy]!r} and Metric('Name') in {names!r}"


def _name(run: Run) -> str:
    """What a run is called on W&B: its directory as it was made, wherever it is now."""
    result = run.result
    return run_name(result.task, result.data_source, result.backbone, result.strategy, result.seed, result.config_hash)
