"""What the campaign of faults does to the workers of a run, and what it looks at afterwards, on one host or on several."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import hashlib
import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

SCRIPT = Path(__file__).with_name("chaos_training.py")
REPOSITORY = Path(__file__).parents[2]
TRACE = "UNISONO_CHAOS"
"""The variable by which everything that a run has started is known: it holds the run's folder."""

LOG = "UNISONO_CHAOS_LOG"
"""The variable that names the file to which workers tell what they do."""


class Fault(enum.Enum):
    """What is done to a run."""

    KILL = "SIGKILL"
    STOP = "SIGSTOP, for ever"
    PAUSE = "SIGSTOP, then SIGCONT"
    FAIL = "exception"
    LEAVE = "told to leave"
    KILL_ALL = "SIGKILL of all"
    # On several hosts only:
    LINK_SHORT = "link down and up"
    LINK_LONG = "link down until the host gives up"
    HOST_LOST = "host lost"
    STORE_LOST = "host of the store lost"
    HOST_LEAVES = "host told to leave"
    JOIN = "host comes"


TO_WORKERS = (Fault.KILL, Fault.STOP, Fault.PAUSE, Fault.FAIL, Fault.LEAVE, Fault.KILL_ALL)
"""Those that strike workers, wherever they are."""
WEIGHTS = {Fault.KILL: 10, Fault.STOP: 1, Fault.PAUSE: 2, Fault.FAIL: 3, Fault.LEAVE: 2, Fault.KILL_ALL: 1}
"""How often each comes."""
LONGEST_S = 60.0
"""How long there may be no step: whatever happens to a run, it finds out sooner."""


@dataclasses.dataclass(kw_only=True)
class Outcome:
    """What became of one run."""

    number: int
    folder: Path
    kind: str
    workers: str
    faults: list[Fault] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    pause_s: float = 0.0
    """The longest time between two steps."""
    problems: list[str] = dataclasses.field(default_factory=list)

    def strike(self, fault: Fault) -> None:
        """Takes note of a fault that has been done to it."""
        self.faults.append(fault)
        with (self.folder / "faults").open("a") as file:
            file.write(f"{time.time():.6f} {fault.value}\n")

    def look_for_pauses(self, logs: Iterable[Path]) -> None:
        """Notes a problem if no worker took a step for too long."""
        steps_s = sorted(float(line.split()[0]) for log in logs for line in log.read_text().splitlines() if " step " in line)
        self.pause_s = max((later - before for before, later in itertools.pairwise(steps_s)), default=0.0)
        if self.pause_s > LONGEST_S:
            self.problems.append(f"no step for {self.pause_s:.0f} s")

    def compare(self, digest: str, expected: str) -> None:
        """Notes a problem if the weights are not those of the undisturbed run."""
        if digest != expected:
            self.problems.append(f"digest {digest[:12]} instead of {expected[:12]}")

    def compare_records(self, run_dir: Path, steps: int) -> None:
        """Notes a problem unless the log has each step once, in order, and no evaluation twice, and there is a summary."""
        told = records(run_dir)
        if [step for step, what in told if what == "step"] != list(range(1, steps + 1)):
            self.problems.append("the log has not each step once, in order")
        if told != sorted(told, key=lambda one: one[0]):
            self.problems.append("the log is not in order")
        if not (run_dir / "summary.json").exists():
            self.problems.append("no summary")

    def row(self) -> str:
        """A line for a person."""
        counts = ", ".join(f"{count} x {fault.value}" for fault, count in Counter(self.faults).items())
        what = f"run {self.number}: {self.kind}, {self.workers} workers, {len(self.faults)} faults ({counts})"
        return f"{what}, {self.seconds:.1f} s, longest pause {self.pause_s:.1f} s: {'; '.join(self.problems) or 'same digest'}"


class Victims(Protocol):
    """Workers of a run."""

    def workers(self) -> list[int]:
        """Processes of workers that live."""
        ...

    def may_leave(self, worker: int) -> bool:
        """Whether enough others stay."""
        ...


class Striker:
    """Does things to workers.

    Args:
        run: Whose workers.
        rng: Chooses.
    """

    def __init__(self, run: Victims, rng: random.Random) -> None:
        self._run = run
        self._rng = rng
        self._wakings: list[tuple[float, int]] = []
        self._stopped: set[int] = set()
        self._left_s = 0.0

    def strike(self, fault: Fault) -> bool:
        """Whether there was someone to do it to."""
        alive = self._run.workers()
        if not alive:
            return False
        victim = self._rng.choice(alive)
        try:
            match fault:
                case Fault.KILL:
                    os.kill(victim, signal.SIGKILL)
                case Fault.STOP:
                    if self._stopped.issuperset(set(alive) - {victim}):
                        return False  # a run that stands still as a whole waits to be let go on, for as long as it takes
                    self._stopped.add(victim)
                    os.kill(victim, signal.SIGSTOP)
                case Fault.PAUSE:
                    os.kill(victim, signal.SIGSTOP)
                    self._wakings.append((time.monotonic() + self._rng.uniform(0.0, 5.0), victim))
                case Fault.FAIL:
                    if len(alive) < 2:
                        return False  # what all workers raise is the program's error, and ends the run
                    os.kill(victim, signal.SIGUSR1)
                case Fault.LEAVE:
                    if time.monotonic() < self._left_s + 3.0 or not self._run.may_leave(victim):
                        return False  # when all leave the run stops, as it should
                    self._left_s = time.monotonic()
                    os.kill(victim, signal.SIGTERM)
                case Fault.KILL_ALL:
                    for pid in alive:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                case _:
                    raise ValueError(f"{fault} is nothing that happens to a worker")
        except ProcessLookupError:
            return False
        return True

    def wake(self) -> None:
        """Lets those go on whose pause is over."""
        for due in [waking for waking in self._wakings if waking[0] <= time.monotonic()]:
            self._wakings.remove(due)
            if lives(due[1]):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(due[1], signal.SIGCONT)


def environment(folder: Path, log: Path) -> dict[str, str]:
    """That of a command which trains `SCRIPT` in a folder, wherever it begins.

    Args:
        log: What its workers tell goes there.
    """
    path = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, TRACE: str(folder), LOG: str(log)}


def lives(pid: int) -> bool:
    """Whether a process runs, or could run again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def last_members(log: str) -> int:
    """How many workers took the last step that a log tells of."""
    return max((int(line.split()[-1]) for line in log.splitlines()[-2:] if len(line.split()) == 6), default=0)


def last_step(log: str) -> int:
    """The last step that a log tells of."""
    return max((int(line.split()[3]) for line in log.splitlines() if len(line.split()) == 6), default=0)


def named_processes(log: str) -> list[int]:
    """The processes that a log tells of, in the order in which they came."""
    return list(dict.fromkeys(int(line.split()[1]) for line in log.splitlines() if len(line.split()) > 2))


def digest(run_dir: Path) -> str:
    """SHA-256 of the weights."""
    file = run_dir / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else "no weights"


def records(run_dir: Path) -> list[tuple[int, str]]:
    """The lines of the log about steps and evaluations, each as the step and what it tells of."""
    log = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [(line["step"], line.get("event", "step")) for line in lines if line.get("event", "evaluation") == "evaluation"]


def leftovers(folder: Path) -> list[str]:
    """Processes that belong to the run in a folder."""
    found, trace = [], f"{TRACE}={folder}".encode()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and trace in (entry / "environ").read_bytes().split(b"\0") and lives(int(entry.name)):
                found.append(entry.name)
    return found


def shared_memory() -> set[Path]:
    """What lies under /dev/shm and may be ours."""
    return {path for path in Path("/dev/shm").iterdir() if "unisono" in path.name or "torch" in path.name}


def remains(folder: Path, before: Iterable[Path]) -> list[str]:
    """What a run that has ended should not have left behind, for a person.

    Args:
        folder: The run's.
        before: What `shared_memory` found before it.
    """
    until = time.monotonic() + 5.0
    while leftovers(folder) and time.monotonic() < until:
        time.sleep(0.05)
    problems = []
    if left := leftovers(folder):
        problems.append(f"processes left: {', '.join(left)}")
    if new := shared_memory().difference(before):
        problems.append(f"left under /dev/shm: {', '.join(map(str, new))}")
    return problems


def between(rng: random.Random) -> float:
    """How long until the next fault, in seconds."""
    return rng.uniform(0.05, 1.2)


def choose(faults: Sequence[Fault], rng: random.Random, weights: Mapping[Fault, int] = WEIGHTS) -> Fault:
    """One of them."""
    return rng.choices(faults, [weights[one] for one in faults])[0]
