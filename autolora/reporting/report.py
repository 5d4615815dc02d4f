"""From run directories to a report: statistics, tables, figures and a page. Reads, and never trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autolora.errors import PathError
from autolora.files import write_text_atomic, writing
from autolora.reporting import figures
from autolora.reporting.compare import Comparison, choose_reference, compare, sentence
from autolora.reporting.figures.canvas import Figure, styled
from autolora.reporting.figures.scores import adapter_parameters
from autolora.reporting.page import render
from autolora.reporting.runs import Found, Run, Variant, variants
from autolora.reporting.statistics import ALPHA, smallest_p
from autolora.reporting.tables import Table, cells, make_table, markdown, row_of, tex, write_results


@dataclass(frozen=True)
class Arena:
    """Runs that may be compared: one source of data, one backbone."""

    name: str
    slug: str
    variants: tuple[Variant, ...]
    reference: Variant
    comparisons: tuple[Comparison, ...]
    table: Table

    def sentences(self) -> list[str]:
        """What it says: a sentence for every comparison, the ones that were decided first."""
        if not self.comparisons:
            return [f"{self.reference.label} stands alone: there is nothing to compare it with."]
        ordered = sorted(self.comparisons, key=lambda one: (not one.significant, -one.mean))
        return [sentence(one) for one in ordered]

    def limits(self) -> list[str]:
        """What a reader has to know to read the numbers."""
        return list(_limits(self))


def _limits(arena: Arena) -> Iterator[str]:
    tests = [one for comparison in arena.comparisons for one in comparison.tasks]
    if not tests:
        return
    seeds = min(len(one.seeds) for one in tests)
    tasks = max(len(comparison.tasks) for comparison in arena.comparisons)
    yield (
        "Runs are paired by task, seed and example. On one task the test is that of readers and cases (Dorfman, "
        "Berbaum and Metz 1992; Hillis 2007) with seeds as readers; p are adjusted by Holm's method over the "
        "comparisons."
    )
    if seeds == 1:
        yield (
            "Some comparisons have one seed: their tests are over examples and speak of those trainings, not of the "
            "strategies. Run more seeds."
        )
    elif seeds < 5:
        yield (
            f"With {seeds} seeds the test has few degrees of freedom ({seeds - 1} if seeds differ much), and a "
            "bootstrap of so few draws intervals that are too narrow: where they disagree, the test decides."
        )
    if tasks > 1 and smallest_p(tasks) > ALPHA:
        yield (
            f"Over {tasks} tasks the smallest p that signs drawn at random can give is {smallest_p(tasks):.2g}, above "
            f"{ALPHA}: a difference on average cannot be shown by so few; single tasks may show one."
        )
    without = sorted({one.task for one in tests if one.difference.over == "seeds"})
    if without:
        yield f"Without predictions for each example, tests on {', '.join(without)} are over seeds alone."


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
        arenas.append(
            Arena(name, slug, tuple(those), chosen, tuple(comparisons), make_table(those, chosen, comparisons))
        )
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
    rows = [
        row_of(run, variant.label) | {"arena": arena.name}
        for arena in arenas
        for variant in arena.variants
        for run in variant.all_runs()
    ]
    write_results(out / "results.csv", rows)
    write_text_atomic(out / "table.md", "\n".join(f"## {arena.name}\n\n{markdown(arena.table)}" for arena in arenas))
    write_text_atomic(out / "table.tex", "\n".join(f"% {arena.name}\n{tex(arena.table)}" for arena in arenas))
    text = [f"{arena.name}\n" + "".join(f"- {line}\n" for line in arena.sentences()) for arena in arenas]
    write_text_atomic(out / "sentences.txt", "\n".join(text))
    shown = []
    with styled():
        for arena in arenas:
            folder = out / "figures" if len(arenas) == 1 else out / "figures" / arena.slug
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            shown.append(_for_page(arena, folder))
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


def _for_page(arena: Arena, folder: Path) -> dict[str, Any]:
    """What the page shows of an arena; its figures are written on the way."""
    drawings = []
    for figure in draw(arena):
        figure.write(folder)
        drawings.append({"name": figure.name, "caption": figure.caption, "svg": figure.inline()})
        figure.close()
    return {
        "name": arena.name,
        "sentences": arena.sentences(),
        "limits": arena.limits(),
        "reference": arena.reference.label,
        "table": cells(arena.table, lambda text: {"text": text, "bold": True}, lambda text: text),
        "comparisons": _differences(arena),
        "figures": drawings,
    }


def _differences(arena: Arena) -> list[list[str]]:
    """Difference, interval and p of every comparison on every task."""
    header = ["strategy", "task", "seeds", "difference", "from", "to", "p", "p (Holm)", "smallest that can be shown"]
    lines = [header]
    for comparison in arena.comparisons:
        for one in comparison.tasks:
            unit = abs(arena.table.units[one.task])
            test = one.difference
            numbers = [f"{unit * value:.3g}" for value in (test.mean, test.low, test.high)]
            p = [f"{value:.2g}" for value in (test.p, one.adjusted)]
            visible = f"{unit * test.detectable():.3g}"
            lines.append([comparison.variant.label, one.task, str(len(one.seeds)), *numbers, *p, visible])
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
        "Score against the seconds of a whole run: search, selection, retraining and evaluation.",
        "seconds",
        lambda run: run.result.seconds.total,
    )
    yield figures.panel(those)
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
    text = f"{count} runs"
    if found.skipped:
        text += f"; {len(found.skipped)} directories were not used (listed at the end)"
    mini = any(run.result.data_source == "mini" for run in found.runs)
    return text + (
        ". Embedded data are generated sentences, not GLUE: for trying things out, not for claims." if mini else "."
    )
