"""A run's sections: what was learned, what the workers did, how fast, what it took. *Local.*"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

import numpy as np

from unisono.observe import formats
from unisono.report.attachments import Attachment, DataTable, TextSample
from unisono.report.figure import Figure
from unisono.report.run_data import RunData, is_number
from unisono.report.run_figures import (
    Axis,
    bytes_figure,
    gradient_figure,
    loss_figure,
    metric_figure,
    run_shares_figure,
    schedule_figure,
    throughput_figure,
    timeline_figure,
)
from unisono.report.section import Section, bullets, table
from unisono.report.worker_times import LOGGED_WORKERS, all_reduce_bound, bytes_sent, phase_totals, waiting_share

_SHOWN_EVENTS = 50
_SHOWN_METRICS = 8
_KINDS = {"generation": "membership", "resumed": "restart"}


def trouble_sections(run: RunData) -> Iterator[Section]:
    """What stands in the way of a whole report."""
    texts = list(run.troubles)
    if not len(run.steps) and not run.summary and not texts:
        texts = [f"{run.url} holds no step yet. If this stays so, check that it is the run_dir of a Trainer."]
    if texts:
        title = "Some files could not be read" if run.troubles else "Nothing has been logged"
        yield Section(key="troubles", kicker="note", title=title, body=bullets(map(escape, texts)))


def learning_section(run: RunData, axis: Axis) -> Section:
    """The loss."""
    loss = run.column("loss")
    known = loss[np.isfinite(loss)]
    few = max(1, min(10, len(known) // 10))
    if not len(known):
        title = "The loss is not finite"
    elif len(known) == 1:
        title = f"The loss begins at {formats.number(known[0])}"
    else:
        first, last = float(np.mean(known[:few])), float(np.mean(known[-few:]))
        verb = "fell" if last < first else "rose" if last > first else "stayed"
        title = f"The loss {verb} from {formats.number(first)} to {formats.number(last)}"
    text = f"Means of the first and the last {few} steps." if few > 1 else ""
    skipped = run.column("skipped")
    left_out = int(np.max(skipped[np.isfinite(skipped)], initial=0))
    if left_out:
        text += f" {formats.count(left_out, 'step')} left out: the loss or the gradient was not finite."
    return Section(key="loss", kicker="learning", title=title, text=text.strip(), figure=loss_figure(run, axis))


def metric_sections(run: RunData, axis: Axis) -> Iterator[Section]:
    """Results of evaluations, a figure for each metric that was measured more than once."""
    steps: dict[str, dict[int, float]] = {}
    for step, results in run.evaluations:
        for name, value in results.items():
            if np.isfinite(value):
                steps.setdefault(name, {})[step] = value
    several = [(name, found) for name, found in steps.items() if len(found) > 1]
    for number, (name, found) in enumerate(several[:_SHOWN_METRICS]):
        first, last = min(found), max(found)
        yield Section(
            key=f"metric-{number}",
            kicker="evaluation",
            title=f"{name}: from {formats.number(found[first])} to {formats.number(found[last])}",
            text=f"Measured {_times(len(found))}, after step {first:,} to {last:,}.",
            figure=metric_figure(run, axis, name),
            half=len(several) > 1,
        )


def attachment_section(number: int, one: Attachment) -> Section:
    """What the application attached."""
    frame: dict[str, Any] = {"key": f"picture-{number}", "kicker": "from the application", "text": one.finding}
    match one.picture:
        case Figure():
            return Section(**frame, title=one.title, figure=one.picture, half=not one.wide)
        case TextSample(text=text, prompt=prompt):
            begun = f"<b>{escape(prompt)}</b>" if prompt else ""
            return Section(**frame, title=one.title, body=f'<pre class="sample">{begun}{escape(text)}</pre>')
        case DataTable(columns=columns, rows=rows):
            cells = [[formats.number(value) if isinstance(value, float) else value for value in row] for row in rows]
            numeric = [bool(rows) and all(is_number(row[place]) for row in rows) for place in range(len(columns))]
            body = table(columns, cells, numeric=numeric)
            return Section(**frame, title=one.title, body=body, half=len(columns) <= 3 and not one.wide)


def workers_section(run: RunData, axis: Axis) -> Section:
    """Where each worker's time went, over the run, and what happened to the workers."""
    waiting = waiting_share(run)
    title = "Where each worker's time went"
    if waiting is not None:
        title = f"Workers waited {formats.percent(waiting)} of their time" if run.workers > 1 else "A single worker never waits"
    changes = sum(event.kind == "generation" for event in run.events)
    lagging = sum(event.kind == "straggler" for event in run.events)
    text = "Milliseconds of each step; other is what a step spends on checkpoints, the log and callbacks."
    if run.workers > LOGGED_WORKERS:
        text += f" The log holds the times of {LOGGED_WORKERS} workers."
    if changes:
        text += f" Membership changed {_times(changes)}."
    if lagging:
        text += f" {formats.count(lagging, 'straggler')} named."
    items = [
        f"<b>step {event.step:,}</b> <em>{escape(_KINDS.get(event.kind, event.kind))}</em> {escape(event.text)}"
        for event in run.events[:_SHOWN_EVENTS]
    ]
    if len(run.events) > _SHOWN_EVENTS:
        items.append(f"and {len(run.events) - _SHOWN_EVENTS:,} more")
    figure = timeline_figure(run, axis)
    return Section(key="workers", kicker="workers", title=title, text=text, figure=figure, body=bullets(items))


def speed_sections(run: RunData, axis: Axis) -> Iterator[Section]:
    """Throughput, and shares of the time."""
    rates = run.column("samples_per_second")
    known = rates[np.isfinite(rates)]
    if len(known):
        rate = run.summary.get("samples_per_second") if run.has_ended else None
        title = f"{formats.rate(rate if is_number(rate) else float(np.median(known)))} samples per second"
        slow = float(np.percentile(known, 10))
        text = f"Nine tenths of the steps ran at {formats.rate(slow)} or more." if len(known) >= 20 else ""
        yield Section(key="speed", kicker="throughput", title=title, text=text, figure=throughput_figure(run, axis), half=True)
    shares = run_shares_figure(run)
    if shares is not None:
        seconds = phase_totals(run)
        computing = sum(seconds["compute"]) / (sum(map(sum, seconds.values())) or 1.0)
        title = f"{formats.percent(computing)} of the time was computing"
        text = (
            "Since the last start of the run. " if run.manifest.get("resumed_from_step") and run.per_worker("compute_s") else ""
        )
        if run.per_worker("microbatches"):
            text += "In brackets: a worker's microbatches of each step."
        yield Section(key="shares", kicker="time", title=title, text=text.strip(), figure=shares, half=True)


def schedule_sections(run: RunData, axis: Axis) -> Iterator[Section]:
    """Learning rate and gradient norm."""
    rates = run.column("lr")
    known = rates[np.isfinite(rates)]
    if len(known):
        name = run.settings.get("scheduler") or "No schedule"
        ends = f"{known[0]:.3g} throughout" if known.min() == known.max() else f"from {known[0]:.3g} to {known[-1]:.3g}"
        figure = schedule_figure(run, axis)
        yield Section(key="schedule", kicker="learning rate", title=f"{name}: {ends}", figure=figure, half=True)
    norms = run.column("gradient_norm")
    finite = norms[np.isfinite(norms)]
    if len(finite):
        limit = run.settings.get("max_grad_norm")
        title = f"Gradient norm {formats.number(float(np.median(finite)))} at the median step"
        if is_number(limit):
            clipped = float(np.mean(finite > limit))
            title = f"Clipping to {limit:g} changed {formats.percent(clipped)} of the steps"
        yield Section(key="gradient", kicker="gradient", title=title, figure=gradient_figure(run, axis), half=True)


def traffic_sections(run: RunData) -> Iterator[Section]:
    """Bytes that workers send, beside what an all-reduce must send."""
    sent = bytes_sent(run)
    if not sent or run.workers < 2:
        return
    mean, bound = sum(sent) / len(sent), all_reduce_bound(run)
    title = f"A worker sends {formats.data_size(mean)} a step"
    text = ""
    if bound:
        ratio = mean / bound
        title += f": {'as much as' if abs(ratio - 1) < 0.02 else f'{ratio:.2f} times the bytes of'} a ring all-reduce"
        text = (
            f"A ring all-reduce of the gradients sends 2 (W - 1) / W times their size: {formats.data_size(bound)}. What a worker "
            "reads in another's memory counts as sent. Fewer bytes are possible: workers of one host may share one copy of the "
            "weights, and large tables send only the rows that were touched."
        )
    figure = bytes_figure(sent, "--communication", "sent in a step", limit=bound)
    yield Section(key="traffic", kicker="bytes on the wire", title=title, text=text, figure=figure, half=True)


def memory_sections(run: RunData) -> Iterator[Section]:
    """Peak memory of each worker."""
    peaks = run.per_worker("peak_memory_bytes")
    if peaks:
        title = f"{formats.data_size(max(peaks))} at most in a worker"
        text = "Peak resident memory; pages that workers share count in each of them."
        figure = bytes_figure(peaks, "--teal", "peak memory")
        yield Section(key="memory", kicker="memory", title=title, text=text, figure=figure, half=True)


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count:,} times")
