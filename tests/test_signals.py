"""Signals as a request to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from autolora.signals import Interrupted, Signals

BOTH = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.parametrize(("signum", "code"), BOTH)
def test_a_signal_raises_at_once_unless_it_is_deferred(
    signum: int, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signum)
    with Signals(), pytest.raises(Interrupted, match=signal.Signals(signum).name) as stop:
        os.kill(os.getpid(), signum)
    assert stop.value.exit_code == code
    with Signals() as signals:
        signals.deferred = True
        os.kill(os.getpid(), signum)
        assert signals.received == signum
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signum)
        assert signal.getsignal(signum) == signal.SIG_DFL  # a third ends the process
    assert signal.getsignal(signum) == before
    assert capfd.readouterr().err.count("stopping after this step") == 1


def test_handlers_of_a_library_are_taken_over() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signals.take_over()
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_threads_leave_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with Signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_no_error_handler_takes_an_interruption_for_its_own() -> None:
    code = (
        "import os, signal\nfrom autolora.signals import Signals\n"
        "with Signals():\n try:\n  os.kill(os.getpid(), signal.SIGTERM)\n except Exception:\n  print('swallowed')\n"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert "swallowed" not in done.stdout
    assert "Interrupted: interrupted by SIGTERM" in done.stderr
