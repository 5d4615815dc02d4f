"""SIGINT and SIGTERM as a request to stop, answered at once or, at the start and in the training loop, after a step.

Under submitit so is SIGUSR2, which says that the job is about to be preempted or to run out of time.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)
PREEMPTING = signal.SIGUSR2
_active: list[Signals] = []


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
    """Inside this context a first SIGINT or SIGTERM waits for :meth:`check`, or raises :class:`Interrupted`.

    Where somebody answers SIGUSR2 outside, as submitit does, that is a request to stop too, and SIGTERM is left to who
    answers it there: a job that is about to be preempted gets both, and only the first says to queue it again.

    While ``deferred`` is set, as it is on entering, a first signal is only kept in ``received``; a second raises at
    once, and one after that has its usual effect. In the middle of an import, which an exception would leave half done
    or which would swallow it, a first signal always waits, and a second has its usual effect. Outside the main thread,
    where Python allows no handlers, nothing happens.

    Args:
        quiet: say nothing of a signal that waits.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.deferred = False
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        self._ours: tuple[int, ...] = ()

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.getsignal(signum) for signum in (*STOPPING, PREEMPTING)}
            queued = callable(self._before[PREEMPTING])
            self._ours = (signal.SIGINT, PREEMPTING) if queued else STOPPING
        self.take_over()
        self.deferred = True
        _active.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _active.remove(self)
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}
        if _active and self.received is not None and kind is not Interrupted:  # nobody has answered it
            _active[-1].received = self.received

    def take_over(self) -> None:
        """Put our handlers in place, also of what a library has put there since."""
        for signum, handler in self._before.items():
            signal.signal(signum, self._handle if signum in self._ours else handler)

    def check(self) -> None:
        """Between two steps: answer a signal that waits.

        Raises:
            Interrupted: if there is one.
        """
        if self.received is not None:
            raise Interrupted(self.received)

    def at_once(self) -> None:
        """From here on signals do not wait.

        Raises:
            Interrupted: if one does.
        """
        self.deferred = False
        self.check()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        importing = _importing(frame)
        if self.received is None and (self.deferred or importing):
            self.received = signum
            if not self.quiet:  # print() must not be entered twice: a handler may run in the middle of one
                name = signal.Signals(signum).name
                os.write(2, f"{name}: stopping after this step; once more stops at once\n".encode())
            return
        self.received = signum
        for other in self._ours:
            signal.signal(other, self._before[other] if other == PREEMPTING else signal.SIG_DFL)
        if importing:
            signal.raise_signal(signum)
        raise Interrupted(signum)


def requeue(stop: Interrupted) -> None:
    """Outside :class:`Signals`: what was stopped for preemption is left to who answers that, to queue it again."""
    if stop.signum == PREEMPTING:
        signal.raise_signal(PREEMPTING)


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported there."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib._bootstrap"):
            return True
        frame = frame.f_back
    return False


# Worker processes ----------------------------------------------------------------------------------------------------


@contextmanager
def held_back() -> Iterator[None]:
    """Inside this context signals wait, and a process that is started here begins with them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent(worker: int) -> None:
    """In a worker process: signals to the whole group are the parent's to answer, and only its own SIGTERM ends us.

    Were SIGTERM ignored outright, a parent that ends without closing its workers would wait for them for ever.

    Args:
        worker: its number, as torch's ``worker_init_fn`` is given it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    if sys.platform == "darwin":  # does not tell who has sent a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    else:
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
