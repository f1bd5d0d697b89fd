"""Starts and watches the workers of this host, from attempt to attempt, until the run ends here.

Each look at the workers gives a `Course`. For a script without a Trainer the rules stand here: its workers cannot go on without
each other. For one with a Trainer they are those of `RestartPolicy`. In both cases other hosts have a say.
"""

from __future__ import annotations

import itertools
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence

from unisono.errors import WorkerFailure
from unisono.launch.config import LaunchConfig
from unisono.launch.control_store import FINE, ControlStore
from unisono.launch.processes import SupervisedProcess, WorkerProcesses
from unisono.launch.rendezvous import Attempt, BrokenOff, Rendezvous, Stopped
from unisono.launch.report import brief
from unisono.launch.restart_policy import Course, RestartPolicy
from unisono.system.signals import StopRequest

_WAIT_S = 0.05
"""How long to wait for a worker's end before looking whether a person asked to stop."""
_LOOK_S = 0.25
"""How often to read the store for news of workers and of other hosts, in seconds."""
_FAILURE_GRACE_S = 1.0
"""How long the others may take to end after a failure: all must be gone within 5 seconds."""
_CAUSE_S = 1.0
"""How long to wait for the cause while workers have only lost contact with another one, which may still be unwinding."""
_ABANDONED_GRACE_S = 3.0
"""How long workers may take to stop once another one has simply died of the signal, in seconds."""


class Supervisor:
    """Supervises the workers of this host. All methods are *local*, although hosts wait for each other.

    Args:
        config: What to run.
        env: Variables for every worker.
        rendezvous: Where hosts meet.
        processes: The workers' processes.
        policy: What becomes of the run when a worker dies.
        stop: Whether a person asked to stop.
        say: Shows one line to a person.
    """

    def __init__(
        self,
        config: LaunchConfig,
        *,
        env: Mapping[str, str],
        rendezvous: Rendezvous,
        processes: WorkerProcesses,
        policy: RestartPolicy,
        stop: StopRequest,
        say: Callable[[str], None],
    ) -> None:
        self._config = config
        self._env = env
        self._rendezvous = rendezvous
        self._processes = processes
        self._policy = policy
        self._stop = stop
        self._say = say
        self._grace_s = config.grace_s
        self._is_shared = config.meet is not None
        """Whether other hosts may take part."""
        self.failed_elsewhere: str | None = None
        """Why the run has failed, where that is not a failure of this host's workers."""
        self.leaves = False
        """Whether this host was told to leave, and the others may go on without it."""
        self._attempt: Attempt
        self._control: ControlStore
        self._founders: list[str]
        self._ranks: range
        self._started = 0
        self._looked_s = self._heard_s = 0.0
        self._stopped_elsewhere: signal.Signals | None = None
        self._stop_deadline_s: float | None = None
        self._first_failure_s: float | None = None

    def run(self) -> None:
        """Supervise workers until none runs any more.

        Raises:
            WorkerFailure: The fork server has ended, or contact with the other hosts was lost.
            Stopped: A person asked to stop before the hosts had met (again).
        """
        try:
            course = Course.AGAIN
            while course is Course.AGAIN:
                self._begin()
                course = self._watch()
        finally:
            self._processes.end(grace_s=_FAILURE_GRACE_S)

    def _begin(self) -> None:
        """Meet the other hosts, and start this host's workers."""
        while True:
            try:
                self._attempt = self._rendezvous.next_attempt()
                self._control = ControlStore(self._rendezvous.store, self._attempt.number)
                self._policy.begin(self._control, is_alone=not self._is_shared)
                self._number_workers()
                break
            except BrokenOff:
                continue
            except Stopped:
                self.leaves = self._may_leave and self._policy.has_applied
                raise
        self._processes.forget_ended()
        self._first_failure_s = None
        for place in range(len(self._ranks)):
            self._start(place, joins=self._attempt.joins)

    def _number_workers(self) -> None:
        """The numbers of this host's workers: they follow those of the hosts before it. A host that joins numbers its own."""
        workers = self._config.workers
        if self._attempt.joins:
            self._founders, self._ranks = [], range(workers if self._can_join() else 0)
            return
        uids = [self._next_uid() for _ in range(workers)]
        everyones = [said.split(",") for said in self._rendezvous.exchange(",".join(uids))]
        self._founders = list(itertools.chain(*everyones))
        if self._policy.has_applied:
            self._control.tell_founders(self._founders)
        first = self._founders.index(uids[0])
        self._ranks = range(first, first + workers)

    def _can_join(self) -> bool:
        """Whether there still is something to do for a host that comes later."""
        wait_s = self._config.wait_s
        deadline_s = time.monotonic() + wait_s
        while not self._policy.applies:
            if self._control.decisions().again:
                raise BrokenOff
            if time.monotonic() > deadline_s:
                raise WorkerFailure(
                    f"the run at {self._rendezvous.address} has not made a Trainer within {wait_s:g} s (--wait): only "
                    "one with a Trainer accepts hosts that come later. For any other script, start all hosts together (--hosts)"
                )
            self._rendezvous.pause()
        return not self._control.is_over

    def _start(self, place: int, *, joins: bool) -> None:
        """Start a worker of this host, by its number here.

        One that joins the others, perhaps to replace a dead one, has no rank among them yet: RANK is its number on this host, so
        that a script which reads it behaves as before.
        """
        uid = self._next_uid() if joins else self._founders[self._ranks[place]]
        rank, size = (place, self._config.workers) if joins else (self._ranks[place], len(self._founders))
        hosts = () if self._attempt.joins else self._attempt.hosts
        env = {
            **self._env,
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(place),
            "LOCAL_WORLD_SIZE": str(self._config.workers),
            "GROUP_RANK": str(hosts.index(self._rendezvous.host) if hosts else 0),
            "GROUP_WORLD_SIZE": str(len(hosts) or 1),
            "ROLE_NAME": "worker",
            "ROLE_RANK": str(rank),
            "ROLE_WORLD_SIZE": str(size),
            "MASTER_ADDR": self._rendezvous.place,
            "MASTER_PORT": str(self._attempt.port),
            "TORCHELASTIC_RESTART_COUNT": str(self._attempt.number),
            "TORCHELASTIC_MAX_RESTARTS": str(self._config.max_restarts),
            "TORCHELASTIC_RUN_ID": self._rendezvous.run_id,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "UNISONO_STORE": self._rendezvous.address,
            "UNISONO_ATTEMPT": str(self._attempt.number),
            "UNISONO_UID": uid,
            "UNISONO_FOUNDERS": "" if joins else ",".join(self._founders),
            "UNISONO_JOINS": "1" if joins else "",
        }
        command = [self._config.script, *self._config.args]
        self._processes.start(self._ranks[place], command, env, uid=uid, joins=joins)

    def _next_uid(self) -> str:
        self._started += 1
        return f"{self._rendezvous.host}.{self._started - 1}"

    def _watch(self) -> Course:
        """Until this attempt ends."""
        course = Course.GO_ON
        while course is Course.GO_ON:
            self._processes.wait(_WAIT_S)
            ended = self._processes.poll()
            for process in ended:
                self._control.tell_dead(process.uid, _end_of(process))
            course = Course.FAILED if self._processes.lost else self._shared_course(self._course(ended))
        if course is Course.AGAIN:
            # They have nothing to save. One that still ran would disturb the next attempt.
            self._processes.end(grace_s=0.0, signum=signal.SIGKILL)
        return course

    def _course(self, ended: Sequence[SupervisedProcess]) -> Course:
        overdue = self._stop_is_overdue()
        if not self._policy.applies:
            return self._plain_course(overdue=overdue)
        now_s, stops = time.monotonic(), self._stop_deadline_s is not None
        course = self._policy.look(ended, self._processes.latest, stops=stops, now_s=now_s)
        if course is not Course.GO_ON:
            return course
        self._processes.hurry(_FAILURE_GRACE_S)
        self._end_outsiders(now_s)
        if 0 in self._processes.statuses and self._control.is_over:
            self._processes.end_stopped()
        if not stops:
            for rank in self._policy.due(len(self._processes.running), now_s):
                self._start(self._ranks.index(rank), joins=True)
        return Course.FAILED if overdue else Course.GO_ON

    def _end_outsiders(self, now_s: float) -> None:
        """Kill our workers that the others have gone on without, and tell the others which of ours SIGSTOP holds: if it holds all
        members, those that wait to join go on without them."""
        if now_s - self._looked_s > _LOOK_S:
            self._looked_s = now_s
            self._control.tell_standing(process.uid for process in self._processes.running if process.is_stopped)
            for process in self._processes.running:
                if self._control.is_outside(process.uid):
                    process.child.send_signal(signal.SIGKILL)  # it counts as the worker's failure: another takes its place

    def _plain_course(self, *, overdue: bool) -> Course:
        """Of a script without a Trainer, whose workers cannot go on without each other."""
        if not self._processes.running:
            return Course.FAILED if any(self._processes.statuses) else Course.DONE
        return Course.FAILED if overdue or self._has_failed() else Course.GO_ON

    def _has_failed(self) -> bool:
        failures = self._processes.failures()
        if not failures:
            return False
        if self._first_failure_s is None:
            self._first_failure_s = time.monotonic()
        known = any(not failure.is_secondary for failure in failures)
        return known or time.monotonic() - self._first_failure_s > _CAUSE_S

    def _shared_course(self, course: Course) -> Course:
        """The same, as far as other hosts agree."""
        if not self._is_shared:
            return course
        cause = self._policy.cause_of(self._processes.failures())
        if course is Course.FAILED and cause is not None and not self.leaves:
            self._control.tell_failed(f"worker {cause.rank} (pid {cause.pid}) on {socket.gethostname()} {brief(cause)}")
        if time.monotonic() - self._heard_s > _LOOK_S:
            self._heard_s = time.monotonic()
            if self._rendezvous.serves:
                self._control.tell_lost([self._rendezvous.host, *self._rendezvous.others()])
            decisions = self._control.decisions()
            if decisions.failed and course is not Course.FAILED:
                self.failed_elsewhere = f"the run has failed: {decisions.failed}"
                return Course.FAILED
            if decisions.again:
                return Course.AGAIN
            self._stopped_elsewhere = decisions.stop
        if course in (Course.DONE, Course.OUT) and self._rendezvous.serves:
            if self._rendezvous.others():
                return Course.GO_ON  # the others need the store
            course = self._last_course(course)
        if course is Course.OUT:
            self._policy.give_up(self._processes.failures())
        return course

    def _last_course(self, course: Course) -> Course:
        """The same, once no other host is left: what they wrote before they left counts."""
        if course is Course.OUT:
            return Course.DONE if self._control.is_over else Course.OUT
        if (loose_end := self._control.loose_end) is None:
            return Course.DONE
        self.failed_elsewhere = (
            f"the run is not finished, and nobody goes on with it: this host's workers have left, and {loose_end}. Start the "
            "same command again: it continues from the last checkpoint"
        )
        return Course.FAILED

    def _stop_is_overdue(self) -> bool:
        """Pass a stop on, once, and see whether its grace is over."""
        if self._stop_deadline_s is None:
            signum = self._stop.requested or self._stopped_elsewhere or self._processes.stopped_by
            if signum is None or (not self._processes.running and not self._outlasts):
                return False
            if self._stop.requested:
                self._say(f"unisono: {signum.name}: the workers finish their step and stop; Ctrl-C again ends them now")
            self.leaves = self._may_leave and self._policy.applies and not self._stopped_elsewhere
            if self.leaves:
                signum = signal.SIGTERM  # not announced: the others go on
            else:
                self._control.tell_stop(signum)
            self._processes.send(signum)
            self._stop_deadline_s = time.monotonic() + self._grace_s
        died = any(status is not None and status < 0 for status in self._processes.statuses)
        if died and not self._policy.applies:
            # A plain script dies of the signal at once. Its peers may then wait for it for ever.
            self._grace_s = min(self._grace_s, _ABANDONED_GRACE_S)
            self._stop_deadline_s = min(self._stop_deadline_s, time.monotonic() + self._grace_s)
        if time.monotonic() < self._stop_deadline_s or not self._processes.running:
            return False
        self._say(f"unisono: workers were still running {self._grace_s:g} s after the stop and were ended (--grace)")
        return True

    @property
    def _may_leave(self) -> bool:
        """Whether others go on without this host, if the script can."""
        return self._is_shared and not self._rendezvous.serves

    @property
    def _outlasts(self) -> bool:
        """Whether this launcher stays after its own workers, for those of other hosts: then it passes a stop on to them."""
        return self._is_shared and self._rendezvous.serves and self._policy.applies and self._stop.requested is not None


def _end_of(process: SupervisedProcess) -> str:
    """How a process ended, for the other workers to report."""
    if process.status == 0:
        return FINE
    failure = process.failure
    return brief(failure) if failure else f"ended with status {process.status}"
