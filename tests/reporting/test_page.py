"""The page in a real browser: nothing from the network, no error, tables that sort and filter, legible anywhere."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from reporting.fake_runs import write_run

from autolora.report import main
from autolora.reporting.page import configurations
from autolora.reporting.report import write_report
from autolora.reporting.runs import load_runs

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--force-device-scale-factor=1",
)  # fmt: skip
WIDTHS = (400, 1400)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks, four strategies at two budgets, three seeds, and names that would be markup."""
    root = tmp_path_factory.mktemp("runs")
    for seed in range(3):
        for task in ("sst2", "rte"):
            write_run(root, "budget.rank=1", task=task, seed=seed, accuracy=0.7 + 0.01 * seed, params=1000, budget=1000)
            write_run(root, "budget.rank=4", task=task, seed=seed, accuracy=0.75, params=4000, budget=4000)
            write_run(root, "budget.rank=1", task=task, seed=seed, strategy="autolora", accuracy=0.85, params=900)
            write_run(
                root, "budget.rank=1", "adapter.targets=[query,'<img src=x onerror=alert(1)>']", task=task, seed=seed,
                strategy="sora", accuracy=0.6, params=950,
            )  # fmt: skip
        write_run(
            root,
            "budget.rank=1",
            "adapter.targets=['</script><b>']",
            task="sst2",
            seed=seed,
            strategy="sora",
            accuracy=0.6,
        )
    write_run(root, "budget.rank=1", strategy="random", status="failed")
    out = root / "report"
    write_report(load_runs([root]), out, title="A <b>title</b> & more")
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in QUIET:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, report: Path) -> Any:
    browser.set_window_size(1400, 1000)
    browser.get((report / "index.html").as_uri())
    return browser


def column(page: Any, kind: str, index: int) -> list[str]:
    """The texts of one column, of the rows that are shown, in their order."""
    script = """
        const rows = [...document.querySelectorAll(`table[data-kind=${arguments[0]}] tbody tr`)];
        return rows.filter((row) => !row.hidden).map((row) => row.cells[arguments[1]].textContent.trim());
    """
    texts: list[str] = page.execute_script(script, kind, index)
    return texts


def test_it_asks_nobody_and_reports_no_error(page: Any, report: Path) -> None:
    assert [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:")} == {(report / "index.html").as_uri()}
    assert page.title == "A <b>title</b> & more"


def test_markup_in_names_is_text(page: Any) -> None:
    labels = column(page, "strategies", 0)
    assert any("<img src=x onerror=alert(1)>" in label for label in labels)
    assert any("</script><b>" in label for label in labels)
    assert page.execute_script("return document.querySelectorAll('img, main b').length") == 0


def test_a_column_sorts_by_number_up_and_down(page: Any) -> None:
    from selenium.webdriver.common.by import By

    head = page.find_elements(By.CSS_SELECTOR, "table[data-kind=strategies] th button")
    names = [button.text for button in head]
    index = names.index("adapter parameters")
    head[index].click()
    numbers = [float(text.replace(",", "")) for text in column(page, "strategies", index)]
    assert numbers == sorted(numbers)
    assert numbers[0] < numbers[-1]
    head[index].click()
    assert [float(text.replace(",", "")) for text in column(page, "strategies", index)] == numbers[::-1]
    head[names.index("rte, accuracy")].click()
    scores = column(page, "strategies", names.index("rte, accuracy"))
    assert scores[-1] == ""  # what is missing comes last
    assert scores[:-1] == sorted(scores[:-1], key=lambda text: float(text.split()[0]))


def test_rows_are_filtered_by_every_word(page: Any) -> None:
    from selenium.webdriver.common.by import By

    (block,) = [
        b for b in page.find_elements(By.CSS_SELECTOR, ".table") if b.find_elements(By.CSS_SELECTOR, "[data-kind=runs]")
    ]
    before = len(column(page, "runs", 0))
    block.find_element(By.CSS_SELECTOR, "input").send_keys("autolora RTE")
    shown = column(page, "runs", 0)
    assert len(shown) == 3 < before
    assert all("autolora" in name and "rte" in name for name in shown)
    assert block.find_element(By.CSS_SELECTOR, ".count").text == f"3 of {before} rows"


def test_a_click_shows_the_whole_configuration(page: Any) -> None:
    from selenium.webdriver.common.by import By

    row = page.find_element(By.CSS_SELECTOR, "table[data-kind=runs] tbody tr")
    name = row.find_element(By.TAG_NAME, "td").text
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", row)
    row.click()
    dialog = page.find_element(By.ID, "configuration")
    assert dialog.is_displayed()
    assert dialog.find_element(By.CSS_SELECTOR, "h3").text == name
    text = dialog.find_element(By.CSS_SELECTOR, "pre").text
    for line in ('strategy.name: "', "seed: ", "optim.adapter.lr: 0.001", "budget.rank: "):
        assert line in text


def test_a_mark_says_what_it_is(page: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    mark = page.find_element(By.CSS_SELECTOR, "#panel .mark")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", mark)
    ActionChains(page).move_to_element(mark).perform()
    tip = page.find_element(By.ID, "tip")
    assert tip.is_displayed()
    assert tip.text == "autolora (rank 1), rte: score 85"


def test_a_pointer_on_the_middle_of_a_mark_reaches_it(page: Any) -> None:
    """Of every figure: the number that is written on a cell of a heatmap is not in the way."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    script = """
        const mark = document.querySelector(`figure[id=${arguments[0]}] .mark`);
        mark.scrollIntoView({block: 'center'});
        const box = mark.getBoundingClientRect();
        if (arguments[0] !== 'over_training')
            return [mark.getAttribute('aria-label'), box.x + box.width / 2, box.y + box.height / 2];
        const line = mark.querySelector('path');  // the middle of its box is beside it
        const on = line.getPointAtLength(0.9 * line.getTotalLength()).matrixTransform(line.getScreenCTM());
        return [mark.getAttribute('aria-label'), on.x, on.y];
    """
    figures = [figure.get_attribute("id") for figure in page.find_elements(By.TAG_NAME, "figure")]
    assert {"ranks", "panel", "over_training", "budget_curves", "score_against_parameters"} <= set(figures)
    for figure in figures:
        says, x, y = page.execute_script(script, figure)
        pointer = ActionChains(page)
        pointer.w3c_actions.pointer_action.move_to_location(round(x), round(y))
        pointer.perform()
        tip = page.find_element(By.ID, "tip")
        assert tip.is_displayed(), figure
        assert tip.text == says


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_legible(page: Any, width: int, scheme: str) -> None:
    """Nothing is wider than the window but what scrolls by itself, text stands out from what is behind it, and figures
    are not shrunk until nobody can read them.
    """
    with seen(page, width, scheme):
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        script = """
            const rgb = (text) => text.match(/[0-9.]+/g).slice(0, 3).map(Number);
            const style = getComputedStyle(document.body);
            const labels = [...document.querySelectorAll('#panel svg text')].map((text) => getComputedStyle(text).fill);
            const scale = (text) => Math.hypot(text.getScreenCTM().a, text.getScreenCTM().b);
            const drawn = [...document.querySelectorAll('.drawing svg text')].map(
                (text) => parseFloat(getComputedStyle(text).fontSize) * scale(text));
            return [rgb(style.backgroundColor), rgb(style.color), labels.map(rgb), parseFloat(style.fontSize),
                Math.min(...drawn)];
        """
        paper, ink, labels, size, smallest = page.execute_script(script)
        assert size >= 14
        assert smallest >= 6  # numbers inside heatmaps; axes and legends have a third more
        for colour in (ink, *labels):
            assert contrast(paper, colour) >= 4.5
        assert (luminance(paper) > 0.5) == (scheme == "light")


def test_a_wide_window_shows_whole_tables(page: Any) -> None:
    widths = page.execute_script(
        "return [...document.querySelectorAll('.scroll')].map((box) => [box.scrollWidth, box.clientWidth])"
    )
    assert len(widths) == 3
    assert all(table <= box for table, box in widths)
    assert page.execute_script("return document.querySelectorAll('.scroll.more').length") == 0


@pytest.mark.parametrize("kind", ["strategies", "comparisons", "runs"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window_shows_whose_row_it_is_and_that_there_is_more(page: Any, scheme: str, kind: str) -> None:
    """The first column stays where it is and leaves room for others; a shade is on the right until all was seen."""
    with seen(page, 400, scheme):
        script = """
            const table = document.querySelector(`table[data-kind=${arguments[0]}]`), box = table.parentElement;
            box.scrollIntoView({block: 'center'});
            box.scrollLeft = arguments[1];
            const {x, y, width, height} = table.rows[1].cells[0].getBoundingClientRect();
            const reached = document.elementFromPoint(x + 5, y + height / 2) === table.rows[1].cells[0];
            const left = box.getBoundingClientRect().x + box.clientLeft;
            const end = [left + box.clientWidth, y + height / 2];
            return [x - left, reached, width / box.clientWidth, getComputedStyle(document.body).backgroundColor, end];
        """
        for place, more in ((0, True), (60, True), (10_000, False)):
            offset, reached, share, paper, end = page.execute_script(script, kind, place)
            assert (round(offset), reached) == (0, True)
            assert share < 0.6
            page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
            shot = imread(BytesIO(page.get_screenshot_as_png()))
            edge = [255 * float(part) for part in shot[round(end[1]), round(end[0]) - 2, :3]]
            behind = [float(part) for part in re.findall(r"[0-9.]+", paper)[:3]]
            assert (contrast(edge, behind) > 1.5) == more


@contextmanager
def seen(page: Any, width: int, scheme: str) -> Iterator[None]:
    """In a window of that width, by a reader who prefers light or dark."""
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        yield
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def luminance(colour: list[float]) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [c / 255 / 12.92 if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(a: list[float], b: list[float]) -> float:
    """As WCAG 2 defines it."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


# Without a browser ---------------------------------------------------------------------------------------------------


def test_the_page_holds_no_address_and_no_markup_of_names(report: Path) -> None:
    text = (report / "index.html").read_text()
    for foreign in ("<img", "</script><b>", "<b>title", "https://", "@import", '<link rel="stylesheet'):
        assert foreign not in text.replace("http://www.w3.org", "")
    assert ": failed" in text


def test_shared_settings_are_kept_once(report: Path) -> None:
    runs = load_runs([report.parent]).runs
    data = configurations(runs)
    for run, own in zip(runs, data["own"], strict=True):
        assert data["common"] | own == run.config
    assert "data.batch_size" in data["common"]
    assert not any("data.batch_size" in own for own in data["own"])


def test_runs_of_several_backbones_and_data_are_told_apart(tmp_path: Path, report: Path) -> None:
    for source in ("local", "mini"):
        write_run(tmp_path, source=source)
    write_report(load_runs([tmp_path]), out := tmp_path / "report")
    head, *lines = runs_table(out)
    where = head.index("data, backbone")
    assert sorted(line[where] for line in lines) == ["local data, minilm", "mini data, minilm"]
    assert "data, backbone" not in runs_table(report)[0]


def runs_table(report: Path) -> list[list[str]]:
    """The texts of the table of runs."""
    (table,) = re.findall('<table data-kind="runs">(.*?)</table>', (report / "index.html").read_text(), re.DOTALL)
    return [
        [re.sub("<.*?>", "", cell) for cell in re.findall("<t[hd].*?</t[hd]>", row)]
        for row in re.findall("<tr.*?</tr>", table, re.DOTALL)
    ]


def test_what_was_not_used_is_counted(tmp_path: Path, report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "27 runs; 1 was not used" in (report / "index.html").read_text()
    write_run(tmp_path, status="failed")
    write_run(tmp_path, seed=1)
    main([f"runs={tmp_path}", f"out={tmp_path / 'report'}"])
    assert "\n1 directory was not used:" in capsys.readouterr().out
    assert "1 run; 1 was not used" in (tmp_path / "report" / "index.html").read_text()
    write_run(tmp_path, seed=2, status="failed")
    main([f"runs={tmp_path}", f"out={tmp_path / 'report'}"])
    assert "\n2 directories were not used:" in capsys.readouterr().out
    assert "1 run; 2 were not used" in (tmp_path / "report" / "index.html").read_text()


def test_an_earlier_report_is_replaced_with_its_figures(tmp_path: Path) -> None:
    """Or they would be published with the new one."""
    out = tmp_path / "report"
    for rank in (1, 2):
        write_run(tmp_path / "curve", f"budget.rank={rank}", params=1000 * rank, budget=1000 * rank)
    main([f"runs={tmp_path / 'curve'}", f"out={out}"])
    assert (out / "figures" / "budget_curves.svg").exists()
    main([f"runs={write_run(tmp_path)}", f"out={out}"])
    assert not (out / "figures" / "budget_curves.svg").exists()
    assert "figures/panel.svg and .png" in (out / "index.html").read_text()


def test_everything_is_written(report: Path) -> None:
    files = {str(file.relative_to(report)) for file in report.rglob("*") if file.is_file()}
    figures = ("score_against_parameters", "score_against_compute", "panel", "ranks", "over_training", "budget_curves")
    assert files == {
        "index.html", "results.csv", "table.md", "table.tex", "sentences.txt",
        *(f"figures/{name}.{kind}" for name in figures for kind in ("svg", "png")),
    }  # fmt: skip
