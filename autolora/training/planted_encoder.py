"""A pretrained encoder whose true ranks are known: the planted regression at full size.

The teacher is the encoder with an update dW of known rank added to each of its Linears; the student starts from the
pretrained weights and reads the same sentences. The loss is the mean squared error between their last hidden states,
padding left out. The labels of the sentences play no part.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autolora.adapters import AdapterSettings, find_sites
from autolora.adapters.attach import stream
from autolora.errors import ConfigError
from autolora.plan import Budget, RankPlan, Site
from autolora.strategies.base import Batch
from autolora.tasks.glue import GlueTask
from autolora.tasks.planted import Profile, update
from autolora.tasks.records import Split
from autolora.training.problem import Outputs, Scores, evaluate
from autolora.training.text import TextProblem


@dataclass(frozen=True)
class Planting:
    """What the teacher is.

    Args:
        highest_rank: ranks are drawn uniformly from 0 to this, both included, where ``ranks`` is ``None``.
        ranks: one for each Linear of the encoder, in model order.
        singular_value: the largest one of a dW, as a share of the largest one of its W.
        profile: ``equal`` or ``decaying`` (:func:`autolora.tasks.planted.plant`).
        noise: standard deviation of gaussian noise on the targets in training, as a share of theirs; every row has
            its own, which does not change.
        seed: of ranks and updates.
    """

    highest_rank: int = 8
    ranks: Sequence[int] | None = None
    singular_value: float = 0.5
    profile: Profile = "equal"
    noise: float = 0.0
    seed: int = 0


class PlantedEncoder(TextProblem):
    """Fit a teacher that differs from a pretrained encoder by updates of known rank.

    The metric is the excess error: the mean squared error on noise-free targets, divided by what it is without
    adapters. The encoder's own dropout is off, since no adapter could learn it away.

    Args:
        task: a GLUE task, whose sentences are read.
        splits: rows of it; ``fit``, ``heldout`` and ``dev``.
        planting: the teacher.
        arguments: as for :class:`TextProblem`.
    """

    peft_task_type = "FEATURE_EXTRACTION"

    def __init__(self, task: GlueTask, splits: Mapping[str, Split], *, planting: Planting, **arguments: Any) -> None:
        super().__init__(task, {name: splits[name] for name in ("fit", "heldout", "dev")}, **arguments)
        self.planting = planting
        self.name, self.primary, self.dev_splits = "planted_encoder", "excess_error", ("dev",)
        self.default_budget = Budget(rank=planting.highest_rank / 2)  # until the model is there

    def build(self, *, all_rows: bool = False) -> None:
        """Load the encoder, plant the updates in a copy, and measure what the student is worth without adapters.

        Raises:
            ConfigError: if the ranks do not fit the encoder.
        """
        super().build(all_rows=all_rows)
        self.model, self.fresh = bare_encoder(self.model), ()
        sites = find_sites(self.model, AdapterSettings(modules_to_save=()))
        self.true_plan = draw_plan(sites, self.planting)
        self.default_budget = Budget(params=self.true_plan.params)
        self.teacher = plant_in(self.model, self.true_plan, self.planting)
        with torch.no_grad():
            self.bare_error = 1.0
            self.bare_error = float(self.scores({"dev": evaluate(self, self.model, "dev")}).all["mse"] or 0.0)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Last hidden states with padding at 0, shape ``(batch, max_length * width)``."""
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "index")}
        hidden = model(**inputs).last_hidden_state.float() * batch["attention_mask"][..., None]
        return F.pad(hidden, (0, 0, 0, self.settings.max_length - hidden.shape[1])).flatten(1)

    @torch.no_grad()
    def labels(self, batch: Batch) -> Tensor:
        """What the teacher says, without noise."""
        self.teacher.to(batch["input_ids"].device)
        return self.forward(self.teacher, batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error, on noisy targets if noise is wanted."""
        targets = self.labels(batch)
        if self.planting.noise:
            real = targets != 0
            targets = targets + self.planting.noise * targets[real].std() * self._noise(batch, targets) * real
        return self.criterion(self.forward(model, batch), targets)

    def _noise(self, batch: Batch, targets: Tensor) -> Tensor:
        """Standard normal, in the shape of the targets: of a row the same whenever and by whom it is read."""
        streams = [stream(self.planting.seed, f"noise of row {row}") for row in batch["index"].tolist()]
        return torch.stack([torch.randn(targets.shape[1], generator=generator) for generator in streams]).to(targets)

    def criterion(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean squared error over what is not padding."""
        return (outputs - labels).square().sum() / (labels != 0).sum()

    def scores(self, outputs: dict[str, Outputs]) -> Scores:
        """Excess error and mean squared error of the first split."""
        first = next(iter(outputs.values()))
        error = float(self.criterion(first.logits, first.labels))
        excess = error / self.bare_error if self.bare_error else None
        notes = [] if excess is not None else ["nothing is planted: the excess error is undefined"]
        return Scores(self.primary, excess, {"excess_error": excess, "mse": error}, higher_is_better=False, notes=notes)

    def predictions(self, outputs: Outputs) -> list[float]:
        """The mean squared error of each row."""
        errors = (outputs.logits - outputs.labels).square().sum(1) / (outputs.labels != 0).sum(1)
        return errors.tolist()


def bare_encoder(classifier: nn.Module) -> nn.Module:
    """The encoder below a classification head, without pooler and without dropout.

    Raises:
        ConfigError: if the model does not say which part of it that is.
    """
    prefix = getattr(classifier, "base_model_prefix", "")
    encoder = getattr(classifier, prefix, None) if prefix else None
    if not isinstance(encoder, nn.Module):
        raise ConfigError(f"task=planted_encoder: {type(classifier).__name__} has no encoder below its head")
    if isinstance(getattr(encoder, "pooler", None), nn.Module):
        encoder.pooler = None  # type: ignore[assignment]
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return encoder


def draw_plan(sites: Mapping[str, Site], planting: Planting) -> RankPlan:
    """The true ranks.

    Raises:
        ConfigError: if their number is not that of the modules.
    """
    ranks = planting.ranks
    if ranks is None:
        generator = torch.Generator().manual_seed(planting.seed)
        ranks = torch.randint(0, planting.highest_rank + 1, (len(sites),), generator=generator).tolist()
    if len(ranks) != len(sites):
        raise ConfigError(f"task.ranks: expected {len(sites)}, one for each Linear of the encoder, got {len(ranks)}")
    return RankPlan(sites, dict(zip(sites, ranks, strict=True)))


@torch.no_grad()
def plant_in(student: nn.Module, plan: RankPlan, planting: Planting) -> nn.Module:
    """A frozen copy of the student with the updates in its weights."""
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(planting.seed + 1_000_003)
    for name, site in plan.sites.items():
        weight = teacher.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        size = planting.singular_value * float(torch.linalg.matrix_norm(weight, 2))
        dw = update(site, plan[name], size, planting.profile, generator)
        weight += dw if weight.shape == (site.out_features, site.in_features) else dw.T
    return teacher
