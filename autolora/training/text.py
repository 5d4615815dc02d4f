"""A GLUE task with a pretrained encoder, as a problem to train on."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autolora.adapters.compress import Compression
from autolora.backbones import head_modules, load_backbone
from autolora.plan import Budget
from autolora.strategies.base import Batch
from autolora.tasks.glue import GlueTask
from autolora.tasks.metrics import compute
from autolora.tasks.records import Split
from autolora.training.data import FIT, HELDOUT, TextDataModule
from autolora.training.problem import Outputs, Problem, Scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from autolora.backbones import Backbone


@dataclass(frozen=True)
class TextSettings:
    """How rows become batches; see :class:`autolora.training.data.TextDataModule`."""

    batch_size: int
    eval_batch_size: int
    max_length: int
    num_workers: int
    cache_dir: Path
    data_seed: int
    head_seed: int


class TextProblem(Problem):
    """Fine-tune a sequence classifier.

    Args:
        task: the row of the GLUE table.
        splits: ``fit``, ``heldout``, ``dev`` and the task's further dev splits.
        source, fingerprint: where the rows came from, and their hash.
        data_notes: what the user should know of the rows.
        backbone, backbone_fingerprint: name to file results under, and hash of the weights.
        weights: arguments of :func:`autolora.backbones.load_backbone`: name, id, path.
        compression: what becomes of the frozen weights.
        settings: batches and seeds.
    """

    default_budget = Budget(rank=4)
    peft_task_type: str | None = "SEQ_CLS"

    def __init__(
        self,
        task: GlueTask,
        splits: Mapping[str, Split],
        *,
        source: str,
        fingerprint: str,
        data_notes: Sequence[str] = (),
        backbone: str,
        backbone_fingerprint: str,
        weights: Mapping[str, Any],
        compression: Compression,
        settings: TextSettings,
    ) -> None:
        self.task = task
        self.name, self.primary = task.name, task.primary
        self.splits = dict(splits)
        self.data_source, self.data_fingerprint = source, fingerprint
        self.data_notes = list(data_notes)
        self.backbone, self.backbone_fingerprint = backbone, backbone_fingerprint
        self.dev_splits = ("dev", *task.extra_dev)
        self.settings = settings
        self._weights, self._compression = dict(weights), compression

    def build(self, *, all_rows: bool = False) -> None:
        """Load the pretrained model and make the batches."""
        settings = self.settings
        self.pretrained: Backbone = load_backbone(
            **self._weights,
            num_labels=self.task.num_labels,
            problem_type=self.task.problem_type,
            labels=self.task.labels,
            head_seed=settings.head_seed,
            compression=self._compression,
        )
        self.backbone_bytes = self.pretrained.stored_bytes
        self.model = self.pretrained.model
        self.fresh: Sequence[str] = (*self.pretrained.fresh, *head_modules(self.model))
        if self.task.regression:
            centre_head(self.model, float(statistics.fmean(self.splits[FIT].labels)))
        splits = self.splits
        if all_rows:
            splits = splits | {FIT: splits[FIT] + splits[HELDOUT]}
        self.datamodule: TextDataModule = TextDataModule(
            splits,
            self.pretrained.tokenizer,
            batch_size=settings.batch_size,
            eval_batch_size=settings.eval_batch_size,
            max_length=settings.max_length,
            seed=settings.data_seed,
            num_workers=settings.num_workers,
            cache_dir=settings.cache_dir,
            regression=self.task.regression,
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """What makes tokens of its rows, from :meth:`build` on; ``None`` where they are no text."""
        return self.pretrained.tokenizer

    @property
    def notes(self) -> list[str]:
        """What is odd about the files, and how many rows were cut."""
        cut = self.datamodule.truncated
        note = f"{cut} rows were longer than data.max_length={self.settings.max_length} tokens and are cut"
        return self.data_notes + ([note] if cut else [])

    def ids(self, split: str, rows: int) -> list[int]:
        """The rows' identifiers in their file."""
        return self.splits[split].ids

    def heldout_batches(self, start: int = 0) -> Iterator[Batch]:
        """Shuffled batches of the held-out slice, in a new order every time it has been read."""
        loader = self.datamodule.shuffled_loader(HELDOUT)
        self.datamodule.seek(loader, *divmod(start, len(loader)))
        while True:
            yield from loader

    def eval_batches(self, split: str, limit: int | None = None) -> Iterable[Batch]:
        """The rows of the split once, the longest first."""
        return self.datamodule.ordered_loader(split, limit)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits in float32, shape ``(batch, labels)``."""
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "index")}
        return model(**inputs).logits.float()

    def criterion(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, or mean squared error for scores."""
        return F.mse_loss(outputs[:, 0], labels) if self.task.regression else F.cross_entropy(outputs, labels)

    def scores(self, outputs: dict[str, Outputs]) -> Scores:
        """GLUE's metrics; those of splits after the first carry the split's name."""
        values: dict[str, float | None] = {}
        notes: list[str] = []
        for i, (split, output) in enumerate(outputs.items()):
            result = compute(self.task, self.predictions(output), output.labels.tolist())
            prefix = "" if i == 0 else f"{split}/"
            values |= {prefix + name: value for name, value in result.values.items()}
            notes += [f"{split}: {note}" for note in result.notes]
        return Scores(self.task.primary, values[self.task.primary], values, notes=notes)


def centre_head(model: nn.Module, mean: float) -> None:
    """Start a regression head at the mean score of the training rows.

    From 0 the first hundred steps would all push one way, which can saturate what lies below the head and leave a
    constant predictor. Heads without a bias are left as they are.
    """
    for name in head_modules(model):
        linears = [module for module in model.get_submodule(name).modules() if isinstance(module, nn.Linear)]
        if linears and linears[-1].bias is not None:
            with torch.no_grad():
                linears[-1].bias.fill_(mean)
