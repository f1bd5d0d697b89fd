"""How the workers of a new generation bring the run's state to one point: agree, roll back, rebuild, transfer, replay.

The state after the last operation is one of these:

- every worker has all of it (small models): then it exists for as long as any of them does;
- it lies in memory that the workers of a host share, except at the moment of the update (``shared_state.py``): then it is there,
  or the copy is, from which the steps since then are taken again;
- it exists nowhere any more: then all workers start anew, from the last checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence

from unisono.collective import Collective
from unisono.elastic.call_log import CallLog
from unisono.elastic.held_state import HeldState, Outcome
from unisono.elastic.link import Link
from unisono.elastic.membership import StateLost
from unisono.elastic.recovery_plan import RecoveryPlan, TrainerFinished, WorkerReport
from unisono.elastic.shared_state import Point
from unisono.elastic.transfer import StateTransfer, unlike_frozen
from unisono.training.participant import Participant
from unisono.training.worker_group import WorkerGroup


class Recovery:
    """Brings what this worker holds to one point with what the others hold.

    Args:
        link: How workers meet.
        participant: The trainer.
        held: What this worker holds of the run.
        calls: The user's calls so far.
        rebuild: *collective*. Makes anew what depends on who the workers are.
    """

    def __init__(
        self,
        link: Link,
        participant: Participant,
        held: HeldState,
        calls: CallLog,
        rebuild: Callable[[Collective], WorkerGroup],
    ) -> None:
        self._link, self._participant, self._held, self._calls, self._rebuild = link, participant, held, calls, rebuild
        self._trainer = link.trainers

    def begin(self, step: int, group: WorkerGroup) -> None:
        """*collective*. The run begins after step ``step``, with these workers."""
        held, generation = self._held, self._link.generation
        held.reached = held.committed = step
        held.has_all = group.reduction.replicates
        if generation is None:
            return
        shares = held.has_all or held.share(group.collective, group.reduction, generation.number, step)
        if not shares and group.collective.rank == 0:
            self._link.tell("whole", "0")
        held.operations = 0

    def exchange_reports(self, collective: Collective, *, changing: bool) -> list[WorkerReport]:
        """*collective*. What each worker says of itself, by rank.

        Args:
            changing: Whether the operation under way is to let others join or leave.
        """
        held = self._held
        mine = WorkerReport(
            trainer=self._trainer,
            operations=held.operations,
            confirmed=held.confirmed,
            reached=held.reached,
            committed=held.committed,
            changing=changing,
            has_all=held.has_all,
            has_part=held.shared is not None,
            may_share=held.local.weights.wanted,
        )
        told = collective.all_gather_bytes(json.dumps(dataclasses.asdict(mine)).encode())
        return [WorkerReport(**json.loads(text)) for text in told]

    def resume(self, reports: Sequence[WorkerReport], collective: Collective, announce: Callable[[], None]) -> None:
        """*collective*. From what the workers have said of themselves to one state, that of the last step of the run.

        Args:
            announce: *local*. Says that they go on; called before steps are taken again.

        Raises:
            StateLost: It cannot be had any more.
        """
        held = self._held
        plan = self._agree(reports, collective)
        step, needy = self._roll_back(plan, collective)
        collective.barrier()
        group = self._rebuild(collective)
        self._transfer(plan, group, needy, step)
        self._share(plan, group, step)
        held.committed = plan.committed
        announce()
        self._replay()
        held.operations, held.confirmed = plan.operations, plan.confirmed

    # ------------------------------------------------------------------ agree, roll back

    def _agree(self, reports: Sequence[WorkerReport], collective: Collective) -> RecoveryPlan:
        try:
            plan = RecoveryPlan.of(reports, trainer=self._trainer)
        except TrainerFinished:
            collective.close()
            raise
        if plan.meeting_counts:
            self._held.outcome = Outcome()
        return plan

    def _roll_back(self, plan: RecoveryPlan, collective: Collective) -> tuple[int, Sequence[int]]:
        """*collective*. Brings what each host holds to where the host of the source can go on from.

        Returns:
            The step that its state shows then, and the workers that have to be given all of the state.
        """
        held = self._held
        if plan.ahead.has_all:
            # If a meeting was broken off, some hold the state as before it, and others as after it.
            held.shared = None
            return plan.ahead.reached, plan.unlike
        near = next(host for host in collective.hosts if collective.rank in host)
        survivors = [rank for rank in near if not plan.reports[rank].is_new]
        point: Point | None = None
        if not held.is_new and held.shared is not None:
            point = held.shared.point(max(plan.reports[rank].reached for rank in survivors))
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
                held.shared = None
            return step, needy
        if point is not None:
            held.go_to(step, point.parts, main=collective.rank == survivors[0])
        held.reached = min(held.reached, step)  # a worker that is behind has yet to be given what it lacks
        return step, needy

    # ------------------------------------------------------------------ transfer

    def _transfer(self, plan: RecoveryPlan, group: WorkerGroup, needy: Sequence[int], step: int) -> None:
        """*collective*. Workers that are behind, or new, or on a host that lacks the state, get it from the source.

        Args:
            step: The step that the source's state shows.
        """
        receivers = plan.behind.union(needy)
        if not receivers:
            return
        held, rank = self._held, group.collective.rank
        newcomers = [one for one in receivers if plan.reports[one].is_new]
        frozen = unlike_frozen(held.local.replica, group.collective, plan.source, newcomers) if newcomers else ()
        given = None
        if rank == plan.source:
            state = plan.ahead.has_all or bool(needy)
            given = StateTransfer.of(
                held,
                weights=state or not held.local.weights.shared,
                state=state,
                frozen=frozen,
                run={"run": self._participant.describe(), "calls": self._calls.describe()} if newcomers else {},
            )
        received = StateTransfer.deliver(given, group.collective, plan.source, receivers)
        if received is None:
            return
        needs_state = plan.ahead.has_all or rank in needy  # else this worker's host has it
        if needs_state:
            held.shared = None
        received.put_into(held, state=needs_state)
        # A worker that has been helped stands where the source stands, also if this meeting is broken off.
        held.reached = step
        if held.is_new:
            self._participant.adopt(received.run["run"])
            self._calls.adopt(received.run["calls"])
        elif rank not in needy:
            held.operations, held.committed = plan.operations, plan.committed

    # ------------------------------------------------------------------ share, replay

    def _share(self, plan: RecoveryPlan, group: WorkerGroup, step: int) -> None:
        """*collective*. From step ``step`` on the workers of each host share the state, unless each has all of it."""
        held, replicates = self._held, group.reduction.replicates
        assert self._link.generation is not None
        if not replicates and not held.share(group.collective, group.reduction, self._link.generation.number, step):
            raise StateLost("the optimizer's state cannot be kept in shared memory")
        held.local.weights.bind(group.collective, share=plan.may_share and not replicates)
        held.has_all = replicates  # only now: a worker that is lost before this leaves the state where it was
        if replicates:
            held.shared = None

    def _replay(self) -> None:
        """*collective*. From where the state is to the last step of the run: the same bits as the first time."""
        held, replica = self._held, self._held.local.replica
        if held.reached == held.committed:
            return
        steps = held.replay_log.between(held.reached, held.committed)
        now = replica.hyperparameters()
        try:
            for past in steps:
                assert past.visible is not None
                with self._participant.showing(past.visible):
                    # Schedulers write learning rates when they are loaded: these come last.
                    replica.set_hyperparameters(past.groups, exactly=True)
                    held.run_step(past, functools.partial(self._participant.redo, past.key, held.grown))
        finally:  # another worker may be lost meanwhile
            replica.set_hyperparameters(now, exactly=True)
