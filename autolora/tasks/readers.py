"""GLUE rows from a folder of TSV files, or from the ``nyu-mll/glue`` data set of the hub and its caches. No torch.

The files are read as GLUE publishes them: tab-separated with no quoting, so that a quotation mark is an ordinary
character; columns found by name, so that sub-samples with fewer columns read like the official files.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autolora.errors import DataError
from autolora.tasks.glue import GlueTask
from autolora.tasks.records import Split

log = logging.getLogger(__name__)

HUB_DATASET = "nyu-mll/glue"
"""The data set on the hub that holds the nine tasks, one configuration each."""

_HUB_SPLITS = {"train": "train", "dev": "validation", "dev_mismatched": "validation_mismatched"}
_NO_LABEL = "-"


@dataclass(frozen=True)
class _Layout:
    """Where a task's texts and label are in its files; ``header`` names the columns of a file that has no header."""

    texts: tuple[str, ...]
    label: str
    named_labels: bool = False
    header: tuple[str, ...] | None = None
    malformed_share: float = 0.0


_LAYOUTS = {
    "cola": _Layout(("sentence",), "label", header=("source", "label", "mark", "sentence")),
    "sst2": _Layout(("sentence",), "label"),
    "mrpc": _Layout(("#1 String", "#2 String"), "Quality"),
    "stsb": _Layout(("sentence1", "sentence2"), "score"),
    # The official QQP files hold about two dozen records broken by a line feed inside a question; the hub leaves them
    # out, and so does this reader, up to one in a thousand: more than that is a damaged file.
    "qqp": _Layout(("question1", "question2"), "is_duplicate", malformed_share=1e-3),
    "mnli": _Layout(("sentence1", "sentence2"), "gold_label", named_labels=True),
    "qnli": _Layout(("question", "sentence"), "label", named_labels=True),
    "rte": _Layout(("sentence1", "sentence2"), "label", named_labels=True),
    "wnli": _Layout(("sentence1", "sentence2"), "label"),
}


def text_columns(task: GlueTask) -> tuple[str, ...]:
    """What GLUE's own files call the text columns of a task: the names of ``GlueTask.fields`` or others."""
    return _LAYOUTS[task.name].texts


def find_local(task: GlueTask, root: Path, split: str) -> Path:
    """The TSV file of one split; folder and file names match in any case, and the folder with or without hyphens.

    Raises:
        DataError: if the root, the task's folder, or the file does not exist; says what was looked for and what is
            there.
    """
    _check_split(task, split)
    if not root.is_dir():
        raise DataError(f"data.dir={root} is not a folder; expected one that holds a folder {task.folder} of TSV files")
    accepted = {task.folder.lower(), task.name}
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and entry.name.lower() in accepted)
    if not folders:
        raise DataError(
            f"{root} has no folder for {task.name}: looked for '{task.folder}' or '{task.name}', in any case; "
            f"{_listing(root)}"
        )
    wanted = "dev_matched.tsv" if task.extra_dev and split == "dev" else f"{split}.tsv"
    files = sorted(entry for folder in folders for entry in folder.iterdir() if entry.name.lower() == wanted)
    if not files:
        raise DataError(f"{folders[0]} has no file {wanted} (the {split} split of {task.name}); {_listing(folders[0])}")
    return files[0]


def read_local(task: GlueTask, root: Path, split: str) -> Split:
    """One split from a folder of GLUE TSV files (``root/MRPC/train.tsv`` and so on).

    Columns are found by name (CoLA, which has no header, by position); a byte-order mark and CRLF line ends are
    tolerated. Texts are kept exactly as they are. Rows whose label is ``-`` (MNLI: no majority among the annotators)
    and QQP's few broken records are left out, counted in ``Split.skipped``, and logged.

    Raises:
        DataError: naming the file (and the line, where there is one) if it is missing, empty or not UTF-8, if the
            header lacks a needed column, a row has too few or too many columns, or a label is not among the allowed
            values.
    """
    path = find_local(task, root, split)
    layout = _LAYOUTS[task.name]
    lines = _lines(path)
    first_row = 0 if layout.header else 1
    if len(lines) <= first_row:
        raise DataError(f"{path}: the {split} split of {task.name} is empty; expected at least one row")
    header = layout.header or tuple(lines[0].split("\t"))
    text_columns, label_column = _columns(path, header, layout)
    parse = _label_parser(task, layout)

    texts: tuple[list[str], ...] = tuple([] for _ in text_columns)
    labels: list[Any] = []
    ids: list[int] = []
    malformed: list[int] = []
    tolerated = int(layout.malformed_share * len(lines))
    for row, line in enumerate(lines[first_row:]):
        number = row + first_row + 1
        cells = line.split("\t")
        if len(cells) != len(header):
            malformed.append(number)
            # A broken last row is a file cut off while it was written, whatever is tolerated elsewhere.
            if number == len(lines) or len(malformed) > tolerated:
                raise _column_error(path, number if number == len(lines) else malformed[0], lines, header)
            continue
        cell = cells[label_column]
        if cell == _NO_LABEL and task.name == "mnli":
            continue
        label = parse(cell)
        if label is None:
            raise DataError(f"{path}, line {number}: {layout.label} is {cell!r}; {_allowed(task, layout)}")
        for column, into in zip(text_columns, texts, strict=True):
            into.append(cells[column])
        labels.append(label)
        ids.append(row)
    return _finish(path, task, split, texts, labels, ids, len(lines) - first_row, len(malformed))


def _finish(
    path: Path,
    task: GlueTask,
    split: str,
    texts: tuple[list[str], ...],
    labels: list[Any],
    ids: list[int],
    rows: int,
    malformed: int,
) -> Split:
    skipped = rows - len(ids)
    if not ids:
        raise DataError(f"{path}: the {split} split of {task.name} is empty: none of its {rows} rows has a label")
    if skipped:
        log.warning(
            "%s: left out %d of %d rows: %d without a gold label, %d with a wrong number of columns",
            path, skipped, rows, skipped - malformed, malformed,
        )  # fmt: skip
    return Split(texts[0], texts[1] if len(texts) == 2 else None, labels, ids, skipped)


def _lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file without byte-order mark and line ends; only LF (or CR LF) ends a line."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _columns(path: Path, header: tuple[str, ...], layout: _Layout) -> tuple[list[int], int]:
    """Positions of the text columns and of the label column."""
    needed = (*layout.texts, layout.label)
    positions = {name.strip().lower(): i for i, name in enumerate(header)}
    missing = [name for name in needed if name.lower() not in positions]
    if missing:
        raise DataError(
            f"{path}: the header (line 1) lacks the column(s) {', '.join(map(repr, missing))}; "
            f"expected {', '.join(map(repr, needed))} separated by tabs, found {', '.join(map(repr, header[:16]))}"
        )
    *texts, label = (positions[name.lower()] for name in needed)
    return texts, label


def _column_error(path: Path, number: int, lines: list[str], header: tuple[str, ...]) -> DataError:
    line = lines[number - 1]
    found = line.count("\t") + 1
    problem = "too few" if found < len(header) else "too many"
    hint = "; it is the last line: the file may be truncated, fetch it again" if number == len(lines) else ""
    return DataError(
        f"{path}, line {number}: {problem} columns: expected {len(header)} ({', '.join(header)}) separated by tabs, "
        f"found {found}: {line[:60]!r}{hint}"
    )


def _label_parser(task: GlueTask, layout: _Layout) -> Callable[[str], int | float | None]:
    """Maps a cell to a class index or a score, or to ``None`` if it is neither."""
    if task.labels is None:
        return lambda cell: parse_score(task, cell)
    values = {name if layout.named_labels else str(i): i for i, name in enumerate(task.labels)}
    return values.get


def parse_score(task: GlueTask, cell: str | float | None) -> float | None:
    """A score as a number, or ``None`` where it is not one, is not finite, or is out of the task's range."""
    assert task.score_range is not None
    low, high = task.score_range
    try:
        # Six decimals, because the hub stores scores in float32: 3.8 must be 3.8 whatever it was read from.
        score = round(float(cell), 6) if cell is not None else math.nan
    except ValueError:
        return None
    return score if low <= score <= high else None


def _allowed(task: GlueTask, layout: _Layout) -> str:
    if task.labels is None:
        assert task.score_range is not None
        return f"expected a number from {task.score_range[0]:g} to {task.score_range[1]:g}"
    values = [name if layout.named_labels else f"{i} ({name})" for i, name in enumerate(task.labels)]
    return f"allowed values: {', '.join(values)}"


def _check_split(task: GlueTask, split: str) -> None:
    if split not in task.splits:
        raise DataError(f"{task.name} has no split {split!r}; expected one of {', '.join(task.splits)}")


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return f"it holds: {', '.join(names[:20]) or 'nothing'}{', ...' if len(names) > 20 else ''}"


def cached_hub_files(task: GlueTask, split: str) -> list[Path]:
    """The files of one split in the local caches of the hub, or an empty list. Touches the disk only.

    Looked for are the Arrow files that ``datasets.load_dataset`` leaves in its own cache (``HF_DATASETS_CACHE``), then
    the Parquet files of a downloaded snapshot in the hub's cache (``HF_HUB_CACHE``); the newest copy wins.
    """
    from huggingface_hub import constants

    _check_split(task, split)
    hub_split = _hub_split(task, split)
    owner, name = HUB_DATASET.split("/")
    datasets_cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets").expanduser()
    snapshots = Path(constants.HF_HUB_CACHE) / f"datasets--{owner}--{name}" / "snapshots"
    for folders, pattern in (
        ((datasets_cache / f"{owner}___{name}" / task.name).glob("*/*"), f"{name}-{hub_split}{{}}.arrow"),
        (snapshots.glob(f"*/{task.name}"), f"{hub_split}{{}}.parquet"),
    ):
        complete = [folder for folder in folders if folder.is_dir() and folder.suffix != ".incomplete"]
        for folder in sorted(complete, key=_modified, reverse=True):
            files = [*folder.glob(pattern.format("")), *sorted(folder.glob(pattern.format("-[0-9]*-of-[0-9]*")))]
            if files and _all_shards(files):
                return files
    return []


def _all_shards(files: list[Path]) -> bool:
    """Whether none of ``…-00000-of-00002`` is missing; a single unnumbered file is complete."""
    _, numbered, total = files[0].stem.rpartition("-of-")
    return all(file.exists() for file in files) and (not numbered or len(files) == int(total))


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def _hub_split(task: GlueTask, split: str) -> str:
    return "validation_matched" if task.extra_dev and split == "dev" else _HUB_SPLITS[split]


def read_hub(task: GlueTask, split: str) -> Split:
    """One split of ``nyu-mll/glue``: from the local caches where they hold it, else downloaded through ``datasets``.

    Cached files are opened directly, because ``load_dataset`` asks the hub first even for what it has cached, and
    retries for most of a minute where there is no network.

    Raises:
        DataError: if the data set can be neither found nor downloaded, its class names come in another order than the
            task's, or a label is missing or out of range.
    """
    _check_split(task, split)
    dataset = _open_hub(task, split)
    where = f"{HUB_DATASET} ({task.name}, {_hub_split(task, split)})"
    missing = [name for name in (*task.fields, "label") if name not in dataset.column_names]
    if missing:
        raise DataError(f"{where} lacks the column(s) {', '.join(missing)}; it has {', '.join(dataset.column_names)}")
    names = getattr(dataset.features["label"], "names", None)
    if names is not None and tuple(names) != task.labels:
        raise DataError(f"{where} orders its classes {names}; expected {list(task.labels or ())}")
    rows = dataset[:]
    if not rows["label"]:
        raise DataError(f"{where} is empty; delete its cache and fetch it again")
    labels = [_hub_label(task, value, f"{where}, row {i}") for i, value in enumerate(rows["label"])]
    texts = [list(rows[field]) for field in task.fields]
    return Split(texts[0], texts[1] if len(texts) == 2 else None, labels, list(range(len(labels))))


def _open_hub(task: GlueTask, split: str) -> Any:
    """The split as a ``datasets.Dataset``."""
    import datasets

    files = cached_hub_files(task, split)
    try:
        if not files:
            return datasets.load_dataset(HUB_DATASET, task.name, split=_hub_split(task, split))
        if files[0].suffix == ".arrow":
            return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
        import pyarrow.parquet

        return datasets.concatenate_datasets([datasets.Dataset(pyarrow.parquet.read_table(file)) for file in files])
    except Exception as error:
        # Whatever goes wrong in the client (connection, permission, disk), the user needs its name and a way on.
        cause = f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
        origin = f"the cached {files[0]}" if files else f"{HUB_DATASET} from the hub"
        raise DataError(
            f"cannot read {task.name} ({split}) from {origin}: {cause}; check the connection or the cache, "
            "or use data.source=local data.dir=DIR, or data.source=mini"
        ) from error


def _hub_label(task: GlueTask, value: Any, where: str) -> Any:
    if task.labels is None:
        score = parse_score(task, value)
        if score is not None:
            return score
    elif value is not None and 0 <= int(value) < len(task.labels):
        return int(value)
    expected = f"0 to {len(task.labels) - 1}" if task.labels else f"a number in {task.score_range}"
    raise DataError(f"{where}: label {value!r}; expected {expected}")
