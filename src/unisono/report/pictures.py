"""The application's own pictures, as sections of the page. *Local.*"""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from unisono.observe import formats
from unisono.report.attachments import (
    Attachment,
    Comparison,
    ConfusionMatrix,
    Curves,
    Forecast,
    Numbers,
    Table,
    TextSample,
)
from unisono.report.figures import Figure, Trace, colours
from unisono.report.section import Section, table
from unisono.report.series import plain

_SHADES = [[0.0, "--heat-0"], [0.02, "--heat-1"], [0.25, "--heat-2"], [1.0, "--heat-3"]]
_MANY_CLASSES = 24


def picture_section(number: int, attachment: Attachment) -> Section:
    """What the application attached, drawn."""
    frame: dict[str, Any] = {
        "key": f"picture-{number}",
        "kicker": "from the application",
        "title": attachment.title,
        "text": attachment.finding,
    }
    match attachment.picture:
        case ConfusionMatrix() as matrix:
            return Section(**frame, figure=_confusion(matrix), half=len(matrix.labels) <= _MANY_CLASSES)
        case Curves() as curves:
            return Section(**frame, figure=_curves(curves), half=True)
        case Forecast() as forecast:
            return Section(**frame, figure=_forecast(forecast))
        case Comparison() as comparison:
            return Section(**frame, figure=_comparison(comparison), half=True)
        case TextSample() as sample:
            prompt = f"<b>{escape(sample.prompt)}</b>" if sample.prompt else ""
            return Section(**frame, body=f'<pre class="sample">{prompt}{escape(sample.text)}</pre>')
        case Table() as given:
            return Section(**frame, body=_table(given), half=len(given.columns) <= 3)


def _confusion(matrix: ConfusionMatrix) -> Figure:
    labels = [str(label) for label in matrix.labels]
    counts = [[float(value) for value in row] for row in matrix.counts]
    totals = [sum(row) or 1.0 for row in counts]
    shares = [[round(value / total, 4) for value in row] for row, total in zip(counts, totals, strict=True)]
    few = len(labels) <= _MANY_CLASSES
    heat: Trace = {
        "type": "heatmap",
        "x": labels,
        "y": labels,
        "z": shares,
        "zmin": 0,
        "zmax": 1,
        "customdata": counts,
        "colorscale": _SHADES,
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": "truth %{y}, taken for %{x}: %{customdata:,} (%{z:.1%})<extra></extra>",
    }
    if few:  # the numbers in the cells
        heat |= {"text": [[f"{value:,.0f}" if value else "" for value in row] for row in counts], "texttemplate": "%{text}"}
        heat["textfont"] = {"size": 11}
    layout = {
        "hovermode": "closest",
        "xaxis": {
            "title": {"text": "predicted", "standoff": 6},
            "type": "category",
            "tickangle": -90 if max(map(len, labels), default=0) > 2 else 0,  # slanting ones would be cut off at the edge
            "showgrid": False,
            "fixedrange": True,
            "automargin": True,
        },
        "yaxis": {
            "title": {"text": "truth", "standoff": 6},
            "type": "category",
            "autorange": "reversed",
            "showgrid": False,
            "fixedrange": True,
            "automargin": True,
        },
        "margin": {"b": 44},
    }
    return Figure(data=[heat], layout=layout, height=min(760, 110 + 30 * max(len(labels), 5)))


def _curves(curves: Curves) -> Figure:
    traces: list[Trace] = []
    legend = []
    for number, (one, colour) in enumerate(zip(curves.lines, colours(len(curves.lines)), strict=True)):
        colour = colour if number == 0 else f"{colour}-muted"
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": _values(one.x),
                "y": _values(one.y),
                "name": one.name,
                "line": {"color": colour, "width": 2.5 if number == 0 else 1.8},
                "hovertemplate": "%{x:.4g}, %{y:.4g}",
            }
        )
        legend.append((colour, one.name))
    layout = {
        "hovermode": "closest",
        "xaxis": {"title": {"text": curves.x_label}},
        "yaxis": {"title": {"text": curves.y_label}},
    }
    # What is compared with lies below this run's own line.
    return Figure(data=traces[::-1], layout=layout, legend=legend, height=330)


def _forecast(forecast: Forecast) -> Figure:
    x = [value if isinstance(value, str) else float(value) for value in forecast.x]
    traces: list[Trace] = []
    legend = []
    if len(forecast.low):
        name = "interval" if forecast.coverage is None else f"{forecast.coverage:.0%} interval"
        edge: Trace = {"type": "scatter", "mode": "lines", "x": x, "line": {"width": 0}}
        traces.append({**edge, "y": _values(forecast.low), "name": "low", "hovertemplate": "%{y:.4g}"})
        high = {"y": _values(forecast.high), "name": "high", "hovertemplate": "%{y:.4g}"}
        traces.append({**edge, **high, "fill": "tonexty", "fillcolor": "--blue-band"})
        legend.append(("--blue-band", name))
    middle = {"type": "scatter", "mode": "lines", "x": x, "y": _values(forecast.predicted), "name": "predicted"}
    traces.append({**middle, "line": {"color": "--blue", "width": 2.2}, "hovertemplate": "%{y:.4g}"})
    legend.append(("--blue", "predicted"))
    if len(forecast.observed):
        dots = {"type": "scatter", "mode": "markers", "x": x, "y": _values(forecast.observed), "name": "observed"}
        size = 5 if len(x) <= 200 else 3
        traces.append({**dots, "marker": {"color": "--orange", "size": size, "opacity": 0.85}, "hovertemplate": "%{y:.4g}"})
        legend.append(("--orange", "observed"))
    layout = {"xaxis": {"title": {"text": forecast.x_label}}, "yaxis": {"title": {"text": forecast.y_label}}}
    return Figure(data=traces, layout=layout, legend=legend, height=330)


def _comparison(comparison: Comparison) -> Figure:
    ordered = sorted(comparison.values.items(), key=lambda item: item[1], reverse=comparison.higher_is_better)
    bars: Trace = {
        "type": "bar",
        "orientation": "h",
        "y": [name for name, _ in ordered],
        "x": _values([value for _, value in ordered]),
        "text": [formats.number(value) for _, value in ordered],
        "textposition": "auto",
        "insidetextfont": {"color": "--on-dark"},
        "marker": {"color": ["--blue" if name == comparison.ours else "--grey" for name, _ in ordered]},
        "hovertemplate": "%{y}: %{text}<extra></extra>",
    }
    better = "more is better" if comparison.higher_is_better else "less is better"
    # Names stand above their bars: beside them, long ones would leave no room for the bars on a telephone.
    place = {
        "xref": "paper",
        "x": 0,
        "xanchor": "left",
        "yshift": 21,
        "showarrow": False,
        "font": {"color": "--muted", "size": 12},
    }
    layout = {
        "annotations": [{"text": escape(name), "y": number, **place} for number, (name, _) in enumerate(ordered)],
        "bargap": 0.54,
        "hovermode": "closest",
        "xaxis": {"title": {"text": f"{comparison.measure}, {better}"}, "rangemode": "tozero", "fixedrange": True},
        "yaxis": {
            "type": "category",
            "autorange": "reversed",
            "showgrid": False,
            "fixedrange": True,
            "showticklabels": False,
        },
        "margin": {"t": 8, "l": 4},
    }
    return Figure(data=[bars], layout=layout, height=48 * len(ordered) + 66)


def _values(numbers: Numbers) -> list[float | None]:
    return plain(np.asarray(numbers, dtype=np.float64))


def _table(given: Table) -> str:
    def is_number(value: object) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    def shown(value: object) -> object:
        return formats.number(value) if isinstance(value, float) else value

    numeric = [bool(given.rows) and all(is_number(row[place]) for row in given.rows) for place in range(len(given.columns))]
    return table(given.columns, [[shown(value) for value in row] for row in given.rows], numeric=numeric)
