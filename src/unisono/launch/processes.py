"""The workers' processes: started, watched, asked to stop, ended, each with everything that it started itself.

Each worker leads a session of its own. A Ctrl-C in the terminal therefore reaches the launcher only, which passes it on
to the workers but not to their loader workers, without which they could not finish their step; and ending the group
ends the loader workers too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unisono.errors import WorkerFailure
from unisono.launch.guard import Guard, end_groups
from unisono.launch.nursery import BLOCKED_SIGNALS, Child, Nursery, Refusal, standard_streams
from unisono.launch.report import ERROR_FILE, Failure, FailureRecord, read_record
from unisono.launch.worker import LAUNCHER_PID

STOP_CODES = frozenset(128 + signum for signum in BLOCKED_SIGNALS)
"""Exit statuses of a worker that stopped because a signal asked it to."""

_log = logging.getLogger(__name__)

_POLL_S = 0.02
_LEFTOVERS_S = 0.5


@dataclass
class _Process:
    rank: int
    popen: subprocess.Popen[bytes] | Child
    error_file: Path
    log: Path | None
    status: int | None = None
    ended_s: float = 0.0
    sent: set[int] = field(default_factory=set)
    """Signals that we have sent it: that it died of one is not its failure."""
    record: FailureRecord | None = None

    @property
    def failed_s(self) -> float:
        return self.record.time_s if self.record else self.ended_s

    def send(self, signum: signal.Signals) -> None:
        self.sent.add(signum)
        self.popen.send_signal(signum)


class WorkerProcesses:
    """The workers of this host, from start to end. All methods are *local*.

    Args:
        folder: Where workers leave output and failure records.
        guard: Who ends the workers if this process is killed.
        nursery: Who forks the workers. Without one, or where it refuses, each gets a fresh interpreter.
    """

    def __init__(self, folder: Path, guard: Guard, nursery: Nursery | None = None) -> None:
        self._folder = folder
        self._guard = guard
        self._nursery = nursery
        self._by_rank: dict[int, _Process] = {}
        self._ending_s = float("inf")

    def start(self, rank: int, command: Sequence[str], env: Mapping[str, str]) -> int:
        """Start one worker and return its process number; at any time, also in the place of one that has ended.

        Rank 0 has the launcher's terminal (or whatever its input and output are); the others write to files.

        Raises:
            WorkerFailure: The nursery has ended.
        """
        error_file = self._folder / f"error-{rank}.json"
        error_file.unlink(missing_ok=True)  # its predecessor's
        log = self._folder / f"worker-{rank}.log" if rank else None
        env = {**os.environ, **env, ERROR_FILE: str(error_file)}
        with contextlib.ExitStack() as files:
            output = files.enter_context(log.open("ab")).fileno() if log else None
            process = self._fork(rank, command, env, output) or self._spawn(rank, command, env, output)
            self._by_rank[rank] = _Process(rank, process, error_file, log)
        return process.pid

    def _fork(self, rank: int, command: Sequence[str], env: Mapping[str, str], output: int | None) -> Child | None:
        """None where a worker from the nursery would not be as it is from a fresh interpreter."""
        if self._nursery is None:
            return None
        streams = standard_streams()
        with contextlib.ExitStack() as files:
            if output is not None:
                nothing = files.enter_context(Path(os.devnull).open("rb")).fileno()
                streams = {0: nothing, 1: output, 2: output}
            try:
                return self._nursery.start(
                    "unisono.launch.worker:forked",
                    {"command": list(command)},
                    environment=env,
                    streams=streams,
                    folder=None if env.get("PYTHONSAFEPATH") else Path(command[0]).resolve().parent,
                )
            except Refusal as refusal:
                _log.debug("worker %d starts in a fresh interpreter: %s", rank, refusal)
                return None

    def _spawn(self, rank: int, command: Sequence[str], env: Mapping[str, str], output: int | None) -> subprocess.Popen[bytes]:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
        try:
            popen = subprocess.Popen(
                [sys.executable, "-P", "-m", "unisono.launch.worker", *command],
                env={**env, LAUNCHER_PID: str(os.getpid())},
                stdin=subprocess.DEVNULL if rank else None,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            self._guard.add(popen.pid)
            return popen
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def poll(self) -> None:
        """See who has ended or failed since the last time, and end what the dead left running."""
        for process in self._by_rank.values():
            if process.record is None:
                process.record = read_record(process.error_file)
        buried = [process for process in self._running() if process.popen.poll() is not None]
        for process in buried:
            process.status, process.ended_s = process.popen.returncode, time.time()
            process.record = process.record or read_record(process.error_file)
        end_groups([process.popen.pid for process in buried], grace_s=_LEFTOVERS_S)
        for process in buried:
            self._guard.remove(process.popen.pid)

    @property
    def lost(self) -> WorkerFailure | None:
        """Why nobody can tell how the workers end, if the nursery has ended before them."""
        return self._nursery.failure if self._nursery else None

    @property
    def all_ended(self) -> bool:
        """Whether no worker runs any more."""
        return not self._running()

    @property
    def statuses(self) -> list[int | None]:
        """Exit status of each worker, in order of rank: -N if signal N killed it, None if it runs."""
        return [process.status for _, process in sorted(self._by_rank.items())]

    def failures(self) -> list[Failure]:
        """The workers that failed by themselves: not those that were told to end, or stopped as a signal asked."""
        return [
            Failure(
                rank=process.rank,
                pid=process.popen.pid,
                status=process.status,
                time_s=process.failed_s,
                record=process.record,
                log=process.log,
            )
            for process in self._by_rank.values()
            if self._has_failed(process)
        ]

    def _has_failed(self, process: _Process) -> bool:
        status = process.status
        if process.record is None and (status is None or status == 0 or status in STOP_CODES or -status in process.sent):
            return False
        return process.failed_s <= self._ending_s  # later failures come of being ended

    def ask_to_stop(self, signum: signal.Signals) -> None:
        """Pass a stop on to the workers that run, and to nobody else."""
        for process in self._running():
            process.send(signum)

    def end(self, *, grace_s: float, signum: signal.Signals = signal.SIGTERM) -> None:
        """End all workers and whatever they started: a signal, then SIGKILL for who still runs after the grace.

        A worker that has failed is on its way out already and only gets the grace, for its own last words.
        """
        self._ending_s = min(self._ending_s, time.time())
        try:
            for process in self._running():
                if process.record is None:
                    process.send(signum)
            self._wait(grace_s)
        finally:  # also when a person insists
            for process in self._running():
                process.send(signal.SIGKILL)
            self._wait(2.0)  # not for ever: a process stuck in the kernel does not even die of SIGKILL

    def _wait(self, limit_s: float) -> None:
        deadline_s = time.monotonic() + limit_s
        self.poll()
        while self._running() and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
            self.poll()

    def _running(self) -> list[_Process]:
        return [process for process in self._by_rank.values() if process.status is None]
