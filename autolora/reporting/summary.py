"""The summary of one run in the terminal: what came out, what it cost, and where it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from autolora.results import Params, Planted, RunResult
from autolora.roles import rank_grid

_SHADES = ("grey35", "dark_blue", "blue", "cyan", "green", "yellow", "red")
_CONTROLS = {
    "found": "the ranks that were found",
    "permuted": "a permutation of the ranks that were found",
    "uniform": "uniform ranks of the same cost",
}


def heat_table(ranks: Mapping[str, int]) -> Table:
    """The grid of :func:`rank_grid`, the colder the lower."""
    rows, columns, cells = rank_grid(ranks)
    largest = max(cells.values(), default=0)
    table = Table(title="ranks by role and depth" if len(rows) > 1 else "ranks", title_justify="left")
    table.add_column("role" if len(rows) > 1 else "")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        shown = (cells.get((row, column)) for column in columns)
        table.add_row(row, *(Text("") if rank is None else _shaded(rank, largest) for rank in shown))
    return table


def print_summary(result: RunResult, directory: Path, console: Console | None = None) -> None:
    """Print what a user wants to see last."""
    console = console or Console()
    metrics, params, seconds = result.metrics, result.params, result.seconds
    value = "undefined" if metrics.value is None else f"{metrics.value:.4f}"
    console.print(f"\n{result.strategy} on {result.task} ({result.data_source}), {result.backbone}, seed {result.seed}")
    console.print(f"  {metrics.primary}: [bold]{value}[/bold]" + _others(metrics.all, metrics.primary), highlight=False)
    console.print("  " + _parameters(params, priced=result.price is not None), highlight=False)
    if (price := result.price) is not None:
        of = "" if price.budget is None else f" of the budget of {price.budget:,}"
        console.print(f"  adapters cost {price.plan:,}{of} {price.unit}", highlight=False)
    if result.planted is not None:
        console.print("  " + _found(result.planted), highlight=False)
    if result.retrain != "none":
        console.print(f"  trained again at {_CONTROLS[result.retrain]}", highlight=False)
    console.print(heat_table(result.ranks))
    spent = {name: getattr(seconds, name) for name in ("fit", "select", "compare", "retrain", "evaluate")}
    parts = ", ".join(f"{name} {value:.1f}" for name, value in spent.items() if value)
    console.print(
        f"  {seconds.total:.1f} s ({parts}), {result.steps} steps, {result.examples_per_second:.0f} examples/s",
        highlight=False,
    )
    for note in result.notes:
        console.print(f"  note: {note}", highlight=False)
    console.print(f"  written to {directory}", highlight=False, soft_wrap=True)


def _found(planted: Planted) -> str:
    """True and found ranks one by one where that can be read, else how far they are apart."""
    if planted.found is None:
        return "the method has no ranks to compare with the planted ones"
    exact = f"planted ranks found exactly in {planted.exact_fraction:.0%} of the modules"
    true = list(planted.true.values())
    found = [planted.found.get(name, 0) for name in planted.true]
    if len(true) <= 12:
        return f"{exact}: true {true}, found {found}"
    apart = sum(abs(a - b) for a, b in zip(true, found, strict=True)) / len(true)
    return f"{exact}; {apart:.2f} components off on average"


def _shaded(rank: int, largest: int) -> Text:
    shade = _SHADES[min(len(_SHADES) - 1, round((len(_SHADES) - 1) * rank / max(1, largest)))]
    return Text(str(rank) if rank else "·", style=shade)


def _others(metrics: Mapping[str, float | None], primary: str) -> str:
    rest = [f"{k} {'undefined' if v is None else f'{v:.4f}'}" for k, v in metrics.items() if k != primary]
    return f"  ({', '.join(rest)})" if rest else ""


def _parameters(params: Params, *, priced: bool) -> str:
    """What there is, against the budget, unless that counts something else than parameters."""
    adapter, budget = params.adapter, params.budget
    if budget is None:
        against = "" if priced else " (no budget)"
    else:
        against = f" ({100 * adapter / budget:.1f} % of the budget of {budget:,})" if budget else " (the budget is 0)"
    besides = f"; besides: {params.extra:,}" if params.extra else ""
    return f"adapter parameters: {adapter:,}{against}; head: {params.head:,}{besides}"
