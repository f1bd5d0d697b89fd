from __future__ import annotations

import json
import uuid
from typing import Any

import numpy as np
import pytest
import torch

from tests.report.made_up import PICTURES
from unisono.checkpoint.store import Store
from unisono.errors import CheckpointError, ConfigurationError
from unisono.report.attachments import ATTACHMENTS_FILE, DataTable, TextSample, attach, read_attachments
from unisono.report.figure import Figure

EARLIER: list[dict[str, Any]] = [
    {"title": "a", "finding": "f", "kind": "confusion", "data": {"labels": ["cat", "dog"], "counts": [[3, 1], [0, 5]]}},
    {
        "title": "b",
        "finding": "",
        "kind": "curves",
        "data": {
            "x_label": "recall",
            "y_label": "precision",
            "lines": [{"name": "this run", "x": [0.0, 1.0], "y": [1.0, 0.5]}, {"name": "other", "x": [], "y": []}],
        },
    },
    {
        "title": "c",
        "finding": "",
        "kind": "forecast",
        "data": {
            "x": ["2026-01-01", "2026-01-02"],
            "predicted": [1.0, 2.0],
            "low": [0.0, 1.0],
            "high": [2.0, 3.5],
            "observed": [1.5, "nan"],
            "coverage": None,
            "x_label": "",
            "y_label": "",
        },
    },
    {"title": "d", "finding": "", "kind": "text", "data": {"text": "<b>& more\n", "prompt": "The "}},
    {
        "title": "e",
        "finding": "",
        "kind": "table",
        "data": {"columns": ["film", "stars"], "rows": [["Vertigo", 4.5], ["Chinatown", 4]]},
    },
    {
        "title": "g",
        "finding": "",
        "kind": "comparison",
        "data": {"measure": "RMSE", "values": {"this run": 0.91, "mean": 1.1}, "ours": "this run", "higher_is_better": False},
    },
]
"""As the first version wrote them: charts by name."""
DEEP = '{"a":' * 900 + "1" + "}" * 900
DEEP = '{"a":' * 900 + "1" + "}" * 900


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}/run"


def test_what_is_attached_is_read_again(url: str) -> None:
    own = {name: picture for name, picture in PICTURES.items() if isinstance(picture, (Figure, TextSample, DataTable))}
    for name, picture in own.items():
        attach(url, name, picture, finding=f"finding of {name}", wide=name == "text")
    found = read_attachments(Store(url))
    assert [one.picture for one in found] == list(own.values())
    assert [(one.title, one.finding, one.wide) for one in found] == [(name, f"finding of {name}", name == "text") for name in own]


def test_a_figure_of_plotly_takes_the_theme_heading_and_width_of_the_page(url: str) -> None:
    attach(url, "it", PICTURES["plotly"])
    (found,) = read_attachments(Store(url))
    assert isinstance(found.picture, Figure)
    assert (found.picture.layout, found.picture.height) == ({}, 300)
    assert [trace["type"] for trace in found.picture.data] == ["scatter", "bar"]


def test_a_figures_json_may_hold_arrays_and_what_is_not_finite(url: str) -> None:
    trace = {"type": "scatter", "x": torch.arange(3), "y": np.array([1.0, np.nan, np.inf])}
    attach(url, "it", {"data": [trace], "layout": {"height": 10**6}})
    (found,) = read_attachments(Store(url))
    assert isinstance(found.picture, Figure)
    assert found.picture.data == [{"type": "scatter", "x": [0, 1, 2], "y": [1.0, None, None]}]
    assert found.picture.height == 1200


def test_words_that_look_like_numbers_stay_words_in_a_figure(url: str) -> None:
    attach(url, "it", {"data": [{"type": "bar", "x": ["nan", "inf"], "y": [1, 2]}]})
    (found,) = read_attachments(Store(url))
    assert isinstance(found.picture, Figure)
    assert found.picture.data[0]["x"] == ["nan", "inf"]


def test_a_report_of_an_earlier_version_is_read_as_charts(url: str) -> None:
    Store(url).write(ATTACHMENTS_FILE, json.dumps({"version": 1, "attachments": EARLIER}).encode())
    found = read_attachments(Store(url))
    now = [PICTURES[name] for name in ("confusion", "curves", "dates", "text", "table", "comparison")]
    assert [one.picture for one in found] == now
    assert [one.wide for one in found] == [False, False, True, False, False, False]
    assert (found[0].title, found[0].finding) == ("a", "f")
    attach(url, "new", TextSample(text="x"))
    assert [one.picture for one in read_attachments(Store(url))] == [*now, TextSample(text="x")]


def test_the_same_title_replaces_the_picture_in_its_place(url: str) -> None:
    for title in ("first", "second"):
        attach(url, title, TextSample(text="old"))
    attach(url, "first", TextSample(text="new"))
    found = read_attachments(Store(url))
    assert [(one.title, one.picture) for one in found] == [("first", TextSample(text="new")), ("second", TextSample(text="old"))]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataTable(columns=["a"], rows=[["b", "c"]]), "row 0 has 2 cells"),
        (lambda: DataTable(columns=["a"], rows=["b"]), "sequences"),
        (lambda: TextSample(text=b"bytes"), "strings"),  # type: ignore[arg-type]
        (lambda: "a picture", "str cannot be shown"),
        (lambda: {"data": {}}, "dict cannot be shown"),
        (lambda: {"data": ["a trace"]}, "dict cannot be shown"),
        (lambda: {"data": [], "layout": [1]}, "dict cannot be shown"),
        (lambda: {"data": [{"y": list(range(400_000))}]}, "MiB of JSON; a page can carry 2 MiB"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_refused(url: str, make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        attach(url, "it", make())
    assert read_attachments(Store(url)) == []


def test_a_picture_needs_a_title(url: str) -> None:
    with pytest.raises(ConfigurationError, match="needs a title"):
        attach(url, " ", TextSample(text="x"))


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        '{"attachments": [{"title": "x", "finding": "", "kind": "pie", "data": {}}]}',
        '{"attachments": [{"title": "x", "finding": "", "kind": "figure", "data": {"data": 3}}]}',
        '{"attachments": [{"title": "x", "finding": "", "kind": "forecast", "data": {"x": 1}}]}',
        '{"attachments": [{"title": "x", "finding": "", "kind": "figure", "data": {"data": [' + DEEP + "]}}]}",
    ],
)
def test_a_damaged_file_is_named_when_read_and_replaced_when_written(url: str, damage: str) -> None:
    store = Store(url)
    store.write(ATTACHMENTS_FILE, damage.encode())
    with pytest.raises(CheckpointError, match=r"(?s)report.json is damaged .* Delete it"):
        read_attachments(store)
    attach(url, "new", TextSample(text="x"))
    assert len(read_attachments(store)) == 1


def test_a_file_that_no_page_could_carry_is_not_read(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attach(url, "it", TextSample(text="x" * 100))
    monkeypatch.setattr("unisono.report.attachments._LARGEST_FILE_BYTES", 50)
    with pytest.raises(CheckpointError, match=r"damaged .*bytes"):
        read_attachments(Store(url))
