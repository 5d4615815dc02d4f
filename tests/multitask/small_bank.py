"""Adapters for a tiny model, written to folders, and what the model says with each alone."""

from __future__ import annotations

from pathlib import Path

import torch
from adapters import tiny_models
from adapters.tiny_models import BASE, inputs_for, output, randomize
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from autolora.adapters import Adapters, AdapterSettings, attach, find_sites
from autolora.adapters.peft_format import save_peft
from autolora.plan import RankPlan

LABELS = {"rte": 2, "cola": 2, "mnli": 3, "stsb": 1}


def make(labels: int = 2, family: str = "bert") -> nn.Module:
    """A tiny model with weights so large that every adapter shows; only the head depends on the labels."""
    if family == "bert":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model: nn.Module = BertForSequenceClassification(BertConfig(**BASE | {"num_labels": labels})).eval()
    else:
        model = tiny_models.make(family)
    return tiny_models.enlarged(model)


def ranks(model: nn.Module, settings: AdapterSettings, shift: int) -> RankPlan:
    """Ranks 0 to 3, other ones for each shift."""
    sites = find_sites(model, settings)
    return RankPlan(sites, {name: (i + shift) % 4 for i, name in enumerate(sites)})


def trained(model: nn.Module, seed: int, **settings: object) -> Adapters:
    """Adapters that do something, with a head of their own."""
    chosen = AdapterSettings(seed=seed, **settings)  # type: ignore[arg-type]
    adapters = attach(model, chosen, ranks(model, chosen, seed))
    randomize(adapters, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.head_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return adapters


def write(folder: Path, family: str = "bert") -> dict[str, Path]:
    """A folder for each of :data:`LABELS`."""
    folders = {}
    for seed, (name, labels) in enumerate(LABELS.items(), 1):
        folders[name] = folder / name
        adapters = trained(make(labels, family), seed)
        save_peft(adapters, folders[name], base_model="tiny", task_type="SEQ_CLS")
    return folders


@torch.no_grad()
def logits(model: nn.Module, family: str = "bert", rows: int = 4, only: list[int] | None = None) -> Tensor:
    """What a model says of a batch, or of some of its rows."""
    batch = inputs_for(family, rows)
    return output(model, batch if only is None else {key: value[only] for key, value in batch.items()})
