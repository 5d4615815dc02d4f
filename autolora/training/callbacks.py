"""What happens beside the training step: records, the progress bar, and choices on the held-out slice."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor

from autolora.files import append, write_text_atomic
from autolora.training.module import AdapterModule


class History(pl.Callback):
    """Writes ``history.csv``: a row every ``every`` steps, at once, and the same numbers to the logger.

    A fit that is resumed goes on with the file as it was at the checkpoint; rows that are no longer there are lost, and
    ``say`` tells the user. A second training has a file of its own, and counts its steps to the logger from
    ``logged_before`` on.

    Columns: step, epoch, seconds of training, mean training loss since the last row, held-out score (where one was
    just measured), parameters and components that are active, learning rates, what the strategy reports, and the rank
    of every module.
    """

    def __init__(self, path: Path, every: int, logged_before: int = 0, say: Callable[[str], None] = print) -> None:
        self.path, self.every, self.logged_before, self.say = path, every, logged_before, say
        self.latest: dict[str, float] = {}
        self._losses: list[Tensor] = []
        self._written_at = -1
        self._rows = 0
        self._seconds = 0.0
        self._header: list[str] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The columns, rows that are written, losses that wait for theirs, and the seconds so far."""
        return {
            "header": self._header,
            "rows": self._rows,
            "written_at": self._written_at,
            "losses": torch.stack(self._losses) if self._losses else torch.zeros(0),
            "seconds": self._elapsed(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self._header = state_dict["header"]
        self._rows, self._written_at = state_dict["rows"], state_dict["written_at"]
        self._losses, self._seconds = list(state_dict["losses"]), state_dict["seconds"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the file, in one process alone."""
        self._started = time.perf_counter()
        self._losses = [loss.to(pl_module.device) for loss in self._losses]
        if not trainer.is_global_zero:
            return
        lines = self._lines_so_far()
        write_text_atomic(self.path, "".join(lines))
        self._header = self._header if lines else None
        self._rows = max(0, len(lines) - 1)
        self._file = io.FileIO(self.path, "a")

    def _lines_so_far(self) -> list[str]:
        """Header and rows as at the checkpoint, or those that are still there."""
        if not self._rows:
            return []
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)[: 1 + self._rows]
        except (OSError, UnicodeDecodeError):
            lines = []
        if next(csv.reader(lines), None) != self._header:
            lines = []
        if len(lines) < 1 + self._rows:
            lines = lines if lines and lines[-1].endswith("\n") else lines[:-1]
            lost = self._rows - max(0, len(lines) - 1)
            self.say(f"{self.path}: {lost} of {self._rows} rows from before the checkpoint are lost")
        return lines

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the loss, and write a row when one is due."""
        assert isinstance(pl_module, AdapterModule)
        if not trainer.is_global_zero:
            return
        if pl_module.last_loss is not None:
            self._losses.append(pl_module.last_loss)
        due = pl_module.steps_done % self.every == 0 or pl_module.steps_done == 1
        if due and pl_module.steps_done != self._written_at:
            self._write(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A row for every measurement on the held-out slice."""
        assert isinstance(pl_module, AdapterModule)
        if pl_module.steps_done and trainer.is_global_zero:
            self._write(trainer, pl_module, float(trainer.callback_metrics["heldout"]))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the file after a failure."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the file."""
        if hasattr(self, "_file"):
            self._file.close()

    def _write(self, trainer: pl.Trainer, module: AdapterModule, heldout: float | None = None) -> None:
        plan = module.strategy.adapters.active_plan()
        rates = {f"lr_{group['name']}": group["lr"] for group in trainer.optimizers[0].param_groups}
        row: dict[str, Any] = {
            "step": module.steps_done,
            "epoch": trainer.current_epoch,
            "seconds": round(self._elapsed(), 3),
            "loss": torch.stack(self._losses).mean().item() if self._losses else None,
            "heldout": heldout,
            "active_params": plan.params,
            "active_components": plan.components,
            "mean_gate": module.strategy.adapters.mean_gate(),
            **rates,
            **module.strategy.progress(),
        }
        self._losses, self._written_at = [], module.steps_done
        self.latest = {key: value for key, value in row.items() if isinstance(value, int | float)}
        step = self.logged_before + module.steps_done
        for logger in trainer.loggers:
            logger.log_metrics(self.latest | {f"rank/{k}": v for k, v in plan.items()}, step=step)
        row |= {f"rank:{name}": rank for name, rank in plan.items()}
        text = io.StringIO(newline="")
        writer: csv.DictWriter[str] = csv.DictWriter(  # what an older version began keeps its columns
            text, self._header or list(row), lineterminator="\n", extrasaction="ignore"
        )
        if self._header is None:
            writer.writeheader()
            self._header = list(row)
        writer.writerow(row)
        append(self._file, text.getvalue())
        self._rows += 1

    def _elapsed(self) -> float:
        return self._seconds + time.perf_counter() - self._started


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, with the loss, the active ranks and the budget."""

    def __init__(self, history: History, budget: int | None, refresh_rate: int) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.history, self.budget = history, budget

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bars of a training that failed; one that is open is drawn again whenever it is thrown away."""
        for bar in (self._train_progress_bar, self._val_progress_bar):
            if bar is not None:
                bar.close()

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What stands at the right end of the bar."""
        latest = self.history.latest
        if not latest:
            return {}
        active = f"{latest['active_params']:,.0f}" + (f"/{self.budget:,}" if self.budget is not None else "")
        shown: dict[str, int | str | float | dict[str, float]] = {
            "ranks": int(latest["active_components"]),
            "params": active,
        }
        return ({"loss": f"{latest['loss']:.3g}"} if "loss" in latest else {}) | shown


class HeldoutChoice(pl.Callback):
    """Keeps the best state on the held-out slice, and stops when there is no progress.

    Both look only at states whose ranks are settled: an earlier one may be better because it is larger.

    Args:
        keep_best: keep a copy of the best state for :meth:`restore`.
        patience: measurements without improvement before training stops; never by default.
    """

    def __init__(self, *, keep_best: bool, patience: int | None) -> None:
        self.keep_best, self.patience = keep_best, patience
        self.best = float("-inf")
        self.state: dict[str, Tensor] | None = None
        self._waited = 0

    def state_dict(self) -> dict[str, Any]:
        """The best score and state so far, and the measurements since."""
        return {"best": self.best, "state": self.state, "waited": self._waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self.best, self.state, self._waited = state_dict["best"], state_dict["state"], state_dict["waited"]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare with the best so far."""
        assert isinstance(pl_module, AdapterModule)
        if not pl_module.strategy.settled:
            return
        score = float(trainer.callback_metrics["heldout"])
        if score > self.best:
            self.best, self._waited = score, 0
            if self.keep_best:
                self.state = pl_module.strategy.adapters.trainable_state()
            return
        self._waited += 1
        trainer.should_stop = self.patience is not None and self._waited >= self.patience

    def restore(self, module: AdapterModule) -> None:
        """Put the best state back, if one was kept."""
        if self.state is not None:
            module.strategy.adapters.load_trainable_state(self.state)
