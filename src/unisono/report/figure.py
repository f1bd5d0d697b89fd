"""A figure as Plotly's JSON, and what figures are made of. *Local.*

A colour is the name of a CSS variable (``"--blue"``): the page puts in what its theme says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unisono.report.series import Column, as_json, plain

Trace = dict[str, Any]
Layout = dict[str, Any]

SERIES = ("--blue", "--orange", "--green", "--violet", "--red", "--teal", "--brown", "--grey")
"""Colours of lines that are compared, in order."""
_THEME_COLOUR = re.compile(r"--[a-z-]+")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure on the page."""

    data: Sequence[Trace]
    layout: Layout
    seconds: Mapping[str, Any] | None = None
    """``x`` (a list for each trace) and ``layout`` (what changes) over seconds; None if there is no such view."""
    height: float = 260
    """Pixels."""

    def legend(self) -> list[tuple[str, str]]:
        """Colour and label of each named trace, for the list above the figure.

        Empty for a single trace, and where a trace has no colour of the theme: then Plotly draws its own legend.
        """
        found: dict[tuple[str, str], None] = {}
        for trace in self.data:
            if trace.get("showlegend") is not False and trace.get("name"):
                line, marker, fill = trace.get("line"), trace.get("marker"), trace.get("fillcolor")
                given = (fill if isinstance(line, dict) and line.get("width") == 0 else None, line, marker)
                colours = [one.get("color") if isinstance(one, dict) else one for one in given if one]
                known = [one for one in colours if isinstance(one, str)]
                if not known or not _THEME_COLOUR.fullmatch(known[0]):
                    return []
                found[known[0], str(trace["name"])] = None
        return list(found) if len(found) > 1 else []

    def as_json(self) -> dict[str, Any]:
        """What the page's script needs."""
        layout = {"showlegend": False, **self.layout} if self.legend() else self.layout
        shown: dict[str, Any] = as_json({"data": self.data, "layout": layout, "seconds": self.seconds, "height": self.height})
        return shown


def line(y: Column, colour: str, name: str, *, width: float = 2, **more: Any) -> Trace:
    """A line over an axis that is yet to be given; a single value is a point."""
    mode = "lines" if np.isfinite(y).sum() > 1 else "markers"
    style = {"line": {"color": colour, "width": width}, "marker": {"color": colour}}
    return {"type": "scatter", "mode": mode, "y": plain(y), "name": name, **style, **more}


def band(low: Column, high: Column, colour: str) -> list[Trace]:
    """The space between two lines."""
    edge: Trace = {"type": "scatter", "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    return [{**edge, "y": plain(low)}, {**edge, "y": plain(high), "fill": "tonexty", "fillcolor": colour}]


def bars(names: Sequence[str], values: Sequence[float | None], colour: str | list[str], *, hover: str, **more: Any) -> Trace:
    """A horizontal bar for each name."""
    style = {"marker": {"color": colour}, "textposition": "auto", "insidetextfont": {"color": "--on-dark"}, "textangle": 0}
    return {
        "type": "bar",
        "orientation": "h",
        "y": names,
        "x": values,
        "hovertemplate": f"{hover}<extra></extra>",
        **style,
        **more,
    }


def bar_layout(*, xaxis: Layout, yaxis: Layout | None = None, **more: Any) -> Layout:
    """The layout of horizontal bars, the first on top."""
    names = {"type": "category", "autorange": "reversed", "showgrid": False, "fixedrange": True, **(yaxis or {})}
    fixed = {"xaxis": {"fixedrange": True, **xaxis}, "yaxis": names, "hovermode": "closest"}
    return {"bargap": 0.3, "margin": {"t": 4, "l": 4}, **fixed, **more}


def colours(count: int) -> list[str]:
    """Colours for so many lines; they repeat after eight."""
    return [SERIES[number % len(SERIES)] for number in range(count)]
