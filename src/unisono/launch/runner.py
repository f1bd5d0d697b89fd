"""One run of a script on this host, from start to exit status."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unisono.errors import WorkerFailure
from unisono.launch.config import LaunchConfig
from unisono.launch.processes import WorkerProcesses
from unisono.launch.report import has_output, report
from unisono.launch.restart_policy import RestartPolicy
from unisono.system.fork_server import ForkServer
from unisono.system.output import is_terminal, say
from unisono.system.reaper import Reaper
from unisono.system.signals import StopRequest

if TYPE_CHECKING:
    from unisono.launch.rendezvous import Rendezvous

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
class Supervision:
    """How supervision ended, beside what became of this host's workers."""

    failure: str | None = None
    """Why the run has failed, where that is not a failure of this host's workers."""
    leaves: bool = False
    """Whether this host has left, and others go on."""


def run(config: LaunchConfig) -> int:
    """Start the workers, wait for their end, report what failed, and return the exit status. *local*

    The status is 0 if all workers ended with 0, or those that were left when others had died; that of the worker whose
    failure ended the run (128 + N if signal N killed it); or 130 or 143 if SIGINT or SIGTERM asked for a stop and the workers
    followed.
    """
    folder = Path(tempfile.mkdtemp(prefix="unisono-"))
    keep_output = False
    policy = RestartPolicy(max_restarts=config.max_restarts, say=_say)
    try:
        with StopRequest() as stop, Reaper() as reaper, _fork_server(config, reaper) as server, _terminal() as terminal:
            processes = WorkerProcesses(folder, reaper, server, terminal=terminal)
            try:
                outcome = _supervise(config, processes, policy, stop)
            finally:
                processes.end(grace_s=0.0)
        status, text = _conclude(config, processes, policy, stop.requested, outcome)
        if text or stop.requested or processes.stopped_by:
            _restore_terminal()
        if text:
            _say(text)
            cause = policy.cause_of(processes.failures())
            keep_output = cause is not None and has_output(cause.log)
        return status
    finally:
        if not keep_output:
            shutil.rmtree(folder, ignore_errors=True)


def _conclude(
    config: LaunchConfig,
    processes: WorkerProcesses,
    policy: RestartPolicy,
    requested: signal.Signals | None,
    outcome: Supervision,
) -> tuple[int, str | None]:
    """The exit status, and what a person is to see."""
    if outcome.failure and not requested:
        return 1, f"unisono: {outcome.failure}"
    cause = policy.cause_of(processes.failures())
    if processes.lost and (cause is None or cause.record is None or cause.record.secondary):
        return 1, str(processes.lost)
    if outcome.leaves and not (outcome.failure or processes.stopped_by) and (cause is None or cause.error is None):
        return 0, None  # also where it was about to lose workers, or to replace them
    stopped = requested or processes.stopped_by
    # Plain scripts do not stop in the same step: the last may fail only because others left before.
    if stopped and (cause is None or cause.lost_contact):
        followed = outcome.failure or any(processes.statuses) or not processes.statuses
        return 128 + stopped if followed else 0, None
    if cause is None:
        return 0, None
    text = report(cause, size=config.workers, host=socket.gethostname())
    if cause.record is None and not policy.has_applied:
        text += (
            "\nunisono: the run is over: the other workers go on without one only once all have made a Trainer. Start it again"
        )
    return cause.exit_code, text


def _fork_server(config: LaunchConfig, reaper: Reaper) -> ForkServer:
    """Started first of all, it imports PyTorch while we do the same."""
    label = (config.script, *config.args)
    return ForkServer(environment=config.environment, preload=_PRELOADED, reaper=reaper, label=label)


@contextlib.contextmanager
def _terminal() -> Iterator[tuple[int, ...]]:
    """Our standard output and error once more, for every worker: whichever becomes worker 0 speaks to the person."""
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


def _supervise(config: LaunchConfig, processes: WorkerProcesses, policy: RestartPolicy, stop: StopRequest) -> Supervision:
    """Until no worker runs on this host.

    Raises:
        ConfigurationError: The hosts cannot meet where they are told to.
    """
    from unisono.launch.rendezvous import Rendezvous, Stopped  # imports torch, which takes a second
    from unisono.launch.supervisor import Supervisor

    try:
        rendezvous = Rendezvous(config.meet, hosts=config.hosts, wait_s=config.wait_s, stops=lambda: bool(stop.requested))
        env = config.environment | _network(config, rendezvous)
        supervisor = Supervisor(config, env=env, rendezvous=rendezvous, processes=processes, policy=policy, stop=stop, say=_say)
        if stop.requested:
            return Supervision()
        try:
            supervisor.run()
        except Stopped:
            pass  # before the hosts had met again
        finally:
            rendezvous.leave()
    except (Stopped, KeyboardInterrupt):
        return Supervision()  # where a person insisted, the supervisor has ended the workers on its way out
    except WorkerFailure as failure:
        return Supervision(failure=None if processes.lost or stop.requested else str(failure))
    return Supervision(failure=supervisor.failed_elsewhere, leaves=supervisor.leaves)


def _network(config: LaunchConfig, rendezvous: Rendezvous) -> dict[str, str]:
    """Gloo would look up the host's own name, which not every machine can resolve, or not as the others do."""
    if sys.platform != "linux" or "GLOO_SOCKET_IFNAME" in os.environ:
        return {}
    interface = rendezvous.interface if config.meet else "lo"
    return {"GLOO_SOCKET_IFNAME": interface} if interface else {}


def _say(text: str) -> None:
    # A worker's progress display may have left the cursor behind its last line.
    say(("\n" if is_terminal(sys.stderr) else "") + text, error=True)


def _restore_terminal() -> None:
    """A progress display that was killed has left the cursor hidden and in the middle of a line."""
    if is_terminal(sys.stdout):
        say("\x1b[?25h")
