"""Does everything to the workers of real runs that can happen to them, and sees that the weights are those of an undisturbed run.

    python -m tests.campaigns.chaos --faults 500 --seed 0
    python -m tests.campaigns.chaos --faults 60 --hosts 3

Each run trains ``chaos_training.py`` through ``unisono run`` on 1 to 6 workers. While it trains, checkpoints, evaluates and
recovers, faults come at random moments: a worker is killed (worker 0 like any other), stopped and perhaps woken up again, made
to fail, told to leave; or all are killed at once. The run must end by itself, with status 0, with the digest of the run that
nothing happened to, and leave no process and nothing under /dev/shm. What else happens on several hosts is in ``chaos_hosts.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
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

from benchmarks.virtual_hosts import NoNamespaces
from tests.campaigns import chaos_hosts
from tests.campaigns.chaos_faults import (
    REPOSITORY,
    SCRIPT,
    TO_WORKERS,
    Fault,
    Outcome,
    Striker,
    between,
    choose,
    digest,
    environment,
    last_members,
    last_step,
    lives,
    named_processes,
    remains,
    shared_memory,
)
from tests.campaigns.chaos_training import KINDS

MOST_WORKERS = 6
LIMIT_S = 180.0
"""When a run counts as hung."""
STEPS = 150


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
        command = ["run", "--workers", str(workers), "--max-restarts", "100000", str(SCRIPT)]
        arguments = [str(folder / "run"), kind, str(steps)]
        self.output = folder / "output"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "unisono.launch", *command, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=REPOSITORY,
                env=environment(folder, self.log),
                start_new_session=True,
            )

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    def workers(self) -> list[int]:
        """Processes of workers that live, in the order in which they came."""
        return [pid for pid in named_processes(self.log.read_text()) if lives(pid)]

    def may_leave(self, worker: int) -> bool:
        """Whether enough others stay."""
        return min(len(self.workers()), last_members(self.log.read_text())) >= 3

    @property
    def ready(self) -> bool:
        """Whether a worker has made its Trainer: until then a script is like any other, and a death ends it."""
        return " ready" in self.log.read_text()

    def end(self) -> None:
        """Ends it, however it stands."""
        if not self.over:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()


def disturb(run: Run, outcome: Outcome, most: int, rng: random.Random, faults: Sequence[Fault]) -> None:
    """Lets faults come until the run is over, or there were enough."""
    began = time.monotonic()
    striker = Striker(run, rng)
    next_s = began + rng.uniform(0.0, 3.0)
    while not run.over:
        now = time.monotonic()
        if now - began > LIMIT_S:
            outcome.problems.append(f"not over after {LIMIT_S:g} s (step {last_step(run.log.read_text())})")
            return
        striker.wake()
        if now >= next_s and run.ready and len(outcome.faults) < most:
            fault = choose(faults, rng)
            if striker.strike(fault):
                outcome.strike(fault)
            next_s = now + between(rng)
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
    workers = rng.randint(1, MOST_WORKERS)
    outcome = Outcome(number=number, folder=folder, kind=kind, workers=str(workers))
    shared = shared_memory()
    began = time.monotonic()
    run = Run(folder, kind, workers, steps)
    try:
        disturb(run, outcome, most, rng, faults)
    finally:
        run.end()
    outcome.seconds = time.monotonic() - began
    if run.process.returncode != 0:
        outcome.problems.append(f"status {run.process.returncode}")
    outcome.look_for_pauses([run.log])
    outcome.compare(digest(folder / "run"), expected)
    outcome.compare_records(folder / "run", steps)
    outcome.problems += remains(folder, shared)
    return outcome


def undisturbed(folder: Path, kind: str, steps: int = STEPS) -> str:
    """The digest that every run of this kind must have."""
    run = Run(folder, kind, 1, steps)
    try:
        if run.process.wait(LIMIT_S):
            raise RuntimeError(f"the undisturbed run failed:\n{run.output.read_text()}")
    finally:
        run.end()
    return digest(folder / "run")


def main() -> int:
    """Runs the campaign; 1 if anything was wrong, 2 if it cannot be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--per-run", type=int, default=12, help="most faults of one run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hosts", type=int, choices=range(1, MOST_WORKERS + 1), default=1, help="each a network namespace")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--only", nargs="*", choices=[fault.name for fault in Fault], help="kinds of faults")
    parser.add_argument("--keep", type=Path, help="keep the folders of runs with problems here")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))  # with the run under way
    here, usual = one_run, TO_WORKERS
    if options.hosts > 1:
        here, usual = functools.partial(chaos_hosts.one_run, hosts=options.hosts), tuple(chaos_hosts.FAULTS)
    steps = STEPS if options.hosts == 1 else chaos_hosts.STEPS
    faults = [Fault[name] for name in options.only] if options.only else usual
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
                digests[kind] = undisturbed(Path(name) / "alone", kind, steps)
            (Path(name) / "run").mkdir()
            try:
                outcome = here(number, Path(name) / "run", digests[kind], rng, most=options.per_run, kind=kind, faults=faults)
            except NoNamespaces as reason:
                print(f"hosts cannot be made here: {reason}")
                return 2
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
