from __future__ import annotations

import uuid
from typing import Any

import numpy as np
import pytest
import torch

from unisono.checkpoint.store import Store
from unisono.errors import CheckpointError, ConfigurationError
from unisono.report.attachments import (
    ATTACHMENTS_FILE,
    Attachment,
    Comparison,
    ConfusionMatrix,
    Curves,
    Forecast,
    Line,
    Picture,
    Table,
    TextSample,
    attach,
    read_attachments,
)

PICTURES: list[Picture] = [
    ConfusionMatrix(labels=["cat", "dog"], counts=[[3, 1], [0, 5]]),
    Curves(x_label="recall", y_label="precision", lines=[Line("this run", [0.0, 1.0], [1.0, 0.5]), Line("other", [], [])]),
    Forecast(x=["2026-01-01", "2026-01-02"], predicted=[1.0, 2.0], low=[0.0, 1.0], high=[2.0, 3.5], observed=[1.5, float("nan")]),
    Forecast(x=[1.0], predicted=[2.0], low=[], high=[], observed=[], coverage=0.8),
    TextSample(text="<b>& more\n", prompt="The "),
    Table(columns=["film", "stars"], rows=[["Vertigo", 4.5], ["Chinatown", 4]]),
    Comparison(measure="RMSE", values={"this run": 0.91, "mean": 1.1}, ours="this run", higher_is_better=False),
]


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}/run"


def test_what_is_attached_is_read_again(url: str) -> None:
    for number, picture in enumerate(PICTURES):
        attach(url, f"picture {number}", picture, finding=f"finding {number}")
    found = read_attachments(Store(url))
    assert [str(one) for one in found] == [
        str(Attachment(title=f"picture {number}", picture=picture, finding=f"finding {number}"))
        for number, picture in enumerate(PICTURES)
    ]


def test_arrays_and_tensors_become_plain_numbers(url: str) -> None:
    attach(url, "counts", ConfusionMatrix(labels=["a", "b"], counts=np.eye(2, dtype=np.int64)))
    attach(url, "curve", Curves(x_label="x", y_label="y", lines=[Line("one", torch.arange(3.0), np.arange(3, dtype=np.float32))]))  # type: ignore[arg-type]
    matrix, curve = (one.picture for one in read_attachments(Store(url)))
    assert isinstance(matrix, ConfusionMatrix)
    assert matrix.counts == [[1, 0], [0, 1]]
    assert isinstance(curve, Curves)
    assert (curve.lines[0].x, curve.lines[0].y) == ([0.0, 1.0, 2.0], [0.0, 1.0, 2.0])


def test_the_same_title_replaces_the_picture_in_its_place(url: str) -> None:
    for title in ("first", "second"):
        attach(url, title, TextSample(text="old"))
    attach(url, "first", TextSample(text="new"))
    found = read_attachments(Store(url))
    assert [(one.title, one.picture) for one in found] == [("first", TextSample(text="new")), ("second", TextSample(text="old"))]


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (ConfusionMatrix(labels=["a", "b"], counts=[[1, 2]]), "lengths differ"),
        (ConfusionMatrix(labels=["a"], counts=[["many"]]), "'many', a str"),  # type: ignore[list-item]
        (Curves(x_label="x", y_label="y", lines=[Line("one", [1.0], [1.0, 2.0])]), "x of 'one' 1, y of 'one' 2"),
        (Curves(x_label="x", y_label="y", lines=[Line("one", [[1.0]], [1.0])]), "a list"),  # type: ignore[list-item]
        (Forecast(x=[1.0], predicted=[1.0], low=[0.0]), "both low and high"),
        (Forecast(x=[1.0, 2.0], predicted=[1.0]), "x 2, predicted 1"),
        (Table(columns=["a"], rows=[["b", "c"]]), "row 0 2"),
        (Comparison(measure="m", values={"a": 1.0}, ours="b"), "there are: a"),
        (TextSample(text=b"bytes"), "strings"),  # type: ignore[arg-type]
        ("a picture", "str is no picture"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_refused(url: str, picture: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        attach(url, "it", picture)
    assert read_attachments(Store(url)) == []


def test_a_picture_needs_a_title(url: str) -> None:
    with pytest.raises(ConfigurationError, match="needs a title"):
        attach(url, " ", TextSample(text="x"))


@pytest.mark.parametrize("damage", ["{", "[]", '{"attachments": [{"title": "x", "finding": "", "kind": "pie", "data": {}}]}'])
def test_a_damaged_file_is_named_when_read_and_replaced_when_written(url: str, damage: str) -> None:
    store = Store(url)
    store.write(ATTACHMENTS_FILE, damage.encode())
    with pytest.raises(CheckpointError, match=r"report.json is damaged .* Delete it"):
        read_attachments(store)
    attach(url, "new", TextSample(text="x"))
    assert len(read_attachments(store)) == 1
