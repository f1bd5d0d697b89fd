"""How the workers of a new generation bring the run's state to one point.

The state after the last operation is one of these:

- every worker has all of it (small models): then it exists for as long as any of them does;
- it lies in memory that the workers of a host share, except at the moment of the update (``shared_state.py``): then it is there,
  or the copy is, from which the steps since then are taken again;
- it exists nowhere any more: then all workers start anew, from the last checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from unisono.collective import Collective
from unisono.elastic.call_log import CallLog
from unisono.elastic.link import Link
from unisono.elastic.membership import StateLost
from unisono.elastic.recovery_plan import Outcome, Progress, RecoveryPlan
from unisono.elastic.replay_log import ReplayLog
from unisono.elastic.shared_state import Point, SharedState
from unisono.elastic.transfer import StateTransfer
from unisono.training.participant import Participant
from unisono.training.worker_group import WorkerGroup


class Recovery:
    """What this worker holds of the run's state, and how that is brought to one point with what others hold.

    Args:
        link: How workers meet.
        participant: The trainer.
        calls: The user's calls so far.

    Attributes:
        progress: How far this worker has come.
        shared: The state in memory that the workers of this host share; None where each worker has all of it.
        replay_log: The steps since the last copy of it.
    """

    def __init__(self, link: Link, participant: Participant, calls: CallLog) -> None:
        self._link = link
        self._calls = calls
        self._participant = participant
        self._local = participant.local
        self.progress = Progress()
        self.shared: SharedState | None = None
        self.replay_log = ReplayLog()

    def begin(self, step: int, group: WorkerGroup) -> None:
        """*collective*. The run begins after step ``step``, with these workers."""
        self.progress.reached = self.progress.committed = step
        self.progress.has_all = group.reduction.replicates
        generation = self._link.generation
        if generation is None:
            return
        if not group.reduction.replicates:
            shared = self._new_shared_state()
            if shared.bind(group.collective, group.reduction, generation.number, step):
                self.shared = shared
            elif group.collective.rank == 0:
                self._link.tell("whole", "0")
        self.progress.operations = 0

    def resume(self, plan: RecoveryPlan, collective: Collective, rebuild: Callable[[Collective], WorkerGroup]) -> None:
        """*collective*. From what the workers have agreed on to one state that all of them share: roll back, rebuild, transfer,
        hold. Taking steps again, up to the last one of the run, is all that is left to do."""
        if plan.meeting_counts:
            self.progress.outcome = Outcome()
        step, needy = self._roll_back(plan, collective)
        collective.barrier()
        group = rebuild(collective)
        self._transfer(plan, group, needy, step)
        self._hold(group, step)
        replicates = group.reduction.replicates
        self._local.weights.bind(collective, share=plan.may_share and not replicates)
        self.progress.has_all = replicates  # only now: one that is lost before this leaves the state where it was
        if replicates:
            self.shared = None
        self.progress.committed = plan.committed

    # ------------------------------------------------------------------ roll back

    def _roll_back(self, plan: RecoveryPlan, collective: Collective) -> tuple[int, Sequence[int]]:
        """*collective*. Brings what each host holds to where the host of the source can go on from.

        Returns:
            The step that its state shows then, and the workers that have to be given all of the state.
        """
        if plan.ahead.has_all:
            # If a meeting was broken off, some hold the state as before it, and others as after it.
            self.shared = None
            return plan.ahead.reached, plan.unlike
        near = next(host for host in collective.hosts if collective.rank in host)
        survivors = [rank for rank in near if not plan.reports[rank].is_new]
        point: Point | None = None
        if not self.progress.is_new and self.shared is not None:
            point = self.shared.point(max(plan.reports[rank].reached for rank in survivors))
        mine = [] if point is None else [point.step, bool(point.parts)]
        points = [json.loads(text) for text in collective.all_gather_bytes(json.dumps(mine).encode())]
        if not points[plan.source]:
            raise StateLost("a worker was lost in the middle of its update, and with it the state that it was changing")
        step = points[plan.source][0]
        needy = [
            rank
            for host in collective.hosts
            if plan.source not in host and [step, False] not in [points[rank] for rank in host]
            for rank in host
        ]
        if collective.rank in needy:
            if len(near) > 1:  # another worker of this host may soon have overwritten the weights that they share
                self.shared = None
            return step, needy
        if point is not None:
            self._go_to(point, step, main=collective.rank == survivors[0])
        # A worker that is behind has yet to be given what it lacks.
        self.progress.reached = min(self.progress.reached, step)
        return step, needy

    def _go_to(self, point: Point, step: int, *, main: bool) -> None:
        assert self.shared is not None
        if not point.parts:
            self.shared.read_numbers()
            return
        self.shared.restore(point, main=main)
        if step != self.progress.reached:
            if not self.replay_log.begins_after(step):
                raise StateLost(f"the buffers after step {step} are not known any more")
            self._local.buffers.go_to(self.replay_log.buffers)

    # ------------------------------------------------------------------ transfer

    def _transfer(self, plan: RecoveryPlan, group: WorkerGroup, needy: Sequence[int], step: int) -> None:
        """*collective*. Workers that are behind, or new, or on a host that lacks the state, get it from the source.

        Args:
            step: The step that the source's state shows.
        """
        receivers = plan.behind.union(needy)
        if not receivers:
            return
        rank, progress = group.collective.rank, self.progress
        given = None
        if rank == plan.source:
            state = plan.ahead.has_all or bool(needy)
            given = StateTransfer.of(
                self._local,
                outcome=progress.outcome,
                weights=state or not self._local.weights.shared,
                state=state,
                replay_log=self.replay_log,
                run={"run": self._participant.describe(), "calls": self._calls.describe()},
            )
        received = StateTransfer.deliver(given, group.collective, plan.source, receivers)
        if received is None:
            return
        has_state = not (plan.ahead.has_all or rank in needy)  # then this worker's host has it
        if not has_state:
            self.shared = None
        received.put_into(self._local, new=progress.is_new, state=not has_state)
        # A worker that has been helped stands where the source stands, also if this meeting is broken off.
        progress.outcome, progress.reached = received.outcome, step
        self.replay_log.adopt(received.replay_log)
        if progress.is_new:
            self._participant.adopt(received.run["run"])
            self._calls.adopt(received.run["calls"])
        elif rank not in needy:
            progress.operations, progress.committed = plan.operations, plan.committed

    # ------------------------------------------------------------------ hold

    def _hold(self, group: WorkerGroup, step: int) -> None:
        """*collective*. From step ``step`` on the workers of each host share the state, unless each has all of it."""
        if group.reduction.replicates:
            return
        assert self._link.generation is not None
        shared = self.shared or self._new_shared_state()
        if not shared.bind(group.collective, group.reduction, self._link.generation.number, step):
            raise StateLost("the optimizer's state cannot be kept in memory that workers share")
        shared.replay = self.replay_log.allowed
        self.shared = shared

    def _new_shared_state(self) -> SharedState:
        return SharedState(self._local.layout, self._local.weights, self._local.optimizer)
