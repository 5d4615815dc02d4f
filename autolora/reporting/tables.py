"""Tables: every run as a row of a CSV, and strategies × tasks in Markdown and TeX."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TypeVar

from autolora.files import replacing
from autolora.reporting.compare import Comparison
from autolora.reporting.runs import Run, Variant
from autolora.reporting.statistics import ALPHA

Cell = TypeVar("Cell")
_OF_ONE = "†"

# Every run -----------------------------------------------------------------------------------------------------------


def row_of(run: Run, variant: str = "") -> dict[str, object]:
    """One run as a flat row; ranks are in the order of the modules."""
    result, planted = run.result, run.result.planted
    return {
        "task": result.task,
        "data_source": result.data_source,
        "data_fingerprint": result.data_fingerprint,
        "backbone": result.backbone,
        "strategy": result.strategy,
        "variant": variant or result.strategy,
        "seed": result.seed,
        "metric": result.metrics.primary,
        "value": result.metrics.value,
        "heldout_value": result.selection_metrics.get(result.metrics.primary),
        "adapter_params": result.params.adapter,
        "extra_params": result.params.extra,
        "head_params": result.params.head,
        "peak_trainable": result.params.peak_trainable,
        "budget": result.params.budget,
        "quantization": run.config.get("backbone.quantization"),
        "sparsity": run.config.get("backbone.sparsity.method"),
        "backbone_bytes": result.backbone_bytes,
        "budget_rank": run.config.get("budget.rank"),
        "price_unit": result.price.unit if result.price else None,
        "price": result.price.plan if result.price else None,
        "steps": result.steps,
        "fit_steps": result.compute.fit_steps,
        "retrain_steps": result.compute.retrain_steps,
        "passes": result.compute.passes,
        "plans_measured": result.compute.plans_measured,
        "plans_compared": result.compute.plans_compared,
        "fit_seconds": round(result.seconds.fit, 1),
        "total_seconds": round(result.seconds.total, 1),
        "retrain": result.retrain,
        "max_train": run.config.get("data.max_train"),
        "lr": run.config.get("optim.adapter.lr"),
        "head_lr": run.config.get("optim.head.lr"),
        "true_ranks": _ranks(planted.true if planted else None),
        "found_ranks": _ranks(planted.found if planted else result.found),
        "exact_fraction": planted.exact_fraction if planted else None,
        "excess_error": planted.excess_error if planted else None,
        "ranks": _ranks(result.ranks),
        "config_hash": result.config_hash,
        "commit": result.git.commit,
        "precision": result.hardware.get("precision"),
        "run": run.path.name,
    }


def _ranks(ranks: Mapping[str, int] | None) -> str | None:
    return None if ranks is None else " ".join(map(str, ranks.values()))


def write_results(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write ``results.csv``: a row for every run."""
    with replacing(path) as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# Strategies × tasks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """Mean and standard deviation (n - 1) over seeds, and whether it is significantly better than the reference's.

    ``of_one`` says that this was tested with one seed: of these trainings only.
    """

    mean: float
    sd: float | None
    seeds: int
    better: bool = False
    of_one: bool = False

    def text(self, unit: float) -> str:
        """As in a table: in points where the unit is 100, else in scientific notation; a 0 has no sign."""
        digits: Callable[[float], str] = (lambda x: f"{x:z.1f}") if unit == 100 else (lambda x: f"{x:z.2e}")
        spread = f" ± {digits(abs(unit) * self.sd)}" if self.sd is not None else ""
        return digits(unit * self.mean) + spread + (_OF_ONE if self.better and self.of_one else "")


@dataclass(frozen=True)
class Row:
    """One variant: a score for each task that it has, the average if it has all, the fewest and the most seeds."""

    label: str
    scores: Mapping[str, Score]
    average: Score | None
    seeds: tuple[int, int]
    adapter: float
    head: float
    seconds: float
    passes: float | None


@dataclass(frozen=True)
class Table:
    """The variants of one arena; by task the metric, and in ``units`` what a score is multiplied with to be shown."""

    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    units: Mapping[str, float]
    metrics: Mapping[str, str]

    @property
    def averaged(self) -> bool:
        """Whether there is an average: several tasks, all of them in points."""
        return len(self.tasks) > 1 and set(self.units.values()) == {100.0}


def make_table(variants: Sequence[Variant], comparisons: Sequence[Comparison]) -> Table:
    """Means over seeds, in the order of the average, or of the best score; variants that lack a task come last."""
    tasks = tuple(sorted({task for variant in variants for task in variant.runs}))
    said = {comparison.variant.label: comparison for comparison in comparisons}
    some = {run.task: run for variant in variants for run in variant.all_runs()}
    units = {task: _unit(some[task]) for task in tasks}
    rows = [_row(variant, tasks, said.get(variant.label)) for variant in variants]

    def worth(row: Row) -> tuple[bool, float]:
        scores = [row.average] if row.average else list(row.scores.values())
        return row.average is None, -max((score.mean for score in scores), default=float("-inf"))

    metrics = {task: some[task].result.metrics.primary.replace("_", " ") for task in tasks}
    return Table(tasks, tuple(sorted(rows, key=worth)), units, metrics)


def _unit(run: Run) -> float:
    """100 for points, -1 for errors, which are kept with a minus sign so that larger is better."""
    return 100.0 if run.in_points else -1.0 if run.lower_is_better else 1.0


def _row(variant: Variant, tasks: Sequence[str], comparison: Comparison | None) -> Row:
    better = {
        one.task: one.difference.over == "examples"
        for one in (comparison.tasks if comparison else ())
        if one.significant and one.difference.mean > 0
    }
    values = {
        task: {seed: run.value for seed, run in by_seed.items() if run.value is not None}
        for task, by_seed in variant.runs.items()
    }
    scores = {
        task: _score(list(found.values()), task in better, better.get(task, False))
        for task, found in values.items()
        if found
    }
    average = None
    if set(scores) == set(tasks):
        seeds = set.intersection(*(set(found) for found in values.values()))
        by_seed = [fmean(found[seed] for found in values.values()) for seed in sorted(seeds)]
        ahead = comparison is not None and len(comparison.tasks) == len(tasks) and comparison.significant
        if by_seed:
            average = _score(by_seed, ahead and comparison is not None and comparison.mean > 0)
    runs = variant.all_runs()
    results = [run.result for run in runs if run.value is not None] or [run.result for run in runs]
    passes = [result.compute.passes for result in results]
    counts = [len(found) for found in values.values()]
    return Row(
        variant.label,
        scores,
        average,
        seeds=(min(counts), max(counts)),
        adapter=fmean(result.params.adapter + result.params.extra for result in results),
        head=fmean(result.params.head for result in results),
        seconds=fmean(result.seconds.total for result in results),
        passes=None if None in passes else fmean(count for count in passes if count is not None),
    )


def _score(values: Sequence[float], better: bool, of_one: bool = False) -> Score:
    return Score(fmean(values), stdev(values) if len(values) > 1 else None, len(values), better, of_one)


def caption(table: Table, against: str) -> str:
    """What the numbers of a table are, and what bold means.

    Args:
        table: whose.
        against: what scores in bold are better than.
    """
    points = "; in points" if set(table.units.values()) == {100.0} else ""
    bold = f"Bold: better than {against}, p < {ALPHA} by Holm's method over the comparisons on that task"
    if any(score.better and score.of_one for row in table.rows for score in row.scores.values()):
        bold += f" ({_OF_ONE} with one seed: of these trainings only)"
    return (
        f"Scores on dev, mean ± standard deviation (n - 1) over seeds{points}. {bold}. Parameters, seconds and passes "
        "of batches through the model are those of one run, with search, selection and retraining, as means over tasks "
        "and seeds."
    )


def cells(table: Table, bold: Callable[[str], Cell], escape: Callable[[str], str]) -> list[list[str | Cell]]:
    """The header and the rows as text, or what ``bold`` makes of it where a score is significantly better."""
    header = [
        "strategy",
        *(f"{task}, {table.metrics[task]}{' (less is better)' * (table.units[task] < 0)}" for task in table.tasks),
        *(["average"] if table.averaged else []),
        "seeds",
        "adapter parameters",
        "head parameters",
        "seconds",
        "passes",
    ]
    lines: list[list[str | Cell]] = [[escape(name) for name in header]]
    for row in table.rows:
        scores: list[tuple[Score | None, float]] = [(row.scores.get(task), table.units[task]) for task in table.tasks]
        if table.averaged:
            scores.append((row.average, 100.0))
        shown = ["" if score is None else _marked(score, score.text(unit), bold, escape) for score, unit in scores]
        passes = "" if row.passes is None else f"{row.passes:,.0f}"
        few, many = row.seeds
        seeds = str(many) if few == many else f"{few} to {many}"
        numbers = [seeds, f"{row.adapter:,.0f}", f"{row.head:,.0f}", f"{row.seconds:,.0f}", passes]
        lines.append([escape(row.label), *shown, *numbers])
    return lines


def _marked(score: Score, text: str, bold: Callable[[str], Cell], escape: Callable[[str], str]) -> str | Cell:
    return bold(escape(text)) if score.better else escape(text)


def markdown(table: Table) -> str:
    """The table in Markdown; bold is significantly better than the reference."""
    header, *rows = cells(table, lambda text: f"**{text}**", lambda text: re.sub(r"([|\\`*_<>\[\]])", r"\\\1", text))
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows)) + "\n"


def tex(table: Table) -> str:
    """The table in TeX, for booktabs; bold is significantly better than the reference."""
    header, *rows = cells(table, lambda text: rf"\textbf{{{text}}}", escape_tex)
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule", _tex_row(header), r"\midrule"]
    lines += [*map(_tex_row, rows), r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def _tex_row(line: Sequence[str]) -> str:
    return " & ".join(line) + r" \\"


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "±": r"$\pm$", "†": r"$^\dagger$", "[": "{[}", "]": "{]}",
}  # fmt: skip


def escape_tex(text: str) -> str:
    """Text in which nothing has a meaning for TeX."""
    return "".join(_TEX.get(character, character) for character in text)
