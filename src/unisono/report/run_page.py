"""What the page says about one run: its headline, its facts, and a section for each question. *Local.*"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

import numpy as np

from unisono.observe import formats
from unisono.report.reproduce import reproduce_sections, run_command
from unisono.report.run_data import RunData, is_number
from unisono.report.run_figures import Axis
from unisono.report.run_sections import (
    attachment_section,
    learning_section,
    memory_sections,
    metric_sections,
    schedule_sections,
    speed_sections,
    traffic_sections,
    trouble_sections,
    workers_section,
)
from unisono.report.section import Section, paired
from unisono.report.worker_times import waiting_share


@dataclass(frozen=True, kw_only=True)
class Page:
    """Everything on a page, in a file or served live."""

    title: str
    """Of the browser's tab."""
    head: str
    """Headline and facts, as HTML."""
    sections: tuple[Section, ...]
    ended: bool
    """Whether nothing more will come."""


@np.errstate(all="ignore")  # numbers of a log may be as large as they like, or none
def run_page(run: RunData, *, live: bool = False) -> Page:
    """The page of one run.

    Args:
        run: The run.
        live: Whether the page is shown while the run may still train.
    """
    pictures = [attachment_section(number, attachment) for number, attachment in enumerate(run.attachments)]
    sections = [*trouble_sections(run), *pictures, *reproduce_sections(run)]
    if len(run.steps):
        axis = Axis.of(run)
        sections = [
            *trouble_sections(run),
            learning_section(run, axis),
            *metric_sections(run, axis),
            *pictures,
            workers_section(run, axis),
            *speed_sections(run, axis),
            *schedule_sections(run, axis),
            *traffic_sections(run),
            *memory_sections(run),
            *reproduce_sections(run),
        ]
    headline = _headline(run, live=live)
    title = f"{run.name}: {headline}" if len(run.steps) else run.name
    return Page(title=title, head=_head(run, headline, live=live), sections=paired(sections), ended=run.has_ended)


def _headline(run: RunData, *, live: bool) -> str:
    if run.has_ended:
        if run.summary.get("finished", True):
            return f"trained in unison on {formats.count(run.workers, 'worker')}"
        return f"stopped after step {run.summary['steps']:,}{_of_planned(run)}"
    if not len(run.steps):
        return "nothing to see yet" if not run.manifest else "no step yet"
    step = f"step {int(run.steps[-1]):,}{_of_planned(run)}"
    return f"training, {step}" if live else f"no end recorded, last at {step}"


def _of_planned(run: RunData) -> str:
    return f" of {run.planned_steps:,}" if run.planned_steps is not None else ""


def _progress(run: RunData, *, live: bool) -> str:
    """How far the run is, as a bar; empty once it is finished, and if its length is not known."""
    planned = run.planned_steps
    if planned is None or not len(run.steps) or (run.has_ended and run.summary.get("finished", True)):
        return ""
    share = min(1.0, float(run.steps[-1]) / planned)
    words = formats.percent(share)
    if live and not run.has_ended and run.seconds_left is not None:
        words += f", about {formats.duration(run.seconds_left)} left"
    return (
        f'<div class="progress" role="progressbar" aria-label="steps" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{100 * share:.0f}"><i style="width:{100 * share:.1f}%"></i></div><p class="left">{escape(words)}</p>'
    )


def _head(run: RunData, headline: str, *, live: bool) -> str:
    state = "live" if live else "open"
    if run.has_ended:
        state = "ended" if run.summary.get("finished", True) else "stopped"
    listed = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(unit)}</small></dd></div>"
        for name, value, unit in facts(run)
    )
    return (
        f'<p class="state {state}"><span></span>{escape(headline[:1].upper() + headline[1:])}</p>'
        f'<h1>{escape(run.name)}</h1><p class="where">{escape(_where(run))}</p>'
        + _progress(run, live=live)
        + (f'<dl class="facts">{listed}</dl>' if listed else "")
    )


def _where(run: RunData) -> str:
    manifest = run.manifest
    fingerprint = run.fingerprint
    words = [
        " ".join(map(str, run_command(run))),
        f"started {str(manifest['started'])[:16].replace('T', ' ')}" if manifest.get("started") else "",
        f"PyTorch {fingerprint['torch']}" if fingerprint.get("torch") else "",
        f"on {fingerprint['device']}" if fingerprint.get("device") else "",
    ]
    return " · ".join(word for word in words if word) or run.url


def facts(run: RunData) -> Iterator[tuple[str, str, str]]:
    """What a run came to: name, value, unit or detail."""
    loss = _last(run, "loss")
    if loss is not None:
        yield "loss", formats.number(loss), ""
    for name, value in run.metrics.items():
        yield name, formats.number(value), ""
    steps = int(run.steps[-1]) if len(run.steps) else run.summary.get("steps")
    if isinstance(steps, int):
        epochs = run.column("epoch")
        yield "steps", f"{steps:,}", f"epoch {int(epochs[-1])}" if len(epochs) and np.isfinite(epochs[-1]) else ""
    samples = _last(run, "samples")
    if samples is not None:
        yield "samples", f"{samples:,.0f}", ""
    rate = _last(run, "samples_per_second")
    if rate is not None:
        yield "speed", formats.rate(rate), "samples/s"
    if len(run.steps) and run.elapsed_s[-1] > 0:
        yield "training", formats.seconds(float(run.elapsed_s[-1])), ""
    if run.workers:
        waiting = waiting_share(run)
        share = f"{formats.percent(waiting)} waiting" if waiting is not None and run.workers > 1 else ""
        yield "workers", str(run.workers), share
    if isinstance(run.summary.get("parameters"), int):
        yield "parameters", f"{run.summary['parameters']:,}", ""


def _last(run: RunData, name: str) -> float | None:
    """The last value of a column, which the summary repeats."""
    if run.has_ended and is_number(run.summary.get(name)):
        return float(run.summary[name])
    values = run.column(name)
    return float(values[-1]) if len(values) and not np.isnan(values[-1]) else None
