"""report.html in a real browser: nothing runs, nothing is fetched, nothing is cut off, everything can be read."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import config
from reported import HOSTILE, make_run
from undrawn import SVG

from lite_dil.evaluation.comparison import LOSSES, page, table
from lite_dil.evaluation.comparison.settings import Comparison
from lite_dil.reports import charts

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver")
VIEWS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]
# The contrast of every text with what lies behind it, by WCAG 2: (0.05 + lighter) / (0.05 + darker) of the luminances.
CONTRAST = """
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
const behind = element => {
  for (; element; element = element.parentElement) {
    const colour = rgb(getComputedStyle(element).backgroundColor);
    if (colour.length === 3) return colour;
    if (colour[3] !== 0) throw new Error('a background that lets through');
  }
  throw new Error('no background');
};
const found = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const text = walk.currentNode.textContent.trim(), element = walk.currentNode.parentElement;
  if (!text || !element.getClientRects().length) continue;
  const style = getComputedStyle(element), drawn = element instanceof SVGElement;
  const pair = [light(rgb(drawn ? style.fill : style.color)), light(behind(element))].sort((a, b) => b - a);
  found.push([(pair[0] + .05) / (pair[1] + .05) * style.opacity, parseFloat(style.fontSize), text.slice(0, 40), drawn]);
}
return found;
"""
CHARTS = """
return [...document.querySelectorAll('figure')].map(figure => {
  const box = figure.querySelector('svg').getBoundingClientRect();
  const strokes = [...figure.querySelectorAll('svg path')].map(path => [getComputedStyle(path).stroke, path.getTotalLength()]);
  const scale = box.width / figure.querySelector('svg').viewBox.baseVal.width;
  const letters = [...figure.querySelectorAll('text')].map(text => parseFloat(getComputedStyle(text).fontSize) * scale);
  return {width: box.width, height: box.height, smallest: Math.min(...letters),
    strokes: strokes.filter(([stroke, length]) => stroke !== 'none' && length > 20).map(([stroke]) => stroke),
    label: figure.querySelector('[role=img]').getAttribute('aria-label')};
});
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "svg", SVG)
        make_run(folder / "calm")
        make_run(folder / "hostile", text=HOSTILE, facts={"state": "failed", "why": HOSTILE})
        found = {name: folder / name / "report.html" for name in ("calm", "hostile")}
        return found | {"comparison": make_comparison(folder / "comparison")}


def make_comparison(folder: Path) -> Path:
    """The page of a comparison of the default losses with two seeds."""
    figures = {name: {"mean": -1234.5, "std": 123.4, "error": 1.0} for name, _, _ in table.COLUMNS}
    figures |= {"accuracy": {"mean": 0.7, "std": 0.1, "error": 0.1}, "kl": {"mean": 12.0, "std": 3.0, "error": 1.0}}
    rows = [{"loss": loss, "seeds": [0, 1], "diverged": {}, "figures": figures} for loss in LOSSES]
    curve = {"steps": [0, 50, 100], "mean": [-191.02, -191.01, -191.0], "std": [0.0, 0.01, 0.02]}
    sides = {"chosen": curve, "rejected": curve}
    folder.mkdir()
    curves = page.draw_curves(
        {"reference": dict.fromkeys(sides, -191.02), "losses": dict.fromkeys(LOSSES, sides)}, folder / "figure2.png"
    )
    options = config(data="prefs.jsonl", eval_data="held_out.jsonl", model="a-model")
    comparison = Comparison(folder, dict.fromkeys(LOSSES, options), [0, 1], 6, 128, 100, "lite-dil compare " + "--flag " * 40)
    samples = [{"prompt": "What is tea?", "answers": [(name, "It is a drink. " * 9) for name in ("reference", *LOSSES)]}] * 6
    said = table.verdict(rows, 100, 24), table.notes(rows, 128)
    whole = page.render(comparison, *table.table_cells(rows), *said, curves, page.draw_accuracy(rows), samples)
    (folder / "index.html").write_text(whole, encoding="utf-8")
    return folder / "index.html"


def show(browser: Any, page: Path, width: int, scheme: str) -> None:
    """Open a page from its file at a width and in a scheme, forgetting what was logged before."""
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(page.as_uri())


@pytest.mark.parametrize("name", ["calm", "hostile", "comparison"])
@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_a_view(browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    show(browser, pages[name], width, scheme)
    # Nothing is wrong, nothing ran, nothing left the page.
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.hit") is None
    sent = [entry["message"] for entry in browser.get_log("performance") if "Network.requestWillBeSent" in entry["message"]]
    assert len(sent) == 1 and pages[name].as_uri() in sent[0]
    # The page is as wide as the screen; what is wider scrolls in its own box.
    assert browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]") == [width, width]
    texts = browser.execute_script(CONTRAST)
    assert len(texts) > 90
    assert [text for text in texts if text[0] < 4.5] == []
    assert browser.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_charts_are_there_to_be_seen(browser: Any, pages: dict[str, Path], width: int, scheme: str) -> None:
    show(browser, pages["calm"], width, scheme)
    charts = browser.execute_script(CHARTS)
    (margins,) = (chart for chart in charts if chart["label"].startswith("Margins of"))
    assert 300 < margins["width"] < width and margins["smallest"] > 10
    charts.remove(margins)
    assert len(charts) == 9
    for chart in charts:
        assert 300 < chart["width"] < width and chart["height"] > 150
        assert chart["smallest"] > 10  # CSS pixels
        assert len(chart["strokes"]) >= 3  # two axes and a curve
        assert "at step" in chart["label"]
    curve = {"light": "rgb(0, 114, 178)", "dark": "rgb(86, 180, 233)"}[scheme]
    assert all(curve in chart["strokes"] for chart in charts)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_comparison_fits_a_screen(browser: Any, pages: dict[str, Path], scheme: str) -> None:
    """Its table has a column per loss, and none is out of sight."""
    show(browser, pages["comparison"], 1280, scheme)
    boxes = browser.execute_script("return [...document.querySelectorAll('.wide')].map(e => [e.clientWidth, e.scrollWidth])")
    assert len(boxes) == 3 and all(seen == whole for seen, whole in boxes)


def test_hostile_text_is_shown_as_it_is(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["hostile"], 390, "light")
    shown = browser.execute_script("return document.querySelector('.said').textContent")
    assert shown.startswith("<script>window.hit=1</script>\"><img src=x onerror='window.hit=1'></style>")
    assert "שלום" in shown and "\U0001f469\u200d\U0001f4bb" in shown and "\\x1b[31m" in shown
    assert shown.endswith("W" * 5000)
    assert browser.execute_script("return document.querySelectorAll('script, img, link, iframe').length") == 0


def test_the_policy_forbids_what_would_run(browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    """Even where something was not escaped: the test of the tests above."""
    page = tmp_path / "open.html"
    whole = pages["calm"].read_text(encoding="utf-8")
    page.write_text(whole.replace("<body>", "<body><script>window.hit=1</script><img src='x.png'>"), encoding="utf-8")
    show(browser, page, 1280, "light")
    assert browser.execute_script("return window.hit") is None
    assert len([entry for entry in browser.get_log("browser") if "Content Security Policy" in entry["message"]]) == 2
