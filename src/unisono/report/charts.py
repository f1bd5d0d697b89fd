"""Charts that applications attach to their runs, drawn in the colours of the page. *Local.*

Each function gives a figure for ``unisono.report.attachments.attach``; any figure of Plotly will do there as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from unisono.errors import ConfigurationError
from unisono.observe import formats
from unisono.report.figure import Figure, Layout, Trace, bar_layout, bars, colours, line
from unisono.report.series import Column, plain

Numbers = Sequence[float]
"""Plain numbers: a list, or a NumPy array or CPU tensor of one dimension."""

MANY_CLASSES = 24
"""A confusion matrix of more classes shows no numbers in its cells, and is as wide as the page."""
_SHADES = [[0.0, "--heat-0"], [0.02, "--heat-1"], [0.25, "--heat-2"], [1.0, "--heat-3"]]


@np.errstate(all="ignore")  # a count may be infinite or NaN: its cells stay empty
def confusion_matrix(labels: Sequence[str], counts: Sequence[Numbers]) -> Figure:
    """How often each class was taken for which.

    Args:
        labels: C names of classes.
        counts: ``[C, C]``: samples by true class (row) and predicted class (column).

    Raises:
        ConfigurationError: The shapes do not fit, or ``counts`` holds something else than numbers.
    """
    labels = [str(label) for label in labels]
    rows = [_column(f"row {number}", row, labels=len(labels)) for number, row in enumerate(counts)]
    _same("labels", len(labels), "rows", len(rows))
    heat: Trace = {
        "type": "heatmap",
        "x": labels,
        "y": labels,
        "z": [plain(row / (row.sum() or 1.0)) for row in rows],
        "zmin": 0,
        "zmax": 1,
        "customdata": [plain(row) for row in rows],
        "colorscale": _SHADES,
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": "truth %{y}, taken for %{x}: %{customdata:,} (%{z:.1%})<extra></extra>",
    }
    if len(labels) <= MANY_CLASSES:
        heat |= {"text": [[f"{value:,.0f}" if value else "" for value in row] for row in rows], "texttemplate": "%{text}"}
        heat["textfont"] = {"size": 11}
    axis = {"type": "category", "showgrid": False, "fixedrange": True, "automargin": True}
    upright = max(map(len, labels), default=0) > 2  # slanting ones would be cut off at the edge
    layout: Layout = {"hovermode": "closest", "margin": {"b": 44}}
    layout["xaxis"] = {**axis, "title": {"text": "predicted", "standoff": 6}, "tickangle": -90 if upright else 0}
    layout["yaxis"] = {**axis, "title": {"text": "truth", "standoff": 6}, "autorange": "reversed"}
    return Figure(data=[heat], layout=layout, height=min(760, 110 + 30 * max(len(labels), 5)))


def curves(x_label: str, y_label: str, lines: Mapping[str, tuple[Numbers, Numbers]]) -> Figure:
    """Lines over a common pair of axes: precision over recall, an ROC, calibration.

    Args:
        lines: x and y of each line, N values each, by its name. The first is this run's; what it is compared with (baselines)
            comes after it, and is drawn in muted colours below it.

    Raises:
        ConfigurationError: A line has not as many x as y, or something else than numbers.
    """
    traces: list[Trace] = []
    for (name, (x, y)), colour in zip(lines.items(), colours(len(lines)), strict=True):
        first = not traces
        across = _column(f"x of {name!r}", x)
        up = _column(f"y of {name!r}", y, **{f"x of {name!r}": len(across)})
        style: dict[str, Any] = {"mode": "lines", "width": 2.5 if first else 1.8, "hovertemplate": "%{x:.4g}, %{y:.4g}"}
        traces.append(line(up, colour if first else f"{colour}-muted", name, x=plain(across), zorder=int(first), **style))
    layout = {"hovermode": "closest", "xaxis": {"title": {"text": x_label}}, "yaxis": {"title": {"text": y_label}}}
    return Figure(data=traces, layout=layout, height=330)


def forecast(
    x: Sequence[float] | Sequence[str],
    predicted: Numbers,
    low: Numbers = (),
    high: Numbers = (),
    observed: Numbers = (),
    *,
    coverage: float | None = None,
    x_label: str = "",
    y_label: str = "",
) -> Figure:
    """A forecast with its interval, and what was observed.

    Args:
        x: N numbers or ISO dates, in ascending order; or N names.
        predicted: N values.
        low: N lower ends of the interval; empty if there is none.
        high: N upper ends of the interval.
        observed: N true values; empty if they are not known.
        coverage: What share of observations the interval is meant to hold, 0 to 1.

    Raises:
        ConfigurationError: Lengths differ, an interval has one end only, or something is no number.
    """
    if bool(len(low)) != bool(len(high)):
        raise ConfigurationError("An interval needs both low and high. Give both or neither.")
    given = {"predicted": predicted, "low": low, "high": high, "observed": observed}
    parts = {name: _column(name, part, x=len(x)) for name, part in given.items() if name == "predicted" or len(part)}
    common: dict[str, Any] = {
        "x": [value if isinstance(value, str) else float(value) for value in x],
        "hovertemplate": "%{y:.4g}",
    }
    traces: list[Trace] = []
    if "low" in parts:
        edge = {"type": "scatter", "mode": "lines", "line": {"width": 0}, **common}
        traces.append({**edge, "y": plain(parts["low"]), "name": "low", "showlegend": False})
        name = "interval" if coverage is None else f"{coverage:.0%} interval"
        traces.append({**edge, "y": plain(parts["high"]), "name": name, "fill": "tonexty", "fillcolor": "--blue-band"})
    traces.append(line(parts["predicted"], "--blue", "predicted", width=2.2, **common))
    if "observed" in parts:
        dots = {"color": "--orange", "size": 5 if len(x) <= 200 else 3, "opacity": 0.85}
        traces.append({**line(parts["observed"], "--orange", "observed", **common), "mode": "markers", "marker": dots})
    layout = {"hovermode": "x unified", "xaxis": {"title": {"text": x_label}}, "yaxis": {"title": {"text": y_label}}}
    return Figure(data=traces, layout=layout, height=330)


def comparison_bars(measure: str, values: Mapping[str, float], ours: str, *, higher_is_better: bool = True) -> Figure:
    """One number of this run beside the same number of others (baselines, published results).

    Args:
        measure: What is compared, with its unit: ``"RMSE (stars)"``.
        values: By name, this run's among them.
        ours: The name of this run's.

    Raises:
        ConfigurationError: ``ours`` has no finite value, or something is no number.
    """
    numbers = dict(zip(values, _column("values", list(values.values())).tolist(), strict=True))
    if not np.isfinite(numbers.get(ours, np.nan)):
        raise ConfigurationError(
            f"ours is {ours!r}, which has no finite value (there are: {', '.join(values) or 'none'}). Give this run's value "
            "under that name."
        )
    ordered = sorted(numbers, key=lambda name: numbers[name], reverse=higher_is_better)
    trace = bars(
        ordered,
        plain(np.array([numbers[name] for name in ordered])),
        ["--blue" if name == ours else "--grey" for name in ordered],
        text=[formats.number(numbers[name]) for name in ordered],
        hover="%{y}: %{text}",
    )
    # Names stand above their bars: beside them, long ones would leave no room for the bars on a phone.
    place = {
        "xref": "paper",
        "x": 0,
        "xanchor": "left",
        "yshift": 21,
        "showarrow": False,
        "font": {"color": "--muted", "size": 12},
    }
    title = f"{measure}, {'more' if higher_is_better else 'less'} is better"
    layout = bar_layout(
        xaxis={"title": {"text": title}, "rangemode": "tozero"},
        yaxis={"showticklabels": False},
        annotations=[{"text": escape(name), "y": number, **place} for number, name in enumerate(ordered)],
        bargap=0.54,
        margin={"t": 8, "l": 4},
    )
    return Figure(data=[trace], layout=layout, height=48 * len(ordered) + 66)


def _column(name: str, values: Numbers, **as_many_as: int) -> Column:
    """The numbers as float64 ``[N]``; ConfigurationError if they are none, or not as many as something else."""
    found = np.asarray(values)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iuf"):
        raise ConfigurationError(f"{name} is {_short(values)}. Give plain numbers, one dimension.")
    for other, length in as_many_as.items():
        _same(other, length, name, len(found))
    return found.astype(np.float64)


def _same(name: str, length: int, other: str, other_length: int) -> None:
    if length != other_length:
        raise ConfigurationError(
            f"lengths differ ({name} {length}, {other} {other_length}). Give each the same number of values."
        )


def _short(values: object) -> str:
    text = repr(values)
    return text if len(text) <= 80 else f"{text[:77]}..."
