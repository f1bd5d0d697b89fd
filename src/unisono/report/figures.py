"""Figures of a run's numbers, as Plotly's JSON. *Local.*

A colour is the name of a CSS variable (``"--blue"``): the page puts in what its theme says. A figure over steps also knows how it
looks over seconds; the page switches between the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from unisono.report.run_data import Column, Event, RunData
from unisono.report.series import Stretches, plain, plain_steps, smoothed

Trace = dict[str, Any]
Layout = dict[str, Any]

SERIES = ("--blue", "--orange", "--green", "--violet", "--red", "--teal", "--brown", "--grey")
"""Colours of lines that are compared, in order."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One picture on the page."""

    data: Sequence[Trace]
    layout: Layout
    legend: Sequence[tuple[str, str]] = ()
    """Colour and label of what is drawn."""
    seconds: Mapping[str, Any] | None = None
    """``x`` (a list for each trace) and ``layout`` (what changes) over seconds; None if there is no such view."""
    height: int = 260
    """Pixels."""

    def as_json(self) -> dict[str, Any]:
        """What the page's script needs."""
        return {"data": list(self.data), "layout": self.layout, "seconds": self.seconds, "height": self.height}


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The horizontal axis of a run's figures, over steps and over seconds."""

    stretches: Stretches
    steps: list[int | float]
    seconds: list[int | float] | None
    """None if the log does not tell."""
    events: Sequence[Event] = ()
    event_seconds: Sequence[float] = field(default_factory=list)

    @classmethod
    def of(cls, run: RunData) -> Axis:
        """The axis of a run's log."""
        stretches = Stretches.of(len(run.steps))
        elapsed = run.elapsed_s
        known = len(elapsed) > 0 and elapsed[-1] > 0
        at = [_seconds_at(run.steps, elapsed, event.step) for event in run.events]
        return cls(
            stretches=stretches,
            steps=plain_steps(stretches.last(run.steps)),
            seconds=plain_steps(stretches.last(elapsed)) if known else None,
            events=run.events,
            event_seconds=at,
        )

    def figure(self, traces: Sequence[Trace], layout: Layout, *, marks: bool = True, **more: Any) -> Figure:
        """A figure over this axis; its traces have no ``x`` yet.

        Args:
            marks: Whether to mark events by vertical lines.
        """
        count = len(self.steps)
        shapes = list(layout.get("shapes", []))
        over_steps = [*shapes, *(self._marks([event.step for event in self.events]) if marks else [])]
        seconds = None
        if self.seconds is not None:
            over_seconds = [*shapes, *(self._marks(self.event_seconds) if marks else [])]
            seconds = {
                "x": [_stretched(trace.get("x"), self.seconds, count) for trace in traces],
                "layout": {"xaxis": {"title": {"text": "seconds of training"}}, "shapes": over_seconds},
            }
        layout = {**layout, "shapes": over_steps, "xaxis": {"title": {"text": "step"}, **layout.get("xaxis", {})}}
        return Figure(
            data=[{**trace, "x": _stretched(trace.get("x"), self.steps, count)} for trace in traces],
            layout=layout,
            seconds=seconds,
            **more,
        )

    @staticmethod
    def _marks(places: Sequence[float]) -> list[dict[str, Any]]:
        line = {"color": "--mark", "width": 1.5, "dash": "dot"}
        return [{"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line} for x in places]


def line(y: Column, colour: str, name: str, **more: Any) -> Trace:
    """A plain line over an axis."""
    style = {"color": colour, "width": 2, **more.pop("line", {})}
    mode = "lines" if np.isfinite(y).sum() > 1 else "markers"
    return {
        "type": "scatter",
        "mode": more.pop("mode", mode),
        "y": plain(y),
        "name": name,
        "line": style,
        "marker": {"color": colour},
        **more,
    }


def band(low: Column, high: Column, colour: str) -> list[Trace]:
    """The space between two lines."""
    edge: Trace = {"type": "scatter", "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    return [{**edge, "y": plain(low)}, {**edge, "y": plain(high), "fill": "tonexty", "fillcolor": colour}]


def loss_figure(run: RunData, axis: Axis) -> Figure:
    """The loss of every step, and its course."""
    loss, divide = run.column("loss"), axis.stretches
    each = divide.mean(loss)
    traces = [line(each, "--blue-soft", "each step", line={"width": 1}, hovertemplate="%{y:.5g}")]
    if divide.lines_each > 1:
        traces = [*band(divide.low(loss), divide.high(loss), "--blue-band"), {**traces[0], "name": "mean"}]
    legend = [("--blue-soft", "each step" if divide.lines_each == 1 else f"{divide.lines_each} steps: mean and range")]
    if len(each) >= 12:
        traces.append(line(course_of(each), "--blue", "smoothed", hovertemplate="%{y:.5g}", line={"width": 2.5}))
        legend.append(("--blue", "smoothed"))
    return axis.figure(traces, {"yaxis": {"title": {"text": "loss"}, **scale_for(each)}}, legend=legend, height=320)


def metric_figure(run: RunData, axis: Axis, name: str) -> Figure:
    """What evaluations made of one metric; of two at the same step the later one."""
    points = {step: results[name] for step, results in run.evaluations if np.isfinite(results.get(name, np.nan))}
    y = np.array([points[step] for step in sorted(points)])
    trace = line(y, "--teal", name, mode="lines+markers", hovertemplate="%{y:.5g}")
    figure = axis.figure([trace], {"yaxis": {"title": {"text": name}, **scale_for(y)}})
    seconds = None
    if figure.seconds is not None:
        seconds = {**figure.seconds, "x": [[_seconds_at(run.steps, run.elapsed_s, step) for step in sorted(points)]]}
    return replace(figure, data=[{**trace, "x": sorted(points)}], seconds=seconds)


def scale_for(values: Column) -> dict[str, Any]:
    """A logarithmic axis where values span more than a power of ten, else a linear one."""
    positive = values[np.isfinite(values)]
    if len(positive) and positive.min() > 0 and positive.max() / positive.min() > 10:
        return {"type": "log", "dtick": 1, "minor": {"dtick": "D1", "showgrid": False}}
    return {"type": "linear"}


def course_of(values: Column) -> Column:
    """A column smoothed as the eye sees it: on a logarithmic axis the logarithms."""
    if scale_for(values)["type"] == "linear":
        return smoothed(values)
    return np.exp(smoothed(np.log(values)))


def throughput_figure(run: RunData, axis: Axis) -> Figure:
    """Samples per second, smoothed as the progress display shows them."""
    rate = axis.stretches.mean(run.column("samples_per_second"))
    traces = [line(rate, "--green", "samples/s", fill="tozeroy", fillcolor="--green-band", hovertemplate="%{y:,.0f}")]
    layout = {"yaxis": {"title": {"text": "samples per second"}, "rangemode": "tozero", "tickformat": ",~s"}}
    return axis.figure(traces, layout)


def schedule_figure(run: RunData, axis: Axis) -> Figure:
    """The learning rate of each parameter group; groups that have the same are one line."""
    names = [name for name in run.columns if name == "lr" or (name.startswith("lr_") and name[3:].isdecimal())]
    names.sort(key=lambda name: (len(name), name))
    groups: list[tuple[list[str], Column]] = []
    for name in names:
        values = run.column(name)
        same = next((members for members, known in groups if np.array_equal(known, values, equal_nan=True)), None)
        if same is not None:
            same.append(name)
        else:
            groups.append(([name], values))
    traces, legend = [], []
    for (members, values), colour in zip(groups, colours(len(groups)), strict=True):
        label = "learning rate" if len(groups) == 1 else "group " + ", ".join(name[3:] or "0" for name in members)
        traces.append(line(axis.stretches.mean(values), colour, label, hovertemplate="%{y:.4g}"))
        legend.append((colour, label))
    layout = {"yaxis": {"title": {"text": "learning rate"}, "rangemode": "tozero", "tickformat": ".2~g"}}
    return axis.figure(traces, layout, legend=legend if len(legend) > 1 else ())


def gradient_figure(run: RunData, axis: Axis) -> Figure:
    """The norm of the whole gradient before clipping, and the limit."""
    norm = axis.stretches.mean(run.column("gradient_norm"))
    traces = [line(norm, "--violet-soft", "norm", hovertemplate="%{y:.4g}", line={"width": 1})]
    legend = [("--violet-soft", "norm")]
    if len(norm) >= 12:
        traces.append(line(course_of(norm), "--violet", "smoothed", hovertemplate="%{y:.4g}", line={"width": 2}))
        legend.append(("--violet", "smoothed"))
    layout: Layout = {"yaxis": {"title": {"text": "gradient norm"}, **scale_for(norm)}}
    limit = run.settings.get("max_grad_norm")
    if isinstance(limit, (int, float)) and not isinstance(limit, bool):
        edge = {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": limit, "y1": limit}
        layout["shapes"] = [{**edge, "line": {"color": "--red", "width": 1.5, "dash": "dash"}}]
        legend.append(("--red", f"clipped to {limit:g}"))
    return axis.figure(traces, layout, legend=legend)


def colours(count: int) -> list[str]:
    """Colours for so many lines; they repeat after eight."""
    return [SERIES[number % len(SERIES)] for number in range(count)]


def _stretched(given: object, axis: list[int | float], count: int) -> object:
    """The axis for traces that have none of their own."""
    return axis[:count] if given is None else given


def _seconds_at(steps: Column, elapsed: Column, step: int) -> float:
    if len(steps) == 0:
        return 0.0
    place = int(np.searchsorted(steps, step, side="right")) - 1
    return round(float(elapsed[place]), 3) if place >= 0 else 0.0
