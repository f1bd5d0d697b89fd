"""torch.distributed.elastic's agent, with our own rules for failures and for stops.

Its base class gathers the hosts (rendezvous), gives out ranks, watches the workers in a loop, and can end all of them and
start them again. PyTorch's own agent for processes does not serve us: it gives a failing group 30 seconds that cannot be
changed, forgets which worker failed first, treats a person's Ctrl-C like a failure, and knows no way to restart one worker
without the others. So this one implements the four methods that the base class leaves open, over `WorkerProcesses`; what
becomes of a run that can go on without one of its workers is for `Survival` to say.
"""

from __future__ import annotations

import itertools
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)

from unisono.errors import WorkerFailure
from unisono.launch.board import FINE, Board, uid_of
from unisono.launch.meeting import BrokenOff, Meeting, Stopped
from unisono.launch.processes import WorkerProcess, WorkerProcesses
from unisono.launch.report import brief, root_cause
from unisono.launch.survival import Course, Survival
from unisono.system.signals import STOP_CODES, StopRequest

_WAIT_S = 0.05
"""How long to wait for news of a worker before looking whether a person asked to stop."""
_LOOK_S = 0.25
"""How often to hear what the workers and other hosts' launchers say, in seconds."""
_FAILURE_GRACE_S = 1.0
"""How long the others may take to end after a failure: all must be gone within 5 seconds."""
_CAUSE_S = 1.0
"""How long to wait for the cause when workers have so far only lost contact with one that is still unwinding."""
_ABANDONED_GRACE_S = 3.0
"""How long workers may take to stop once another one has died of the stop, instead of taking part in it."""

_STATES = {
    Course.GO_ON: WorkerState.HEALTHY,
    Course.AGAIN: WorkerState.UNHEALTHY,
    Course.DONE: WorkerState.SUCCEEDED,
    Course.FAILED: WorkerState.FAILED,
    Course.OUT: WorkerState.FAILED,
}


class Agent(SimpleElasticAgent):
    """Starts and watches the workers of this host.

    Args:
        spec: What elastic wants to know.
        meeting: Its rendezvous, which serves the store.
        processes: The workers' processes.
        survival: What becomes of the run when a worker dies.
        is_shared: Whether other hosts may take part.
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
        meeting: Meeting,
        processes: WorkerProcesses,
        survival: Survival,
        is_shared: bool,
        command: Sequence[str],
        env: Mapping[str, str],
        stop: StopRequest,
        grace_s: float,
        say: Callable[[str], None],
    ) -> None:
        super().__init__(spec)
        self._meeting = meeting
        self._processes = processes
        self._survival = survival
        self._command = command
        self._env = env
        self._stop = stop
        self._grace_s = grace_s
        self._say = say
        self._board: Board
        self._is_shared = is_shared
        self._looked_s = 0.0
        self._heard_s = 0.0
        self.failed_elsewhere: str | None = None
        """Why the run has failed, where that is not a failure of this host's workers."""
        self.leaves = False
        """Whether this host was told to leave, and the others may go on without it."""
        self._founders: list[str] = []
        self._started = 0
        self._stopped_elsewhere: signal.Signals | None = None
        self._stop_deadline_s: float | None = None
        self._first_failure_s: float | None = None

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        while True:
            try:
                super()._rendezvous(worker_group)
            except BrokenOff:
                continue
            except Stopped:
                self.leaves = self._may_leave and self._survival.has_applied
                raise
            return

    def _assign_worker_ranks(self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec) -> list[Worker]:
        # Elastic's own waits a minute for what each host says of itself, and then fails: one may have been lost.
        self._board = Board(self._meeting.store, self._meeting.attempt)
        self._survival.begin(self._board, is_alone=not self._is_shared)
        if self._meeting.joins:
            self._founders, before = [], 0
            size = spec.local_world_size if self._can_join() else 0
        else:
            uids = [self._next_uid() for _ in range(spec.local_world_size)]
            everyones = [said.split(",") for said in self._meeting.exchange(",".join(uids))]
            self._founders = list(itertools.chain(*everyones))
            if self._survival.has_applied:
                self._board.tell_founders(self._founders)
            before, size = sum(map(len, everyones[:group_rank])), len(self._founders)
        return [
            Worker(local_rank=place, global_rank=before + place, role_rank=before + place, world_size=size, role_world_size=size)
            for place in range(min(size, spec.local_world_size))
        ]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._processes.forget_ended()
        self._first_failure_s = None
        if self._meeting.joins:
            return {worker.local_rank: self._start_joining(worker) for worker in worker_group.workers}
        started = {}
        for worker in worker_group.workers:
            uid = self._founders[worker.global_rank]
            env = {
                "RANK": str(worker.global_rank),
                "WORLD_SIZE": str(worker.world_size),
                "ROLE_RANK": str(worker.role_rank),
                "ROLE_WORLD_SIZE": str(worker.role_world_size),
                "UNISONO_FOUNDERS": ",".join(self._founders),
                "UNISONO_JOINS": "",
            }
            env = {**self._environment(worker, uid), **env}
            started[worker.local_rank] = self._processes.start(worker.global_rank, self._command, env, uid=uid).pid
        return started

    def _can_join(self) -> bool:
        """Whether there still is something to do for a host that comes later."""
        deadline_s = time.monotonic() + self._meeting.wait_s
        while not self._survival.applies:
            if self._board.news().again:
                raise BrokenOff
            if time.monotonic() > deadline_s:
                raise WorkerFailure(
                    f"the run at {self._meeting.address} has made no Trainer within {self._meeting.wait_s:g} s (--wait): only "
                    "one with a Trainer takes in hosts that come later. Start all hosts of another script together (--hosts)"
                )
            self._meeting.pause()
        return not self._board.is_over

    def _start_joining(self, worker: Worker) -> int:
        """Start a worker that joins the others, perhaps in the place of one that died. It has no rank among them yet: the
        variables say which worker of this host it is, so that a script which asks them does as its predecessor did."""
        uid, spec = self._next_uid(), self._worker_group.spec
        place, places = str(worker.local_rank), str(spec.local_world_size)
        env = {
            "RANK": place,
            "WORLD_SIZE": places,
            "ROLE_RANK": place,
            "ROLE_WORLD_SIZE": places,
            "UNISONO_FOUNDERS": "",
            "UNISONO_JOINS": "1",
        }
        env = {**self._environment(worker, uid), **env}
        return self._processes.start(worker.global_rank, self._command, env, uid=uid, joins=True).pid

    def _environment(self, worker: Worker, uid: str) -> dict[str, str]:
        group, spec = self._worker_group, self._worker_group.spec
        return {
            **self._env,
            "LOCAL_RANK": str(worker.local_rank),
            "LOCAL_WORLD_SIZE": str(spec.local_world_size),
            "GROUP_RANK": str(group.group_rank),
            "GROUP_WORLD_SIZE": str(group.group_world_size),
            "ROLE_NAME": spec.role,
            "MASTER_ADDR": str(group.master_addr),
            "MASTER_PORT": str(group.master_port),
            "TORCHELASTIC_RESTART_COUNT": str(self._meeting.attempt),
            "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
            "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
            "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
            "UNISONO_STORE": self._meeting.address,
            "UNISONO_ATTEMPT": str(self._meeting.attempt),
            "UNISONO_UID": uid,
        }

    def _next_uid(self) -> str:
        self._started += 1
        return uid_of(self._meeting.host, self._started - 1)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._processes.wait(_WAIT_S)
        ended = self._processes.poll()
        for process in ended:
            self._board.tell_dead(process.uid, _end_of(process))
        course = Course.FAILED if self._processes.lost else self._shared_course(self._course(ended))
        # Elastic starts all workers again after either bad state if it has restarts left. Who may, has been decided: it
        # would also count those only that restart all.
        self._remaining_restarts = 1 if course is Course.AGAIN else 0
        if course is Course.AGAIN:
            # They have nothing to save, or nothing to save it with. One that still ran would disturb those that come.
            self._processes.end(grace_s=0.0, signum=signal.SIGKILL)
        ranks = [worker.global_rank for worker in worker_group.workers] if course is Course.DONE else []
        return RunResult(state=_STATES[course], return_values=dict.fromkeys(ranks))

    def _course(self, ended: Sequence[WorkerProcess]) -> Course:
        overdue = self._stop_is_overdue()
        if not self._survival.applies:
            return self._plain_course(overdue=overdue)
        now_s, stops = time.monotonic(), self._stop_deadline_s is not None
        course = self._survival.look(ended, self._processes.latest, stops=stops, now_s=now_s)
        if course is not Course.GO_ON:
            return course
        self._processes.hurry(_FAILURE_GRACE_S)
        self._end_outsiders(now_s)
        if 0 in self._processes.statuses and self._board.is_over:
            self._processes.end_stopped()
        due = [] if stops else self._survival.due(self._processes.running, now_s)
        for worker in self._worker_group.workers:
            if worker.global_rank in due:
                worker.id = self._start_joining(worker)
        return Course.FAILED if overdue else Course.GO_ON

    def _end_outsiders(self, now_s: float) -> None:
        """Kill those of our workers that the others have given up, and tell the others which stand still: where all who take part
        do, they are given up by those who wait to join."""
        if now_s - self._looked_s > _LOOK_S:
            self._looked_s = now_s
            running = [process for process in self._processes.latest if process.status is None]
            self._board.tell_standing(process.uid for process in running if process.is_stopped)
            self._processes.kill([process for process in running if self._board.is_outside(process.uid)])

    def _shared_course(self, course: Course) -> Course:
        """The same, as far as other hosts agree."""
        if not self._is_shared:
            return course
        cause = self._survival.cause if self._survival.has_applied else root_cause(self._processes.failures())
        if course is Course.FAILED and cause is not None and not self.leaves:
            self._board.tell_failed(f"worker {cause.rank} (pid {cause.pid}) on {socket.gethostname()} {brief(cause)}")
        if time.monotonic() - self._heard_s > _LOOK_S:
            self._heard_s = time.monotonic()
            if self._meeting.serves:
                self._board.tell_lost([self._meeting.host, *self._meeting.others()])
            news = self._board.news()
            if news.failed and course is not Course.FAILED:
                self.failed_elsewhere = f"the run has failed: {news.failed}"
                return Course.FAILED
            if news.again:
                return Course.AGAIN
            self._stopped_elsewhere = news.stop
        if course in (Course.DONE, Course.OUT) and self._meeting.serves:
            if self._meeting.others():
                return Course.GO_ON  # without the store the others could not
            course = self._last_course(course)
        if course is Course.OUT:
            self._survival.give_up(self._processes.latest)
        return course

    def _last_course(self, course: Course) -> Course:
        """The same, now that no other host is there: what they have said before they left counts."""
        if course is Course.OUT:
            return Course.DONE if self._board.is_over else Course.OUT
        if (loose_end := self._board.loose_end) is None:
            return Course.DONE
        self.failed_elsewhere = (
            f"the run is not finished, and nobody goes on with it: this host's workers have left, and {loose_end}. Start the "
            "same command again: it continues from the last checkpoint"
        )
        return Course.FAILED

    def _plain_course(self, *, overdue: bool) -> Course:
        """Of a script without a Trainer, whose workers cannot go on without each other."""
        if self._processes.all_ended:
            return Course.FAILED if any(self._processes.statuses) else Course.DONE
        return Course.FAILED if overdue or self._has_failed() else Course.GO_ON

    def _exit_barrier(self) -> None:
        """Elastic's own waits for the hosts that began the attempt, five minutes for one that is lost. Here the host that
        serves the store stays until the others have left, which it does in its loop."""

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
        known = any(not failure.is_secondary for failure in failures)
        return known or time.monotonic() - self._first_failure_s > _CAUSE_S

    def _stop_is_overdue(self) -> bool:
        """Pass a stop on, once, and see whether its grace is over."""
        if self._stop_deadline_s is None:
            signum = self._stop.requested or self._stopped_elsewhere or self._stopped_by_worker()
            if signum is None or (self._processes.all_ended and not self._outlasts):
                return False
            if self._stop.requested:
                self._say(f"unisono: {signum.name}: the workers finish their step and stop; Ctrl-C again ends them now")
            self.leaves = self._may_leave and self._survival.applies and not self._stopped_elsewhere
            if self.leaves:
                signum = signal.SIGTERM  # not announced: the others go on
            else:
                self._board.tell_stop(signum)
            self._processes.ask_to_stop(signum)
            self._stop_deadline_s = time.monotonic() + self._grace_s
        died = any(status is not None and status < 0 for status in self._processes.statuses)
        if died and not self._survival.applies:
            # Plain scripts die of the signal where it finds them. The others may then wait for them for ever.
            self._grace_s = min(self._grace_s, _ABANDONED_GRACE_S)
            self._stop_deadline_s = min(self._stop_deadline_s, time.monotonic() + self._grace_s)
        if time.monotonic() < self._stop_deadline_s or self._processes.all_ended:
            return False
        self._say(f"unisono: workers still ran {self._grace_s:g} s after the stop and were ended (--grace)")
        return True

    @property
    def _may_leave(self) -> bool:
        """Whether others go on without this host, if the script can."""
        return self._is_shared and not self._meeting.serves

    @property
    def _outlasts(self) -> bool:
        """Whether this launcher stays without workers, for those of other hosts: then it passes a person's stop on to them."""
        return self._is_shared and self._meeting.serves and self._survival.applies and self._stop.requested is not None

    def _stopped_by_worker(self) -> signal.Signals | None:
        """The signal that someone sent to a worker and not to us: all workers agree on a stop, so all get its grace."""
        codes = (status for status in self._processes.statuses if status in STOP_CODES)
        return next((signal.Signals(code - 128) for code in codes if code is not None), None)


def _end_of(process: WorkerProcess) -> str:
    """How a process ended, for the other workers to tell."""
    if process.status == 0:
        return FINE
    failure = process.failure
    return brief(failure) if failure else f"ended with status {process.status}"
