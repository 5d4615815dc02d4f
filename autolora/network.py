"""Whether a server can be reached, decided quickly: the hub's own client retries for most of a minute. No torch."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request

REQUEST_SECONDS = 2.0
"""Time-out of each network operation of the probe."""
PROBE_SECONDS = 3.0
"""Longest the probe may take altogether, name resolution (which has no time-out of its own) included."""


def why_unreachable(url: str, *, any_answer: bool = False) -> str | None:
    """What is wrong with a server, or ``None`` if it answers a HEAD request with success.

    With ``any_answer`` it may also answer with an error: there is one, whatever it says to HEAD.

    The request runs in a thread that is left behind after :data:`PROBE_SECONDS`, because looking up a name cannot be
    given a time-out.
    """
    answer: list[str | None] = []
    probe = threading.Thread(target=lambda: answer.append(_head(url, any_answer)), name="network-probe", daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS)
    return answer[0] if answer else f"{url} did not answer in {PROBE_SECONDS:g} s"


def _head(url: str, any_answer: bool) -> str | None:
    try:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "autolora"})
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS):
            return None
    except urllib.error.HTTPError as error:
        return None if any_answer else f"{url} answered {error.code} {error.reason}"
    except urllib.error.URLError as error:
        return f"{url} cannot be reached ({error.reason})"
    except (OSError, ValueError) as error:
        return f"{url} cannot be reached ({error})"
