"""Where a task's rows come from: local files, the hub or its cache, or the embedded data; and what they are. No torch.

The choice is made once, before anything heavy loads, without waiting for a network that is not there, and is said in
one line. The source and the fingerprint of the rows are part of a run's identity, so that numbers on the embedded data
can never pass for GLUE numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from autolora.errors import DataError
from autolora.network import why_unreachable
from autolora.tasks.glue import OFFICIAL_ROWS, GlueTask
from autolora.tasks.readers import HUB_DATASET, cached_hub_files, find_local, read_hub, read_local
from autolora.tasks.records import Split

Kind = Literal["local", "hub", "mini"]
SOURCES = ("auto", *get_args(Kind))

_MINI_SEED = 0
_WAY_OUT = "use data.source=local data.dir=DIR with GLUE TSV files, or data.source=mini"


@dataclass(frozen=True)
class ResolvedSource:
    """A decided source. ``detail`` is the one line for the user; ``folder`` is set for local files alone."""

    kind: Kind
    detail: str
    folder: Path | None = None


def resolve(source: str, task: GlueTask, data_dir: Path | None) -> ResolvedSource:
    """Decide where the rows of a task come from; reads no rows, and takes about 3 s at most.

    ``auto`` is the local folder if one is given, else the hub or its cache if either has the task, else the embedded
    data. Only ``auto`` without a folder ever falls back: a source or a folder asked for is used, or is an error.

    Args:
        source: one of ``SOURCES``.
        task: the task whose rows are wanted.
        data_dir: the folder of GLUE TSV files, for ``local`` and ``auto``.

    Raises:
        DataError: naming the cause if an explicit source cannot be used.
    """
    if source not in SOURCES:
        raise DataError(f"data.source={source} is unknown; expected one of {', '.join(SOURCES)}")
    if source == "local" and data_dir is None:
        raise DataError("data.source=local needs data.dir: the folder that holds CoLA, MRPC and so on as TSV files")
    if source == "mini":
        return _mini(task, "asked for")
    if data_dir is not None and source in ("local", "auto"):
        return _local(task, data_dir)
    if all(cached_hub_files(task, split) for split in task.splits):
        return ResolvedSource("hub", f"GLUE {task.name} from the local cache of {HUB_DATASET}")
    endpoint, problem = probe_hub()
    if problem is None:
        return ResolvedSource("hub", f"GLUE {task.name} from {HUB_DATASET} at {endpoint}")
    if source == "hub":
        raise DataError(
            f"data.source=hub: {task.name} of {HUB_DATASET} is not in the local cache and the hub cannot be used: "
            f"{problem}; {_WAY_OUT}"
        )
    return _mini(task, f"no data.dir given, nothing cached, and no hub: {problem}")


def _local(task: GlueTask, root: Path) -> ResolvedSource:
    files = [find_local(task, root, split) for split in task.splits]
    return ResolvedSource("local", f"GLUE {task.name} from local files in {files[0].parent}", root)


def _mini(task: GlueTask, why: str) -> ResolvedSource:
    return ResolvedSource(
        "mini",
        f"MINI {task.name}, generated sentences, NOT GLUE ({why}); results do not compare with GLUE results",
    )


def probe_hub() -> tuple[str, str | None]:
    """Ask the hub for the data set's page, once: ``(endpoint, None)`` if it answers, ``(endpoint, problem)`` if not."""
    from huggingface_hub import constants

    endpoint = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES:
        return endpoint, "offline mode is switched on (HF_HUB_OFFLINE or HF_DATASETS_OFFLINE)"
    return endpoint, why_unreachable(f"{endpoint}/api/datasets/{HUB_DATASET}")


def load(resolved: ResolvedSource, task: GlueTask) -> dict[str, Split]:
    """All labelled splits of a task: ``train``, ``dev``, and the further dev splits (MNLI: ``dev_mismatched``).

    Raises:
        DataError: if the source cannot be read after all; there is no fall-back to another one.
    """
    return {split: _read(resolved, task, split) for split in task.splits}


def size_notes(resolved: ResolvedSource, task: GlueTask, splits: Mapping[str, Split]) -> list[str]:
    """What differs from GLUE in the number of rows: a file may be a part on purpose, or cut short at a row's end."""
    if resolved.kind == "mini":
        return []
    return [
        f"{task.name} {name}: {len(splits[name]):,} rows, GLUE has {rows:,}: part of it, or a truncated file"
        for name, rows in zip(task.splits, OFFICIAL_ROWS[task.name], strict=True)
        if len(splits[name]) != rows
    ]


def _read(resolved: ResolvedSource, task: GlueTask, split: str) -> Split:
    if resolved.kind == "local":
        assert resolved.folder is not None
        return read_local(task, resolved.folder, split)
    if resolved.kind == "hub":
        return read_hub(task, split)
    from autolora.tasks.mini import generate

    return generate(task.name, split, seed=_MINI_SEED)


def fingerprint(splits: Mapping[str, Split]) -> str:
    """Twelve hexadecimal digits that stand for the texts, labels and order of every split.

    The file layout, row numbers, and the order of the splits have no part in it: the same rows read from TSV files or
    from the hub have the same fingerprint. Scores count to six digits, as much as the hub's float32 keeps.
    """
    digest = hashlib.sha256()
    for name in sorted(splits):
        split = splits[name]
        digest.update(json.dumps([name, len(split)]).encode())
        texts_b = split.text_b if split.text_b is not None else [None] * len(split)
        for text_a, text_b, label in zip(split.text_a, texts_b, split.labels, strict=True):
            digest.update(json.dumps([text_a, text_b, f"{label:.6g}"]).encode())
    return digest.hexdigest()[:12]
