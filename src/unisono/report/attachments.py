"""Pictures that an application adds to its run's report: ``report.json`` in the run directory.

::

    attach(
        "runs/fraud",
        "Which alerts are frauds",
        Curves(x_label="recall", y_label="precision", lines=[Line("this run", recall, precision)]),
        finding="average precision 0.81, gradient boosting reaches 0.79",
    )

``unisono report`` and ``unisono watch`` draw them below the run's own figures, in the order in which they were first attached.
Everything here is *local*: worker 0 calls ``attach``, the others do not. No plotting library is needed for that.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unisono.checkpoint.store import Store
from unisono.errors import CheckpointError, ConfigurationError
from unisono.observe.strict_json import decode, dumps

ATTACHMENTS_FILE = "report.json"
"""Name of the file in the run directory."""

Numbers = Sequence[float]
"""Plain numbers: a list, or a NumPy array or CPU tensor of one dimension."""


@dataclass(frozen=True, kw_only=True)
class ConfusionMatrix:
    """How often each class was taken for which."""

    labels: Sequence[str]
    """C names of classes."""
    counts: Sequence[Numbers]
    """``[C, C]``: samples by true class (row) and predicted class (column)."""


@dataclass(frozen=True)
class Line:
    """One line of ``Curves``."""

    name: str
    """In the legend."""
    x: Numbers
    """N values."""
    y: Numbers
    """N values."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Lines over a common pair of axes: precision over recall, an ROC, calibration, a metric over epochs."""

    x_label: str
    y_label: str
    lines: Sequence[Line]
    """The first is this run's; what it is compared with (baselines) comes after it, and is drawn in muted colours."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What was expected, how sure, and what came."""

    x: Sequence[float] | Sequence[str]
    """N numbers or ISO dates, in ascending order; or N names."""
    predicted: Numbers
    """N values."""
    low: Numbers = ()
    """N lower ends of the interval; empty if there is none."""
    high: Numbers = ()
    """N upper ends of the interval."""
    observed: Numbers = ()
    """N true values; empty if they are not known."""
    coverage: float | None = None
    """What share of observations the interval is meant to hold, 0 to 1."""
    x_label: str = ""
    y_label: str = ""


@dataclass(frozen=True, kw_only=True)
class TextSample:
    """Text that the model wrote."""

    text: str
    """What it wrote."""
    prompt: str = ""
    """What it was given; shown in front of the text, in another colour."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of words and numbers: recommended films, examples and their predictions."""

    columns: Sequence[str]
    """C headings."""
    rows: Sequence[Sequence[str | int | float]]
    """R rows of C cells. Columns of numbers are set to the right."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One number of this run beside the same number of others (baselines, published results), drawn as bars."""

    measure: str
    """What is compared, with its unit: ``"RMSE (stars)"``."""
    values: Mapping[str, float]
    """By name, this run's among them."""
    ours: str
    """The name of this run's."""
    higher_is_better: bool = True


Picture = ConfusionMatrix | Curves | Forecast | TextSample | Table | Comparison
"""What can be attached."""

_KINDS: dict[str, type[Picture]] = {
    "confusion": ConfusionMatrix,
    "curves": Curves,
    "forecast": Forecast,
    "text": TextSample,
    "table": Table,
    "comparison": Comparison,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """A picture with its words."""

    title: str
    picture: Picture
    finding: str = ""


def attach(run_dir: str | os.PathLike[str], title: str, picture: Picture, *, finding: str = "") -> None:
    """Add a picture to the run's report, or replace the one of the same title. *Local*: worker 0 calls it.

    Call it at the end of training, or as often as there is something new: the file is replaced atomically.

    Args:
        run_dir: The run directory, a path or an fsspec address.
        title: The heading; also the picture's name.
        picture: What to draw.
        finding: A sentence below the heading: what a reader should see in the picture.

    Raises:
        ConfigurationError: The picture's parts do not fit each other (lengths, shapes), or hold no plain numbers.
        CheckpointError: The file cannot be written.
    """
    _check(title, picture)
    store = Store(run_dir)
    try:
        kept = read_attachments(store)
    except CheckpointError:
        kept = []  # a damaged file is replaced: only pictures were in it
    new = Attachment(title=title, picture=picture, finding=finding)
    titles = [one.title for one in kept]
    if title in titles:
        kept[titles.index(title)] = new
    else:
        kept.append(new)
    document = {"version": 1, "attachments": [_as_json(one) for one in kept]}
    store.write(ATTACHMENTS_FILE, (dumps(document) + "\n").encode())


def read_attachments(store: Store) -> list[Attachment]:
    """Read what ``attach`` wrote, in order; an empty list if there is no such file. *Local*.

    Raises:
        CheckpointError: The file is damaged; the message says where.
    """
    if not store.exists(ATTACHMENTS_FILE):
        return []
    try:
        document = decode(json.loads(store.read(ATTACHMENTS_FILE)))
        return [_from_json(one) for one in document["attachments"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{ATTACHMENTS_FILE} is damaged ({type(error).__name__}: {error}). Delete it; the run does not depend on it, and the "
            "application writes it again.",
            file=ATTACHMENTS_FILE,
        ) from error


def _as_json(one: Attachment) -> dict[str, Any]:
    data = {field.name: _plain(getattr(one.picture, field.name)) for field in dataclasses.fields(one.picture)}
    return {"title": one.title, "finding": one.finding, "kind": _NAMES[type(one.picture)], "data": data}


def _from_json(one: dict[str, Any]) -> Attachment:
    kind, data = _KINDS[one["kind"]], dict(one["data"])
    if kind is Curves:
        data["lines"] = [Line(**line) for line in data["lines"]]
    picture = kind(**data)
    _check(one["title"], picture)
    return Attachment(title=one["title"], finding=one["finding"], picture=picture)


def _plain(value: Any) -> Any:
    """As JSON has it: arrays and tensors become lists, NumPy's scalars Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Line):
        return {"name": value.name, "x": _plain(value.x), "y": _plain(value.y)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _check(title: str, picture: Picture) -> None:
    """Whether it can be drawn; ConfigurationError if not."""

    def same(**lengths: int) -> None:
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ConfigurationError(f"attachment {title!r}: lengths differ ({found}). Give each the same number of values.")

    def numbers(name: str, values: Numbers) -> None:
        for value in _plain(values):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigurationError(
                    f"attachment {title!r}: {name} holds {value!r}, a {type(value).__name__}. Give plain numbers, one dimension."
                )

    if not isinstance(title, str) or not title.strip():
        raise ConfigurationError(f"an attachment needs a title, got {title!r}. Give it a short heading.")
    match picture:
        case ConfusionMatrix(labels=labels, counts=counts):
            same(labels=len(labels), rows=len(counts), **{f"row {number}": len(row) for number, row in enumerate(counts)})
            for row in counts:
                numbers("counts", row)
        case Curves(lines=lines):
            for line in lines:
                same(**{f"x of {line.name!r}": len(line.x), f"y of {line.name!r}": len(line.y)})
                numbers(f"x of {line.name!r}", line.x)
                numbers(f"y of {line.name!r}", line.y)
        case Forecast():
            parts = {name: getattr(picture, name) for name in ("predicted", "low", "high", "observed")}
            same(x=len(picture.x), **{name: len(part) for name, part in parts.items() if name == "predicted" or len(part)})
            if bool(len(picture.low)) != bool(len(picture.high)):
                raise ConfigurationError(f"attachment {title!r}: an interval needs both low and high. Give both or neither.")
            for name, part in parts.items():
                numbers(name, part)
        case TextSample():
            if not isinstance(picture.text, str) or not isinstance(picture.prompt, str):
                raise ConfigurationError(f"attachment {title!r}: text and prompt are strings. Decode them first.")
        case Table(columns=columns, rows=rows):
            same(columns=len(columns), **{f"row {number}": len(row) for number, row in enumerate(rows)})
        case Comparison(values=values, ours=ours):
            numbers("values", list(values.values()))
            if ours not in values or not math.isfinite(values[ours]):
                raise ConfigurationError(
                    f"attachment {title!r}: ours is {ours!r}, which has no finite value (there are: "
                    f"{', '.join(values) or 'none'}). Give this run's value under that name."
                )
        case _:
            raise ConfigurationError(
                f"attachment {title!r}: {type(picture).__name__} is no picture. Use one of "
                f"{', '.join(kind.__name__ for kind in _KINDS.values())} of unisono.report.attachments."
            )
