"""Tables of what was measured: on a terminal, and as Markdown for the README. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from autolora.bench.measure import Interval
from autolora.bench.report import Report, Row, Suite

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
"""Around the table in the README, which ``python -m autolora.bench table=FILE`` prints."""

LABELS = {
    "limit": "the limit",
    "uniform8": "**uniform r=8**",
    "uniform16": "**uniform r=16**",
    "autolora16-prune": "**autolora r_max=16**, pruning",
    "autolora16-settle": "**autolora r_max=16**, settled at rank 4",
    "peft8": "PEFT LoRA r=8",
    "peft16": "PEFT LoRA r=16",
    "adalora16": "PEFT AdaLoRA init_r=16",
    "bare": "the bare model",
    "merged": "**merged**",
    "compact": "**compact**, mixed ranks",
    "peft-pattern": "PEFT LoRA, the same rank_pattern",
    "attach-uniform8": "**attach uniform r=8**",
    "attach-peft8": "PEFT attach r=8",
    "attach-autolora16": "**attach autolora r_max=16**",
    "attach-peft16": "PEFT attach r=16",
    "select-autolora16": "**autolora: choose the plan and compact**",
}
RUN_LABELS = {
    "uniform8": "**uniform r=8**",
    "autolora8": "**autolora r_max=16**, budget of rank 8",
    "peft8-usual": "PEFT LoRA r=8 in the Trainer, usual: padded to 128, float32",
    "peft8-best": "PEFT LoRA r=8 in the Trainer, best: dynamic padding, grouped lengths",
}
_TITLES = {"train": "Training step", "evaluate": "Forward pass", "memory": "Peak memory of a training step"}
_UNITS = {
    "train": ("ms", 1.0),
    "evaluate": ("ms", 1.0),
    "overhead": ("ms", 1.0),
    "once": ("ms", 1.0),
    "memory": ("MB", 1e-6),
    "run": ("s", 1.0),
    "bookkeeping": ("ms", 1.0),
    "cell": ("s", 1.0),
    "dev": ("rows/s", 1.0),
    "report": ("s", 1.0),
    "report-memory": ("MB", 1e-6),
}


def markdown(report: Report) -> str:
    """All tables of a report, as Markdown."""
    parts = []
    if "steps" in report.suites:
        parts += _steps(report.suites["steps"])
    if "run" in report.suites:
        parts += _runs(report.suites["run"])
    if "strategies" in report.suites:
        parts += _strategies(report.suites["strategies"])
    if "comparison" in report.suites:
        parts += _comparison(report.suites["comparison"])
    return "\n\n".join(parts) + "\n"


def line(row: Row) -> str:
    """A row for the terminal."""
    unit, factor = _UNITS[row.part]
    case = f"{row.part:<8} {row.shape or '':<7} {row.precision or '':<8} {row.name:<18}"
    ratios = "  ".join(
        f"{what} {value.median:.3f} [{value.low:.3f}, {value.high:.3f}]" for what, value in row.ratios.items()
    )
    return f"{case} {row.value.median * factor:10.2f} {unit:<2}  {ratios}".rstrip()


def _steps(suite: Suite) -> list[str]:
    out = []
    for part, title in _TITLES.items():
        rows = [row for row in suite.rows if row.part == part]
        whats = ("bare", "peft") if part == "evaluate" else ("limit", "peft", "adalora")
        for precision in dict.fromkeys(row.precision for row in rows):
            chosen = [row for row in rows if row.precision == precision]
            out.append(_by_shape(f"{title}, {precision}", chosen, whats))
    added = [row for row in suite.rows if row.part == "overhead"]
    if added:
        header = ["Adapters of a plan", "rows × tokens", "ms", "predicted ÷ measured"]
        cells = [
            [
                row.name,
                (row.shape or "").replace("x", " × "),
                f"{row.value.median:.2f}",
                _ratio(row.ratios["predicted"]),
            ]
            for row in added
        ]
        out.append(_table(header, cells))
    once = [row for row in suite.rows if row.part == "once"]
    if once:
        cells = [[LABELS[row.name], _value(row), _ratio(row.ratios.get("peft"))] for row in once]
        out.append(_table(["Once in a run", "ms", "÷ PEFT"], cells))
    return [*out, _place(suite)] if out else []


def _by_shape(title: str, rows: Sequence[Row], whats: Sequence[str]) -> str:
    """A line for each contender, and the columns of every shape side by side."""
    shapes = list(dict.fromkeys(row.shape or "" for row in rows))
    unit = _UNITS[rows[0].part][0]
    names = {"limit": "limit", "peft": "PEFT", "adalora": "AdaLoRA", "bare": "bare"}
    header = [title]
    for shape in shapes:
        header += [f"{shape.replace('x', '×')}: {unit}", *(f"÷ {names[what]}" for what in whats)]
    cells = []
    for name in dict.fromkeys(row.name for row in rows):
        of_shape = {row.shape: row for row in rows if row.name == name}
        line = [LABELS[name]]
        for shape in shapes:
            row = of_shape.get(shape)
            line += ["", *("" for _ in whats)] if row is None else _measured(row, whats)
        cells.append(line)
    return _table(header, cells)


def _measured(row: Row, whats: Sequence[str]) -> list[str]:
    return [_value(row), *(_ratio(row.ratios.get(what)) for what in whats)]


def _runs(suite: Suite) -> list[str]:
    """Two epochs from process start to the final metric; ratios the other way round: how many times as fast."""
    rows = [row for row in suite.rows if row.part == "run"]
    parts = list(dict.fromkeys(part for row in rows for part in row.parts))
    task, epochs, data = (suite.settings[key] for key in ("task", "epochs", "data"))
    rows_used = f", {data['max_train']} training rows" if data["max_train"] else ""
    header = [f"{task} ({data['source']}{rows_used}), {epochs} epochs", "s", "× usual", "× best", "accuracy", *parts]
    cells = []
    for row in rows:
        seconds = (f"{row.parts[part]:.1f}" if part in row.parts else "" for part in parts)
        speed = (_ratio(_inverse(row.ratios.get(what))) for what in ("usual", "best"))
        metric = "" if row.metric is None else f"{row.metric:.3f}"
        cells.append([RUN_LABELS[row.name], f"{row.value.median:.1f}", *speed, metric, *seconds])
    notes = [_imports(row) for row in rows if row.imports]
    return [_table(header, cells), *notes, _place(suite)] if rows else []


def _strategies(suite: Suite) -> list[str]:
    """What a strategy spends on itself."""
    few, many = suite.settings["modules"]
    header = [
        "Bookkeeping of a strategy", "ms a step", f"share of a step at {suite.settings['shape'].replace('x', '×')}",
        f"a module of {many:,} ÷ a module of {few:,}",
    ]  # fmt: skip
    cells = [
        [row.name, f"{row.value.median:.2f}", f"{row.ratios['step'].median:.1%}", _ratio(row.ratios["growth"])]
        for row in suite.rows
    ]
    return [_table(header, cells), _place(suite)]


def _comparison(suite: Suite) -> list[str]:
    """What comparing costs."""
    cells = [
        [
            row.name + (f", {row.precision}" if row.precision else ""),
            f"{_value(row)} {_UNITS[row.part][0]}",
            _ratio(row.ratios.get("training")),
        ]
        for row in suite.rows
    ]
    return [_table(["Comparing", "median", "÷ training"], cells), _place(suite)]


def _imports(row: Row) -> str:
    most = ", ".join(f"{name} {value:.1f}" for name, value in row.imports.items() if name != "all")
    return f"Imports of {RUN_LABELS[row.name].replace('**', '')}: {row.imports['all']:.1f} s, of which {most}."


def _inverse(value: Interval | None) -> Interval | None:
    return None if value is None else Interval(median=1 / value.median, low=1 / value.high, high=1 / value.low)


def _value(row: Row) -> str:
    value = row.value.median * _UNITS[row.part][1]
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _ratio(value: Interval | None) -> str:
    if value is None:
        return ""
    one = value.low == value.high
    return f"{value.median:.2f}" if one else f"{value.median:.2f} ({value.low:.2f} to {value.high:.2f})"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _place(suite: Suite) -> str:
    """Where and how it was measured, in a sentence."""
    machine = suite.machine
    hardware, versions, git = machine["hardware"], machine["versions"], machine["git"]
    commit = (git["commit"] or "unknown")[:10] + (" with changes" if git["dirty"] else "")
    clock = "CPU time, " if suite.settings.get("clock") == "cpu" else ""
    threads = f"{machine['threads']} threads, " if machine["threads"] else ""
    counts = sorted({row.rounds for row in suite.rows if row.part != "memory"}) or [1]  # memory repeats exactly
    rounds = "1 round" if counts == [1] else f"{' to '.join(str(n) for n in sorted({counts[0], counts[-1]}))} rounds"
    return (
        f"{machine['date'][:10]}, {hardware['gpu'] or hardware['cpu']}, {hardware['cores']} cores, {threads}"
        f"load {(machine['load_average_before'] or ['unknown'])[0]} before; {clock}{rounds}; "
        f"torch {versions['torch']}, transformers {versions['transformers']}, peft {versions['peft']}; commit {commit}."
    )
