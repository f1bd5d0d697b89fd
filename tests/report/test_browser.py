"""The pages in a real browser. Needs Chromium and ``pip install 'unisono[browser]'``; elsewhere these tests are skipped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.report.made_up import PICTURES, lines, summary, write_run
from unisono.report.attachments import attach
from unisono.report.command import write_report
from unisono.report.server import Dashboard

sync_api = pytest.importorskip("playwright.sync_api", exc_type=ImportError)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


class Tab:
    """A page, and everything that went wrong on it."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.errors: list[str] = []
        page.on("console", lambda message: self.errors.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.asked: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))

    def open(self, url: str) -> None:
        self.page.goto(url)
        self.page.wait_for_selector("html[data-drawn]", state="attached")

    def size(self, width: int) -> None:
        """Resize the window, and wait until all figures fit it."""
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.wait_for_function(
            "[...document.querySelectorAll('.main-svg')].every((one) => one.getBoundingClientRect().right <= innerWidth)"
        )

    def overflows(self) -> bool:
        return bool(self.page.evaluate("document.documentElement.scrollWidth > innerWidth"))

    def drawn(self) -> int:
        """Figures that show something."""
        figures, content = (
            "[...document.querySelectorAll('.js-plotly-plot')]",
            ".cartesianlayer path, .cartesianlayer image, .pielayer path",
        )
        return int(self.page.evaluate(f"{figures}.filter((one) => one.querySelector('{content}')).length"))

    def wait_for_text(self, selector: str, text: str) -> None:
        self.page.wait_for_function(
            "([selector, text]) => document.querySelector(selector)?.textContent.includes(text)", arg=[selector, text]
        )


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium has none for root
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium: Any, request: pytest.FixtureRequest) -> Iterator[Tab]:
    page = chromium.new_page(viewport={"width": 1280, "height": 900}, color_scheme=getattr(request, "param", "light"))
    page.set_default_timeout(30_000)
    yield Tab(page)
    page.close()


@pytest.mark.parametrize("tab", ["light", "dark"], indirect=True)
def test_a_report_draws_all_its_figures_and_asks_nobody_for_anything(tab: Tab, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=900, workers=3, lost_at=400)
    for name, picture in PICTURES.items():
        attach(folder, name, picture)
    tab.open(Path(write_report([str(folder)])).as_uri())
    assert tab.drawn() >= 8 + 7
    assert tab.asked == [(folder / "report.html").as_uri(), *[url for url in tab.asked if url.startswith("data:")]]
    for width in (1280, 400):
        tab.size(width)
        assert not tab.overflows(), width
    before = tab.page.evaluate("document.getElementById('figure-loss').layout.xaxis.title.text")
    tab.page.click("button[value=seconds]")
    after = tab.page.evaluate("document.getElementById('figure-loss').layout.xaxis.title.text")
    assert (before, after) == ("step", "seconds of training")
    assert tab.errors == []


def test_a_figure_that_cannot_be_drawn_or_asks_for_the_network_stops_no_other(tab: Tab, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=5)
    attach(
        folder, "odd", {"data": [{"type": "scatter", "x": {"a": 1}, "y": 7}], "layout": {"xaxis": {"range": "x"}, "shapes": 3}}
    )
    image = {"source": "http://127.0.0.1:9/picture.png", "xref": "paper", "yref": "paper", "x": 0, "y": 1, "sizex": 1, "sizey": 1}
    attach(folder, "image", {"data": [{"y": [1, 2]}], "layout": {"images": [image]}})
    attach(folder, "worse", {"data": [{"type": "sankey", "node": [], "link": {"source": [9]}}]})
    attach(folder, "last", {"data": [{"type": "bar", "x": ["--no-colour"], "y": [1]}]})
    report = Path(write_report([str(folder)])).as_uri()
    with tab.page.expect_console_message(lambda message: "Content Security Policy" in message.text):
        tab.open(report)
    assert tab.page.evaluate("document.getElementById('figure-picture-3').data[0].x[0]") == "--no-colour"
    assert tab.drawn() >= 8
    assert all("Content Security Policy" in error for error in tab.errors)


def test_a_comparison_is_drawn(tab: Tab, tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / name, workers=workers)) for name, workers in (("one", 1), ("two", 2))]
    tab.open(Path(write_report([*runs], output=tmp_path / "both.html")).as_uri())
    assert tab.drawn() == 3
    tab.size(400)
    assert not tab.overflows()
    assert tab.errors == []


def test_a_live_page_follows_the_run_and_shows_its_end(tab: Tab, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Dashboard(folder) as dashboard:
        tab.open(dashboard.address)
        tab.wait_for_text("main", "Nothing has been logged")
        write_run(folder, steps=30, planned=50, ended=False)
        tab.wait_for_text(".state", "Training, step 30 of 50")
        bar, whole = (f"document.querySelector('{one}').getBoundingClientRect().width" for one in (".progress i", ".progress"))
        tab.page.wait_for_function(f"Math.abs({bar} / {whole} - 0.6) < 0.01")
        tab.wait_for_text(".left", "60%, about 0:0")
        assert tab.drawn() >= 6
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in list(lines(50))[30:]) + "damaged\n" + '{"step": 51, "lo')
        tab.wait_for_text(".state", "Training, step 50")
        tab.wait_for_text("#troubles", "1 line is damaged")
        assert tab.page.evaluate("document.getElementById('figure-loss').data[0].x.at(-1)") == 50
        (folder / "summary.json").write_text(json.dumps(summary(50)))
        tab.wait_for_text(".state", "Trained in unison on 2 workers")
        tab.wait_for_text("#digest", "sha256sum")
        assert tab.errors == []
    assert all(url.startswith((dashboard.address, "data:")) for url in tab.asked)
