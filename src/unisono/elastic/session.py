"""A session whose workers may be lost, leave and join while the run goes on.

What the workers do together is a sequence of *operations*: a step, an evaluation, the start of a checkpoint. An operation ends
everywhere or it is done again: if a worker is lost, those who are left meet again, bring the state to one point
(``recovery.py``), and repeat the operation without it. They can be one operation apart, since some may have heard all that they
needed when the others had not: then those who are behind take the result from those who are ahead, and nobody repeats anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from unisono.collective import Collective, LostWorker
from unisono.elastic.call_log import CallLog
from unisono.elastic.held_state import ADMITS, LEAVES, HeldState, Outcome
from unisono.elastic.identity import ask_run_dir, check_identity, tell_arguments, tell_identity, tell_run_dir
from unisono.elastic.link import Link
from unisono.elastic.membership import Generation, Member, TooFewWorkers, restarting
from unisono.elastic.outside import Outsider
from unisono.elastic.recovery import Recovery
from unisono.elastic.recovery_plan import TrainerFinished, WorkerReport
from unisono.elastic.replay_log import PastStep
from unisono.guard.silence import SilenceWatch, StatusBoard
from unisono.training.participant import Participant
from unisono.training.session import Call, Session, StepKey, check_size
from unisono.training.worker_group import WorkerGroup
from unisono.world import World

T = TypeVar("T")
logger = logging.getLogger("unisono")


class ElasticSession(Session):
    """See the module.

    Args:
        link: How workers meet again.
        microbatches: M, the most workers that there can be.
        collective: The first workers; for one that is to join others, itself alone.
    """

    can_change = True

    def __init__(self, link: Link, collective: Collective, *, microbatches: int) -> None:
        super().__init__(collective)
        self._link = link
        self._microbatches = microbatches
        self._trainer = link.trainers
        self._calls = CallLog(link)
        self._depth = 0
        self._is_changing = False
        self._next: Outcome | None = None  # the last step, until the workers have changed as it asks
        self._participant: Participant
        self._recovery: Recovery
        self._held: HeldState
        self._timeout_s = 0.0
        self._board: StatusBoard | None = None

    @classmethod
    def open(
        cls,
        world: World,
        collective: Collective | Link | None,
        connect: Callable[[], Collective],
        *,
        device: torch.device,
        timeout_s: float,
        microbatches: int,
    ) -> Session:
        """*collective*. An elastic session where a launcher serves a store, else a plain one; arguments as for ``Session``."""
        if isinstance(collective, Link):
            link = collective
        elif collective is None and world.store is not None:
            link = Link.of(world, device=device, timeout_s=timeout_s)
        else:
            return Session.open(world, collective, connect, device=device, timeout_s=timeout_s, microbatches=microbatches)
        return cls(link, check_size(link.first(), microbatches), microbatches=microbatches)

    @property
    def collective(self) -> Collective:
        return Outsider() if self.is_outside else self._collective

    @property
    def is_outside(self) -> bool:
        return self._calls.is_outside

    @property
    def is_midway(self) -> bool:
        return self._calls.is_midway

    # ------------------------------------------------------------------ the beginning

    def begin(
        self, participant: Participant, *, identity: Mapping[str, Any], timeout_s: float, board: StatusBoard | None
    ) -> None:
        self._participant = participant
        self._timeout_s, self._board = timeout_s, board
        self._held = HeldState(participant.local)
        self._recovery = Recovery(self._link, participant, self._held, self._calls, self._rebuild)
        with restarting():
            if self.is_outside:
                check_identity(self._link, identity)
                participant.move(ask_run_dir(self._link))
            else:
                tell_identity(self._link, identity)
            again = False
            while True:
                try:
                    self._begin(again=again)
                    break
                except LostWorker as failure:
                    if self._link.generation is None:
                        raise
                    logger.info("meeting again: %s", failure)
                    again = True
                    self._collective.close()
                    self._collective = self._link.first(keep=self._held.local.weights.flats)
        if not self.is_outside:
            tell_run_dir(self._link, participant.run_dir)
        self._link.finish_trainer = self._finish_trainer

    def _begin(self, *, again: bool) -> None:
        self._watch()
        reports = self._exchange_reports() if again or self._trainer > 1 else []
        if any(report.trainer < self._trainer for report in reports):
            raise LostWorker("another worker has not yet reached this trainer")
        if any(not report.is_new for report in reports):
            self._resume(reports)  # the others had heard all that they needed
            return
        if not self.is_outside:
            tell_arguments(self._link, self._collective)
        group = self._rebuild(self._collective)
        self._recovery.begin(self._participant.start(), group)

    def _watch(self) -> None:
        self.watch = SilenceWatch.begin(self._collective, self._timeout_s, self._board)

    def _rebuild(self, collective: Collective) -> WorkerGroup:
        self.group = self._participant.rebuild(collective)
        return self.group

    def _finish_trainer(self) -> None:
        """*collective*. The script comes to another trainer: once this returns all have done everything with this one."""
        with contextlib.suppress(TrainerFinished):
            self.perform("wait for the others", lambda: self._collective.barrier(), edits=False)

    # ------------------------------------------------------------------ operations

    def perform(self, name: str, body: Callable[[], T], *, edits: bool = True, step: StepKey | None = None) -> T:
        """See ``Session.perform``. If a worker is lost meanwhile, the others do it again without it.

        Raises:
            LostWorker: One was lost, and there is no way to meet again.
            RestartFromCheckpoint: One was lost, and with it what cannot be computed again.
        """
        with restarting():
            if step is None:
                outcome = self._operate(lambda: Outcome(result=body()), edits=edits)
            else:
                self._await_quorum()
                outcome = self._take(step, body)
        result: T = outcome.result
        return result

    def _operate(self, body: Callable[[], Outcome], *, edits: bool) -> Outcome:
        held = self._held
        operation = held.operations + 1
        while True:
            try:
                if held.operations < operation:
                    held.done(operation, body())
                if edits:
                    self._confirm(operation)
                return held.outcome
            except LostWorker as failure:
                self._recover(failure)

    def _confirm(self, operation: int) -> None:
        """*collective*. Until all have the result of the operation. A worker that is behind takes the state from one that is
        ahead, as the operation has left it, and must not find there what that one's script has done since then, which it is
        about to do itself. What is new in the optimizer's state is shared before that: without it nobody could go back to where
        the operation began."""
        if self._held.confirmed < operation:
            self._held.settle(self._collective)
            self._held.confirmed = operation

    # ------------------------------------------------------------------ steps

    def _take(self, key: StepKey, body: Callable[[], Any]) -> Outcome:
        held, replica = self._held, self._held.local.replica
        visible = self._participant.visible() if held.replay_log.allowed else None
        past = PastStep(key, replica.hyperparameters(), visible)
        tries = 0
        computed = False

        def take() -> Outcome:
            nonlocal tries, computed
            tries += 1
            if tries > 1:
                replica.set_hyperparameters(past.groups, exactly=True)  # some optimizers count their steps there
            result = held.run_step(past, body)
            held.committed = key.step
            computed = True
            uids = self._link.uids
            return Outcome(
                result=result,
                workers=len(held.flags),
                leavers=[uid for uid, flags in zip(uids, held.flags, strict=False) if flags & LEAVES],
                admits=bool(held.flags and held.flags[0] & ADMITS),
                groups=replica.hyperparameters(),
            )

        outcome = self._operate(take, edits=not held.replay_log.allowed)
        if not computed:  # another worker has, with the same result
            replica.set_hyperparameters(outcome.groups, exactly=True)
        self.everyone_leaves = outcome.everyone_leaves and not outcome.admits
        self._next = outcome
        return outcome

    def updating(
        self, step: int, flags: Sequence[int], step_s: float, *, skips: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        return self._held.updating(step, flags, step_s, skips=skips)

    def begin_steps(self, arguments: Sequence[str], *, redoable: bool) -> None:
        self._held.begin_steps(redoable=redoable)
        self._calls.begin_loop(arguments, main=self._collective.rank == 0)

    def enter_steps(self) -> bool:
        midway, self._calls.is_midway = self._calls.is_midway, False
        return midway

    def end_steps(self) -> None:
        self.perform("end the loop", lambda: self._held.settle(self._collective), edits=False)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        self._link.trains = True
        yield
        self._link.trains = False  # not after an error: then the script ends in the middle of training

    def signals(self, stop: int) -> tuple[int, int]:
        # A worker that gets the signal alone is to leave; the launcher announces beforehand that all are to stop.
        leaves = stop == signal.SIGTERM and self._link.ask("stop") is None
        return 0 if leaves else stop, LEAVES * leaves | ADMITS * self._has_applicants() | self._held.grown

    def _has_applicants(self) -> bool:
        if self._collective.rank or self._collective.size >= self._microbatches:
            return False
        return bool(self._link.membership.applicants())

    # ------------------------------------------------------------------ workers come and go

    def between_steps(self, prepare: Callable[[], None]) -> None:
        outcome, self._next = self._next, None
        if outcome is None:
            return
        # If all are to leave, they stay until those who wait to join have what they hold.
        leavers = () if outcome.everyone_leaves else outcome.leavers
        if leavers or outcome.admits:
            prepare()
            with restarting():
                self._change(leavers, admit=outcome.admits)

    def _change(self, leavers: Sequence[str], *, admit: bool) -> None:
        """*collective*. Goes on without those who leave, and with those who wait to join.

        Raises:
            SystemExit: With status 0, on a worker that leaves.
        """
        link = self._link
        if link.generation is None:
            return
        operation = self._held.operations + 1

        def change() -> Outcome:
            gone = [uid for uid in leavers if uid in link.uids]
            waiting = link.membership.applicants(at_once=True) if admit and self._collective.rank == 0 else []
            room = self._microbatches - self._collective.size + len(gone)
            joiners = json.loads(self._collective.all_gather_bytes(json.dumps(waiting[:room]).encode())[0])
            if not (joiners or gone):
                return Outcome()
            if self._held.shared is not None:
                self._held.shared.settle(self._held.committed)
            if self._collective.rank == 0:
                link.membership.admit(joiners, gone)
            self._collective.barrier()
            if link.membership.me.uid in gone:
                self._collective.close()
                link.is_leaving = True
                raise SystemExit(0)
            reason = _changes(link, gone, joiners)
            self._regroup(leavers=gone, joiners=joiners, operation=operation, reason=reason)
            return self._held.outcome

        self._is_changing = True
        try:
            self._operate(change, edits=True)
        finally:
            self._is_changing = False

    def _join(self, over: Callable[[], bool]) -> bool:
        """*local* until the others meet this worker. Waits to be let in; False if ``over`` says that there is nothing to join."""
        try:
            collective = self._link.join(over, keep=self._held.local.weights.flats)
            if collective is None:
                return False
            self._collective = collective
            self._come_together("")
        except LostWorker as failure:
            self._recover(failure)
        while True:
            try:
                self._confirm(self._held.operations)  # to meet was an operation of theirs
                return True
            except LostWorker as failure:
                self._recover(failure)

    def _await_quorum(self) -> None:
        """*collective*. Where there are fewer workers than the minimum: until there are enough.

        Raises:
            TooFewWorkers: None came in time.
        """
        link = self._link
        began = time.monotonic()
        while self._collective.size < link.minimum:
            if time.monotonic() - began > link.wait_s:
                raise TooFewWorkers(
                    f"{self._collective.size} of at least {link.minimum} workers are left, and no others came within "
                    f"{link.wait_s:g} s (--wait). Start the same command again to go on from the last checkpoint, or "
                    "with a smaller minimum (--workers MIN:MAX)"
                )
            self._change((), admit=True)
            if self._collective.size < link.minimum:
                link.pause(0.05)

    # ------------------------------------------------------------------ recovery

    def _recover(self, failure: LostWorker) -> None:
        """Meets those who are left, and brings the state to where the operation can be done (again)."""
        if self._link.generation is None:
            raise failure
        before = self._link.generation
        if failure.silent:
            self._link.tell(f"silence/{before.number}", str(failure))
        while True:
            try:
                self._regroup(before=before, silent=failure.rank if failure.silent else None)
                return
            except LostWorker as another:
                logger.info("meeting again: %s", another)
                failure = another

    def _regroup(
        self,
        *,
        leavers: Sequence[str] = (),
        joiners: Sequence[str] = (),
        silent: int | None = None,
        operation: int | None = None,
        reason: str = "",
        before: Generation | None = None,
    ) -> None:
        """*collective*. Leaves the generation, and begins the next one.

        Args:
            silent: The rank of a worker that has not answered.
            operation: How many operations are done once the workers have met: to meet is the last of them.
            before: The generation that a lost worker has ended.
        """
        self._abandon()
        link = self._link
        self._collective = link.meet(leavers=leavers, joiners=joiners, silent=silent, keep=self._held.local.weights.flats)
        silence = None
        if operation is not None:
            self._held.done(operation, Outcome())
            self._is_changing = False
        if before is not None:
            gone = [member for member in before.members if member.uid not in link.uids]
            reason = "; ".join(self._obituary(before, member) for member in gone)
            silence = link.ask(f"silence/{before.number}")
        self._come_together(reason, silence)

    def _obituary(self, before: Generation, member: Member) -> str:
        why = self._link.membership.why(member.uid) or "was lost"
        return f"worker {before.members.index(member)} ({member.host}, process {member.process.pid}) {why}"

    def _abandon(self) -> None:
        """*local*. Leaves the generation; workers that still wait for this one notice. The step under way is undone."""
        self._collective.close()
        self._held.undo_step()

    def _come_together(self, reason: str, silence: str | None = None) -> None:
        """*collective*. Brings these workers, whose state may differ by one operation or be none at all, to one point."""
        self._watch()
        self._resume(self._exchange_reports(), reason, silence)

    def _exchange_reports(self) -> list[WorkerReport]:
        return self._recovery.exchange_reports(self._collective, changing=self._is_changing)

    def _resume(self, reports: Sequence[WorkerReport], reason: str = "", silence: str | None = None) -> None:
        self._recovery.resume(reports, self._collective, lambda: self._announce(reason, silence))

    def _announce(self, reason: str, silence: str | None) -> None:
        main = self._collective.rank == 0
        self._calls.publish(main=main)
        if not main:
            return
        link, workers, step = self._link, self._collective.size, self._held.committed
        assert link.generation is not None
        link.speak()
        on = f"worker{'s go' if workers > 1 else ' goes'} on after step {step}"
        if workers < link.minimum:
            on = f"worker{'s wait' if workers > 1 else ' waits'} up to {link.wait_s:g} s for others (--workers, --wait)"
        event = {"step": step, "event": "generation", "generation": link.generation.number, "workers": workers, "reason": reason}
        self._participant.announce([*([silence] if silence else []), f"{reason}: {workers} {on}"], event)

    # ------------------------------------------------------------------ calls of the user's

    def enter_call(self, arguments: Callable[[], Sequence[str]] | None = None) -> Call:
        if not self.is_outside:
            return Call()
        with restarting():
            return self._calls.wait() if arguments is None else self._calls.enter(self._join, arguments())

    @contextlib.contextmanager
    def making(self, call: Call) -> Iterator[None]:
        if call.is_done:
            yield
            return
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if not self._depth:  # calls that callbacks make inside another one are part of it
            self._calls.done(call.result, main=self._collective.rank == 0)

    def is_past(self) -> bool:
        return self._link.is_past()

    def place(self, world: World) -> World:
        if self._link.generation is None:
            return dataclasses.replace(world, rank=1, size=2)  # it speaks for nobody until it has joined
        members, rank = self._link.generation.members, self._link.generation.rank
        near = [number for number, member in enumerate(members) if member.machine == members[rank].machine]
        return dataclasses.replace(world, rank=rank, size=len(members), local_rank=near.index(rank), local_size=len(near))


def _changes(link: Link, leavers: Sequence[str], joiners: Sequence[str]) -> str:
    texts = [f"worker {link.uids.index(uid)} left, as it was told to" for uid in leavers]
    if joiners:
        texts.append(f"{len(joiners)} worker{'s'[: len(joiners) != 1]} joined")
    return "; ".join(texts)
