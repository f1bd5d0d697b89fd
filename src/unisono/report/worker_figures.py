"""Figures of what the workers did: the time line, shares, traffic, memory. *Local.*"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from unisono.observe import formats
from unisono.observe.timing import PHASES
from unisono.report.figures import Axis, Figure, Trace
from unisono.report.run_data import Column, RunData
from unisono.report.series import plain

COLOURS = {
    "compute": "--compute",
    "communication": "--communication",
    "waiting": "--waiting",
    "data": "--data",
    "other": "--other",
}
"""In the order in which they are stacked."""
LOGGED_WORKERS = 16
"""The log holds the times of so many workers."""
_ON = {"waiting": "--on-light", "other": "--on-other"}
_ROW, _GAP = 68, 22
"""Pixels of a worker's row in the time line, and between rows."""
_BAR = 34


def worker_times(run: RunData) -> list[dict[str, Column]]:
    """For each worker that the log knows, seconds a step by phase, float64 ``[lines]``; NaN where it was not there."""
    ranks = 1 + max((int(name[len("compute_s_") :]) for name in run.columns if _is_per_worker(name)), default=0)
    logged = np.zeros(len(run.steps), dtype=bool)
    for rank in range(1, ranks):
        logged |= np.isfinite(run.column(f"compute_s_{rank}"))
    present = _workers_at(run)
    times: list[dict[str, Column]] = [{name: run.column(f"{name}_s") for name in PHASES}]
    for rank in range(1, ranks):
        there = (present == 0) | (present > rank)
        times.append({name: np.where(there, _spread(run.column(f"{name}_s_{rank}"), logged), np.nan) for name in PHASES})
    step_s = run.column("step_s")
    for phases in times:
        known = np.sum([phases[name] for name in PHASES], axis=0)
        phases["other"] = np.where(np.isfinite(known), np.maximum(step_s - known, 0.0), np.nan)
    return times


def timeline_figure(run: RunData, axis: Axis) -> Figure:
    """Milliseconds of a step by phase, a row for each worker, over the run, with events marked across all rows."""
    times = worker_times(run)
    means = [{name: axis.stretches.mean(phases[name] * 1000) for name in COLOURS} for phases in times]
    top = _ceiling(means)
    height = len(times) * (_ROW + _GAP) + 62
    inner = height - 62
    traces: list[Trace] = []
    layout: dict[str, Any] = {"annotations": [], "hovermode": "x unified", "margin": {"t": 20, "b": 42}}
    for rank, phases in enumerate(means):
        suffix = "" if rank == 0 else str(rank + 1)
        high = 1 - rank * (_ROW + _GAP) / inner
        layout[f"yaxis{suffix}"] = {
            "domain": [max(0.0, high - _ROW / inner), high],
            "range": [0, top],
            "tickvals": [0, _round_down(top)],
            "fixedrange": True,
            "anchor": "x",
        }
        label = {"x": 0, "xref": "paper", "xanchor": "left", "y": high, "yref": "paper", "yanchor": "bottom", "showarrow": False}
        layout["annotations"].append({**label, "text": f"worker {rank}", "font": {"size": 12, "color": "--muted"}})
        for name, colour in COLOURS.items():
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "y": [value or 0 for value in plain(phases[name])],
                    "yaxis": f"y{suffix}",
                    "name": f"{rank} {name}",
                    "stackgroup": f"worker{rank}",
                    "line": {"width": 0},
                    "fillcolor": colour,
                    "hovertemplate": "%{y:.2f} ms",
                }
            )
    layout["xaxis"] = {"anchor": f"y{len(times)}" if len(times) > 1 else "y"}
    if len(times) > 4:  # a box with every phase of every worker would cover the picture
        layout["hovermode"] = "closest"
    return axis.figure(traces, layout, legend=[(colour, name) for name, colour in COLOURS.items()], height=height)


def shares_figure(run: RunData) -> Figure | None:
    """What share of its time each worker spent on what, over the run."""
    seconds = phase_totals(run)
    if not seconds:
        return None
    workers = len(next(iter(seconds.values())))
    whole = [sum(column[rank] for column in seconds.values()) or 1.0 for rank in range(workers)]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "y": _names(run, workers),
            "x": [round(100 * column[rank] / whole[rank], 2) for rank in range(workers)],
            "customdata": [round(value, 3) for value in column],
            "name": name,
            "marker": {"color": COLOURS[name]},
            "text": [f"{value / total:.0%}" if value / total > 0.06 else "" for value, total in zip(column, whole, strict=True)],
            "textposition": "inside",
            "insidetextanchor": "middle",
            "insidetextfont": {"color": _ON.get(name, "--on-dark"), "size": 12},
            "textangle": 0,
            "hovertemplate": f"{name}: %{{x:.1f}}% (%{{customdata:,.2f}} s)<extra></extra>",
        }
        for name, column in seconds.items()
    ]
    layout = {
        "barmode": "stack",
        "bargap": 0.28,
        "hovermode": "closest",
        "xaxis": {"visible": False, "range": [0, 100], "fixedrange": True},
        "yaxis": {"autorange": "reversed", "showgrid": False, "fixedrange": True, "automargin": True},
        "margin": {"t": 4, "b": 4, "l": 4},
    }
    return Figure(data=traces, layout=layout, height=workers * _BAR + 12)


def _names(run: RunData, workers: int) -> list[str]:
    """Of the workers, with their microbatches where the summary tells."""
    parts, of = run.per_worker("microbatches"), run.settings.get("microbatches")
    if len(parts) != workers:
        return [f"worker {rank} " for rank in range(workers)]
    whole = f" of {of}" if isinstance(of, int) else ""
    return [f"worker {rank} ({part:.3g}{whole}) " for rank, part in enumerate(parts)]


def bars_figure(values: Sequence[float], colour: str, label: str, *, limit: float | None = None) -> Figure:
    """A bar of bytes for each worker, and a line that they are measured against."""
    scale, unit = _unit(max([*values, limit or 0.0]))
    layout: dict[str, Any] = {
        "bargap": 0.35,
        "hovermode": "closest",
        "xaxis": {"title": {"text": f"{label} ({unit})"}, "rangemode": "tozero", "fixedrange": True, "nticks": 5},
        "yaxis": {"autorange": "reversed", "showgrid": False, "fixedrange": True, "automargin": True},
        "margin": {"t": 18 if limit else 4, "l": 4},
    }
    if limit:
        edge = {"type": "line", "x0": limit / scale, "x1": limit / scale, "y0": 0, "y1": 1, "yref": "paper"}
        layout["shapes"] = [{**edge, "line": {"color": "--ink", "width": 1.5, "dash": "dash"}}]
        layout["annotations"] = [
            {
                "x": limit / scale,
                "y": 1,
                "yref": "paper",
                "yanchor": "bottom",
                "xanchor": "right",
                "showarrow": False,
                "text": "all-reduce bound",
                "font": {"size": 11.5, "color": "--muted"},
            }
        ]
    bars = {
        "type": "bar",
        "orientation": "h",
        "y": [f"worker {rank} " for rank in range(len(values))],
        "x": [round(value / scale, 3) for value in values],
        "text": [formats.data_size(value) for value in values],
        "textposition": "auto",
        "insidetextanchor": "start",
        "insidetextfont": {"color": "--on-dark"},
        "marker": {"color": colour},
        "hovertemplate": "%{text}<extra></extra>",
    }
    return Figure(data=[bars], layout=layout, height=len(values) * _BAR + 66)


def waiting_share(run: RunData) -> float | None:
    """Share of all workers' time spent waiting, 0 to 1; None if nothing tells."""
    seconds = phase_totals(run)
    total = sum(map(sum, seconds.values()))
    return sum(seconds["waiting"]) / total if seconds and total > 0 else None


def all_reduce_bound(run: RunData) -> float | None:
    """Bytes that each of W workers must send a step in a ring all-reduce of all gradients: 2 (W - 1) / W times their size."""
    size = parameter_bytes(run)
    if size is None or run.workers < 1:
        return None
    return 2 * (run.workers - 1) / run.workers * size


def parameter_bytes(run: RunData) -> int | None:
    """Bytes of all trainable parameters, by the manifest; None if it does not tell."""
    parameters = run.settings.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        return None
    total = 0
    for text in parameters.values():
        dtype, _, shape = str(text).partition("[")
        width = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}.get(dtype)
        sizes = shape.rstrip("]")
        if width is None or not all(part.strip().isdecimal() for part in sizes.split(",") if sizes):
            return None
        total += width * int(np.prod([int(part) for part in sizes.split(",") if sizes], dtype=np.int64))
    return total


def phase_totals(run: RunData) -> dict[str, list[float]]:
    """Seconds of each worker by phase: the summary's of the last start, else the log's of the whole run (or empty)."""
    lists: dict[str, list[float]] = {name: run.per_worker(f"{name}_s") for name in PHASES}
    if all(lists.values()) and len({len(values) for values in lists.values()}) == 1:
        seconds = run.summary.get("seconds")
        if isinstance(seconds, (int, float)):
            rest = [max(0.0, seconds - sum(values[rank] for values in lists.values())) for rank in range(len(lists["compute"]))]
            lists["other"] = rest
        return {name: lists[name] for name in COLOURS if name in lists}
    if not len(run.steps) or not np.isfinite(run.column("compute_s")).any():
        return {}
    times = worker_times(run)
    return {name: [float(np.nansum(phases[name])) for phases in times] for name in COLOURS}


def _spread(column: Column, logged: Column) -> Column:
    """A block's average, written in its last line, for all lines of the block; the last block's for those after it."""
    places = np.flatnonzero(logged)
    if len(places) == 0:
        return column
    following = np.searchsorted(places, np.arange(len(column)))
    return column[places[np.minimum(following, len(places) - 1)]]


def _workers_at(run: RunData) -> Column:
    """How many workers there were at each line, as far as events tell; 0 where nothing does."""
    present = np.zeros(len(run.steps))
    for event in run.events:
        if event.workers is not None:
            present[run.steps > event.step] = event.workers
    return present


def _ceiling(means: Sequence[dict[str, Column]]) -> float:
    """The top of the rows: what nearly all steps stay below, so that one slow step does not flatten the rest."""
    totals = np.concatenate([np.sum([phases[name] for name in COLOURS], axis=0) for phases in means])
    totals = totals[np.isfinite(totals)]
    return float(max(np.percentile(totals, 98) * 1.15, 1e-3)) if len(totals) else 1.0


def _round_down(value: float) -> float:
    """To one or two significant digits, for a tick."""
    power = 10.0 ** np.floor(np.log10(value))
    return float(f"{max(step for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if step * power <= value) * power:.4g}")


def _unit(largest: float) -> tuple[float, str]:
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= scale:
            return scale, unit
    return 1.0, "B"


def _is_per_worker(name: str) -> bool:
    return name.startswith("compute_s_") and name[len("compute_s_") :].isdecimal()
