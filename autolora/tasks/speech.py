"""Spoken words, one of a few in a second of sound: a folder of WAV files as Speech Commands has it.

There is a folder for each word with the files of that word in it (the archive of Warden, arXiv 1804.03209, unpacks to
this). Folders whose name begins with an underscore are no words. The files in ``validation_list.txt`` are dev, those in
``testing_list.txt`` are left alone; without such lists, a tenth of the files, the same for every seed, is dev.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autolora.errors import BackboneError, DataError
from autolora.tasks.glue import GlueTask
from autolora.tasks.records import Arrays
from autolora.tasks.splits import hold_out

if TYPE_CHECKING:
    from torch import Tensor

RATE = 16_000
"""Samples a second that models of speech read."""
_DEV_SHARE = 0.1
_DEV_LIST, _TEST_LIST = "validation_list.txt", "testing_list.txt"


def load(folder: Path, words: Sequence[str] | None, seconds: float) -> tuple[GlueTask, dict[str, Arrays]]:
    """``train`` and ``dev`` as waveforms ``(rows, seconds * 16000)`` from -1 to 1, and the task that they make.

    Args:
        folder: with a folder of WAV files for each word.
        words: the words to tell apart; ``None`` for all there are.
        seconds: that each row is cut or filled up to.

    Raises:
        DataError: if there are fewer than two words, one is missing, or a file is no WAV.
    """
    known = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._")
    chosen = list(words) if words else known
    missing = [word for word in chosen if word not in known]
    if missing or len(chosen) < 2:
        got = ", ".join(missing or chosen) or "none"
        raise DataError(
            f"{folder}: expected a folder of WAV files for each of at least two words; there are folders for "
            f"{', '.join(known[:40]) or 'none'}" + (f", wanted was {got}" if words else "")
        )
    silent = [word for word in chosen if not any((folder / word).glob("*.wav"))]
    if silent:
        raise DataError(f"{folder}: expected files *.wav for every word, there are none in {', '.join(silent[:40])}")
    test, dev = (_listed(folder / name) for name in (_TEST_LIST, _DEV_LIST))
    files = [path for word in chosen for path in sorted((folder / word).glob("*.wav"))]
    names = [f"{path.parent.name}/{path.name}" for path in files]
    kept = [i for i, name in enumerate(names) if name not in test]
    waves = np.stack([_wave(files[i], round(seconds * RATE)) for i in kept]) if kept else np.zeros((0, 1), np.float32)
    rows = Arrays(waves, [chosen.index(files[i].parent.name) for i in kept], kept)
    told = GlueTask("speech_commands", "", ("audio",), tuple(chosen), ("accuracy",))
    if not dev:
        train, held = hold_out(rows, _DEV_SHARE, None, seed=0)
        return told, {"train": train, "dev": held}
    inside = [names[i] in dev for i in kept]
    parts = {"train": [i for i, listed in enumerate(inside) if not listed]}
    parts["dev"] = [i for i, listed in enumerate(inside) if listed]
    empty = [name for name, places in parts.items() if not places]
    if empty:
        raise DataError(f"{folder}: expected files in {' and '.join(empty)}, {_DEV_LIST} leaves none")
    return told, {name: rows.take(places) for name, places in parts.items()}


def features(directory: Path, name: str) -> Callable[[NDArray[np.float32]], Tensor]:
    """What makes the inputs of a model, whose name is given, of waveforms: the feature extractor in its folder.

    Raises:
        BackboneError: if there is none.
    """
    from transformers import AutoFeatureExtractor

    try:
        extractor = AutoFeatureExtractor.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise BackboneError(f"{directory}: expected the feature extractor of a model of speech: {error}") from None

    def extract(waves: NDArray[np.float32]) -> Tensor:
        return extractor(list(waves), sampling_rate=RATE, return_tensors="pt")[name]

    return extract


def decode(content: bytes) -> NDArray[np.float32]:
    """The sound in a WAV file, one channel, -1 to 1, at 16 kHz.

    Raises:
        ValueError: if it is no WAV file.
    """
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    rate, samples = wavfile.read(io.BytesIO(content))
    if samples.dtype.kind in "iu":
        middle, half = (128, 128) if samples.dtype == np.uint8 else (0, -float(np.iinfo(samples.dtype).min))
        samples = (samples.astype(np.float64) - middle) / half
    if samples.ndim > 1:
        samples = samples.mean(axis=1)
    if rate != RATE:
        common = math.gcd(rate, RATE)
        samples = resample_poly(samples, RATE // common, rate // common)
    return samples.astype(np.float32)


def _listed(path: Path) -> set[str]:
    return set(path.read_text(encoding="utf-8").split()) if path.is_file() else set()


def _wave(path: Path, samples: int) -> NDArray[np.float32]:
    try:
        wave = decode(path.read_bytes())[:samples]
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: expected a WAV file ({error})") from None
    return np.pad(wave, (0, samples - len(wave)))
