from __future__ import annotations

import base64
import gzip
import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.report.made_up import SHA256, manifest, summary, write_run
from unisono.errors import ConfigurationError
from unisono.report import page as page_module
from unisono.report.attachments import DataTable, TextSample, attach
from unisono.report.comparison import comparison_page
from unisono.report.page import live_html, news, report_html
from unisono.report.run_data import RunData, RunReader
from unisono.report.run_page import run_page

VOID = {"meta", "link", "br", "img", "input"}


class Parsed(HTMLParser):
    """The page's text, ids and scripts; fails if elements are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.text = ""
        self.scripts: dict[str | None, str] = {}
        self.links: list[str] = []
        self._open: list[str] = []
        self._script: str | None = None
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in VOID:
            self._open.append(tag)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        if tag == "script":
            self._script = values.get("id")
        self.links += [str(values[name]) for name in ("src", "href") if values.get(name)]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data
        elif self._open[-1:] != ["style"]:
            self.text += f"{data}\n"

    @property
    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts["figures"])
        return found


def parsed(folder: Path) -> Parsed:
    return Parsed(report_html(run_page(RunReader(folder).read())))


def test_a_report_needs_nothing_but_itself(tmp_path: Path) -> None:
    report = parsed(write_run(tmp_path / "run"))
    assert report.links == ["data:,"]
    code = gzip.decompress(base64.b64decode(report.scripts["plotly"])).decode()
    assert "Plotly" in code
    assert code == page_module.plotly_js()


def test_a_report_says_what_was_run_and_what_came_out(tmp_path: Path) -> None:
    report = parsed(write_run(tmp_path / "my-run", steps=60, workers=3, lost_at=30))
    for words in (
        "Trained in unison on 2 workers",
        "my-run",
        "train.py --epochs 3 --run-dir runs/one",
        "0.9875",
        "The loss fell from",
        "Workers waited 12% of their time",
        "worker 2 (pid 4711) was killed by SIGKILL",
        "A worker sends 2.6 kB a step: as much as a ring all-reduce",
        "410.0 MB at most in a worker",
        "CosineAnnealingLR: from 0.003 to 0",
        SHA256,
        f"sha256sum {tmp_path}/my-run/model.safetensors",
        "unisono run --workers 1 train.py --epochs 3 --run-dir runs/one-on-1",
        "AdamW",
    ):
        assert words in report.text, words
    assert {"loss", "workers", "speed", "shares", "schedule", "gradient", "traffic", "memory"} == set(report.figures)
    assert all(f"figure-{key}" in report.ids for key in report.figures)
    assert len(report.ids) == len(set(report.ids))


def test_equal_runs_give_equal_reports(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert report_html(run_page(RunReader(folder).read())) == report_html(run_page(RunReader(folder).read()))


def test_a_page_of_many_steps_stays_small(tmp_path: Path) -> None:
    report = parsed(write_run(tmp_path / "run", steps=8000, workers=2))
    assert len(report.scripts["figures"]) < 600_000


def test_what_a_run_says_cannot_become_part_of_the_page(tmp_path: Path) -> None:
    evil = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'
    folder = write_run(tmp_path / "run", extra=[{"step": 5, "event": evil, "text": evil}], settings={"optimizer": evil})
    attach(folder, evil, DataTable(columns=[evil], rows=[[evil]]), finding=evil)
    attach(folder, "text", TextSample(text=evil, prompt=evil))
    (folder / "summary.json").write_text(json.dumps(summary(60, metrics={evil: 1.0}, weights_sha256=evil)))
    html = report_html(run_page(RunReader(folder).read()))
    assert "<script>alert" not in html
    assert "<img" not in html
    assert Parsed(html).text.count("onerror=alert(1)") >= 8


def test_a_live_page_asks_its_server_for_everything_else(tmp_path: Path) -> None:
    page = run_page(RunReader(write_run(tmp_path / "run", ended=False)).read(), live=True)
    live = Parsed(live_html(page))
    assert live.links == ["data:,", "plotly.js"]
    told = news(page)
    assert [section["key"] for section in told["sections"] if section["figure"]] == list(live.figures)
    assert told["ended"] is False
    assert f'data-live="{told["version"]}"' in live_html(page)


def test_without_plotly_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page_module.plotly_js.cache_clear()
    page_module._packed_plotly.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'unisono\[report\]'"):
        parsed(write_run(tmp_path / "run"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**6) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=6,
)
COLUMN = st.lists(st.floats(), min_size=9, max_size=9).map(np.array)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_log_manifest_or_summary_stops_a_page(data: st.DataObject) -> None:
    told = {}
    for name, whole in (("summary", summary(9)), ("manifest", manifest())):
        for key in data.draw(st.lists(st.sampled_from(sorted(whole)), max_size=3)):
            whole[key] = data.draw(JSON)
        if name == "manifest" and isinstance(whole["settings"], dict):
            for key in data.draw(st.lists(st.sampled_from(sorted(whole["settings"]) or ["seed"]), max_size=2)):
                whole["settings"][key] = data.draw(JSON)
        told[name] = whole
    names = [
        "loss",
        "compute_s",
        "compute_s_1",
        "data_s",
        "step_s",
        "samples_per_second",
        "lr",
        "gradient_norm",
        "skipped",
        "epoch",
    ]
    columns = {name: np.linspace(0.1, 1.0, 9) for name in names}
    columns |= data.draw(st.dictionaries(st.sampled_from(names), COLUMN, max_size=3))
    run = RunData(name="x", url="x", columns={**columns, "step": np.arange(1.0, 10)}, **told)
    for page in (run_page(run), run_page(run, live=True), comparison_page([run, run])):
        json.dumps(news(page), allow_nan=False)
        Parsed(live_html(page))


KINDS = {
    "figure": ["data", "layout"],
    "text": ["text", "prompt"],
    "table": ["columns", "rows"],
    "confusion": ["labels", "counts"],
    "curves": ["x_label", "y_label", "lines"],
    "forecast": ["x", "predicted", "low", "high", "observed", "coverage", "x_label", "y_label"],
    "comparison": ["measure", "values", "ours", "higher_is_better"],
}
NUMBERS = st.lists(st.floats() | st.integers(), min_size=2, max_size=2)
FITTING = {
    "data": st.lists(st.dictionaries(st.sampled_from(["name", "line", "marker", "fillcolor", "x", "y", "type"]), JSON)),
    "layout": st.dictionaries(st.sampled_from(["height", "xaxis", "shapes", "showlegend"]), JSON),
    "labels": st.just(["a", "b"]),
    "counts": st.lists(NUMBERS, min_size=2, max_size=2),
    "lines": st.lists(st.fixed_dictionaries({"name": st.text(), "x": NUMBERS, "y": NUMBERS})),
    "values": st.dictionaries(st.sampled_from("ab"), st.floats()),
    "ours": st.sampled_from("ab"),
    **dict.fromkeys(["x", "predicted", "low", "high", "observed"], NUMBERS),
}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_attachment_stops_a_page(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    attachments = []
    for kind in data.draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=3)):
        values = {name: data.draw(FITTING.get(name, JSON) | JSON) for name in KINDS[kind]}
        one = {"title": data.draw(st.text()), "finding": "", "kind": kind, "wide": data.draw(JSON), "data": values}
        attachments.append({**one, **data.draw(st.dictionaries(st.sampled_from(sorted(one)), JSON, max_size=1))})
    folder = tmp_path_factory.mktemp("run")
    (folder / "report.json").write_text(json.dumps({"version": 1, "attachments": attachments}))
    page = run_page(RunReader(folder).read())
    json.dumps(news(page), allow_nan=False)
    Parsed(live_html(page))
