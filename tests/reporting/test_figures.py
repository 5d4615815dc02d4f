"""Figures: what is joined by a line, what is left out, and that a legend has its room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from reporting.fake_runs import write_run

from autolora.reporting import figures
from autolora.reporting.figures.canvas import styled
from autolora.reporting.figures.scores import adapter_parameters
from autolora.reporting.runs import Variant, load_runs, variants


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with styled():
        yield


def those(root: Path) -> list[Variant]:
    return variants(load_runs([root]).runs, [])


def test_a_line_joins_budgets_and_nothing_else_that_varies(tmp_path: Path) -> None:
    """Ranks on two numbers of rows are two lines; a setting that goes with the budget makes none."""
    for rank in (1, 4):
        for rows in (500, 5000):
            more = (f"data.max_train={rows}", f"optim.adapter.lr={0.001 / rank}")
            write_run(tmp_path, f"budget.rank={rank}", *more, budget=100 * rank, accuracy=0.7 + rank / 100)
    figure = figures.budget_curves(those(tmp_path))
    assert figure is not None
    (ax,) = figure.drawn.axes
    lines = [line for line in ax.get_lines() if len(line.get_xdata()) > 1]
    assert [list(line.get_xdata()) for line in lines] == [[100, 400], [100, 400]]
    assert [text.get_text() for text in figure.drawn.legends[0].get_texts()] == [
        "uniform (max_train=500)",
        "uniform (max_train=5000)",
    ]
    figure.close()


def test_one_budget_on_each_task_is_no_curve(tmp_path: Path) -> None:
    write_run(tmp_path, "budget.rank=1", budget=100, task="rte")
    write_run(tmp_path, "budget.rank=4", budget=400, task="sst2")
    assert figures.budget_curves(those(tmp_path)) is None


def test_a_long_legend_has_its_room(tmp_path: Path) -> None:
    for rank in (1, 2, 4, 8):
        for rate in (1e-5, 1e-4, 1e-3, 1e-2):
            write_run(tmp_path, f"budget.rank={rank}", f"optim.adapter.lr={rate}", budget=100 * rank)
    figure = figures.score_against(those(tmp_path), "score", "", "parameters", adapter_parameters)
    figure.drawn.draw_without_rendering()
    (ax,) = figure.drawn.axes
    legend = figure.drawn.legends[0].get_window_extent()
    assert ax.get_tightbbox().y0 >= legend.y1
    assert legend.y0 >= 0
    assert ax.get_window_extent().height > 150  # pixels; 2.9 inches of 100 without a legend
    figure.close()


def test_gates_are_drawn_where_they_were_written_down(tmp_path: Path) -> None:
    plain = write_run(tmp_path, strategy="adalora")
    gated = write_run(tmp_path, strategy="autolora")
    lines = (gated / "history.csv").read_text().splitlines()
    gates = ["mean_gate", "0.9", "0.4", ""]
    (gated / "history.csv").write_text("\n".join(f"{line},{gate}" for line, gate in zip(lines, gates, strict=True)))
    assert (plain / "history.csv").is_file()
    figure = figures.over_training(those(tmp_path))
    assert figure is not None
    *panels, right = figure.drawn.axes
    assert len(panels) == 2
    assert [list(line.get_ydata()) for line in right.get_lines()] == [[0.9, 0.4]]
    assert any("autolora: mean gate 0.9 at first, 0.4 at last" in tip for tip in figure.tips.values())
    figure.close()


def test_tips_of_the_panel_write_parameters_out(tmp_path: Path) -> None:
    write_run(tmp_path, params=331_776)
    (figure,) = figures.panels(those(tmp_path))
    tips = list(figure.tips.values())
    assert "uniform, sst2: adapter parameters 331,776" in tips
    assert not [tip for tip in tips if "e+" in tip]
    figure.close()


def test_the_panel_does_not_praise_errors(tmp_path: Path) -> None:
    """Points and errors have a figure each; the least error is seen, and no efficiency is best for a large one."""
    for strategy, accuracy, error, params in (
        ("head", 0.6, 0.9, 0),
        ("autolora", 0.85, 2e-10, 2000),
        ("uniform", 0.7, 0.3, 4000),
    ):
        metrics = {"primary": "excess_error", "value": error, "all": {"excess_error": error}}
        write_run(tmp_path, strategy=strategy, accuracy=accuracy, params=params)
        write_run(tmp_path, task="rte", strategy=strategy, metrics=metrics, params=params)
    write_run(tmp_path, task="mnli", strategy="sora")
    points, errors = figures.panels(those(tmp_path))
    assert (points.name, errors.name) == ("panel", "panel_errors")
    assert {tip.split(": ")[0] for tip in points.tips.values()} == {
        "autolora, sst2", "head, sst2", "uniform, sst2", "sora, mnli",
    }  # fmt: skip
    assert {tip.split(": ")[0] for tip in errors.tips.values()} == {"autolora, rte", "head, rte", "uniform, rte"}
    score, efficiency, parameters, trade = errors.drawn.axes
    assert [ax.get_xscale() for ax in (score, efficiency, parameters)] == ["log", "log", "linear"]
    assert trade.get_yscale() == "log"
    assert score.get_title() == trade.get_ylabel() == "excess error (less is better)"
    assert efficiency.get_title() == "excess error × adapter parameters (less is better)"
    errors.drawn.draw_without_rendering()
    for ax, least, rest in ((score, 2e-10, [0.9, 0.3]), (efficiency, 4e-7, [1200])):
        shown = [float(line.get_xdata()[0]) for line in ax.get_lines()]
        assert shown == pytest.approx([least, *rest])
        assert ax.get_xlim()[0] < least
        assert not ax.patches
    assert [ax.get_xscale() for ax in points.drawn.axes[:3]] == ["linear"] * 3
    assert points.drawn.axes[1].get_title() == "score / 1,000 parameters"
    for figure in (points, errors):
        figure.close()


def test_errors_alone_are_the_panel(tmp_path: Path) -> None:
    """An error of 0 would not be seen on a logarithmic axis."""
    for strategy, error in (("autolora", 0.0), ("uniform", 0.3), ("sora", 0.001)):
        metrics = {"primary": "mse", "value": error, "all": {"mse": error}}
        write_run(tmp_path, strategy=strategy, metrics=metrics)
    (figure,) = figures.panels(those(tmp_path))
    assert figure.name == "panel"
    assert figure.drawn.axes[0].get_xscale() == "linear"
    figure.close()


def test_what_is_drawn_against_errors_says_that_less_is_better(tmp_path: Path) -> None:
    write_run(tmp_path, task="rte", metrics={"primary": "mse", "value": 0.3, "all": {"mse": 0.3}})
    write_run(tmp_path)
    figure = figures.score_against(those(tmp_path), "score", "", "parameters", adapter_parameters)
    assert [ax.get_ylabel() for ax in figure.drawn.axes] == ["mse (less is better)", "accuracy"]
    figure.close()
