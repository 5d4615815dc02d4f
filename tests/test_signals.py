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
    with Signals() as signals:
        signals.at_once()
        with pytest.raises(Interrupted, match=signal.Signals(signum).name) as stop:
            os.kill(os.getpid(), signum)
    assert stop.value.exit_code == code
    with Signals() as signals:
        signals.check()
        os.kill(os.getpid(), signum)
        assert signals.received == signum
        for answer in (signals.check, signals.at_once):
            with pytest.raises(Interrupted, match=signal.Signals(signum).name):
                answer()
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signum)
        assert signal.getsignal(signum) == signal.SIG_DFL  # a third ends the process
    assert signal.getsignal(signum) == before
    assert capfd.readouterr().err.count("stopping after this step") == 1


def test_handlers_of_a_library_are_taken_over() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        signals.at_once()
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
        "with Signals() as signals:\n signals.at_once()\n"
        " try:\n  os.kill(os.getpid(), signal.SIGTERM)\n except Exception:\n  print('swallowed')\n"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert "swallowed" not in done.stdout
    assert "Interrupted: interrupted by SIGTERM" in done.stderr


STOPPED_MODULE = """
import os, signal
for _ in range(int(os.environ["TIMES"])):
    os.kill(os.getpid(), signal.SIGTERM)
print("imported", flush=True)
"""
IMPORTER = """
from autolora.signals import Interrupted, Signals
with Signals() as signals:
    signals.at_once()
    try:
        import stopped
    except BaseException:
        print("raised inside")
    try:
        signals.check()
    except Interrupted as stop:
        print(stop)
"""


@pytest.mark.parametrize(
    ("times", "code", "said"), [(1, 0, "imported\ninterrupted by SIGTERM\n"), (2, -signal.SIGTERM, "")]
)
def test_an_import_is_never_left_half_done(tmp_path: Path, times: int, code: int, said: str) -> None:
    """The first signal waits, the second ends the process."""
    (tmp_path / "stopped.py").write_text(STOPPED_MODULE)
    root = Path(__file__).resolve().parents[1]
    path = f"{root}{os.pathsep}{tmp_path}"
    done = subprocess.run(
        [sys.executable, "-c", IMPORTER],
        capture_output=True,
        text=True,
        env={**os.environ, "TIMES": str(times), "PYTHONPATH": path},
    )
    assert (done.returncode, done.stdout) == (code, said)


FORGETFUL = """
import os, signal, sys
from torch.utils.data import DataLoader
from autolora.signals import held_back, leave_to_parent
with held_back():
    batches = iter(DataLoader(range(100), num_workers=1, worker_init_fn=leave_to_parent, persistent_workers=True))
next(batches)
worker = batches._workers[0]
for signum in (signal.SIGINT, signal.SIGTERM):
    os.system(f"kill -{int(signum)} {worker.pid}")
worker.join(1)
print(worker.is_alive(), len(list(batches)))
keep = sys.modules["kept"] = batches
"""


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not tell a worker who has sent a signal")
def test_a_worker_ends_with_its_parent_and_for_nobody_else() -> None:
    """Also where the parent ends without closing it; others' signals, and its own copies, pass it by."""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", FORGETFUL], capture_output=True, text=True, cwd=root, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True 99\n", "")
