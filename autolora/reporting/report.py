"""From run directories to a report: statistics, tables, figures and a page. Reads, and never trains."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from textwrap import fill, indent
from typing import Any

from autolora.errors import PathError
from autolora.files import write_text_atomic, writing
from autolora.reporting import figures
from autolora.reporting.compare import (
    Comparison,
    OnTask,
    beyond_scores,
    choose_reference,
    compare,
    not_compared,
    sentence,
)
from autolora.reporting.figures.canvas import Figure, styled
from autolora.reporting.figures.scores import adapter_parameters
from autolora.reporting.page import render
from autolora.reporting.runs import Found, Run, Variant, circumstances_apart, settings_apart, some_of, variants
from autolora.reporting.statistics import ALPHA, POWER
from autolora.reporting.tables import Table, caption, cells, make_table, markdown, row_of, tex, write_results

_MANY_SEEDS = (5, 10, 20)
"""With fewer than the first, a report says what these would show."""


@dataclass(frozen=True)
class Arena:
    """Runs that may be compared: one source of data, one backbone.

    Args:
        name: of both.
        slug: the same for the name of a folder.
        variants: what is there.
        reference: what the others are compared with, or of several with other budgets the one that most are.
        comparisons: of all others.
        table: of all variants.
    """

    name: str
    slug: str
    variants: tuple[Variant, ...]
    reference: Variant
    comparisons: tuple[Comparison, ...]
    table: Table

    def sentences(self) -> list[str]:
        """What it says: a sentence for every strategy, the comparisons that were decided first."""
        ordered = sorted(self.comparisons, key=lambda one: (not one.significant, -one.mean))
        return [*map(sentence, ordered), *not_compared(self.variants, self.reference, self.comparisons)]

    def limits(self) -> list[str]:
        """What a reader has to know to read the numbers."""
        return list(_limits(self))

    def caption(self) -> str:
        """What the numbers of the table are, and what bold scores in it are better than."""
        against = self.reference.label
        if len({one.reference.label for one in self.comparisons}) > 1:
            against = f"{self.reference.strategy} at the same budget, where there is one, or {against}"
        return caption(self.table, against)

    def markdown(self) -> str:
        """The table and its caption in Markdown."""
        return f"{markdown(self.table)}\n{self.caption()}\n"

    def tex(self) -> str:
        """The table in TeX, and its caption as a comment."""
        return tex(self.table) + indent(fill(self.caption(), 118), "% ") + "\n"


def _limits(arena: Arena) -> Iterator[str]:
    tests = [one for comparison in arena.comparisons for one in comparison.tasks]
    if not tests:
        return
    seeds = min(len(one.seeds) for one in tests)
    tasks = max(len(comparison.tasks) for comparison in arena.comparisons)
    among = max(one.among for one in tests)
    yield (
        "Runs are paired by task, seed and example. On one task the variance of a difference is that of readers and "
        "cases (Dorfman, Berbaum and Metz 1992) with seeds as readers, and its interval and test are Banerjee's "
        "(1960): where there is no difference, one is found no more often than the level of the test says."
    )
    for apart in (*settings_apart(arena.variants), *circumstances_apart(arena.variants)):
        yield f"Not everything else is equal. {apart}."
    if among > 1:
        yield (
            f"p are adjusted by Holm's method over the {among} comparisons, on each task by itself; power is that of a "
            f"test at {ALPHA} / {among}, the level of a comparison that has to stand whatever becomes of the others. "
            "Smaller differences are found too, but less often."
        )
    if among > 1 and tasks > 1:
        yield (
            f"Each of {tasks} tasks has its own error rate of {ALPHA:.0%}: where nothing differs, up to "
            f"{1 - (1 - ALPHA) ** tasks:.0%} of reports like this one call something different on some single task."
        )
    if seeds == 1:
        yield (
            "Some comparisons have one seed: their tests are over examples and speak of those trainings, not of the "
            "strategies. Run more seeds."
        )
    yield from _more_seeds(arena, [one for one in tests if one.difference.over in ("seeds and examples", "seeds")])
    lowest = min((one.smallest_p for one in arena.comparisons if one.smallest_p is not None), default=0.0)
    if lowest > ALPHA:
        yield (
            f"Over {tasks} tasks and {among} comparison{'s' * (among > 1)} the smallest adjusted p that signs drawn at "
            f"random can give is {lowest:.2g}, above {ALPHA}: a difference on average cannot be shown; single tasks "
            "may show one. Intervals over tasks suppose differences that are normal; where they disagree, the test "
            "decides."
        )
    blind = {one.task for one in tests if one.difference.over in ("seeds", "nothing")}
    those = [run for one in arena.variants for run in one.all_runs() if run.task in blind and run.value is not None]
    if whole := sorted({run.task for run in those if not run.in_points}):
        yield f"Tests on {', '.join(whole)} are over seeds alone: the metric is one number for a whole run."
    if unread := [run for run in those if run.in_points and run.scored is None]:
        yield (
            f"Tests on {', '.join(sorted({run.task for run in unread}))} are over seeds alone: predictions for each "
            f"example are missing or are not those of result.json ({some_of([run.path.name for run in unread])})."
        )


def _more_seeds(arena: Arena, tests: Sequence[OnTask]) -> Iterator[str]:
    """What a single task can show with the seeds there are, and with more, where those are few."""
    for task in dict.fromkeys(one.task for one in tests):
        here = [one for one in tests if one.task == task]
        seeds = min(len(one.seeds) for one in here)
        if seeds >= _MANY_SEEDS[0]:
            continue
        unit = arena.table.units[task]
        sizes = {n: median(one.detectable_with(n) for one in here) for n in (seeds, *_MANY_SEEDS)}
        visible = (
            f"with {n} seeds {'none' if beyond_scores(size, unit) else f'those above {abs(unit) * size:.2g}'}"
            for n, size in sizes.items()
        )
        yield (
            f"Differences on {task} that are found with a power of {POWER:.0%}: {', '.join(visible)} (the median over "
            "the comparisons, if trainings vary as these do)."
        )


def make_arenas(found: Found, reference: str | None = None) -> list[Arena]:
    """Sort runs by source and backbone, and compare within each."""
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in found.runs:
        groups.setdefault(run.arena, []).append(run)
    labels = [(source, backbone) for source, backbone, _ in groups]
    arenas = []
    for (source, backbone, weights), runs in sorted(groups.items()):
        several = labels.count((source, backbone)) > 1
        name = f"{source} data, {backbone}" + (f" ({weights[:8]})" if several else "")
        slug = "-".join([source, backbone.replace("/", "_"), *([weights[:8]] if several else [])])
        those = variants(runs, found.flagged)
        chosen = choose_reference(those, reference)
        comparisons = compare(those, chosen)
        arenas.append(Arena(name, slug, tuple(those), chosen, tuple(comparisons), make_table(those, comparisons)))
    return arenas


def write_report(
    found: Found, out: Path, *, title: str = "Rank selection", reference: str | None = None
) -> list[Arena]:
    """Write ``results.csv``, ``table.md``, ``table.tex``, ``sentences.txt``, figures and ``index.html`` into ``out``.

    With several sources or backbones the figures of each are in a folder of its own.

    Raises:
        PathError: if ``out`` cannot be written.
        ConfigError: if there is no such reference.
    """
    arenas = make_arenas(found, reference)
    if out.exists() and not out.is_dir():
        raise PathError(f"out={out}: expected a folder, got a file")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if (out / "index.html").exists():
            shutil.rmtree(out / "figures", ignore_errors=True)  # those of an earlier report may not be drawn now
    rows = [
        row_of(run, variant.label) | {"arena": arena.name}
        for arena in arenas
        for variant in arena.variants
        for run in variant.all_runs()
    ]
    write_results(out / "results.csv", rows)
    write_text_atomic(out / "table.md", "\n".join(f"## {arena.name}\n\n{arena.markdown()}" for arena in arenas))
    write_text_atomic(out / "table.tex", "\n".join(f"% {arena.name}\n{arena.tex()}" for arena in arenas))
    text = [
        f"{arena.name}\n" + "".join(f"- {line}\n" for line in [*arena.sentences(), "", *arena.limits()] if line)
        for arena in arenas
    ]
    write_text_atomic(out / "sentences.txt", "\n".join(text))
    shown = []
    with styled():
        for arena in arenas:
            folder = out / "figures" if len(arenas) == 1 else out / "figures" / arena.slug
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            shown.append(_for_page(arena, out, folder))
    page = render(
        title=title,
        about=_about(found, arenas),
        arenas=shown,
        rows=rows,
        runs=[run for arena in arenas for variant in arena.variants for run in variant.all_runs()],
        skipped=[f"{path}: {reason}" for path, reason in found.skipped],
        flagged=found.flagged,
    )
    write_text_atomic(out / "index.html", page)
    return arenas


def _for_page(arena: Arena, out: Path, folder: Path) -> dict[str, Any]:
    """What the page shows of an arena; its figures are written to the folder on the way."""
    drawings = []
    for figure in draw(arena):
        figure.write(folder)
        file = (folder / figure.name).relative_to(out).as_posix()
        drawings.append({"name": figure.name, "file": file, "caption": figure.caption, "svg": figure.inline()})
        figure.close()
    return {
        "name": arena.name,
        "sentences": arena.sentences(),
        "limits": arena.limits(),
        "caption": arena.caption(),
        "table": cells(arena.table, lambda text: {"text": text, "bold": True}, lambda text: text),
        "comparisons": _differences(arena),
        "figures": drawings,
    }


def _differences(arena: Arena) -> list[list[str]]:
    """Difference, interval and p of every comparison on every task."""
    header = [
        "strategy",
        "against",
        "task",
        "seeds",
        "difference",
        "from",
        "to",
        "p",
        "p (Holm)",
        f"found with a power of {POWER:.0%}",
    ]
    lines = [header]
    for comparison in arena.comparisons:
        for one in comparison.tasks:
            unit = abs(arena.table.units[one.task])
            test = one.difference
            numbers = [f"{unit * value:z.3g}" for value in (test.mean, test.low, test.high)]
            p = [f"{value:.2g}" for value in (test.p, one.adjusted)]
            visible = "none" if beyond_scores(one.detectable, unit) else f"{unit * one.detectable:.3g}"
            names = [comparison.variant.label, comparison.reference.label, one.task]
            lines.append([*names, str(len(one.seeds)), *numbers, *p, visible])
    return lines


def draw(arena: Arena) -> Iterator[Figure]:
    """The figures that the runs of an arena have data for."""
    those = arena.variants
    yield figures.score_against(
        those,
        "score_against_parameters",
        "Score against adapter parameters; the grey line joins what nothing else beats in both (Pareto front). "
        "Bars: one standard deviation over seeds.",
        "adapter parameters",
        adapter_parameters,
    )
    yield figures.score_against(
        those,
        "score_against_compute",
        "Score against the seconds of a whole run: search, selection, retraining and evaluation. They are those of the "
        "machine with whatever else ran on it; passes of the model, in the table, are not.",
        "seconds",
        lambda run: run.result.seconds.total,
    )
    yield from figures.panels(those)
    for figure in (
        figures.rank_heatmaps(those),
        figures.over_training(those),
        figures.budget_curves(those),
        figures.found_against_true(those),
    ):
        if figure is not None:
            yield figure


def _about(found: Found, arenas: Sequence[Arena]) -> str:
    count = sum(len(variant.all_runs()) for arena in arenas for variant in arena.variants)
    text = f"{count} run{'s' * (count != 1)}"
    if found.skipped:
        were = "was" if len(found.skipped) == 1 else "were"
        text += f"; {len(found.skipped)} {were} not used: failed, unfinished or unreadable (listed at the end)"
    mini = any(run.result.data_source == "mini" for run in found.runs)
    return text + (
        ". Embedded data are generated sentences, not GLUE: for trying things out, not for claims." if mini else "."
    )
