"""The workers' processes: started, watched, asked to stop, ended, each with everything that it started itself.

Each worker leads a session of its own. A Ctrl-C in the terminal therefore reaches the launcher only, which passes it on
to the workers but not to their loader workers, without which they could not finish their step; and ending the group
ends the loader workers too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unisono.errors import WorkerFailure
from unisono.launch.logs import Logs
from unisono.launch.report import ERROR_FILE, Failure, FailureRecord, read_record
from unisono.launch.worker import LAUNCHER_PID, TERMINAL
from unisono.system.fork_server import Child, ForkServer, overlaid, standard_streams, wait_for_end
from unisono.system.process import state_of
from unisono.system.reaper import Leftovers, Reaper
from unisono.system.signals import STOP_CODES

_POLL_S = 0.02
_LEFTOVERS_S = 0.5


@dataclass(eq=False)
class SupervisedProcess:
    """One process of a worker, from its start on. All methods are *local*."""

    rank: int
    """Number of the worker. A process that takes the place of a dead one has the same."""
    uid: str
    """Name of the process."""
    child: Child
    error_file: Path
    """Where it leaves its failure record."""
    log: Path | None
    """Its output, unless that goes to the terminal."""
    joins: bool = False
    """Whether it joins others that were there before it."""
    started_s: float = field(default_factory=time.time)
    """When it was started, in seconds since the epoch."""
    status: int | None = None
    """Exit status, -N if signal N killed it, None while it runs."""
    ended_s: float = 0.0
    """When it was seen to have ended, in seconds since the epoch."""
    told_to_end_s: float = float("inf")
    """When it was told to end, in seconds since the epoch: a later failure is a consequence."""
    sent: set[int] = field(default_factory=set)
    """Signals that we have sent it: dying of one of them is not a failure."""
    record: FailureRecord | None = None
    """What it wrote down about its failure."""

    @property
    def pid(self) -> int:
        """Its process number."""
        return self.child.pid

    @property
    def failure(self) -> Failure | None:
        """How it failed by itself; None if it has not, was told to end, or stopped as a signal asked."""
        status = self.status
        if self.record is None and (status is None or status == 0 or status in STOP_CODES or -status in self.sent):
            return None
        time_s = self.record.time_s if self.record else self.ended_s
        if time_s > self.told_to_end_s:
            return None
        return Failure(rank=self.rank, pid=self.pid, status=status, time_s=time_s, record=self.record, log=self.log)

    @property
    def is_stopped(self) -> bool:
        """Whether SIGSTOP holds it, by the kernel's account."""
        with contextlib.suppress(OSError):
            return state_of(self.pid)[0] == "T"
        return False

    def send(self, signum: signal.Signals) -> None:
        """Send it a signal, and remember that."""
        self.sent.add(signum)
        self.child.send_signal(signum)


class WorkerProcesses:
    """The workers of this host, from start to end. All methods are *local*.

    Args:
        folder: Where workers leave output and failure records.
        reaper: Ends the workers if this process is killed.
        fork_server: Starts them.
        terminal: Standard output and error of this process, under numbers from 3 up, for every worker to have.
    """

    def __init__(self, folder: Path, reaper: Reaper, fork_server: ForkServer, *, terminal: Sequence[int] = ()) -> None:
        self._folder = folder
        self._fork_server = fork_server
        self._terminal = terminal
        self._by_rank: dict[int, SupervisedProcess] = {}
        self._leftovers = Leftovers(reaper.remove, grace_s=_LEFTOVERS_S)
        self._logs = Logs()

    def start(self, rank: int, command: Sequence[str], env: Mapping[str, str], *, uid: str = "", joins: bool = False) -> None:
        """Start one worker; at any time, also in the place of one that has ended.

        Args:
            rank: Its number.
            command: Script and arguments.
            env: Its variables beside those of this process. An empty one is left out.
            uid: Name of the process.
            joins: Whether it joins others. If not, worker 0 has the launcher's terminal (or whatever its input and output
                are). All others write to files.

        Raises:
            WorkerFailure: The fork server has ended.
        """
        error_file = self._folder / f"error-{uid or rank}.json"
        error_file.unlink(missing_ok=True)  # its predecessor's
        log = None if rank == 0 and not joins else self._folder / f"worker-{rank}.log"
        # Our own variables of this kind, if any, come from an outer `unisono run`.
        env = overlaid({TERMINAL: "", **env, ERROR_FILE: str(error_file), LAUNCHER_PID: str(os.getpid())})
        with contextlib.ExitStack() as files:
            streams = standard_streams()
            if log is not None:
                output = files.enter_context(log.open("ab")).fileno()
                streams = {0: files.enter_context(Path(os.devnull).open("rb")).fileno(), 1: output, 2: output}
            child = self._fork_server.start(
                "unisono.launch.worker:forked",
                {"command": list(command)},
                environment=env,
                streams=streams,
                handed={TERMINAL: self._terminal} if self._terminal else {},
                folder=None if env.get("PYTHONSAFEPATH") else Path(command[0]).resolve().parent,
                fresh=["-m", "unisono.launch.worker", *command],
            )
        self._by_rank[rank] = SupervisedProcess(rank, uid, child, error_file, log, joins=joins)

    def forget_ended(self) -> None:
        """Call it before another attempt, in which the workers of this host may have other numbers."""
        self._by_rank = {rank: process for rank, process in self._by_rank.items() if process.status is None}

    def wait(self, limit_s: float) -> None:
        """Wait until it is worth to `poll`: a worker has ended, or `limit_s` seconds are over."""
        limit_s = min(limit_s, _POLL_S) if self._leftovers else limit_s
        wait_for_end([process.child for process in self.running], limit_s)

    def poll(self) -> list[SupervisedProcess]:
        """Find the workers that have ended or failed since the last call, and begin to end what the dead left running.

        Returns:
            Those that have ended.
        """
        for process in self._by_rank.values():
            if process.record is None:
                process.record = read_record(process.error_file)
        buried = [process for process in self.running if process.child.poll() is not None]
        for process in buried:
            process.status, process.ended_s = process.child.returncode, time.time()
            process.record = process.record or read_record(process.error_file)
            self._leftovers.add(process.pid)
        self._leftovers.end()
        self._logs.shorten(process.log for process in self._by_rank.values() if process.log is not None)
        return buried

    @property
    def lost(self) -> WorkerFailure | None:
        """The failure of the fork server, if it has ended before the workers: how they end is unknown then."""
        return self._fork_server.failure

    @property
    def latest(self) -> list[SupervisedProcess]:
        """The latest process of each worker, in order of rank."""
        return [process for _, process in sorted(self._by_rank.items())]

    @property
    def running(self) -> list[SupervisedProcess]:
        """Those that run."""
        return [process for process in self._by_rank.values() if process.status is None]

    @property
    def statuses(self) -> list[int | None]:
        """Exit status of each worker's latest process, in order of rank: -N if signal N killed it, None if it runs."""
        return [process.status for process in self.latest]

    @property
    def stopped_by(self) -> signal.Signals | None:
        """The signal that someone sent to a worker and not to us: all workers agree on a stop."""
        return next((signal.Signals(status - 128) for status in self.statuses if status in STOP_CODES), None)

    def failures(self) -> list[Failure]:
        """The workers that failed by themselves: not those that were told to end, or stopped as a signal asked."""
        return [failure for process in self._by_rank.values() if (failure := process.failure)]

    def send(self, signum: signal.Signals) -> None:
        """Send a signal to the workers that run, and to nothing that they have started."""
        for process in self.running:
            process.send(signum)

    def hurry(self, limit_s: float) -> None:
        """Kill workers that failed more than `limit_s` seconds ago and are still on their way out."""
        for process in self.running:
            if process.record is not None and time.time() - process.record.time_s > limit_s:
                process.send(signal.SIGKILL)

    def end_stopped(self) -> None:
        """Kill the workers that run, if SIGSTOP holds every one of them: nothing would continue them."""
        if all(process.is_stopped for process in self.running):
            self.send(signal.SIGKILL)

    def end(self, *, grace_s: float, signum: signal.Signals = signal.SIGTERM) -> None:
        """End all workers and whatever they started: a signal, then SIGKILL for what still runs after the grace.

        A worker that has failed is exiting already and only gets the grace, to finish its cleanup.
        """
        now_s = time.time()
        for process in self._by_rank.values():
            process.told_to_end_s = min(process.told_to_end_s, now_s)
        try:
            for process in self.running:
                if process.record is None:
                    process.send(signum)
            self._wait(grace_s)
        finally:  # also when a person insists
            self.send(signal.SIGKILL)
            self._wait(2.0)  # not for ever: a process stuck in the kernel does not even die of SIGKILL
            while self._leftovers:  # for half a second: then they are killed
                time.sleep(_POLL_S)
                self._leftovers.end()

    def _wait(self, limit_s: float) -> None:
        deadline_s = time.monotonic() + limit_s
        self.poll()
        while self.running and (left_s := deadline_s - time.monotonic()) > 0:
            self.wait(left_s)
            self.poll()
