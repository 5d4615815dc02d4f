"""SIGINT and SIGTERM as a request to stop, answered at once or, inside the training loop, after the current step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The user or the system asked the process to stop.

    Like ``KeyboardInterrupt`` it is no ``Exception``, so that nothing on the way takes it for an error of its own.

    Args:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """128 + the signal, as a shell counts: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum


class Signals:
    """Inside this context a first SIGINT or SIGTERM raises :class:`Interrupted`, or waits for whoever deferred it.

    While ``deferred`` is set a first signal is only kept in ``received``; a second raises at once, and one after that
    has its usual effect. Outside the main thread, where Python allows no handlers, nothing happens.

    Args:
        quiet: say nothing of a signal that waits.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.deferred = False
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.getsignal(signum) for signum in STOPPING}
        self.take_over()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def take_over(self) -> None:
        """Put our handlers in place, also of what a library has put there since."""
        for signum in self._before:
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.deferred and self.received is None:
            self.received = signum
            if not self.quiet:  # print() must not be entered twice: a handler may run in the middle of one
                name = signal.Signals(signum).name
                os.write(2, f"{name}: stopping after this step; once more stops at once\n".encode())
            return
        self.received = signum
        for other in STOPPING:
            signal.signal(other, signal.SIG_DFL)
        raise Interrupted(signum)
