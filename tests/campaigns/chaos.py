"""Does everything to the workers of real runs that can happen to them, and sees that the weights are those of an undisturbed run.

    python -m tests.campaigns.chaos --faults 500 --seed 0

Each run trains ``chaos_training.py`` through ``unisono run`` on 1 to 6 workers. While it trains, checkpoints, evaluates and
recovers, faults come at random moments: a worker is killed (worker 0 like any other), stopped and perhaps woken up again, made
to fail, told to leave; or all are killed at once. The run must end by itself, with status 0, with the digest of the run that
nothing happened to, and leave no process and nothing under /dev/shm.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import enum
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.campaigns.chaos_training import KINDS

SCRIPT = Path(__file__).with_name("chaos_training.py")
REPOSITORY = Path(__file__).parents[2]
MOST_WORKERS = 6
LIMIT_S = 180.0
"""When a run counts as hung."""
STEPS = 150
PAUSE_S = (0.05, 1.2)
"""Between two faults."""


class Fault(enum.Enum):
    """What is done to a worker."""

    KILL = "SIGKILL"
    STOP = "SIGSTOP, for ever"
    PAUSE = "SIGSTOP, then SIGCONT"
    FAIL = "exception"
    LEAVE = "told to leave"
    KILL_ALL = "SIGKILL of all"


WEIGHTS = {Fault.KILL: 10, Fault.STOP: 1, Fault.PAUSE: 2, Fault.FAIL: 3, Fault.LEAVE: 2, Fault.KILL_ALL: 1}


@dataclasses.dataclass(kw_only=True)
class Outcome:
    """What became of one run."""

    number: int
    kind: str
    workers: int
    faults: list[Fault] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    problems: list[str] = dataclasses.field(default_factory=list)

    def row(self) -> str:
        """A line for a person."""
        counts = ", ".join(f"{count} x {fault.value}" for fault, count in Counter(self.faults).items())
        what = f"run {self.number}: {self.kind}, {self.workers} workers, {len(self.faults)} faults ({counts})"
        return f"{what}, {self.seconds:.1f} s: {'; '.join(self.problems) or 'same digest'}"


class Run:
    """One run under fire.

    Args:
        folder: Empty; everything lies there.
        kind: One of ``KINDS``.
        workers: How many.
        steps: How many it trains.
    """

    def __init__(self, folder: Path, kind: str, workers: int, steps: int = STEPS) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.log.touch()
        self.left_s = 0.0
        command = ["run", "--workers", str(workers), "--max-restarts", "100000", str(SCRIPT)]
        arguments = [str(folder / "run"), str(self.log), kind, str(steps)]
        self.output = folder / "output"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "unisono.launch", *command, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])},
                start_new_session=True,
            )

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    def workers(self) -> list[int]:
        """Processes of workers that live, in the order in which they came."""
        named = dict.fromkeys(int(line.split()[1]) for line in self.log.read_text().splitlines() if len(line.split()) > 2)
        return [pid for pid in named if _lives(pid)]

    @property
    def ready(self) -> bool:
        """Whether a worker has made its Trainer: until then a script is like any other, and a death ends it."""
        return " ready" in self.log.read_text()

    def members(self) -> int:
        """How many workers took the last step."""
        return max(
            (int(line.split()[-1]) for line in self.log.read_text().splitlines()[-2:] if len(line.split()) == 6), default=0
        )

    def steps(self) -> int:
        """The last step that any worker has done."""
        lines = (line.split() for line in self.log.read_text().splitlines())
        return max((int(line[3]) for line in lines if len(line) == 6), default=0)

    def digest(self) -> str:
        """SHA-256 of the weights."""
        file = self.folder / "run" / "model.safetensors"
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else "no weights"

    def leftovers(self) -> list[str]:
        """Processes that still belong to it."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and str(self.folder).encode() in (entry / "cmdline").read_bytes():
                    found.append(entry.name)
        return found

    def end(self) -> None:
        """Ends it, however it stands."""
        if not self.over:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()


def strike(run: Run, fault: Fault, rng: random.Random, wakings: list[tuple[float, int]]) -> bool:
    """Does something to the run; whether there was someone to do it to."""
    alive = run.workers()
    if not alive:
        return False
    victim = rng.choice(alive)
    try:
        match fault:
            case Fault.KILL:
                os.kill(victim, signal.SIGKILL)
            case Fault.STOP:
                os.kill(victim, signal.SIGSTOP)
            case Fault.PAUSE:
                os.kill(victim, signal.SIGSTOP)
                wakings.append((time.monotonic() + rng.uniform(0.0, 5.0), victim))
            case Fault.FAIL:
                if len(alive) < 2:
                    return False  # what all workers raise is the program's error, and ends the run
                os.kill(victim, signal.SIGUSR1)
            case Fault.LEAVE:
                if min(len(alive), run.members()) < 3 or time.monotonic() < run.left_s + 3.0:
                    return False  # when all leave the run stops, as it should
                run.left_s = time.monotonic()
                os.kill(victim, signal.SIGTERM)
            case Fault.KILL_ALL:
                for pid in alive:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def disturb(run: Run, outcome: Outcome, most: int, rng: random.Random, faults: Sequence[Fault]) -> None:
    """Lets faults come until the run is over, or there were enough."""
    began = time.monotonic()
    wakings: list[tuple[float, int]] = []
    next_s = began + rng.uniform(0.0, 3.0)
    while not run.over:
        now = time.monotonic()
        if now - began > LIMIT_S:
            outcome.problems.append(f"not over after {LIMIT_S:g} s (step {run.steps()})")
            return
        for due in [waking for waking in wakings if waking[0] <= now]:
            wakings.remove(due)
            with contextlib.suppress(ProcessLookupError):
                if _lives(due[1]):
                    os.kill(due[1], signal.SIGCONT)
        if now >= next_s and run.ready and len(outcome.faults) < most:
            fault = rng.choices(faults, [WEIGHTS[one] for one in faults])[0]
            if strike(run, fault, rng, wakings):
                outcome.faults.append(fault)
            next_s = now + rng.uniform(*PAUSE_S)
        time.sleep(0.005)


def one_run(
    number: int,
    folder: Path,
    expected: str,
    rng: random.Random,
    *,
    most: int,
    kind: str,
    faults: Sequence[Fault],
    steps: int = STEPS,
) -> Outcome:
    """Starts a run, disturbs it, and looks what became of it."""
    outcome = Outcome(number=number, kind=kind, workers=rng.randint(1, MOST_WORKERS))
    shared = set(Path("/dev/shm").iterdir())
    began = time.monotonic()
    run = Run(folder, kind, outcome.workers, steps)
    try:
        disturb(run, outcome, most, rng, faults)
    finally:
        run.end()
    outcome.seconds = time.monotonic() - began
    if run.process.returncode != 0:
        outcome.problems.append(f"status {run.process.returncode}")
    if run.digest() != expected:
        outcome.problems.append(f"digest {run.digest()[:12]} instead of {expected[:12]}")
    until = time.monotonic() + 5.0
    while run.leftovers() and time.monotonic() < until:
        time.sleep(0.05)
    if left := run.leftovers():
        outcome.problems.append(f"processes left: {', '.join(left)}")
    if new := [str(path) for path in set(Path("/dev/shm").iterdir()) - shared if "unisono" in path.name or "torch" in path.name]:
        outcome.problems.append(f"left under /dev/shm: {', '.join(new)}")
    return outcome


def undisturbed(folder: Path, kind: str, steps: int = STEPS) -> str:
    """The digest that every run of this kind must have."""
    run = Run(folder, kind, 1, steps)
    try:
        if run.process.wait(LIMIT_S):
            raise RuntimeError(f"the undisturbed run failed:\n{run.output.read_text()}")
    finally:
        run.end()
    return run.digest()


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def main() -> int:
    """Runs the campaign; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--per-run", type=int, default=12, help="most faults of one run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--only", nargs="*", default=[fault.name for fault in Fault], help="kinds of faults")
    parser.add_argument("--keep", type=Path, help="keep the folders of runs with problems here")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    total = bad = number = 0
    counts: Counter[Fault] = Counter()
    digests: dict[str, str] = {}
    while total < options.faults:
        number += 1
        kind = rng.choice(options.kinds)
        with tempfile.TemporaryDirectory(prefix="unisono-chaos-") as name:
            if kind not in digests:
                (Path(name) / "alone").mkdir()
                digests[kind] = undisturbed(Path(name) / "alone", kind)
            (Path(name) / "run").mkdir()
            outcome = one_run(
                number,
                Path(name) / "run",
                digests[kind],
                rng,
                most=options.per_run,
                kind=kind,
                faults=[Fault[one] for one in options.only],
            )
            total += len(outcome.faults)
            counts.update(outcome.faults)
            bad += bool(outcome.problems)
            print(outcome.row(), flush=True)
            if outcome.problems and options.keep:
                Path(name).rename(options.keep / f"seed{options.seed}-run{number}")
                Path(name).mkdir()
    print(f"{total} faults in {number} runs, {bad} of them wrong; seed {options.seed}")
    print(", ".join(f"{fault.value}: {count}" for fault, count in counts.most_common()))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
