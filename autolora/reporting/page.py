"""The report as one HTML file that needs nothing else: no network, no server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from autolora.reporting.runs import Run

_SHOWN = {
    "run": "run",
    "arena": "data, backbone",
    "task": "task",
    "variant": "variant",
    "seed": "seed",
    "value": "value",
    "adapter_params": "adapter parameters",
    "head_params": "head parameters",
    "budget": "budget",
    "total_seconds": "seconds",
    "passes": "passes",
}
"""Columns of the table of runs, by their names in results.csv; where there is but one arena, it has none."""


def render(
    *,
    title: str,
    about: str,
    arenas: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, object]],
    runs: Sequence[Run],
    skipped: Sequence[str],
    flagged: Sequence[str],
) -> str:
    """The page; everything that comes from runs is escaped."""
    from jinja2 import Environment, StrictUndefined

    several = len({row["arena"] for row in rows}) > 1
    shown = {key: name for key, name in _SHOWN.items() if key != "arena" or several}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(_file("page.html.j2"))
    return template.render(
        title=title,
        about=about,
        arenas=arenas,
        runs=[list(shown.values()), *([_cell(row[key]) for key in shown] for row in rows)],
        skipped=skipped,
        flagged=flagged,
        configurations=_json(configurations(runs)),
        style=_file("page.css"),
        script=_file("page.js"),
    )


def configurations(runs: Sequence[Run]) -> dict[str, Any]:
    """What all runs share, once, and what is each one's own, in their order: ``{"common": {...}, "own": [{...}]}``."""
    first = runs[0].config
    common = {
        key: value
        for key, value in first.items()
        if all(key in run.config and run.config[key] == value for run in runs)
    }
    own = [{key: value for key, value in run.config.items() if key not in common} for run in runs]
    return {"common": common, "own": own}


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:z.6g}"
    return (
        f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000 else str(value)
    )


def _json(data: object) -> str:
    """JSON that cannot end the script element that it stands in."""
    return json.dumps(data, ensure_ascii=False, default=str).replace("<", "\\u003c")


def _file(name: str) -> str:
    return files("autolora.reporting").joinpath(name).read_text(encoding="utf-8")
