"""One run of a script on this host, from start to exit status."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unisono.errors import WorkerFailure
from unisono.launch.processes import WorkerProcesses
from unisono.launch.report import Failure, has_output, report, root_cause
from unisono.launch.survival import Survival
from unisono.system.fork_server import ForkServer
from unisono.system.reaper import Reaper
from unisono.system.signals import STOP_CODES, StopRequest

if TYPE_CHECKING:
    from unisono.launch.agent import Agent
    from unisono.launch.meeting import Meeting

_PRELOADED = (
    "numpy",
    "torch",
    "torch._dynamo",  # every optimizer imports it
    "torch.distributed",
    "unisono.training.trainer",
    "unisono.launch.worker",
)
"""What the fork server imports: what every training script needs, and nothing that a script may need in another way."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What to run."""

    script: str
    """Path of the script."""
    args: Sequence[str] = ()
    """Its arguments."""
    workers: int
    """How many workers."""
    workers_defaulted: bool
    """Whether nobody named that number: then the Trainer may use fewer."""
    threads: int
    """Threads per worker."""
    grace_s: float
    """How long workers may take to save their work and leave after a stop, in seconds."""
    minimum: int = 1
    """Fewest workers that go on when others are lost."""
    max_restarts: int = 3
    """How often in the whole run a worker is replaced, or all start again from a checkpoint."""
    wait_s: float = 300.0
    """How long fewer workers than the minimum wait for more, and hosts for each other, in seconds."""
    meet: tuple[str, int] | None = None
    """Host and port where the launchers of several hosts meet; None if there is only this one."""
    hosts: int = 1
    """How many hosts begin the run together."""


def run(settings: Run) -> int:
    """Start the workers, wait for their end, report what failed, and return the exit status. *local*

    The status is 0 if all workers ended with 0, or those that were left when others had died; that of the worker whose
    failure ended the run (128 + N if signal N killed it); or 130 or 143 if SIGINT or SIGTERM asked for a stop and the workers
    followed.
    """
    host = socket.gethostname()
    folder = Path(tempfile.mkdtemp(prefix="unisono-"))
    keep_output = False
    survival = Survival(max_restarts=settings.max_restarts, say=_say)
    try:
        with StopRequest() as stop, Reaper() as reaper, _fork_server(settings, reaper) as server, _terminal() as terminal:
            processes = WorkerProcesses(folder, reaper, server, terminal=terminal)
            elsewhere = contact = None
            leaves = False
            try:
                elsewhere, leaves = _run_agent(settings, processes, survival, stop)
            except KeyboardInterrupt:
                pass  # a person insisted: the agent has ended the workers on its way out
            except WorkerFailure as failure:
                contact = None if processes.lost else str(failure)
            finally:
                processes.end(grace_s=0.0)
        if (elsewhere or contact) and not stop.requested:
            _restore_terminal()
            _say(f"unisono: {elsewhere or contact}")
            return 1
        cause = survival.cause if survival.has_applied else root_cause(processes.failures())
        if processes.lost and (cause is None or cause.record is None or cause.record.secondary):
            _restore_terminal()
            _say(str(processes.lost))
            return 1
        stopped = stop.requested or _stop_of(processes)
        if stopped:
            _restore_terminal()
        if leaves and not (elsewhere or _stop_of(processes)) and (cause is None or cause.error is None):
            return 0  # also where it was about to lose workers, or to replace them
        if stopped and (cause is None or _is_consequence_of_stop(cause)):
            return 128 + stopped if elsewhere or any(processes.statuses) or not processes.statuses else 0
        if cause is None:
            return 0
        _restore_terminal()
        _say(report(cause, size=settings.workers, host=host))
        keep_output = has_output(cause.log)
        return cause.exit_code
    finally:
        if not keep_output:
            shutil.rmtree(folder, ignore_errors=True)


def _fork_server(settings: Run, reaper: Reaper) -> ForkServer:
    """Started first of all, it imports PyTorch while we do the same."""
    label = (settings.script, *settings.args)
    return ForkServer(environment=_environment(settings), preload=_PRELOADED, reaper=reaper, label=label)


@contextlib.contextmanager
def _terminal() -> Iterator[tuple[int, ...]]:
    """Our standard output and error once more, for every worker: whoever becomes worker 0 speaks to the person."""
    with contextlib.ExitStack() as stack:
        copies = []
        for descriptor in (1, 2):
            try:
                # From 3 up: a closed stream must not be taken for a free number.
                copies.append(fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3))
            except OSError:
                yield ()
                return
            stack.callback(os.close, copies[-1])
        yield tuple(copies)


def _run_agent(settings: Run, processes: WorkerProcesses, survival: Survival, stop: StopRequest) -> tuple[str | None, bool]:
    """Why the run has failed, if not of this host's workers; and whether this host left, and others go on.

    Raises:
        ConfigurationError: The hosts cannot meet where they are told to.
        WorkerFailure: The fork server has ended, or contact with the other hosts was lost.
    """
    from unisono.launch.meeting import Meeting, Stopped  # imports torch, which takes a second

    try:
        meeting = Meeting(settings.meet, hosts=settings.hosts, wait_s=settings.wait_s, stops=lambda: bool(stop.requested))
        agent = _make_agent(settings, meeting, processes, survival, stop)
        if stop.requested:
            return None, False
        try:
            agent.run()
        except Stopped:
            pass  # before the hosts had met again
        finally:
            meeting.shutdown()
    except Stopped:
        return None, False
    return agent.failed_elsewhere, agent.leaves


def _make_agent(settings: Run, meeting: Meeting, processes: WorkerProcesses, survival: Survival, stop: StopRequest) -> Agent:
    from torch.distributed.elastic.agent.server.api import WorkerSpec

    from unisono.launch.agent import Agent

    # Elastic logs each failure at length: our report says it once.
    elastic = logging.getLogger("torch.distributed.elastic")
    elastic.addHandler(logging.NullHandler())
    elastic.propagate = False
    spec = WorkerSpec(
        role="worker",
        local_world_size=settings.workers,
        entrypoint=settings.script,
        rdzv_handler=meeting,
        max_restarts=settings.max_restarts,
        monitor_interval=0.001,  # elastic wants one, but the agent itself waits until a worker ends
    )
    return Agent(
        spec,
        meeting=meeting,
        processes=processes,
        survival=survival,
        is_shared=settings.meet is not None,
        command=[settings.script, *settings.args],
        env=_environment(settings) | _network(settings, meeting),
        stop=stop,
        grace_s=settings.grace_s,
        say=_say,
    )


def _environment(settings: Run) -> dict[str, str]:
    threads = str(settings.threads)
    env = {
        "UNISONO_LAUNCHED": "1",
        "UNISONO_WORKERS_DEFAULTED": "1" if settings.workers_defaulted else "0",
        "UNISONO_THREADS": threads,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "UNISONO_MINIMUM": str(settings.minimum),
        "UNISONO_WAIT": str(settings.wait_s),
        "PYTHONUNBUFFERED": "1",  # what a worker said before it was killed is in its log
    }
    return env


def _network(settings: Run, meeting: Meeting) -> dict[str, str]:
    """Gloo would look up the host's own name, which not every machine can resolve, or not as the others do."""
    if sys.platform != "linux" or "GLOO_SOCKET_IFNAME" in os.environ:
        return {}
    interface = meeting.interface if settings.meet else "lo"
    return {"GLOO_SOCKET_IFNAME": interface} if interface else {}


def _stop_of(processes: WorkerProcesses) -> signal.Signals | None:
    """The signal that stopped the run, if it was sent to the workers only."""
    return next((signal.Signals(status - 128) for status in processes.statuses if status in STOP_CODES), None)


def _is_consequence_of_stop(failure: Failure) -> bool:
    """Whether a worker failed only because others left before it: plain scripts do not stop in the same step."""
    return failure.record is not None and failure.record.secondary


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        # A worker's progress display may have left the cursor behind its last line.
        print(("\n" if sys.stderr.isatty() else "") + text, file=sys.stderr, flush=True)


def _restore_terminal() -> None:
    """A progress display that was killed has left the cursor hidden and in the middle of a line."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stdout.isatty():
            print("\x1b[?25h", flush=True)
