"""torch.distributed.elastic's agent, with our own rules for failures and for stops.

Its base class gathers the hosts (rendezvous), gives out ranks, and watches the workers in a loop. PyTorch's own agent
for processes does not serve us: it gives a failing group 30 seconds that cannot be changed, forgets which worker failed
first, and treats a person's Ctrl-C like a failure. So this one implements the four methods that the base class leaves
open, over `WorkerProcesses`.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)

from unisono.launch.processes import STOP_CODES, WorkerProcesses
from unisono.signals import StopRequest

_FAILURE_GRACE_S = 1.0
"""How long the others may take to end after a failure: all must be gone within 5 seconds."""
_CAUSE_S = 1.0
"""How long to wait for the cause when workers have so far only lost contact with one that is still unwinding."""
_ABANDONED_GRACE_S = 3.0
"""How long workers may take to stop once another one has died of the stop, instead of taking part in it."""


class Agent(SimpleElasticAgent):
    """Starts and watches the workers of this host.

    Args:
        spec: What elastic wants to know.
        processes: The workers' processes.
        command: Script and arguments.
        env: Variables for every worker.
        stop: Whether a person asked to stop.
        grace_s: How long workers may take to save their work and leave after a stop, in seconds.
        say: Shows one line to a person.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        processes: WorkerProcesses,
        command: Sequence[str],
        env: Mapping[str, str],
        stop: StopRequest,
        grace_s: float,
        say: Callable[[str], None],
    ) -> None:
        super().__init__(spec)
        self._processes = processes
        self._command = command
        self._env = env
        self._stop = stop
        self._grace_s = grace_s
        self._say = say
        self._stop_deadline_s: float | None = None
        self._first_failure_s: float | None = None

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        spec = worker_group.spec
        pids: dict[int, Any] = {}
        for worker in worker_group.workers:
            env = {
                "RANK": str(worker.global_rank),
                "LOCAL_RANK": str(worker.local_rank),
                "WORLD_SIZE": str(worker.world_size),
                "LOCAL_WORLD_SIZE": str(spec.local_world_size),
                "GROUP_RANK": str(worker_group.group_rank),
                "GROUP_WORLD_SIZE": str(worker_group.group_world_size),
                "ROLE_NAME": spec.role,
                "ROLE_RANK": str(worker.role_rank),
                "ROLE_WORLD_SIZE": str(worker.role_world_size),
                "MASTER_ADDR": str(worker_group.master_addr),
                "MASTER_PORT": str(worker_group.master_port),
                "TORCHELASTIC_RESTART_COUNT": "0",
                "TORCHELASTIC_MAX_RESTARTS": "0",
                "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
                "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
            }
            pids[worker.local_rank] = self._processes.start(worker.global_rank, self._command, {**self._env, **env})
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._processes.poll()
        if self._processes.lost:
            return RunResult(state=WorkerState.FAILED)
        if self._processes.all_ended:
            if any(self._processes.statuses):
                return RunResult(state=WorkerState.FAILED)
            ranks = [worker.global_rank for worker in worker_group.workers]
            return RunResult(state=WorkerState.SUCCEEDED, return_values=dict.fromkeys(ranks))
        if self._has_failed() or self._stop_is_overdue():
            return RunResult(state=WorkerState.FAILED)  # elastic now calls _stop_workers
        return RunResult(state=WorkerState.HEALTHY)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        # Elastic's 30 seconds would be far too long after a failure; a stop has had its own grace before it gets here.
        self._processes.end(grace_s=_FAILURE_GRACE_S, signum=death_sig)

    def _has_failed(self) -> bool:
        failures = self._processes.failures()
        if not failures:
            return False
        if self._first_failure_s is None:
            self._first_failure_s = time.monotonic()
        known = any(failure.record is None or not failure.record.secondary for failure in failures)
        return known or time.monotonic() - self._first_failure_s > _CAUSE_S

    def _stop_is_overdue(self) -> bool:
        """Pass a stop on, once, and see whether its grace is over."""
        if self._stop_deadline_s is None:
            signum = self._stop.requested or self._stopped_by_worker()
            if signum is None:
                return False
            if self._stop.requested:
                self._say(f"unisono: {signum.name}: the workers finish their step and stop; Ctrl-C again ends them now")
            self._processes.ask_to_stop(signum)
            self._stop_deadline_s = time.monotonic() + self._grace_s
        if any(status is not None and status < 0 for status in self._processes.statuses):
            # Plain scripts die of the signal where it finds them. The others may then wait for them for ever.
            self._grace_s = min(self._grace_s, _ABANDONED_GRACE_S)
            self._stop_deadline_s = min(self._stop_deadline_s, time.monotonic() + self._grace_s)
        if time.monotonic() < self._stop_deadline_s:
            return False
        self._say(f"unisono: workers still ran {self._grace_s:g} s after the stop and were ended (--grace)")
        return True

    def _stopped_by_worker(self) -> signal.Signals | None:
        """The signal that someone sent to a worker and not to us: all workers agree on a stop, so all get its grace."""
        codes = (status for status in self._processes.statuses if status in STOP_CODES)
        return next((signal.Signals(code - 128) for code in codes if code is not None), None)
