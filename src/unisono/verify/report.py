"""What ``unisono verify`` shows: a table for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unisono.observe.strict_json import dumps
from unisono.verify.causes import Cause
from unisono.verify.compare import Difference
from unisono.verify.inquiry import EXIT_STATUS, VerifyReport, WorkerComparison
from unisono.verify.reference import ReferenceResult

_VERDICTS = {
    "equal": "Equal",
    "different": "Different",
    "unknown": "Could not tell",
}


def show(report: VerifyReport, console: Console) -> None:
    """*local*. Writes the report for a person."""
    if report.problem:
        _line(console, f"{_VERDICTS['unknown']}: {report.problem}")
        return
    table = Table(show_edge=False, pad_edge=False, box=None, padding=(0, 2, 0, 0))
    for name in ("compared with 1 worker", "result", "first difference"):
        table.add_column(name, overflow="fold")
    for comparison in report.comparisons:
        table.add_row(comparison.name, *map(Text, _row(comparison)))
    if report.reference is not None:
        table.add_row("plain loop, whole batches", *map(Text, _reference_row(report.reference)))
    console.print(table)
    if report.reference is not None and report.reference.distance.steps:
        console.print()
        console.print(_distances(report.reference))
        for held in report.reference.held:
            _line(console, f"Compared while {held}.")
    for cause in report.causes:
        console.print()
        for line in _cause(cause):
            _line(console, line)
    for comparison in report.comparisons:
        if comparison.difference is not None and not comparison.changes:
            console.print()
            for line in _unexplained(comparison):
                _line(console, line)
    for note in report.notes:
        console.print()
        _line(console, f"Note: {note}")
    console.print()
    _line(console, f"{_verdict(report)} ({report.steps} steps; the script was run {report.runs} times in {report.seconds:.0f} s)")


def to_json(report: VerifyReport) -> str:
    """*local*. The report as strict JSON."""
    facts = dataclasses.asdict(report)
    facts["exit_status"] = EXIT_STATUS[report.verdict]
    facts["causes"] = [dataclasses.asdict(cause) for cause in report.causes]
    for comparison in facts["comparisons"]:
        if comparison["search"]:
            comparison["search"]["changes"] = sorted(comparison["search"]["changes"])
        comparison["equal"] = not comparison["skipped"] and comparison["difference"] is None
    if report.reference is not None:
        for name, distance in (("distance", report.reference.distance), ("rounding", report.reference.rounding)):
            facts["reference"][name] = {
                key: {"usual": distance.usual(key), "largest": distance.largest(key), "steps": values}
                for key, values in distance.steps.items()
            }
    return dumps(json.loads(json.dumps(facts)), indent=2)  # without tuples


def _verdict(report: VerifyReport) -> str:
    same = _same_bits(report)
    if report.verdict == "equal" and any(not cause.fault for cause in report.causes):
        return f"Equal: {same}. Mind what is said above"
    if report.verdict == "equal":
        return f"Equal: {same}, and what a plain loop computes"
    if report.verdict == "unknown" and report.reference is not None:
        if report.reference.problem:
            return f"T{same[1:]}, but the plain loop could not tell: {report.reference.problem}"
        return f"{_VERDICTS['unknown']}: no other number of workers was compared (see above)"
    return _VERDICTS[report.verdict]


def _same_bits(report: VerifyReport) -> str:
    """On which numbers of workers."""
    *numbers, last = sorted({comparison.workers for comparison in report.comparisons if not comparison.skipped} | {1})
    if not numbers:
        return "the same bits again on 1 worker"
    return f"the same bits on {', '.join(map(str, numbers))} and {last} workers"


def _row(comparison: WorkerComparison) -> tuple[str, str]:
    if comparison.skipped:
        return "not compared", comparison.skipped
    if comparison.difference is None:
        return "equal bits", ""
    return "different", _first(comparison.difference)


def _first(difference: Difference) -> str:
    if difference.stage == "failure":
        return f"worker {difference.rank} failed: {difference.what}"
    trainer = f"trainer {difference.trainer + 1}, " if difference.trainer else ""
    text = f"{trainer}step {difference.step}, {difference.where}: {difference.what}"
    if difference.tensor is not None:
        others = f" and {difference.tensors - 1} more tensors" if difference.tensors > 1 else ""
        size = "" if difference.ulp is None else f" by up to {difference.ulp:,} ulp ({difference.largest:.3g})"
        text += f"; then {difference.tensor}{others}{size} on worker {difference.rank}"
    return text


def _reference_row(reference: ReferenceResult) -> tuple[str, str]:
    if reference.problem:
        return "could not tell", reference.problem
    if not reference.beyond:
        return "only rounding", ""
    names = ", ".join(reference.beyond)
    if reference.explained and all(not cause.fault for cause in reference.causes):
        return "a choice", f"{names} beyond rounding: {', '.join(cause.name for cause in reference.causes)}"
    return "different", f"{names} beyond rounding"


def _distances(reference: ReferenceResult) -> Table:
    """Beside each other: how far apart, and what rounding explains."""
    table = Table(show_edge=False, pad_edge=False, box=None, padding=(0, 2, 0, 0))
    table.add_column("relative distance from the plain loop, one step at a time")
    for name in ("most steps", "rounding", "largest", "rounding"):
        table.add_column(name, justify="right")
    for name in reference.distance.steps:
        values = [
            reference.distance.usual(name),
            reference.rounding.usual(name),
            reference.distance.largest(name),
            reference.rounding.largest(name),
        ]
        table.add_row(name, *(f"{value:.1e}" if value else "0" for value in values))
    return table


def _cause(cause: Cause) -> Iterator[str]:
    kind = "Cause" if cause.fault else "Know"
    yield f"{kind} ({cause.name}): {cause.what}."
    for place in cause.places:
        yield f"  {place}"
    yield f"  To do: {cause.advice}."
    if cause.experiments:
        yield f"  Found by experiment: {', '.join(cause.experiments)}"


def _unexplained(comparison: WorkerComparison) -> Iterator[str]:
    search = comparison.search
    if search is not None and search.causes:
        yield f"{comparison.name}: with these causes taken away there still is a difference, whose cause was not found."
    elif comparison.difference is not None and comparison.difference.stage != "failure":
        yield f"{comparison.name}: the cause was not found."
    if search is not None and search.tried:
        yield f"  Changed without effect: {', '.join(search.tried)}"


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
