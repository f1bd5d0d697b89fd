"""Figures of a run's numbers, over steps and over seconds of training; the page switches between the two. *Local.*"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unisono.observe import formats
from unisono.report.figure import Figure, Layout, Trace, band, bar_layout, bars, colours, line
from unisono.report.run_data import RunData
from unisono.report.series import Column, Stretches, course_of, plain, plain_steps, scale_for
from unisono.report.worker_times import COLOURS, phase_totals, worker_times

_ON = {"waiting": "--on-light", "other": "--on-other"}
"""Colours of words on a phase's bar, where they are not ``--on-dark``."""
_ROW, _GAP, _UNDER = 68, 22, 62
"""Pixels of a worker's row in the time line, between rows, and below them."""
_BAR = 34
_SMOOTHED_FROM = 12
"""So many points are worth a smoothed line."""
Places = list[int | float]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The horizontal axis of a run's figures, over steps and over seconds, with a mark at each event."""

    stretches: Stretches
    steps: Places
    seconds: Places | None
    """None if the log does not say."""
    event_steps: Places
    event_seconds: Places

    @classmethod
    def of(cls, run: RunData) -> Axis:
        """The axis of a run's log."""
        stretches = Stretches(len(run.steps))
        elapsed, events = run.elapsed_s, [event.step for event in run.events]
        return cls(
            stretches=stretches,
            steps=plain_steps(stretches.last(run.steps)),
            seconds=plain_steps(stretches.last(elapsed)) if len(elapsed) and elapsed[-1] > 0 else None,
            event_steps=[*events],
            event_seconds=_seconds_at(run, events),
        )

    def figure(
        self, traces: Sequence[Trace], yaxis: Layout, *, steps: Places | None = None, seconds: Places | None = None, **more: Any
    ) -> Figure:
        """A figure over this axis; its traces have no ``x`` yet.

        Args:
            yaxis: Plotly's.
            steps, seconds: Where the points lie, if not at the ends of the stretches.
            more: ``height``, and more of the layout.
        """
        height = more.pop("height", 260)
        layout = {"xaxis": {"title": {"text": "step"}}, "yaxis": yaxis, "shapes": _marks(self.event_steps), **more}
        over_seconds = None
        if self.seconds is not None:
            changed = {"xaxis": {"title": {"text": "seconds of training"}}, "shapes": _marks(self.event_seconds)}
            over_seconds = {"x": [seconds or self.seconds] * len(traces), "layout": changed}
        data = [{**trace, "x": steps or self.steps} for trace in traces]
        return Figure(data=data, layout=layout, seconds=over_seconds, height=height)


def loss_figure(run: RunData, axis: Axis) -> Figure:
    """The loss of every step, and its course."""
    loss, divide = run.column("loss"), axis.stretches
    each = divide.mean(loss)
    name = "each step" if divide.lines_each == 1 else f"{divide.lines_each} steps: mean and range"
    traces = band(divide.low(loss), divide.high(loss), "--blue-band") if divide.lines_each > 1 else []
    traces += _with_course(each, "--blue", name, hovertemplate="%{y:.5g}")
    return axis.figure(traces, {"title": {"text": "loss"}, **scale_for(each)}, height=320)


def metric_figure(run: RunData, axis: Axis, name: str) -> Figure:
    """What evaluations made of one metric; of two at the same step the later one."""
    points = {step: results[name] for step, results in run.evaluations if np.isfinite(results.get(name, np.nan))}
    steps = sorted(points)
    values = np.array([points[step] for step in steps])
    trace = line(values, "--teal", name, mode="lines+markers", hovertemplate="%{y:.5g}")
    return axis.figure([trace], {"title": {"text": name}, **scale_for(values)}, steps=[*steps], seconds=_seconds_at(run, steps))


def throughput_figure(run: RunData, axis: Axis) -> Figure:
    """Samples per second, smoothed as the progress display shows them."""
    rate = axis.stretches.mean(run.column("samples_per_second"))
    trace = line(rate, "--green", "samples/s", fill="tozeroy", fillcolor="--green-band", hovertemplate="%{y:,.0f}")
    return axis.figure([trace], {"title": {"text": "samples per second"}, "rangemode": "tozero", "tickformat": ",~s"})


def schedule_figure(run: RunData, axis: Axis) -> Figure:
    """The learning rate of each parameter group; groups that have the same are one line."""
    names = [name for name in run.columns if name == "lr" or (name.startswith("lr_") and name[3:].isdecimal())]
    groups: list[tuple[list[str], Column]] = []
    for name in sorted(names, key=lambda name: (len(name), name)):
        values = run.column(name)
        same = next((members for members, known in groups if np.array_equal(known, values, equal_nan=True)), None)
        if same is not None:
            same.append(name[3:])
        else:
            groups.append(([name[3:] or "0"], values))
    traces = [
        line(axis.stretches.mean(values), colour, f"group {', '.join(members)}", hovertemplate="%{y:.4g}")
        for (members, values), colour in zip(groups, colours(len(groups)), strict=True)
    ]
    return axis.figure(traces, {"title": {"text": "learning rate"}, "rangemode": "tozero", "tickformat": ".2~g"})


def gradient_figure(run: RunData, axis: Axis) -> Figure:
    """The norm of the whole gradient before clipping, and the limit."""
    norm = axis.stretches.mean(run.column("gradient_norm"))
    traces = _with_course(norm, "--violet", "norm", hovertemplate="%{y:.4g}")
    limit = run.settings.get("max_grad_norm")
    highest = np.nanmax(norm, initial=0.0)
    if (
        isinstance(limit, (int, float)) and not isinstance(limit, bool) and limit <= 2 * highest
    ):  # a far one would flatten the rest
        edge = line(np.full(len(norm), float(limit)), "--red", f"clipped to {limit:g}", width=1.5, hoverinfo="skip")
        traces.append({**edge, "line": {**edge["line"], "dash": "dash"}})
    return axis.figure(traces, {"title": {"text": "gradient norm"}, **scale_for(norm)})


def timeline_figure(run: RunData, axis: Axis) -> Figure:
    """Milliseconds of a step by phase, a row for each worker, over the run, with events marked across all rows."""
    times = worker_times(run)
    means = [{name: axis.stretches.mean(phases[name] * 1000) for name in COLOURS} for phases in times]
    top = _ceiling(means)
    inner = len(times) * (_ROW + _GAP)
    traces: list[Trace] = []
    layout: Layout = {"annotations": [], "margin": {"t": 20, "b": 42}}
    for rank, phases in enumerate(means):
        suffix = "" if rank == 0 else str(rank + 1)
        high = 1 - rank * (_ROW + _GAP) / inner
        domain = [max(0.0, high - _ROW / inner), high]
        ticks = {"range": [0, top], "tickvals": [0, _round_down(top)]}
        layout[f"yaxis{suffix}"] = {"domain": domain, "fixedrange": True, "anchor": "x", **ticks}
        label = {"x": 0, "xref": "paper", "xanchor": "left", "y": high, "yref": "paper", "yanchor": "bottom", "showarrow": False}
        layout["annotations"].append({**label, "text": f"worker {rank}", "font": {"size": 12, "color": "--muted"}})
        for name, colour in COLOURS.items():
            area = {"type": "scatter", "mode": "lines", "line": {"width": 0}, "fillcolor": colour, "stackgroup": f"worker{rank}"}
            place = {"name": name, "yaxis": f"y{suffix}", "y": [value or 0 for value in plain(phases[name])]}
            traces.append({**area, **place, "hovertemplate": f"%{{y:.2f}} ms<extra>{rank} {name}</extra>"})
    layout["xaxis"] = {"anchor": f"y{len(times)}" if len(times) > 1 else "y", "title": {"text": "step"}}
    # With more workers, a box with every phase of each would cover the picture.
    layout["hovermode"] = "x unified" if len(times) <= 4 else "closest"
    return axis.figure(traces, layout.pop("yaxis"), height=inner + _UNDER, **layout)


def run_shares_figure(run: RunData) -> Figure | None:
    """What share of its time each worker spent on what, over the run; with its microbatches if the summary has them."""
    seconds = phase_totals(run)
    if not seconds:
        return None
    workers = len(seconds["compute"])
    parts, of = run.per_worker("microbatches"), run.settings.get("microbatches")
    whole = f" of {of}" if isinstance(of, int) else ""
    told = [f" ({part:.3g}{whole})" for part in parts] if len(parts) == workers else [""] * workers
    return shares_figure([f"worker {rank}{words}" for rank, words in enumerate(told)], seconds)


def shares_figure(names: Sequence[str], seconds: Mapping[str, Sequence[float]]) -> Figure:
    """A bar for each name, of one length, parted by phase.

    Args:
        seconds: By phase, for each name.
    """
    whole = [sum(spent) or 1.0 for spent in zip(*seconds.values(), strict=True)]
    traces = []
    for phase, column in seconds.items():
        shares = [value / total for value, total in zip(column, whole, strict=True)]
        bar = bars(
            [f"{name} " for name in names],
            [round(100 * share, 2) for share in shares],
            COLOURS[phase],
            name=phase,
            customdata=[round(value, 3) for value in column],
            text=[f"{share:.0%}" if share > 0.06 else "" for share in shares],
            hover=f"{phase}: %{{x:.1f}}% (%{{customdata:,.2f}} s)",
        )
        inside = {"textposition": "inside", "insidetextanchor": "middle"}
        traces.append({**bar, **inside, "insidetextfont": {"color": _ON.get(phase, "--on-dark"), "size": 12}})
    margin = {"t": 4, "b": 4, "l": 4}
    layout = bar_layout(xaxis={"visible": False, "range": [0, 100]}, barmode="stack", bargap=0.28, margin=margin)
    return Figure(data=traces, layout=layout, height=len(names) * _BAR + 12)


def bytes_figure(values: Sequence[float], colour: str, label: str, *, limit: float | None = None) -> Figure:
    """A bar of bytes for each worker, and a line that they are measured against."""
    largest = max([*values, limit or 0.0])
    scale, unit = next(((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if largest >= s), (1.0, "B"))
    bar = bars(
        [f"worker {rank} " for rank in range(len(values))],
        [round(value / scale, 3) for value in values],
        colour,
        text=[formats.data_size(value) for value in values],
        hover="%{text}",
        insidetextanchor="start",
    )
    layout = bar_layout(xaxis={"title": {"text": f"{label} ({unit})"}, "rangemode": "tozero", "nticks": 5}, bargap=0.35)
    if limit:
        place = limit / scale
        edge = {"color": "--ink", "width": 1.5, "dash": "dash"}
        layout["shapes"] = [{"type": "line", "x0": place, "x1": place, "y0": 0, "y1": 1, "yref": "paper", "line": edge}]
        words = {"text": "all-reduce bound", "font": {"size": 11.5, "color": "--muted"}, "showarrow": False}
        layout["annotations"] = [{"x": place, "y": 1, "yref": "paper", "yanchor": "bottom", "xanchor": "right", **words}]
        layout["margin"] = {"t": 18, "l": 4}
    return Figure(data=[bar], layout=layout, height=len(values) * _BAR + 66)


def _with_course(values: Column, colour: str, name: str, *, hovertemplate: str) -> list[Trace]:
    """A faint line of all values and, where there are many, a strong one of their course."""
    each = line(values, f"{colour}-soft", name, width=1, hovertemplate=hovertemplate)
    if len(values) < _SMOOTHED_FROM:
        return [each]
    return [each, line(course_of(values), colour, "smoothed", width=2.5, hovertemplate=hovertemplate)]


def _seconds_at(run: RunData, steps: Sequence[int]) -> Places:
    """Seconds of training after each of these steps."""
    places = np.searchsorted(run.steps, steps, side="right") - 1
    elapsed = run.elapsed_s
    return [round(float(elapsed[place]), 3) if place >= 0 else 0.0 for place in places]


def _marks(places: Places) -> list[Layout]:
    """Dotted vertical lines."""
    line = {"color": "--mark", "width": 1.5, "dash": "dot"}
    return [{"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line} for x in places]


def _ceiling(means: Sequence[dict[str, Column]]) -> float:
    """The top of the rows: what nearly all steps stay below, so that one slow step does not flatten the rest."""
    totals = np.concatenate([np.sum([phases[name] for name in COLOURS], axis=0) for phases in means])
    totals = totals[np.isfinite(totals)]
    return float(max(np.percentile(totals, 98) * 1.15, 1e-3)) if len(totals) else 1.0


def _round_down(value: float) -> float:
    """To one or two significant digits, for a tick."""
    power = 10.0 ** np.floor(np.log10(value))
    return float(f"{max(step for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if step * power <= value) * power:.4g}")
