"""Several runs on one page: who ended with the same weights, and where they went different ways. *Local.*"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape

import numpy as np

from unisono.observe import formats
from unisono.report.figures import Figure, Trace, colours, course_of, line, scale_for
from unisono.report.run_data import Column, RunData
from unisono.report.run_page import Page
from unisono.report.section import Section, paired, table
from unisono.report.series import Stretches, plain_steps
from unisono.report.worker_figures import COLOURS, shares_figure, waiting_share

_SHOWN_DIFFERENCES = 40


def comparison_page(runs: Sequence[RunData]) -> Page:
    """A page that sets two or more runs beside each other."""
    names = ", ".join(run.name for run in runs)
    kinds = _weights(runs)
    state, headline = ("ended", "All ended with the same weights, bit for bit")
    if len(kinds) != 1 or None in kinds:
        unknown = sum(len(kinds.get(digest, ())) for digest in (None,))
        known = len(kinds) - (None in kinds)
        state = "stopped"
        headline = f"{known} different results" if known > 1 else "Not all of these runs have ended"
        if known > 1 and unknown:
            headline += f", {formats.count(unknown, 'run')} without one"
    head = (
        f'<p class="state {state}"><span></span>{escape(headline)}</p><h1>{escape(str(len(runs)))} runs</h1>'
        f'<p class="where">{escape(names)}</p>'
    )
    sections = paired(
        [
            *_troubles(runs),
            _overview(runs),
            *_losses(runs),
            *_speeds(runs),
            *_times(runs),
            *_differences(runs),
        ]
    )
    return Page(title=f"{len(runs)} runs: {headline}", head=head, sections=sections, ended=True)


def _weights(runs: Sequence[RunData]) -> dict[str | None, list[str]]:
    """Names of the runs by digest; None stands for runs that have none (yet)."""
    found: dict[str | None, list[str]] = {}
    for run in runs:
        digest = run.summary.get("weights_sha256") if run.has_ended else None
        found.setdefault(digest if isinstance(digest, str) and digest else None, []).append(run.name)
    return found


def _troubles(runs: Sequence[RunData]) -> Iterator[Section]:
    texts = [f"{run.name}: {text}" for run in runs for text in run.troubles]
    texts += [f"{run.name}: {run.url} holds no step." for run in runs if not len(run.steps)]
    if texts:
        body = f'<ul class="events">{"".join(f"<li>{escape(text)}</li>" for text in texts)}</ul>'
        yield Section(key="troubles", kicker="note", title="Not everything could be read", body=body)


def _overview(runs: Sequence[RunData]) -> Section:
    metrics: list[str] = []
    for run in runs:
        found = run.summary.get("metrics")
        metrics += [name for name in (found if isinstance(found, dict) else {}) if name not in metrics]
    rows: list[tuple[str, Callable[[RunData], str]]] = [
        ("loss", lambda run: _number(run, "loss", formats.number)),
        *((name, lambda run, name=name: _metric(run, name)) for name in metrics),
        ("steps", lambda run: f"{int(run.steps[-1]):,}" if len(run.steps) else ""),
        ("workers", lambda run: str(run.workers or "")),
        ("samples/s", lambda run: _number(run, "samples_per_second", formats.rate)),
        ("training", lambda run: formats.seconds(float(run.elapsed_s[-1])) if len(run.steps) else ""),
        ("waiting", _waiting),
        ("sent in a step", _sent),
        ("weights", lambda run: str(run.summary.get("weights_sha256") or "")[:12] if run.has_ended else ""),
    ]
    columns = ["run", *(name for name, _ in rows)]
    cells = [[run.name, *(show(run) for _, show in rows)] for run in runs]
    kept = [place for place in range(len(columns)) if place == 0 or any(row[place] for row in cells)]
    body = table(
        [columns[place] for place in kept],
        [[row[place] for place in kept] for row in cells],
        numeric=[place > 0 for place in kept],
    )
    return Section(key="overview", kicker="at the end", title=_best(runs), body=body)


def _best(runs: Sequence[RunData]) -> str:
    known = [(rate, run.name) for run in runs if (rate := _value(run, "samples_per_second"))]
    if len(known) < 2:
        return "What the runs came to"
    fastest, slowest = max(known), min(known)
    return f"{fastest[1]} is the fastest: {fastest[0] / slowest[0]:.2f} times {slowest[1]}"


def _losses(runs: Sequence[RunData]) -> Iterator[Section]:
    logged = [run for run in runs if len(run.steps)]
    if not logged:
        return
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
        values = [first[step], *(other[step] for other in others)]
        if any(value != values[0] and not (np.isnan(value) and np.isnan(values[0])) for value in values):
            return "The losses differ from the first step on" if step == common[0] else f"The losses part at step {int(step):,}"
    return f"The losses are the same to the last bit, over {formats.count(len(common), 'step')}"


def _speeds(runs: Sequence[RunData]) -> Iterator[Section]:
    logged = [run for run in runs if np.isfinite(run.column("samples_per_second")).any()]
    if logged:
        figure = _overlay(logged, "samples_per_second", "samples per second")
        yield Section(key="speed", kicker="throughput", title="Samples per second", figure=figure, half=True)


def _times(runs: Sequence[RunData]) -> Iterator[Section]:
    """Where the workers' time went, a bar for each run."""
    bars = [(run, figure) for run in runs if (figure := shares_figure(run)) is not None]
    if not bars:
        return
    traces: list[Trace] = []
    for name, colour in COLOURS.items():
        shares = [
            float(np.mean(next(trace["x"] for trace in figure.data if trace["name"] == name)))
            if any(trace["name"] == name for trace in figure.data)
            else 0.0
            for _, figure in bars
        ]
        pattern = next((trace for _, figure in bars for trace in figure.data if trace["name"] == name), None)
        if pattern is None:
            continue
        given = {
            "y": [f"{run.name} " for run, _ in bars],
            "x": [round(share, 2) for share in shares],
            "text": [f"{share:.0f}%" if share > 6 else "" for share in shares],
            "hovertemplate": f"{name}: %{{x:.1f}}%<extra></extra>",
        }
        kept = {key: value for key, value in pattern.items() if key != "customdata"}
        traces.append({**kept, **given, "marker": {"color": colour}})
    figure = Figure(
        data=traces,
        layout=bars[0][1].layout,
        legend=[(colour, name) for name, colour in COLOURS.items()],
        height=len(bars) * 34 + 12,
    )
    yield Section(key="shares", kicker="time", title="Where the workers' time went", figure=figure, half=True)


def _differences(runs: Sequence[RunData]) -> Iterator[Section]:
    flat = [_flat({"settings": run.settings, "fingerprint": run.fingerprint, "workers": run.workers}) for run in runs]
    names = [name for name in dict.fromkeys(name for one in flat for name in one) if len({one.get(name, "") for one in flat}) > 1]
    if not any(flat):
        return
    rows = [[name, *(one.get(name, "") for one in flat)] for name in names[:_SHOWN_DIFFERENCES]]
    more = f"{len(names) - _SHOWN_DIFFERENCES} more differ." if len(names) > _SHOWN_DIFFERENCES else ""
    settings = [name for name in names if name.startswith("settings")]
    ground = [name for name in names if name.startswith("fingerprint")]
    if settings:
        title = f"{formats.count(len(settings), 'setting')} differ" if len(settings) > 1 else "One setting differs"
    else:
        title = "Same settings" + (", other ground" if ground else ", same ground")
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
    for run, colour in zip(runs, colours(len(runs)), strict=True):
        stretches = Stretches.of(len(run.steps))
        values = stretches.mean(run.column(column))
        if course and len(values) >= 12:
            values = course_of(values)
        drawn.append(values)
        traces.append(
            line(values, colour, run.name, x=plain_steps(stretches.last(run.steps)), hovertemplate="%{y:.5g}", opacity=0.9)
        )
        seconds.append(plain_steps(stretches.last(run.elapsed_s)))
    # Equal lines lie on each other: thinner ones on top let the ones below be seen.
    for place, trace in enumerate(traces):
        trace["line"] = {**trace["line"], "width": min(5.0, 1.5 + 1.5 * (len(traces) - 1 - place))}
    axis = scale_for(np.concatenate(drawn)) if course else {"rangemode": "tozero", "tickformat": ",~s"}
    return Figure(
        data=traces,
        layout={"yaxis": {"title": {"text": label}, **axis}, "xaxis": {"title": {"text": "step"}}},
        seconds={"x": seconds, "layout": {"xaxis": {"title": {"text": "seconds of training"}}}},
        legend=[(colour, run.name) for run, colour in zip(runs, colours(len(runs)), strict=True)],
        height=340 if course else 260,
    )


def _value(run: RunData, name: str) -> float | None:
    found = run.summary.get(name)
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None


def _number(run: RunData, name: str, show: Callable[[float], str]) -> str:
    value = _value(run, name)
    return "" if value is None else show(value)


def _metric(run: RunData, name: str) -> str:
    metrics = run.summary.get("metrics")
    value = metrics.get(name) if isinstance(metrics, dict) else None
    return formats.number(float(value)) if isinstance(value, (int, float)) else ""


def _sent(run: RunData) -> str:
    sent = run.per_worker("bytes_sent")
    return formats.data_size(sum(sent) / len(sent)) if sent else _number(run, "bytes_sent_per_step", formats.data_size)


def _waiting(run: RunData) -> str:
    share = waiting_share(run)
    return "" if share is None else formats.percent(share)
