"""scikit-learn's 1,797 handwritten digits, 8 by 8 pixels: 0 to 4 to pretrain on, 5 to 9 to adapt to.

A model that has learned to tell 0 to 4 apart has never seen one of the other digits, and no row is in both parts. A
quarter of the digits 5 to 9, the same for every seed, is dev.
(UCI "Optical Recognition of Handwritten Digits", Alpaydin & Kaynak, 1998; its test part, which scikit-learn carries.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from autolora.errors import DataError
from autolora.tasks.glue import GlueTask
from autolora.tasks.records import Arrays
from autolora.tasks.splits import hold_out

if TYPE_CHECKING:
    from torch import Tensor

TASK = GlueTask("digits", "", ("image",), ("5", "6", "7", "8", "9"), ("accuracy",))
SKLEARN_MISSING = "scikit-learn is not installed: pip install 'autolora[digits]'"
_FIRST_NEW = 5
_DEV_SHARE = 0.25


def pretraining() -> Arrays:
    """The digits 0 to 4, labelled by themselves."""
    rows = _all()
    return rows.take([i for i, label in enumerate(rows.labels) if label < _FIRST_NEW])


def adaptation() -> dict[str, Arrays]:
    """``train`` and ``dev`` of the digits 5 to 9, which have the labels 0 to 4."""
    rows = _all()
    new = rows.take([i for i, label in enumerate(rows.labels) if label >= _FIRST_NEW])
    labelled = Arrays(new.inputs, [label - _FIRST_NEW for label in new.labels], new.ids)
    train, dev = hold_out(labelled, _DEV_SHARE, None, seed=0)
    return {"train": train, "dev": dev}


def pixel_values(images: np.ndarray, size: int, channels: int) -> Tensor:
    """Images ``(rows, 8, 8)`` from 0 to 1 as a vision transformer reads them: ``(rows, channels, size, size)``, ±1.

    Another size is interpolated, and a model for colours gets grey.
    """
    import torch
    from torch.nn.functional import interpolate

    pixels = torch.from_numpy(images)[:, None] * 2 - 1
    if pixels.shape[-1] != size:
        pixels = interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    return pixels.repeat(1, channels, 1, 1)


def _all() -> Arrays:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(f"task=digits: {SKLEARN_MISSING}") from None
    bundled = load_digits()
    images = (bundled.images / 16).astype(np.float32)
    return Arrays(images, [int(label) for label in bundled.target], list(range(len(images))))
