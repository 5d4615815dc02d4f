from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autolora.bench.model import Subject
from autolora.config import BackboneConfig


@pytest.fixture(scope="session")
def subject(tiny_bert_dir: Path) -> Subject:
    """The tiny BERT as what is measured."""
    return Subject.load(BackboneConfig(path=tiny_bert_dir), torch.device("cpu"))
