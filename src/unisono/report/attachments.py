"""What an application adds to its run's report: ``report.json`` in the run directory.

::

    attach("runs/fraud", "Scores", plotly.graph_objects.Figure(data=plotly.graph_objects.Histogram(x=scores)))
    attach("runs/fraud", "Precision and recall", charts.curves("recall", "precision", {"this run": (recall, precision)}))

``unisono report`` and ``unisono watch`` draw it below the run's own figures, in the order in which it was first attached.
Everything here is *local*: worker 0 calls ``attach``, the others do not. Plotly need not be installed for that.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unisono.checkpoint.store import Store
from unisono.errors import CheckpointError, ConfigurationError
from unisono.observe.strict_json import decode, dumps
from unisono.report import charts
from unisono.report.figure import Figure
from unisono.report.series import as_json

ATTACHMENTS_FILE = "report.json"
"""Name of the file in the run directory."""

_LARGEST_BYTES = 2 << 20
_LARGEST_FILE_BYTES = 64 << 20
_HEIGHTS = (80, 1200)
_OF_THE_PAGE = ("template", "title", "width", "height", "autosize")
"""What a figure does not decide: the page has its own theme, heading and width."""


@dataclass(frozen=True, kw_only=True)
class TextSample:
    """Text that the model wrote."""

    text: str
    """What it wrote."""
    prompt: str = ""
    """What it was given; shown in front of the text, in another colour."""

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not isinstance(self.prompt, str):
            raise ConfigurationError("text and prompt are strings. Decode them first.")


@dataclass(frozen=True, kw_only=True)
class DataTable:
    """Rows of words and numbers: recommended films, examples and their predictions."""

    columns: Sequence[str]
    """C headings."""
    rows: Sequence[Sequence[str | int | float]]
    """R rows of C cells. Columns of numbers are set to the right."""

    def __post_init__(self) -> None:
        if any(isinstance(part, str) or not isinstance(part, Sequence) for part in (self.columns, self.rows, *self.rows)):
            raise ConfigurationError("columns, rows and each row are sequences. Give lists.")
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ConfigurationError(
                    f"row {number} has {len(row)} cells, there are {len(self.columns)} columns. Fill them all."
                )


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """A picture with its words."""

    title: str
    picture: Figure | TextSample | DataTable
    finding: str = ""
    wide: bool = False
    """Whether it is as wide as the page even where two would fit beside each other."""


def attach(run_dir: str | os.PathLike[str], title: str, picture: Any, *, finding: str = "", wide: bool = False) -> None:
    """Add a picture to the run's report, or replace the one of the same title. *Local*: worker 0 calls it.

    Call it at the end of training, or as often as there is something new: the file is replaced atomically.

    Args:
        run_dir: The run directory, a path or an fsspec address.
        title: The heading; also the picture's name.
        picture: A figure of Plotly or its JSON (a mapping with ``data`` and ``layout``), at most 2 MiB of JSON; a chart of
            ``unisono.report.charts``; a ``TextSample`` or a ``DataTable``. The page has its own theme, width and heading: a
            figure's ``template``, ``width`` and ``title`` are left out. A colour ``"--blue"`` is the page's blue.
        finding: A sentence below the heading: what a reader should see in the picture.
        wide: Whether it is as wide as the page.

    Raises:
        ConfigurationError: It is none of these, or too large, or there is no title.
        CheckpointError: The file cannot be written.
    """
    if not isinstance(title, str) or not title.strip():
        raise ConfigurationError(f"an attachment needs a title, got {title!r}. Give it a short heading.")
    if not isinstance(picture, Figure | TextSample | DataTable):
        picture = _figure(json.loads(picture.to_json()) if hasattr(picture, "to_plotly_json") else picture, title)
    new = _as_json(Attachment(title=title, picture=picture, finding=finding, wide=wide))
    size = len(dumps(new))
    if size > _LARGEST_BYTES:
        raise ConfigurationError(
            f"attachment {title!r} is {size / 2**20:.1f} MiB of JSON; a page can carry 2 MiB of each. Draw fewer points."
        )
    store = Store(run_dir)
    try:
        kept = [_as_json(one) for one in read_attachments(store)]
    except CheckpointError:
        kept = []  # a damaged file is replaced: only pictures were in it
    titles = [one["title"] for one in kept]
    place = titles.index(title) if title in titles else len(kept)
    kept[place : place + 1] = [new]
    store.write(ATTACHMENTS_FILE, (dumps({"version": 1, "attachments": kept}) + "\n").encode())


def read_attachments(store: Store) -> list[Attachment]:
    """Read what ``attach`` wrote, in order; an empty list if there is no such file. *Local*.

    Raises:
        CheckpointError: The file is damaged; the message says where.
    """
    if not store.exists(ATTACHMENTS_FILE):
        return []
    try:
        if (size := store.size(ATTACHMENTS_FILE) or 0) > _LARGEST_FILE_BYTES:
            raise ValueError(f"it has {size:,} bytes")
        return [_from_json(one) for one in json.loads(store.read(ATTACHMENTS_FILE))["attachments"]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{ATTACHMENTS_FILE} is damaged ({type(error).__name__}: {error}). Delete it; the run does not depend on it, and the "
            "application writes it again.",
            file=ATTACHMENTS_FILE,
        ) from error


def _as_json(one: Attachment) -> dict[str, Any]:
    words = {"title": one.title, "finding": one.finding, "wide": one.wide}
    match one.picture:
        case Figure(data=data, layout=layout, height=height):
            return {**words, "kind": "figure", "data": {"data": data, "layout": {**layout, "height": height}}}
        case TextSample():
            return {**words, "kind": "text", "data": dataclasses.asdict(one.picture)}
        case DataTable(columns=columns, rows=rows):
            return {**words, "kind": "table", "data": {"columns": list(columns), "rows": [list(row) for row in rows]}}


def _from_json(one: dict[str, Any]) -> Attachment:
    title, finding, kind, data = str(one["title"]), str(one["finding"]), one["kind"], one["data"]
    if kind == "figure":
        return Attachment(title=title, picture=_figure(data, title), finding=finding, wide=bool(one.get("wide")))
    return _of_kind(kind, decode(data), title=title, finding=finding, wide=bool(one.get("wide")))


def _of_kind(kind: str, data: dict[str, Any], *, title: str, finding: str, wide: bool) -> Attachment:
    """Words and tables, and the kinds of charts that earlier versions wrote by name."""
    picture: Figure | TextSample | DataTable
    match kind:
        case "text":
            picture = TextSample(**data)
        case "table":
            picture = DataTable(**data)
        case "confusion":
            picture, wide = charts.confusion_matrix(**data), len(data["labels"]) > charts.MANY_CLASSES
        case "curves":
            lines = {line["name"]: (line["x"], line["y"]) for line in data["lines"]}
            picture = charts.curves(data["x_label"], data["y_label"], lines)
        case "forecast":
            picture, wide = charts.forecast(**data), True
        case "comparison":
            picture = charts.comparison_bars(**data)
        case _:
            raise ValueError(f"there is no kind {kind!r}")
    return Attachment(title=title, picture=picture, finding=finding, wide=wide)


def _figure(given: object, title: str) -> Figure:
    """A figure from Plotly's JSON; ConfigurationError if it is none."""
    plain = as_json(given)
    data = plain.get("data") if isinstance(plain, dict) else None
    layout = (plain.get("layout") or {}) if isinstance(plain, dict) else None
    if not isinstance(data, list) or not isinstance(layout, dict) or not all(isinstance(trace, dict) for trace in data):
        raise ConfigurationError(
            f"attachment {title!r}: {type(given).__name__} cannot be shown. Give a figure of Plotly, its JSON (with 'data' and "
            "'layout'), a chart of unisono.report.charts, a TextSample or a DataTable."
        )
    height = layout.get("height")
    height = min(max(height, _HEIGHTS[0]), _HEIGHTS[1]) if isinstance(height, (int, float)) else 360
    return Figure(data=data, layout={key: value for key, value in layout.items() if key not in _OF_THE_PAGE}, height=height)
