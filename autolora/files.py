"""Files that are written as a whole or not at all, also when the disk is full. No torch."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from autolora.errors import DataError, DiskFullError, PathError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNWRITABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ELOOP, errno.ENAMETOOLONG,
)  # fmt: skip


def dump_json(data: Any) -> str:
    """Strict, indented JSON with a newline at the end."""
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path, missing: str, advice: str = "") -> Any:
    """The content of a JSON file.

    Raises:
        DataError: saying ``missing`` if it is not there, or what is wrong with it and ``advice``.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(missing) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected JSON, could not read it ({error}){advice}") from None


def write_json_atomic(path: Path, data: Any) -> None:
    """Replace a JSON file as a whole, or not at all."""
    write_text_atomic(path, dump_json(data))


def write_text_atomic(path: Path, text: str) -> None:
    """Replace a text file as a whole, or not at all."""
    with replacing(path) as file:
        file.write(text)


@contextmanager
def replacing(path: Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """A file beside ``path`` that takes its place once it is written and on disk; after a failure nothing is left.

    Raises:
        DiskFullError: if there is no space.
        PathError: if no file can be made there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with temporary.open("wb") if binary else temporary.open("w", encoding="utf-8", newline="") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def append(file: io.FileIO, text: str) -> None:
    """Add text at the end of a file that is open without a buffer, as a whole or not at all.

    Raises:
        DiskFullError: if there is no space.
    """
    with writing(Path(str(file.name))):
        end = file.seek(0, os.SEEK_END)
        rest = memoryview(text.encode())
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside this context what the system refuses is an error that the user can mend; ``path`` is what is written.

    Raises:
        DiskFullError: if there is no space.
        PathError: if nothing can be made there.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFullError(
                f"{path}: could not be written ({error.strerror}), and what was there before is as it was; free space "
                "and repeat the command"
            ) from None
        if error.errno not in _UNWRITABLE:
            raise
        advice = "name another place, or make this one writable"
        if error.errno == errno.EBUSY:
            advice = "a folder where something is mounted cannot be replaced: name one inside it"
        raise PathError(f"{path}: could not be written ({error.strerror}); {advice}") from None


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` that takes its place once all its files are on disk; after a failure nothing is left.

    A link stays: what it points to is replaced.

    Raises:
        DiskFullError: if there is no space.
        PathError: if no folder can be made there.
    """
    named, path = path, Path(os.path.realpath(path))
    temporary, old = (path.with_name(f".{path.name}.{kind}.{os.getpid()}.tmp") for kind in ("new", "old"))
    with writing(named):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.mkdir()
            yield temporary
            for file in (file for file in temporary.rglob("*") if file.is_file()):
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
            if path.exists():  # a folder with something in it cannot be replaced in one step
                os.replace(path, old)
            try:
                os.replace(temporary, path)
            except OSError:
                if old.exists():
                    os.replace(old, path)
                raise
        finally:
            for left in (temporary, old):
                shutil.rmtree(left, ignore_errors=True)


def require_empty(path: Path) -> None:
    """Refuse a place for a new folder that holds something.

    Raises:
        DataError: if there is a file, or a folder that is not empty.
        PathError: if that cannot be looked at.
    """
    with writing(path):
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise DataError(f"out={path}: expected a folder that is not there yet, or empty: name another")
