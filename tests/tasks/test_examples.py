"""Rows of a stream, whole and malformed, and when they are given out."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from autolora.errors import DataError
from autolora.tasks import examples
from autolora.tasks.examples import Example, Form, Malformed, Row, form_of, read_batches
from autolora.tasks.glue import GLUE


def read(data: bytes, task: str = "mnli", form: Form = "json", batch_size: int = 100) -> list[Row]:
    batches = read_batches(io.BytesIO(data), GLUE[task], form, batch_size, "input")
    return [row for batch in batches for row in batch]


def test_json_lines_with_either_name_of_a_column() -> None:
    rows = read(
        b'\xef\xbb\xbf{"premise": "A b.", "hypothesis": "C"}\r\n'
        b'{"hypothesis": "d\xc3\xa9", "label": 3, "premise": "\\u0065"}\n'
        b'{"sentence1": "x", "sentence2": " y\\t"}'
    )
    assert rows == [Example(1, ("A b.", "C")), Example(2, ("e", "dé")), Example(3, ("x", " y\t"))]
    assert read(b'{"#1 String": "a", "sentence2": "b"}', "mrpc") == [Example(1, ("a", "b"))]
    assert read(b'{"sentence": "a"}\n', "cola") == [Example(1, ("a",))]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "expected a JSON object, got an empty line"),
        (b" \t", "expected a JSON object, got an empty line"),
        (b"{", "expected a JSON object, it is not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b"[1]", "expected a JSON object, got a list"),
        (b"null", "expected a JSON object, got null"),
        (b"true", "expected a JSON object, got a truth value"),
        (b'"a"', "expected a JSON object, got a string"),
        (b"1.5", "expected a JSON object, got a number"),
        (b"[" * 100_000, "expected a JSON object, got one that is nested too deep"),
        (b"{}", "expected the key 'premise' or 'sentence1', got none"),
        (b'{"premise": "a", "b": 1}', "expected the key 'hypothesis' or 'sentence2', got 'premise', 'b'"),
        (b'{"premise": 5, "hypothesis": "c"}', "premise: expected text, got a number"),
        (b'{"premise": null, "hypothesis": "c"}', "premise: expected text, got null"),
        (b'{"premise": {}, "hypothesis": "c"}', "premise: expected text, got an object"),
        (b'{"premise": "a", "hypothesis": " \\n"}', "hypothesis: expected text, it is empty"),
        (b'{"premise": "\\ud800", "hypothesis": "c"}', "premise: expected Unicode text, got half of a surrogate pair"),
        (b'{"premise": "\xff", "hypothesis": "c"}', "expected UTF-8, got the byte 0xff (invalid start byte)"),
        (b'{"premise": "' + b"a" * examples.LONGEST, "expected at most 1,048,576 bytes in a line"),
    ],
)
def test_a_malformed_line_is_one_row_and_the_next_is_whole(line: bytes, reason: str) -> None:
    good = b'{"premise": "a", "hypothesis": "b"}'
    assert read(b"\n".join([good, line, good, b""])) == [
        Example(1, ("a", "b")), Malformed(2, reason), Example(3, ("a", "b"))
    ]  # fmt: skip


def test_tsv_has_no_quoting_and_csv_has() -> None:
    tsv = b'index\tsentence1\tsentence2\r\n0\tShe said "no\tb\r\n1\ta\n2\ta\t\n3\ta, b\tc\xff\n4\tx\ty\tz\n5\tx\ty'
    assert read(tsv, "mnli", "tsv") == [
        Example(2, ('She said "no', "b")),
        Malformed(3, "expected 3 columns (index, sentence1, sentence2), got 2"),
        Malformed(4, "sentence2: expected text, it is empty"),
        Malformed(5, "expected UTF-8, got the byte 0xff (invalid start byte)"),
        Malformed(6, "expected 3 columns (index, sentence1, sentence2), got 4"),
        Example(7, ("x", "y")),
    ]
    table = b'\xef\xbb\xbf"Premise",Hypothesis\n"a, ""b""",c\n"open,d\n\ne,f\n'
    assert read(table, "mnli", "csv") == [
        Example(2, ('a, "b"', "c")),
        Malformed(3, "expected comma-separated fields: unexpected end of data"),
        Malformed(4, "expected 2 columns (premise, hypothesis), got 0"),
        Example(5, ("e", "f")),
    ]
    assert read(b"Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\ta\tb\n", "mrpc", "tsv") == [
        Example(2, ("a", "b"))
    ]


@pytest.mark.parametrize(
    ("header", "found"),
    [(b"", "got ''"), (b"premise\thypotesis\n", "got 'premise', 'hypotesis'"), (b"\xff\n", "utf-8")],
)
def test_a_header_without_the_columns_ends_it(header: bytes, found: str) -> None:
    with pytest.raises(DataError) as error:
        read_batches(io.BytesIO(header), GLUE["mnli"], "tsv", 1, "a.tsv")
    start = "a.tsv, line 1: expected a header with 'premise' or 'sentence1' and 'hypothesis' or 'sentence2'"
    assert str(error.value).startswith(start)
    assert found in str(error.value)


def test_names_of_files() -> None:
    names = ("-", "a", "a.jsonl", "a.json", "a.TSV", "a.csv")
    assert [form_of(Path(name)) for name in names] == ["json", "json", "json", "json", "tsv", "csv"]


class Endless:
    """A pipe whose other end writes so many bytes of the same line for ever; counts what has been read."""

    def __init__(self, line: bytes, at_once: int) -> None:
        self.line, self.at_once, self.read = line, at_once, 0

    def read1(self, size: int, /) -> bytes:
        start = self.read % len(self.line)
        count = min(size, self.at_once)
        self.read += count
        return (self.line * (count // len(self.line) + 2))[start : start + count]

    def readline(self, size: int, /) -> bytes:
        raise NotImplementedError


@pytest.mark.parametrize("at_once", [1, 7, 30, 100, 10_000])
def test_rows_are_given_out_when_they_are_there_and_nothing_is_read_before_that(at_once: int) -> None:
    line = json.dumps({"sentence": "a b c d e"}).encode() + b"\n"
    stream = Endless(line, at_once)
    batches = read_batches(stream, GLUE["sst2"], "json", 8, "pipe")
    assert stream.read == 0
    given = 0
    for batch in (next(batches) for _ in range(50)):
        assert 1 <= len(batch) <= 8
        assert batch == [Example(given + 1 + i, ("a b c d e",)) for i in range(len(batch))]
        given += len(batch)
        arrived = stream.read // len(line)
        assert given <= arrived < given + max(1, at_once // len(line) + 1)


def test_a_line_without_an_end_is_not_kept() -> None:
    stream = Endless(b"a", 1 << 20)
    batches = examples._arriving(stream)
    import tracemalloc

    class Stop(Exception):
        pass

    real, peak = stream.read1, 0

    def counted(size: int, /) -> bytes:
        if stream.read > 64 << 20:
            raise Stop
        return real(size)

    stream.read1 = counted  # type: ignore[method-assign]
    tracemalloc.start()
    try:
        with pytest.raises(Stop):
            next(batches)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
