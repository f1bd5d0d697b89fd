"""Several runs on one page: who ended with the same weights, and where they went different ways. *Local.*"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import numpy as np

from unisono.observe import formats
from unisono.report.figure import Figure, Trace, colours, line
from unisono.report.run_data import RunData, is_number
from unisono.report.run_figures import shares_figure
from unisono.report.run_page import Page, facts
from unisono.report.section import Section, bullets, paired, table
from unisono.report.series import Column, Stretches, course_of, plain_steps, scale_for
from unisono.report.worker_times import COLOURS, bytes_sent, phase_totals, waiting_share

_SHOWN_DIFFERENCES = 40


@np.errstate(all="ignore")
def comparison_page(runs: Sequence[RunData]) -> Page:
    """A page that sets two or more runs beside each other."""
    digests = [run.weights_sha256 for run in runs]
    known = len({digest for digest in digests if digest})
    state, headline = "stopped", "Not all of these runs have ended"
    if known > 1:
        headline = f"{known} different results"
        if None in digests:
            headline += f", {formats.count(digests.count(None), 'run')} without one"
    elif None not in digests:
        state, headline = "ended", "All ended with the same weights, bit for bit"
    head = (
        f'<p class="state {state}"><span></span>{escape(headline)}</p><h1>{len(runs)} runs</h1>'
        f'<p class="where">{escape(", ".join(run.name for run in runs))}</p>'
    )
    sections = [*_troubles(runs), _overview(runs), *_learning(runs), *_speeds(runs), *_times(runs), *_differences(runs)]
    return Page(title=f"{len(runs)} runs: {headline}", head=head, sections=paired(sections), ended=True)


def _troubles(runs: Sequence[RunData]) -> Iterator[Section]:
    texts = [f"{run.name}: {text}" for run in runs for text in run.troubles]
    texts += [f"{run.name}: {run.url} holds no step." for run in runs if not len(run.steps)]
    if texts:
        yield Section(key="troubles", kicker="note", title="Not everything could be read", body=bullets(map(escape, texts)))


def _overview(runs: Sequence[RunData]) -> Section:
    rows: list[dict[str, str]] = []
    for run in runs:
        row = {"run": run.name, **{name: value for name, value, _ in facts(run)}}
        if (waiting := waiting_share(run)) is not None:
            row["waiting"] = formats.percent(waiting)
        if sent := bytes_sent(run):
            row["sent in a step"] = formats.data_size(sum(sent) / len(sent))
        rows.append({**row, "weights": (run.weights_sha256 or "")[:12]})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    body = table(columns, [[row.get(name, "") for name in columns] for row in rows], numeric=[name != "run" for name in columns])
    return Section(key="overview", kicker="at the end", title=_fastest(runs), body=body)


def _fastest(runs: Sequence[RunData]) -> str:
    rates = [(run.summary.get("samples_per_second"), run.name) for run in runs]
    known = [(rate, name) for rate, name in rates if is_number(rate) and rate > 0]
    if len(known) < 2:
        return "What the runs came to"
    fastest, slowest = max(known), min(known)
    return f"{fastest[1]} is the fastest: {fastest[0] / slowest[0]:.2f} times {slowest[1]}"


def _learning(runs: Sequence[RunData]) -> Iterator[Section]:
    logged = [run for run in runs if len(run.steps)]
    if logged:
        figure = _overlay(logged, "loss", "loss", course=True)
        yield Section(key="loss", kicker="learning", title=_parting(logged), figure=figure)


def _parting(runs: Sequence[RunData]) -> str:
    """Until which step the losses are the same number, to the last bit."""
    if len(runs) < 2:
        return f"The loss of {runs[0].name}"
    first, *others = [dict(zip(run.steps.tolist(), run.column("loss").tolist(), strict=True)) for run in runs]
    common = sorted(set(first).intersection(*others))
    if not common:
        return "The runs have no step in common"
    for step in common:
        if len({repr(losses[step]) for losses in (first, *others)}) > 1:  # as text nan is equal to nan
            return (
                "The losses differ from the first step on" if step == common[0] else f"The losses diverge at step {int(step):,}"
            )
    return f"The losses are the same to the last bit, over {formats.count(len(common), 'step')}"


def _speeds(runs: Sequence[RunData]) -> Iterator[Section]:
    logged = [run for run in runs if np.isfinite(run.column("samples_per_second")).any()]
    if logged:
        figure = _overlay(logged, "samples_per_second", "samples per second")
        yield Section(key="speed", kicker="throughput", title="Samples per second", figure=figure, half=True)


def _times(runs: Sequence[RunData]) -> Iterator[Section]:
    """Where the workers' time went, a bar for each run."""
    totals = {run.name: seconds for run in runs if (seconds := phase_totals(run))}
    if totals:
        phases = {name: [sum(seconds.get(name, [])) for seconds in totals.values()] for name in COLOURS}
        figure = shares_figure([*totals], phases)
        yield Section(key="shares", kicker="time", title="Where the workers' time went", figure=figure, half=True)


def _differences(runs: Sequence[RunData]) -> Iterator[Section]:
    flat = [_flat({"settings": run.settings, "fingerprint": run.fingerprint, "workers": run.workers}) for run in runs]
    every = dict.fromkeys(name for one in flat for name in one)
    names = [name for name in every if len({one.get(name, "") for one in flat}) > 1]
    settings = [name for name in names if name.startswith("settings")]
    builds = any(name.startswith("fingerprint") for name in names)
    if settings:
        title = f"{formats.count(len(settings), 'setting')} differ" if len(settings) > 1 else "One setting differs"
    else:
        title = f"Same settings, {'another' if builds else 'same'} fingerprint"
    rows = [[name, *(one.get(name, "") for one in flat)] for name in names[:_SHOWN_DIFFERENCES]]
    more = f"{len(names) - _SHOWN_DIFFERENCES} more differ." if len(names) > _SHOWN_DIFFERENCES else ""
    body = table(["", *(run.name for run in runs)], rows) if rows else ""
    yield Section(key="differences", kicker="settings", title=title, text=more, body=body)


def _flat(value: object, name: str = "") -> dict[str, str]:
    """Nested settings as text by dotted name."""
    items: list[tuple[object, object]]
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        items = list(enumerate(value))
    else:
        return {name: str(value)}
    return {key: text for part, item in items for key, text in _flat(item, f"{name}.{part}" if name else str(part)).items()}


def _overlay(runs: Sequence[RunData], column: str, label: str, *, course: bool = False) -> Figure:
    """A line for each run, over steps and over seconds."""
    traces: list[Trace] = []
    seconds: list[list[int | float]] = []
    drawn: list[Column] = []
    for number, (run, colour) in enumerate(zip(runs, colours(len(runs)), strict=True)):
        stretches = Stretches(len(run.steps))
        values = stretches.mean(run.column(column))
        values = course_of(values) if course and len(values) >= 12 else values
        # Equal lines lie on each other: thinner ones on top let the ones below be seen.
        width = min(5.0, 1.5 * (len(runs) - number))
        more: dict[str, Any] = {"x": plain_steps(stretches.last(run.steps)), "hovertemplate": "%{y:.5g}", "opacity": 0.9}
        traces.append(line(values, colour, run.name, width=width, **more))
        seconds.append(plain_steps(stretches.last(run.elapsed_s)))
        drawn.append(values)
    axis = scale_for(np.concatenate(drawn)) if course else {"rangemode": "tozero", "tickformat": ",~s"}
    return Figure(
        data=traces,
        layout={"yaxis": {"title": {"text": label}, **axis}, "xaxis": {"title": {"text": "step"}}},
        seconds={"x": seconds, "layout": {"xaxis": {"title": {"text": "seconds of training"}}}},
        height=340 if course else 260,
    )
