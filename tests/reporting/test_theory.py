"""Figures and table of an analysis, made by hand."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch
from rich.console import Console

from autolora.plan import RankPlan, Site
from autolora.reporting.figures.canvas import styled
from autolora.reporting.figures.ranks import heatmap
from autolora.reporting.figures.theory import bits, bulk, figures_of, short, some_of_each_role
from autolora.reporting.theory import Analysis, columns_of, print_analysis
from autolora.theory.information import Code
from autolora.theory.modules import update_numbers, weight_numbers
from autolora.theory.spectra import spectrum_of

NAMES = [f"bert.encoder.layer.{i}.attention.self.{role}" for i in range(3) for role in ("query", "key")] + ["pooler"]


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with styled():
        yield


def analysis() -> Analysis:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(60, 40, generator=generator) for name in NAMES}
    spectra = {name: spectrum_of(weight) for name, weight in weights.items()}
    plan = RankPlan.uniform({name: Site(40, 60) for name in NAMES}, 2)
    code = Code((1, 2, 4), (0.5, 0.8, 1.0), (0.1, 0.25, 0.25), (0.01, -0.02))
    return Analysis(
        backbone="tiny",
        weights={name: weight_numbers(spectrum) for name, spectrum in spectra.items()},
        spectra=spectra,
        options={"spectral": {}},
        plans={"spectral": plan},
        budget=1400,
        codes=dict.fromkeys(NAMES[:2], code) | {NAMES[2]: Code((1,), (1.0,), (0.0,), (0.0, 0.0))},
        beta=4.0,
        optima={name: 2 if name in NAMES[:2] else 0 for name in NAMES},
        run="autolora on rte",
        updates={NAMES[0]: update_numbers(0.1 * weights[NAMES[0]], weights[NAMES[0]], 40)},
        found={NAMES[0]: 40},
        notes=("something",),
    )


def test_who_reads_one_tensor_is_one_line_and_optima_are_marked() -> None:
    figure = bits(analysis())
    texts = set(figure.tips.values())
    assert "query, key, layer 0: optimum at rank 2" in texts
    assert not any("layer 1: optimum" in text for text in texts)
    assert [text.get_text() for text in figure.drawn.legends[0].get_texts()] == [
        "query, key, layer 0",
        "query, layer 1",
    ]
    figure.close()


def test_the_law_of_noise_has_as_many_values_as_the_weight() -> None:
    figure = bulk(analysis())
    ax = figure.drawn.axes[0]
    x, expected = ax.get_lines()[0].get_data()
    width = ax.patches[0].get_width()
    assert sum(patch.get_height() for patch in ax.patches) == 40
    assert float(((expected[1:] + expected[:-1]) / 2 * (x[1:] - x[:-1])).sum() / width) == pytest.approx(40, rel=0.02)
    figure.close()


def test_every_figure_is_drawn_and_numbers_of_three_digits_are_whole() -> None:
    figures = list(figures_of(analysis()))
    assert [one.name for one in figures] == [
        "weights", "over_depth", "bulk", "bits", "updates", "update_spectra", "plans",
    ]  # fmt: skip
    first = figures[0]
    cells = {("query", "0"): 268.4, ("key", "0"): 0.123}
    heatmap(first, first.drawn.axes[0], "x", cells, 268.4, "rank")
    assert [text.get_text() for text in first.drawn.axes[0].texts[-2:]] == ["268", "0.12"]
    for one in figures:
        one.close()


def test_modules_to_show_are_one_of_each_role_from_the_middle() -> None:
    assert some_of_each_role(NAMES) == [NAMES[2], NAMES[3], "pooler"]
    assert some_of_each_role([f"U{i}" for i in range(9)]) == [f"U{i}" for i in range(6)]
    assert short(*NAMES[2:4]) == "query, key, layer 1"
    assert short("pooler") == "pooler"


def test_the_table_fits_a_terminal_and_without_a_price_there_is_no_optimum() -> None:
    out = io.StringIO()
    print_analysis(analysis(), Console(file=out, width=80))
    assert "…" not in out.getvalue()
    assert "strategy=spectral: 1,400 of 1,400 parameters" in out.getvalue()
    assert "note: something" in out.getvalue()
    shown = [column.short for column in columns_of(analysis())]
    assert "IB" in shown
    assert "; IB: rank at" in " ".join(out.getvalue().split())
    silent = Analysis(**{**vars(analysis()), "beta": None, "optima": {}})
    assert [column.short for column in columns_of(silent)] == [name for name in shown if name != "IB"]
    out = io.StringIO()
    print_analysis(silent, Console(file=out, width=80))
    assert "IB" not in out.getvalue()
    bits(silent).close()


def test_of_a_weight_known_in_part_what_is_known_is_written() -> None:
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0])) / 3
    spectrum = spectrum_of(weight, exact_up_to=2, largest=2)
    one = Analysis(backbone="tiny", weights={"a": weight_numbers(spectrum)}, spectra={"a": spectrum}, options={})
    assert one.to_json()["modules"]["a"]["weight"]["singular_values"] == [1.0, 0.666667]


def test_an_update_along_the_weight_overlaps_far_more_than_chance() -> None:
    columns = {column.label: column.values for column in columns_of(analysis())}
    assert columns["overlap with W over chance, outputs"][NAMES[0]] == pytest.approx(60 / 40)
    assert columns["overlap with W over chance, inputs"][NAMES[0]] == pytest.approx(1.0)
    assert columns["rank of the update"][NAMES[1]] == 0
