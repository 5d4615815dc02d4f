"""One process at a time in a run directory."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autolora.errors import BusyError
from autolora.files import writing


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Inside this context no other process can hold ``folder``; the file ``.lock`` in it says who does.

    It is a POSIX record lock: it goes with the process, however that ends, and children do not inherit it.

    Raises:
        BusyError: if another process holds the folder.
        DiskFullError: if there is no space for the file.
    """
    file = folder / ".lock"
    with writing(file):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
            raise BusyError(f"{folder}: {holder} is working here; wait for it, or stop it") from None
        with writing(file):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(descriptor)
