"""Examples to predict, read from a file or a pipe while they arrive: JSON lines, TSV or CSV. No torch.

A line is a row, whatever is wrong with it, so that what is malformed never touches the rows around it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from autolora.errors import DataError
from autolora.tasks.glue import GlueTask
from autolora.tasks.readers import text_columns

Form = Literal["json", "tsv", "csv"]

LONGEST = 1 << 20
"""Bytes of a line that are read: more is malformed, and is not kept."""

_CHUNK = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_Parse = Callable[[bytes], tuple[str, ...]]


class Stream(Protocol):
    """What is read: a binary file, or ``sys.stdin.buffer``."""

    def read1(self, size: int, /) -> bytes:
        """What there is, at most ``size`` bytes of it; waits only where there is nothing, and is empty at the end."""

    def readline(self, size: int, /) -> bytes:
        """A line with its end, at most ``size`` bytes of it."""


@dataclass(frozen=True)
class Example:
    """Texts in the order of the task's fields, and the number of the line that they stood on, from 1."""

    line: int
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Malformed:
    """A line that is no example, and why."""

    line: int
    reason: str


Row = Example | Malformed


def form_of(path: Path) -> Form:
    """What a file holds, by its name: ``.tsv``, ``.csv``; everything else is JSON lines."""
    return {".tsv": "tsv", ".csv": "csv"}.get(path.suffix.lower(), "json")  # type: ignore[return-value]


def read_batches(stream: Stream, task: GlueTask, form: Form, batch_size: int, name: str) -> Iterator[list[Row]]:
    """The rows of a stream in order, so many at a time as have arrived, and at most ``batch_size``.

    Nothing is read before what was read is given out, but for the header, and memory does not grow with the input.

    JSON lines are objects with the task's fields as keys. TSV and CSV have a header with the fields as columns; TSV has
    no quoting, as GLUE's files have none, and a quoted field of CSV ends on its line. In all of them GLUE's own names
    of the columns will do, and what else there is does not matter.

    Args:
        stream: bytes of UTF-8; a byte-order mark and CRLF line ends are tolerated.
        task: says which texts are needed.
        form: of the lines.
        batch_size: rows.
        name: of the stream, for messages.

    Raises:
        DataError: if there is no header, or it lacks a needed column.
    """
    if form == "json":
        return _batches(stream, _json_parser(task), 1, batch_size)
    header = stream.readline(LONGEST).removeprefix(_BYTE_ORDER_MARK)
    return _batches(stream, _table_parser(task, form, header, name), 2, batch_size)


def _batches(stream: Stream, parse: _Parse, first: int, batch_size: int) -> Iterator[list[Row]]:
    for lines in _arriving(stream):
        for start in range(0, len(lines), batch_size):
            part = lines[start : start + batch_size]
            yield [_row(first + i, line, parse) for i, line in enumerate(part)]
            first += len(part)


def _arriving(stream: Stream) -> Iterator[list[bytes]]:
    """Whole lines, each time all that have arrived."""
    rest = b""
    while chunk := stream.read1(_CHUNK):
        *lines, rest = (rest + chunk).split(b"\n")
        rest = rest[: LONGEST + 1]
        if lines:
            yield lines
    if rest:
        yield [rest]


def _row(number: int, line: bytes, parse: _Parse) -> Row:
    if number == 1:
        line = line.removeprefix(_BYTE_ORDER_MARK)
    try:
        if len(line) > LONGEST:
            raise ValueError(f"expected at most {LONGEST:,} bytes in a line")
        return Example(number, parse(line.removesuffix(b"\r")))
    except UnicodeDecodeError as error:
        return Malformed(number, f"expected UTF-8, got the byte 0x{line[error.start]:02x} ({error.reason})")
    except ValueError as error:
        return Malformed(number, str(error))


def _json_parser(task: GlueTask) -> _Parse:
    def parse(line: bytes) -> tuple[str, ...]:
        text = line.decode("utf-8")
        if not text.strip():
            raise ValueError("expected a JSON object, got an empty line")
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"expected a JSON object, it is not JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise ValueError("expected a JSON object, got one that is nested too deep") from None
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {_kind(values)}")
        return _texts(task, values)

    return parse


def _table_parser(task: GlueTask, form: Form, first: bytes, name: str) -> _Parse:
    """Reads the rows under a header.

    Raises:
        DataError: if the header lacks a needed column.
    """
    wanted = " and ".join(_either(names) for names in _names(task))
    try:
        header = [cell.strip().lower() for cell in _cells(form, first.removesuffix(b"\n").removesuffix(b"\r"))]
    except ValueError as error:
        raise DataError(f"{name}, line 1: expected a header with {wanted}: {error}") from None
    if not all(set(names) & set(header) for names in _names(task)):
        found = ", ".join(map(repr, header[:16]))
        raise DataError(f"{name}, line 1: expected a header with {wanted}, got {found or 'nothing'}")

    def parse(line: bytes) -> tuple[str, ...]:
        row = _cells(form, line)
        if len(row) != len(header):
            raise ValueError(f"expected {len(header)} columns ({', '.join(header)}), got {len(row)}")
        return _texts(task, dict(zip(header, row, strict=True)))

    return parse


def _cells(form: Form, line: bytes) -> list[str]:
    text = line.decode("utf-8")
    if form == "tsv":
        return text.split("\t")
    try:
        return next(csv.reader([text], strict=True), [])
    except csv.Error as error:
        raise ValueError(f"expected comma-separated fields: {error}") from None


def _names(task: GlueTask) -> list[tuple[str, ...]]:
    """The names that each of the task's texts goes by."""
    pairs = zip(task.fields, text_columns(task), strict=True)
    return [tuple(dict.fromkeys((field, column, column.lower()))) for field, column in pairs]


def _either(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names[:2]))


def _texts(task: GlueTask, values: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts of a row.

    Raises:
        ValueError: if one is missing, no text, empty, or not Unicode.
    """
    texts = []
    for names in _names(task):
        key = next((name for name in names if name in values), None)
        if key is None:
            found = ", ".join(map(repr, list(values)[:8])) or "none"
            raise ValueError(f"expected the key {_either(names)}, got {found}")
        text = values[key]
        if not isinstance(text, str):
            raise ValueError(f"{key}: expected text, got {_kind(text)}")
        if not text.strip():
            raise ValueError(f"{key}: expected text, it is empty")
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can write such a thing, and no tokenizer takes it
            raise ValueError(f"{key}: expected Unicode text, got half of a surrogate pair") from None
        texts.append(text)
    return tuple(texts)


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    if value is None:
        return "null"
    kinds = ((bool, "a truth value"), (int | float, "a number"), (str, "a string"), (list, "a list"))
    return next((said for kind, said in kinds if isinstance(value, kind)), "an object")
