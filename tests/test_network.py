"""A server is judged quickly, whatever it does."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from autolora import network
from autolora.network import why_unreachable


def test_probe_is_bounded_even_if_the_request_never_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    # Looking a name up has no time-out: the bound is that the probe leaves its thread behind.
    release = threading.Event()
    monkeypatch.setattr(network, "_head", lambda url, any_answer: release.wait() and None)
    monkeypatch.setattr(network, "PROBE_SECONDS", 0.05)
    waits = []
    join = threading.Thread.join

    def spy(thread: threading.Thread, timeout: float | None = None) -> None:
        waits.append(timeout)
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", spy)
    problem = why_unreachable("http://hub.example")
    release.set()
    assert waits == [0.05]
    assert problem is not None
    assert "did not answer in 0.05 s" in problem


def test_request_has_a_time_out_and_the_bounds_keep_the_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def urlopen(request: object, timeout: float | None = None) -> None:
        seen.append(timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    problem = why_unreachable("http://hub.example")
    assert problem is not None
    assert "timed out" in problem
    assert seen == [network.REQUEST_SECONDS]
    assert network.REQUEST_SECONDS <= network.PROBE_SECONDS < 5.0


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "PROBE_SECONDS", 0.2)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        assert why_unreachable(f"http://127.0.0.1:{server.getsockname()[1]}") is not None


@pytest.mark.parametrize(
    ("code", "any_answer", "said"), [(200, False, None), (404, False, "answered 404"), (404, True, None)]
)
def test_an_answer_is_told_from_an_error(code: int, any_answer: bool, said: str | None) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(code)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        problem = why_unreachable(f"http://127.0.0.1:{server.server_port}", any_answer=any_answer)
    assert (problem is None) if said is None else (problem is not None and said in problem)
