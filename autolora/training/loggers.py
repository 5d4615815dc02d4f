"""Weights & Biases, offline unless the user wants otherwise."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolora.results import RunResult

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger

DEV = "dev/{}"
"""Name in a run's summary of a metric on dev."""
ADAPTER_PARAMETERS = "params/adapter"
"""Name in a run's summary of what :attr:`autolora.results.Params.adapter` counts."""
TOTAL_SECONDS = "seconds/total"
"""Name in a run's summary of the seconds of a whole run."""
_LONGEST_TAG = 64  # W&B refuses longer ones


def labels(task: str, source: str, backbone: str, strategy: str, seed: int) -> dict[str, Any]:
    """What W&B sorts runs by: runs that may be compared are a group, a strategy is a type of job.

    Returns:
        ``group``, ``job_type`` and ``tags``.
    """
    return {
        "group": f"{task}-{source}-{backbone}",
        "job_type": strategy,
        "tags": [tag[:_LONGEST_TAG] for tag in (task, strategy, source, f"seed{seed}")],
    }


def summary(result: RunResult) -> dict[str, float | None]:
    """The numbers of a result that a run's summary on W&B has, by name there."""
    numbers = {DEV.format(name): value for name, value in result.metrics.all.items()}
    return numbers | {
        ADAPTER_PARAMETERS: result.params.adapter,
        "params/extra": result.params.extra,
        "params/head": result.params.head,
        TOTAL_SECONDS: result.seconds.total,
    }


def wandb_mode(mode: str) -> str:
    """``online`` only if the user asks for it and is logged in; ``auto`` is offline.

    The environment variable ``WANDB_MODE`` counts as asking.
    """
    asked = os.environ.get("WANDB_MODE", "offline") if mode == "auto" else mode
    if asked != "online":
        return asked
    import wandb

    if wandb.login(prompt=False, verify=False):  # whether there are credentials; nothing is sent
        return "online"
    warnings.warn(
        "logger.mode=online: not logged in to W&B, so this run is kept offline; `wandb login` first", stacklevel=2
    )
    return "offline"


class WandbRun:
    """A W&B run that is always finished, also after a failure: use it as a context.

    Args:
        directory: the run directory; files go to its ``wandb/``.
        name: of the run.
        settings: project, entity, mode, group, job_type and tags.
        config: the run's configuration.
        resume: identifier of a W&B run to go on with; offline it becomes another part of the same run.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        settings: Mapping[str, Any],
        config: Mapping[str, Any],
        resume: str | None = None,
    ) -> None:
        self.directory, self.name, self.settings, self.config = directory, name, settings, config
        self.resume = resume
        self.logger: WandbLogger | None = None

    def __enter__(self) -> WandbRun:
        import wandb
        from lightning.pytorch.loggers import WandbLogger

        os.environ.setdefault("WANDB_SILENT", "true")
        wandb.setup()  # reads the variable; otherwise W&B warns of a setting that Lightning writes
        self.logger = WandbLogger(
            name=self.name,
            save_dir=self.directory,
            project=self.settings["project"],
            entity=self.settings["entity"],
            group=self.settings["group"],
            job_type=self.settings["job_type"],
            tags=list(self.settings["tags"]),
            mode=wandb_mode(self.settings["mode"]),
            config=dict(self.config),
            id=self.resume,
            resume=None if self.resume is None else "allow",
            settings=wandb.Settings(console="off"),
        )
        self.logger.experiment  # noqa: B018  starts the run
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        import wandb

        wandb.finish(exit_code=0 if kind is None else 1)

    def finish_with(self, result: RunResult) -> None:
        """Log final numbers, the ranks as a table, and a role × depth heat map."""
        import wandb

        assert self.logger is not None
        run = self.logger.experiment
        run.summary.update(summary(result))
        table = wandb.Table(columns=["module", "rank"], data=[[name, rank] for name, rank in result.ranks.items()])
        figure = rank_heatmap(result.ranks)
        run.log({"ranks": table, "rank_heatmap": wandb.Image(figure)})


def rank_heatmap(ranks: Mapping[str, int]) -> Any:
    """A matplotlib figure of :func:`autolora.roles.rank_grid`."""
    from matplotlib.figure import Figure

    from autolora.roles import rank_grid

    rows, columns, cells = rank_grid(ranks)
    grid = [[cells.get((row, column), float("nan")) for column in columns] for row in rows]
    figure = Figure(figsize=(1.5 + 0.6 * len(columns), 1 + 0.4 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(grid, cmap="viridis", vmin=0, aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    if len(rows) > 1:
        axes.set_xlabel("depth")
    largest = max(cells.values())
    for (row, column), rank in cells.items():
        color = "black" if rank > 0.6 * largest else "white"  # what the cell's own colour leaves legible
        axes.text(columns.index(column), rows.index(row), str(rank), ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, label="rank")
    return figure
