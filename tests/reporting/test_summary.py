"""The summary in the terminal says the numbers of the result, and shows ranks where they belong."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from autolora.reporting.summary import heat_table, print_summary
from autolora.results import Git, Metrics, Params, Planted, Price, RunResult, Seconds
from autolora.roles import rank_grid
from autolora.training.loggers import rank_heatmap

RANKS = {
    "bert.encoder.layer.0.attention.self.query": 3,
    "bert.encoder.layer.1.attention.self.query": 0,
    "bert.encoder.layer.1.output.dense": 12,
    "bert.pooler.dense": 5,
}


def result(**changes: Any) -> RunResult:
    values: dict[str, Any] = {
        "status": "complete",
        "task": "cola",
        "data_source": "local",
        "data_fingerprint": "0",
        "backbone": "minilm",
        "strategy": "autolora",
        "seed": 3,
        "metrics": Metrics(primary="matthews", value=0.25, all={"matthews": 0.25, "accuracy": None}),
        "params": Params(adapter=900, head=770, peak_trainable=2000, budget=1000, backbone=10),
        "adapter_bytes": 3600,
        "ranks": RANKS,
        "seconds": Seconds(total=12.0, fit=10.0),
        "examples_per_second": 100.0,
        "peak_memory_bytes": 1,
        "steps": 7,
        "config_hash": "abc",
        "git": Git(),
        "versions": {},
        "hardware": {},
        "notes": ("something to know",),
    }
    return RunResult(**(values | changes))


def shown(of: RunResult) -> str:
    console = Console(file=io.StringIO(), width=120)
    print_summary(of, Path("runs/one"), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_numbers_notes_and_place() -> None:
    text = shown(result())
    for part in ("matthews: 0.2500", "accuracy undefined", "900 (90.0 % of the budget of 1,000)", "head: 770",
                 "7 steps", "something to know", "written to runs/one"):  # fmt: skip
        assert part in text, part


def test_a_metric_that_is_undefined_is_not_shown_as_a_number() -> None:
    assert "matthews: undefined" in shown(result(metrics=Metrics(primary="matthews", value=None, all={})))


def test_no_budget_and_a_budget_of_nothing() -> None:
    for budget, said in ((None, "no budget"), (0, "the budget is 0")):
        params = Params(adapter=0, head=1, peak_trainable=1, budget=budget, backbone=1)
        assert said in shown(result(params=params))


def test_a_budget_of_something_else_is_not_called_none() -> None:
    params = Params(adapter=900, head=1, peak_trainable=1, budget=None, backbone=1)
    text = shown(result(params=params, price=Price(unit="ns", plan=70, budget=80)))
    assert "adapter parameters: 900; head: 1" in text
    assert "adapters cost 70 of the budget of 80 ns" in text
    assert "no budget" not in text


def test_planted_ranks_stand_side_by_side() -> None:
    planted = Planted(true={"U0": 1, "V0": 2}, found={"U0": 1, "V0": 3}, exact_fraction=0.5, excess_error=0.1)
    text = shown(result(planted=planted, ranks={"U0": 1, "V0": 3}))
    assert "exactly in 50% of the modules: true [1, 2], found [1, 3]" in text
    assert "U0" in text


def test_a_method_without_ranks_has_found_none() -> None:
    planted = Planted(true={"U0": 1, "V0": 2}, found=None, exact_fraction=None, excess_error=0.1)
    text = shown(result(planted=planted, ranks={"U0": 0, "V0": 0}))
    assert "no ranks to compare with the planted ones" in text
    assert "exactly" not in text


def test_the_grid_puts_each_rank_in_its_cell() -> None:
    roles, depths, cells = rank_grid(RANKS)
    assert roles == ["query", "mlp_down", "other"]
    assert depths == ["0", "1", "-"]
    assert cells == {("query", "0"): 3, ("query", "1"): 0, ("mlp_down", "1"): 12, ("other", "-"): 5}
    assert rank_grid({"a.0.query": 1, "b.0.query": 2})[2] == {("query", "0"): 3}
    assert rank_grid({f"{i}.query": i for i in (10, 9)})[1] == ["9", "10"]


def test_modules_without_a_role_have_a_column_each() -> None:
    ranks = {"U0": 0, "V0": 1, "U1": 2}
    assert rank_grid(ranks) == (["rank"], ["U0", "V0", "U1"], {("rank", name): rank for name, rank in ranks.items()})
    assert [text.get_text() for text in rank_heatmap(ranks).axes[0].texts] == ["0", "1", "2"]


def test_the_table_has_a_row_for_each_role_and_tells_rank_0_from_no_module() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(heat_table(RANKS))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    query = next(line for line in lines if "query" in line)
    assert [cell.strip() for cell in query.split("│")[2:-1]] == ["3", "·", ""]


def test_the_heat_map_draws_the_same_grid() -> None:
    import numpy as np

    figure = rank_heatmap(RANKS)
    grid = np.asarray(figure.axes[0].images[0].get_array().filled(np.nan))
    np.testing.assert_array_equal(grid, [[3, 0, np.nan], [np.nan, 12, np.nan], [np.nan, np.nan, 5]])
