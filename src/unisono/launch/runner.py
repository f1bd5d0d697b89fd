"""One run of a script on this host, from start to exit status."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unisono.errors import WorkerFailure
from unisono.launch.guard import Guard
from unisono.launch.nursery import Nursery, is_possible
from unisono.launch.processes import STOP_CODES, WorkerProcesses
from unisono.launch.report import Failure, has_output, report, root_cause
from unisono.signals import StopRequest

if TYPE_CHECKING:
    from unisono.launch.agent import Agent

_MONITOR_INTERVAL_S = 0.1
_PRELOADED = (
    "numpy",
    "torch",
    "torch._dynamo",  # every optimizer imports it
    "torch.distributed",
    "unisono.training.trainer",
    "unisono.launch.worker",
)
"""What the nursery imports: what every training script needs, and nothing that a script may need in another way."""


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


def run(settings: Run) -> int:
    """Start the workers, wait for their end, report what failed, and return the exit status. *local*

    The status is 0 if all workers ended with 0; that of the worker that failed first (128 + N if signal N killed it);
    or 130 or 143 if SIGINT or SIGTERM asked for a stop and the workers followed.
    """
    host = socket.gethostname()
    folder = Path(tempfile.mkdtemp(prefix="unisono-"))
    keep_output = False
    try:
        with StopRequest() as stop, Guard() as guard, _nursery(settings, guard) as nursery:
            processes = WorkerProcesses(folder, guard, nursery)
            try:
                _run_agent(settings, processes, stop)
            except KeyboardInterrupt:
                pass  # a person insisted: the agent has ended the workers on its way out
            except WorkerFailure:
                if processes.lost is None:
                    raise
            finally:
                processes.end(grace_s=0.0)
        cause = root_cause(processes.failures())
        if processes.lost and (cause is None or cause.record is None or cause.record.secondary):
            _restore_terminal()
            _say(str(processes.lost))
            return 1
        stopped = stop.requested or _stop_of(processes)
        if stopped:
            _restore_terminal()
        if stopped and (cause is None or _is_consequence_of_stop(cause)):
            return 128 + stopped if any(processes.statuses) or not processes.statuses else 0
        if cause is None:
            return 0
        _restore_terminal()
        _say(report(cause, size=settings.workers, host=host))
        keep_output = has_output(cause.log)
        return cause.exit_code
    finally:
        if not keep_output:
            shutil.rmtree(folder, ignore_errors=True)


def _nursery(settings: Run, guard: Guard) -> AbstractContextManager[Nursery | None]:
    """Started first of all, it imports PyTorch while we do the same."""
    if not is_possible():
        return contextlib.nullcontext()
    command = (settings.script, *settings.args)
    return Nursery(environment=_environment(settings), preload=_PRELOADED, guard=guard, label=command)


def _run_agent(settings: Run, processes: WorkerProcesses, stop: StopRequest) -> None:
    agent = _make_agent(settings, processes, stop)  # imports torch, which takes a second
    if stop.requested:
        return
    rendezvous = agent.get_worker_group().spec.rdzv_handler
    try:
        agent.run()
    finally:
        rendezvous.shutdown()


def _make_agent(settings: Run, processes: WorkerProcesses, stop: StopRequest) -> Agent:
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    from unisono.launch.agent import Agent

    # Elastic logs each failure at length: our report says it once.
    elastic = logging.getLogger("torch.distributed.elastic")
    elastic.addHandler(logging.NullHandler())
    elastic.propagate = False
    # Port 0: the system picks a free one, so that runs beside each other do not meet.
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        min_nodes=1,
        max_nodes=1,
        local_addr="localhost",
        is_host=True,
    )
    spec = WorkerSpec(
        role="worker",
        local_world_size=settings.workers,
        entrypoint=settings.script,
        rdzv_handler=get_rendezvous_handler(parameters),
        max_restarts=0,
        monitor_interval=_MONITOR_INTERVAL_S,
        local_addr="localhost",
    )
    return Agent(
        spec,
        processes=processes,
        command=[settings.script, *settings.args],
        env=_environment(settings),
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
        "PYTHONUNBUFFERED": "1",  # what a worker said before it was killed is in its log
    }
    if sys.platform == "linux" and "GLOO_SOCKET_IFNAME" not in os.environ:
        # All workers are here. Gloo would look up the host's own name, which not every machine can resolve.
        env["GLOO_SOCKET_IFNAME"] = "lo"
    return env


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
