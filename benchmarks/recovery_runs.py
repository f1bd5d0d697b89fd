"""Runs of a system in which workers are killed at random moments, and what their journals say."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import select
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from recovery_measures import Kill, Line, commits, contributions, goodput, recoveries, samples_off
from recovery_peers.journal import Job
from recovery_systems import Running, System

BATCH_SIZE = 120
EDGE_STEPS = 30
"""Before the first kill, and after the last."""
LOOK_S = 0.005
STEPS_A_SECOND = 100
"""More than any system takes."""
STUCK_S = 60.0
"""Without a committed step: the run is given up."""


class RunFailed(Exception):
    """The system did not train to the end; the text says what it left behind."""


class Workers:
    """The processes of a run, by what they write into the journal; each is held by a file descriptor, not by its number."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "journal"
        self._rest = b""
        self._read = 0
        self._held: dict[int, int] = {}
        self.lines: list[dict[str, Any]] = []
        self._latest: dict[int, set[int]] = {}
        self.step = 0
        """The last one that was committed."""
        self.moved = time.monotonic()
        """When that changed."""

    def look(self) -> None:
        """Reads what is new."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        self._read += len(new)
        *whole, self._rest = (self._rest + new).split(b"\n")
        for text in whole:
            line = json.loads(text)
            self.lines.append(line)
            if line["kind"] == "start":
                self._hold(line["pid"])
            elif line["kind"] == "compute":
                self._latest.setdefault(line["step"], set()).add(line["pid"])
            elif line["kind"] == "commit" and line["step"] > self.step:
                self.step, self.moved = line["step"], time.monotonic()

    def _hold(self, pid: int) -> None:
        try:
            self._held[pid] = os.pidfd_open(pid)
        except ProcessLookupError:  # it was quick to die
            self._held.pop(pid, None)

    def living(self) -> list[int]:
        """Process numbers, in order."""
        return sorted(pid for pid, held in self._held.items() if not select.select([held], [], [], 0)[0])

    def training(self) -> list[int]:
        """Those of the living that took part in the last committed step."""
        return [pid for pid in self.living() if pid in self._latest.get(self.step, ())]

    def kill(self, pid: int) -> list[Kill]:
        """One, or none if the process has just ended by itself."""
        now = time.time()
        try:
            signal.pidfd_send_signal(self._held[pid], signal.SIGKILL)
        except ProcessLookupError:
            return []
        return [Kill(time=now, pid=pid, step=self.step)]

    def close(self) -> None:
        """Ends those that are left."""
        self.look()
        for held in self._held.values():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(held, signal.SIGKILL)
            os.close(held)


@dataclasses.dataclass(kw_only=True)
class Watched:
    """A running system, and its workers."""

    job: Job
    running: Running
    workers: Workers
    status: int | None = None

    def look(self) -> bool:
        """Whether it goes on.

        Raises:
            RunFailed: No step is committed any more.
        """
        time.sleep(LOOK_S)
        self.workers.look()
        self.status = self.running.tend()
        if self.status is None and time.monotonic() - self.workers.moved > STUCK_S:
            raise RunFailed(f"no step was committed for {STUCK_S:.0f} s after step {self.workers.step}. {self.output()}")
        return self.status is None

    def output(self, size: int = 600) -> str:
        """The last words of all processes."""
        logs = sorted(Path(self.job.folder).glob("output*.log"))
        return " | ".join(f"{log.name}: {log.read_text(errors='replace')[-size:].strip()}" for log in logs)


@contextmanager
def _watched(system: System, workers: int, steps: int) -> Iterator[Watched]:
    with tempfile.TemporaryDirectory(prefix="recovery-", ignore_cleanup_errors=True) as folder:
        job = Job(folder=folder, workers=workers, steps=steps, batch_size=BATCH_SIZE)
        running = system.start(job)
        seen = Workers(Path(folder))
        try:
            yield Watched(job=job, running=running, workers=seen)
        finally:
            running.close()
            seen.close()


def steps_of(system: System, number: int, edge: int = EDGE_STEPS) -> int:
    """How long a run with ``number`` kills is."""
    return 2 * edge + system.steps_a_kill * number


def kills(system: System, workers: int, number: int, seed: int, steps: int, edge: int) -> dict[str, Any]:
    """One run of ``steps`` steps in which ``number`` workers are killed, one after the other, or as many as time allows.

    A worker dies at a random moment of a step, some steps after the full number of workers trains again.

    Returns:
        What was measured, for JSON.

    Raises:
        RunFailed: The run ended with an error, or stopped committing steps.
    """
    chance = random.Random(f"{system.name} {workers} {seed}")
    done: list[Kill] = []
    due = edge
    with _watched(system, workers, steps) as run:
        while run.look():
            if len(done) == number or run.workers.step < due or run.workers.step > steps - edge:
                continue
            if len(run.workers.training()) < workers:
                due = run.workers.step + chance.randint(2, 15)
                continue
            time.sleep(chance.uniform(0, 0.1))
            run.workers.look()
            if victims := run.workers.training():
                done += run.workers.kill(chance.choice(victims))
            due = run.workers.step + 2
        run.workers.look()
        if run.status:
            raise RunFailed(f"it ended with status {run.status} after step {run.workers.step}. {run.output()}")
        lines = run.workers.lines
        digests = sorted(
            {hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(run.job.folder).glob("final*.safetensors")}
        )
        found, usual = recoveries(lines, done, workers)
        lost, repeated = samples_off(contributions(lines, done), run.job.samples)
        return {
            "steps": steps,
            "committed": len(commits(lines)),
            "usual": usual,
            "recoveries": [dataclasses.asdict(one) for one in found],
            "samples_lost": lost,
            "samples_repeated": repeated,
            "weights_sha256": digests,
            "timeline": _timeline(lines, done),
        }


def _timeline(lines: list[Line], done: list[Kill]) -> dict[str, list[float]]:
    """Seconds since the first committed step."""
    times = list(commits(lines).values())
    return {
        "commits": [round(time - times[0], 4) for time in times],
        "kills": [round(kill.time - times[0], 4) for kill in done],
    }


def steady(system: System, workers: int, interval_s: float, number: int, calm_s: float, seed: int) -> dict[str, Any]:
    """One run that is left alone for ``calm_s`` and then loses a worker every ``interval_s``, ``number`` times.

    Returns:
        What was measured, for JSON.

    Raises:
        RunFailed: The run ended before the time was over, or stopped committing steps.
    """
    chance = random.Random(f"{system.name} {workers} {interval_s} {seed}")
    done: list[Kill] = []
    began: float | None = None
    with _watched(system, workers, steps=round(STEPS_A_SECOND * (calm_s + interval_s * number + STUCK_S))) as run:
        while run.look():
            now = time.time()
            if began is None:
                if run.workers.step >= EDGE_STEPS and len(run.workers.training()) == workers:
                    began = now
                continue
            first = began + calm_s
            if now > first + interval_s * number:
                break
            if len(done) < number and now > first + interval_s * len(done) and (living := run.workers.living()):
                done += run.workers.kill(chance.choice(living))
        else:
            raise RunFailed(f"it ended with status {run.status} after step {run.workers.step}. {run.output()}")
        assert began is not None
        first = began + calm_s
        found = goodput(run.workers.lines, done, (began, first), (first, first + interval_s * number), BATCH_SIZE)
        return {**found, "interval": interval_s, "timeline": _timeline(run.workers.lines, done)}
