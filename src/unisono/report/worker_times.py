"""What the workers spent their time on, and what they had to send, as far as the run directory says. *Local.*"""

from __future__ import annotations

import numpy as np

from unisono.observe.timing import PHASES
from unisono.report.run_data import RunData, is_number
from unisono.report.series import Column

COLOURS = {name: f"--{name}" for name in ("compute", "communication", "waiting", "data", "other")}
"""Phases and their colours, in the order in which they are stacked."""
LOGGED_WORKERS = 16
"""The log holds the times of so many workers."""
_PER_WORKER = "compute_s_"
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


def worker_times(run: RunData) -> list[dict[str, Column]]:
    """For each worker that the log knows, seconds a step by phase, float64 ``[lines]``; NaN where it was not there."""
    numbers = [name.removeprefix(_PER_WORKER) for name in run.columns if name.startswith(_PER_WORKER)]
    ranks = 1 + max((int(number) for number in numbers if number.isdecimal()), default=0)
    logged = np.zeros(len(run.steps), dtype=bool)
    for rank in range(1, ranks):
        logged |= np.isfinite(run.column(f"{_PER_WORKER}{rank}"))
    present = np.zeros(len(run.steps))  # workers at each line, as far as events tell; 0 where nothing does
    for event in run.events:
        if event.workers is not None:
            present[run.steps > event.step] = event.workers
    times: list[dict[str, Column]] = [{name: run.column(f"{name}_s") for name in PHASES}]
    for rank in range(1, ranks):
        here = (present == 0) | (present > rank)
        times.append({name: np.where(here, _spread(run.column(f"{name}_s_{rank}"), logged), np.nan) for name in PHASES})
    step_s = run.column("step_s")
    for phases in times:
        known = np.sum([phases[name] for name in PHASES], axis=0)
        phases["other"] = np.where(np.isfinite(known), np.maximum(step_s - known, 0.0), np.nan)
    return times


def phase_totals(run: RunData) -> dict[str, list[float]]:
    """Seconds of each worker by phase: the summary's of the last start, else the log's of the whole run (or empty)."""
    lists: dict[str, list[float]] = {name: run.per_worker(f"{name}_s") for name in PHASES}
    if all(lists.values()) and len({len(values) for values in lists.values()}) == 1:
        seconds = run.summary.get("seconds")
        if isinstance(seconds, (int, float)):
            lists["other"] = [max(0.0, seconds - sum(spent)) for spent in zip(*lists.values(), strict=True)]
        return {name: lists[name] for name in COLOURS if name in lists}
    if not np.isfinite(run.column("compute_s")).any():
        return {}
    times = worker_times(run)
    return {name: [float(np.nansum(phases[name])) for phases in times] for name in COLOURS}


def waiting_share(run: RunData) -> float | None:
    """Share of all workers' time spent waiting, 0 to 1; None if it is not known."""
    seconds = phase_totals(run)
    total = sum(map(sum, seconds.values()))
    return sum(seconds["waiting"]) / total if total > 0 else None


def bytes_sent(run: RunData) -> list[float]:
    """Bytes that each worker sent in a step, on average; those of worker 0 alone if no more is known."""
    average = run.summary.get("bytes_sent_per_step")
    return run.per_worker("bytes_sent") or ([float(average)] if is_number(average) else [])


def all_reduce_bound(run: RunData) -> float | None:
    """Bytes that each of W workers must send a step in a ring all-reduce of all gradients: 2 (W - 1) / W times their size."""
    size = parameter_bytes(run)
    return None if size is None or run.workers < 1 else 2 * (run.workers - 1) / run.workers * size


def parameter_bytes(run: RunData) -> int | None:
    """Size of all parameters, from the shapes in the manifest; None if it does not say."""
    parameters = run.settings.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        return None
    total = 0
    for text in parameters.values():
        dtype, _, shape = str(text).partition("[")
        sizes = [part.strip() for part in shape.rstrip("]").split(",") if part]
        if dtype not in _BYTES or not all(size.isdecimal() for size in sizes):
            return None
        total += _BYTES[dtype] * int(np.prod([int(size) for size in sizes], dtype=np.int64))
    return total


def _spread(column: Column, logged: Column) -> Column:
    """A block's average, written in its last line, for all lines of the block; the last block's for those after it."""
    places = np.flatnonzero(logged)
    if len(places) == 0:
        return column
    following = np.searchsorted(places, np.arange(len(column)))
    return column[places[np.minimum(following, len(places) - 1)]]
