"""What a program imports, and how long that takes: the report of ``python -X importtime``. No torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_LINE = re.compile(r"import time:\s*(\d+) \|\s*\d+ \|\s*(\S+)\s*$")


def import_seconds(lines: Iterable[str]) -> dict[str, float]:
    """Seconds spent in each top-level package's own modules; most first; their sum is what all imports take.

    Args:
        lines: of the interpreter's standard error; others than those of the report are skipped.
    """
    microseconds: Counter[str] = Counter()
    for line in lines:
        if hit := _LINE.match(line):
            microseconds[hit.group(2).partition(".")[0]] += int(hit.group(1))
    return {name: value / 1e6 for name, value in microseconds.most_common()}
