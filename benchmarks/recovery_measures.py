"""What a journal says about recovery: pure arithmetic over its lines.

How much a kill costs is seen from outside, alike for every system. Let c1, c2, c3 be the times at which the next three steps
after a SIGKILL at t0 are committed, and m the median time of an undisturbed step of the same run. Then

- *recovery* = max(c1 − t0, c2 − c1, c3 − c2) − m: the longest wait for a step, less the time a step takes. The step that runs
  when the worker dies may still be committed, if it had given everything already; then it is the second or third that waits.
- *all again*: from t0 to the first committed step in which the full number of living workers took part.
- *training lost* = that time − m · (steps committed in it): includes whatever the others wait for when the new worker joins.
- *steps lost*: optimizer steps taken before the kill and taken again afterwards, and attempts given up together with their
  samples. The step under way is not counted if it is repeated with the samples that it had.
- *samples*: the committed steps of a run are to use each sample exactly once; lost is one that none of them used, repeated
  each use after the first.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]

WARM_UP_STEPS = 10
NEXT_STEPS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill:
    """A worker was killed."""

    time: float
    pid: int
    step: int
    """The last one that had been committed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recovery:
    """What came after a kill; seconds."""

    first: float
    """To the next committed step."""
    recovery: float
    all_again: float
    training_lost: float
    steps_lost: int


def commits(lines: Iterable[Line]) -> dict[int, float]:
    """When each step was committed first, in order of steps."""
    found: dict[int, float] = {}
    for line in lines:
        if line["kind"] == "commit":
            found.setdefault(line["step"], line["t"])
    return dict(sorted(found.items()))


def with_replays(lines: Iterable[Line]) -> list[Line]:
    """The same lines; those of a step that is done once more in between, on the way to a later one, are put down to it.

    A worker of unisono may have to do committed steps again before the one under way, for which it then writes these lines,
    too. They are told by their samples: exactly those of an earlier line, of a step that had been committed.
    """
    first: dict[tuple[int, ...], int] = {}
    done: set[int] = set()
    found: list[Line] = []
    for line in lines:
        if line["kind"] == "commit":
            done.add(line["step"])
        elif line["kind"] == "compute":
            step = first.setdefault(tuple(line["samples"]), line["step"])
            if step < line["step"] and step in done:
                line = {**line, "step": step}
        found.append(line)
    return found


def contributions(lines: Iterable[Line], kills: Sequence[Kill]) -> dict[int, dict[int, list[int]]]:
    """For each step: process -> samples, of the attempt that was committed, or of the last one after that."""
    attempts: dict[int, dict[int, list[Line]]] = {}
    done = commits(lines := with_replays(lines))
    for line in lines:
        if line["kind"] == "compute" and line["step"] in done:
            own = attempts.setdefault(line["step"], {}).setdefault(line["pid"], [])
            # Another attempt, or the same once more: what this worker had before does not count.
            if own and (_attempt(own[-1]) != _attempt(line) or set(own[-1]["samples"]) & set(line["samples"])):
                own.clear()
            own.append(line)
    died = {kill.pid: kill.time for kill in kills}
    return {step: _committed(own, died) for step, own in sorted(attempts.items())}


def _attempt(line: Line) -> tuple[object, ...]:
    return line["size"], line.get("attempt"), line.get("generation")


def _committed(own: dict[int, list[Line]], died: dict[int, float]) -> dict[int, list[int]]:
    """Of the last attempt at a step: the workers that saw the same world as the one that wrote last, the living first."""
    newest = max((lines[-1] for lines in own.values()), key=lambda line: line["t"])
    same = [pid for pid, lines in own.items() if _world(lines[-1]) == _world(newest)]
    same.sort(key=lambda pid: died.get(pid, math.inf), reverse=True)
    return {pid: [sample for line in own[pid] for sample in line["samples"]] for pid in same[: newest["size"]]}


def _world(line: Line) -> tuple[object, ...]:
    return line["size"], line.get("generation")


def recoveries(lines: Sequence[Line], kills: Sequence[Kill], workers: int) -> tuple[list[Recovery], float]:
    """What each kill cost, and the median seconds of an undisturbed step.

    Raises:
        ValueError: There is no undisturbed step, or a kill after which training did not come back to strength.
    """
    lines = with_replays(lines)
    done, used = commits(lines), contributions(lines, kills)
    times = list(done.values())
    again = [_all_again(kill, done, used, workers, kills) for kill in kills]
    disturbed = [(kill.time, end) for kill, end in zip(kills, again, strict=True)]
    gaps = [
        b - a
        for number, (a, b) in enumerate(itertools.pairwise(times))
        if number >= WARM_UP_STEPS and not any(a <= end and b >= start for start, end in disturbed)
    ]
    if not gaps:
        raise ValueError("no step was undisturbed: train more steps between kills")
    usual = statistics.median(gaps)
    found = []
    for kill, end in zip(kills, again, strict=True):
        next_ones = times[(first := bisect.bisect_right(times, kill.time)) : first + NEXT_STEPS]
        waits = [b - a for a, b in zip([kill.time, *next_ones], next_ones, strict=False)]
        within = bisect.bisect_right(times, end) - first
        found.append(
            Recovery(
                first=waits[0],
                recovery=max(waits) - usual,
                all_again=end - kill.time,
                training_lost=end - kill.time - usual * within,
                steps_lost=_steps_lost(lines, kill, end),
            )
        )
    return found, usual


def _all_again(
    kill: Kill, done: dict[int, float], used: dict[int, dict[int, list[int]]], workers: int, kills: Sequence[Kill]
) -> float:
    dead = {other.pid for other in kills if other.time <= kill.time}
    for step, time in done.items():
        if time > kill.time and len(used.get(step, {}).keys() - dead) == workers:
            return time
    raise ValueError(f"after a kill in step {kill.step + 1} the {workers} workers never trained together again")


def _steps_lost(lines: Sequence[Line], kill: Kill, end: float) -> int:
    # Nobody takes a step before all have given it their gradients: who gives them later does so once more.
    before = {line["step"] for line in lines if line["kind"] in ("applied", "commit") and line["t"] <= kill.time}
    after = {line["step"] for line in lines if line["kind"] == "compute" and kill.time < line["t"] <= end}
    dropped = Counter(line["pid"] for line in lines if line["kind"] == "dropped" and kill.time < line["t"] <= end)
    return len(before & after) + max(dropped.values(), default=0)


def samples_off(used: dict[int, dict[int, list[int]]], samples: int) -> tuple[int, int]:
    """How many of the numbers below ``samples`` no committed step used, and how many uses were one too many."""
    count = Counter(sample for of_step in used.values() for own in of_step.values() for sample in own)
    return samples - sum(sample < samples for sample in count), sum(count.values()) - len(count)


def goodput(
    lines: Sequence[Line], kills: Sequence[Kill], calm: tuple[float, float], window: tuple[float, float], batch_size: int
) -> dict[str, float]:
    """Committed against undisturbed.

    Args:
        calm: From when to when nobody was killed.
        window: From when to when workers were killed.
        batch_size: Samples of an undisturbed step.

    Returns:
        ``steps`` committed in the window, steps that would have been (``ideal``), their ratio (``goodput``), the same for
        samples (``of_samples``), and ``kills``.
    """
    done, used = commits(lines), contributions(lines, kills)
    times = sorted(done.values())

    def between(start: float, end: float) -> int:
        return bisect.bisect_right(times, end) - bisect.bisect_right(times, start)

    ideal = between(*calm) / (calm[1] - calm[0]) * (window[1] - window[0])
    committed = [step for step, time in done.items() if window[0] < time <= window[1]]
    counted = sum(len(own) for step in committed for own in used.get(step, {}).values())
    return {
        "kills": len(kills),
        "steps": len(committed),
        "ideal": ideal,
        "goodput": len(committed) / ideal,
        "of_samples": counted / (ideal * batch_size),
    }
