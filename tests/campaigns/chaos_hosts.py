"""The campaign of faults on several hosts: network namespaces joined by virtual cables, each with processes of its own.

``unisono run --meet`` trains on all, with one worker each or more; all but the first host may come later. Beside what happens to
workers

- a host's link goes down for a moment: all hosts go on, or the workers that were cut off come again;
- it stays down: whoever is cut off from the store ends with status 1 and says what to do, and the others go on;
- a host is lost with everything on it, or its launcher is told to leave and ends with status 0;
- the host of the store is lost: the others end as if cut off, and all start again.

Whenever a host is not there the same command starts there again after a while, and it joins. Linux only, and for a user who may
make namespaces.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.virtual_hosts import VirtualHosts, address, virtual_hosts
from tests.campaigns.chaos_faults import (
    SCRIPT,
    TO_WORKERS,
    WEIGHTS,
    Fault,
    Outcome,
    Striker,
    between,
    choose,
    digest,
    environment,
    last_step,
    lives,
    named_processes,
    remains,
    shared_memory,
)
from tests.campaigns.chaos_training import MICROBATCHES

TO_HOSTS = {Fault.LINK_SHORT: 8, Fault.LINK_LONG: 4, Fault.HOST_LOST: 4, Fault.STORE_LOST: 2, Fault.HOST_LEAVES: 2}
"""How often each comes. A host that is not there comes again whatever else comes."""
FAULTS = (*TO_WORKERS, *TO_HOSTS)
STEPS = 400
PORT = 29400
LIMIT_S = 240.0
"""When a run counts as hung."""
SHORT_S = (0.05, 5.0)
"""How long a link is down for a moment: less than a launcher waits for the store, as TCP waits twice as long each time."""
AWAY_S = (0.0, 4.0)
"""How long a host stays away."""
CUT_OFF = f"contact with the store at {address(0)}:{PORT} was lost"
TOO_LATE = f"no host serves the run at {address(0)}:{PORT}"
LATE_S = 30
"""How long a host looks for the run, or for the other host, before it says that there is none."""
END_S = 60.0
"""How long the other hosts may take to end when the first one has."""


class Fate(enum.Enum):
    """What was done to a whole launch."""

    NONE = "nothing"
    CUT_OFF = "cut off from the store"
    LOST = "lost"
    TOLD = "told to leave"


@dataclasses.dataclass(kw_only=True)
class Launch:
    """One ``unisono run``, on one host."""

    host: int
    process: subprocess.Popen[bytes]
    log: Path
    output: Path
    fate: Fate = Fate.NONE

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    @property
    def has_worker(self) -> bool:
        """Whether a worker of it has made its Trainer."""
        return " ready" in self.log.read_text()

    def problem(self, *, run_is_over: bool) -> str:
        """What is wrong with how it ended; "" if nothing is."""
        status, text = self.process.returncode, self.output.read_text(errors="replace")
        stopped = status == 128 + signal.SIGTERM and "stopped by SIGTERM" in text  # where nobody was there to leave
        never_came = not self.has_worker and TOO_LATE in text
        says_so = status == 1 and (CUT_OFF in text or never_came) and "Traceback" not in text
        fine = {
            Fate.NONE: status == 0,
            Fate.CUT_OFF: says_so or (run_is_over and status == 0),
            Fate.LOST: status == -signal.SIGKILL,
            Fate.TOLD: status == 0 or stopped or (status == 1 and "RuntimeError: planted" in text),
        }[self.fate]
        late = run_is_over and not self.has_worker and says_so
        return "" if fine or late else f"host {self.host} ({self.fate.value}) ended with status {status} ({self.output.name})"


class Run:
    """One run on several hosts.

    Args:
        hosts: Where.
        folder: Empty; everything lies there.
        kind: One of ``KINDS``.
        workers: How many on each host.
        steps: How many it trains.
        together: Whether the hosts begin together.
    """

    def __init__(
        self, hosts: VirtualHosts, folder: Path, kind: str, workers: Sequence[int], steps: int = STEPS, *, together: bool
    ) -> None:
        self.hosts = hosts
        self.folder = folder
        self._kind = kind
        self._workers = workers
        self._steps = steps
        self.together = together
        self.launches: list[Launch] = []
        self.present: list[Launch | None] = [None for _ in workers]
        """The launch that runs on each host."""

    def start(self, host: int) -> None:
        """Starts the command on a host."""
        number = len(self.launches)
        log, output = self.folder / f"log{number}", self.folder / f"output{number}-host{host}"
        log.touch()
        meet = [
            "--meet",
            f"{address(0)}:{PORT}",
            "--hosts",
            str(len(self.present) if self.together else 1),
            "--wait",
            str(LATE_S),
        ]
        options = [*meet, "--workers", str(self._workers[host]), "--max-restarts", "100000"]
        script = [str(SCRIPT), str(self.folder / "run"), self._kind, str(self._steps)]
        with output.open("wb") as file:
            process = subprocess.Popen(
                self.hosts.command(host, [sys.executable, "-m", "unisono.launch", "run", *options, *script]),
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment(self.folder, log),
                start_new_session=True,
            )
        self.launches.append(Launch(host=host, process=process, log=log, output=output))
        self.present[host] = self.launches[-1]

    def workers_of(self, host: int) -> list[int]:
        """Processes of workers that live on a host."""
        launch = self.present[host]
        if launch is None:
            return []
        here = self.hosts.processes(host)
        return [here[pid] for pid in named_processes(launch.log.read_text()) if pid in here and lives(here[pid])]

    def workers(self) -> list[int]:
        """Processes of workers that live, on all hosts."""
        return [worker for host in range(len(self.present)) for worker in self.workers_of(host)]

    def may_leave(self, worker: int) -> bool:
        """Whether enough others stay: some on the first host, whatever becomes of the others."""
        last = self.step() - 1
        members = [
            {pid for pid in self.workers_of(host) if launch is not None and self._took(launch, host, pid) >= last}
            for host, launch in enumerate(self.present)
        ]
        return last >= 0 and len(set().union(*members)) >= 3 and bool(members[0] - {worker})

    def _took(self, launch: Launch, host: int, worker: int) -> int:
        """The last step that a worker has taken part in."""
        inside = next((number for number, here in self.hosts.processes(host).items() if here == worker), None)
        lines = launch.log.read_text().splitlines()
        return last_step("\n".join(line for line in lines if line.split()[1] == str(inside)))

    def step(self) -> int:
        """The last one."""
        return max((last_step(launch.log.read_text()) for launch in self.launches), default=0)

    def signal(self, host: int, signum: signal.Signals) -> None:
        """To the launcher on a host. The process that we have started is the one that led into the namespaces."""
        launch = self.present[host]
        assert launch is not None
        pid = launch.process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            os.kill(int(child), signum)

    @property
    def over(self) -> bool:
        """Whether the first host has ended by itself."""
        first = self.present[0]
        return first is not None and first.over and first.fate is not Fate.LOST

    def bury(self, *, last: bool = False) -> list[str]:
        """Takes note of the launches that have ended, but for that by which the run is over, unless this is the ``last`` look;
        what was wrong with them."""
        problems = []
        for host, launch in enumerate(self.present):
            if launch is not None and launch.over and (last or host > 0 or launch.fate is Fate.LOST):
                self.present[host] = None
                problems.append(launch.problem(run_is_over=self.step() >= self._steps))
        return [problem for problem in problems if problem]

    def close(self) -> None:
        """Once all that it has started has ended."""
        for launch in self.launches:
            launch.process.wait()


class Weather:
    """Does things to hosts, and puts them right again.

    Args:
        run: Whose.
        rng: Chooses.
        outcome: Hears of it.
    """

    def __init__(self, run: Run, rng: random.Random, outcome: Outcome) -> None:
        self._run = run
        self._rng = rng
        self._outcome = outcome
        self._up_s: float | None = None
        self._down_at = 0
        self._hit: list[Launch] = []
        self._comes_s = [time.monotonic() + rng.uniform(*AWAY_S) for _ in run.present]

    def strike(self, fault: Fault) -> bool:
        """Whether it could be done: one thing at a time happens to hosts."""
        run = self._run
        first, *others = run.present
        there = [launch for launch in others if launch is not None and launch.has_worker and launch.fate is Fate.NONE]
        if first is None or not there or self._up_s is not None:
            return False
        victim = self._rng.choice(there)
        match fault:
            case Fault.LINK_SHORT:
                self._cut(self._rng.choice([first, victim]), time.monotonic() + self._rng.uniform(*SHORT_S))
            case Fault.LINK_LONG:
                self._cut(self._rng.choice([first, victim]))
            case Fault.HOST_LOST:
                self._lose(victim)
            case Fault.STORE_LOST:
                self._lose(first)
            case Fault.HOST_LEAVES:
                victim.fate = Fate.TOLD
                run.signal(victim.host, signal.SIGTERM)
            case _:
                raise ValueError(f"{fault} is nothing that happens to a host")
        return True

    def _cut(self, launch: Launch, up_s: float = float("inf")) -> None:
        """Without an end the link is down until those who are cut off from the store have ended."""
        self._down_at, self._up_s = launch.host, up_s
        self._run.hosts.set_link(launch.host, "down")
        if up_s == float("inf"):
            self._hit = [one for one in (self._run.present[1:] if launch.host == 0 else [launch]) if one is not None]
            for one in self._hit:
                one.fate = Fate.CUT_OFF

    def _lose(self, launch: Launch) -> None:
        """The link goes first: what a computer without power does not say must not be heard."""
        self._cut(launch)
        self._hit.append(launch)
        launch.fate = Fate.LOST
        self._run.hosts.lose(launch.host)

    def clear_up(self) -> list[str]:
        """Puts right what it is time for; what was wrong with launches that have ended."""
        run, now_s = self._run, time.monotonic()
        there = list(run.present)
        problems = run.bury()
        for host, (before, after) in enumerate(zip(there, run.present, strict=True)):
            if before is not after:
                self._comes_s[host] = now_s + self._rng.uniform(*AWAY_S)
        if self._up_s is not None and (now_s >= self._up_s or (self._hit and all(launch.over for launch in self._hit))):
            self.mend()
        first = run.present[0]
        if not any(run.present) and now_s >= max(self._comes_s):
            for host in range(len(run.present)):
                run.start(host)
            self._outcome.strike(Fault.JOIN)
        for host, launch in enumerate(run.present):
            if (
                launch is None
                and first is not None
                and first.has_worker
                and first.fate is Fate.NONE
                and now_s >= self._comes_s[host]
            ):
                run.start(host)
                self._outcome.strike(Fault.JOIN)
        return problems

    def mend(self) -> None:
        """The link is up again."""
        if self._up_s is not None:
            self._run.hosts.set_link(self._down_at, "up")
            self._up_s = None
            self._hit.clear()


def disturb(run: Run, outcome: Outcome, most: int, rng: random.Random, faults: Sequence[Fault]) -> None:
    """Lets faults come until the run is over, or there were enough."""
    striker, weather = Striker(run, rng), Weather(run, rng, outcome)
    began = time.monotonic()
    next_s = began + rng.uniform(0.0, 3.0)
    while not run.over:
        now = time.monotonic()
        if now - began > LIMIT_S:
            outcome.problems.append(f"not over after {LIMIT_S:g} s (step {run.step()})")
            return
        striker.wake()
        outcome.problems += weather.clear_up()
        if now >= next_s and any(launch and launch.has_worker for launch in run.present) and len(outcome.faults) < most:
            fault = choose(faults, rng, WEIGHTS | TO_HOSTS)
            if weather.strike(fault) if fault in TO_HOSTS else striker.strike(fault):
                outcome.strike(fault)
            next_s = now + between(rng)
        time.sleep(0.01)
    weather.mend()
    for host, launch in enumerate(run.present):
        if launch is None or host == 0:
            continue
        with contextlib.suppress(subprocess.TimeoutExpired):
            launch.process.wait(END_S)
        if not launch.over:
            fate = launch.fate.value
            outcome.problems.append(f"host {host} ({fate}) still ran {END_S:g} s after the end ({launch.output.name})")
    outcome.problems += run.bury(last=True)


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
    hosts: int = 2,
) -> Outcome:
    """Starts a run, disturbs it, and looks what became of it.

    Raises:
        NoNamespaces: Hosts cannot be made here.
    """
    workers = [rng.randint(1, MICROBATCHES // hosts) for _ in range(hosts)]
    outcome = Outcome(number=number, folder=folder, kind=kind, workers=" and ".join(map(str, workers)))
    shared = shared_memory()
    began = time.monotonic()
    with virtual_hosts(hosts, machines=True) as made:
        run = Run(made, folder, kind, workers, steps, together=rng.random() < 0.7)
        for host in range(hosts if run.together else 1):
            run.start(host)
        disturb(run, outcome, most, rng, faults)
        outcome.seconds = time.monotonic() - began
        outcome.look_for_pauses(launch.log for launch in run.launches)
        outcome.compare(digest(folder / "run"), expected)
        outcome.compare_records(folder / "run", steps)
        outcome.problems += remains(folder, shared)
    run.close()
    return outcome
