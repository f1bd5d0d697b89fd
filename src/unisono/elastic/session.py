"""This worker's part of the team: what it computes together with the other workers, whoever they are at the moment.

What the workers do together is a sequence of *acts*: a step, an evaluation, the start of a checkpoint. An act ends everywhere or
it is done again: if a worker is lost, those who are left meet again, bring the state to one point, and repeat the act with what
they are now. They can be one act apart, since some may have heard all that they needed when the others had not: then those
who are behind take the result from those who are ahead, and nobody repeats anything.

The state after the last act is one of these:

- every worker has all of it (small models): then it is there as long as anyone is;
- it lies in common memory, but for the moment of the update (``holdings.py``): then it is there, or the copy is, from which the
  steps since then are done again;
- it is nowhere any more: then all workers start anew, from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from unisono.collective import Collective, LostWorker
from unisono.data.batch import Batch
from unisono.elastic.link import Link
from unisono.elastic.membership import Generation, Member, StateLost, TooFewWorkers
from unisono.elastic.recovery_plan import NEW, Part, Parted, RecoveryPlan, Report, Taken
from unisono.elastic.replay_log import Past, ReplayLog
from unisono.elastic.shared_state import Point, SharedState
from unisono.elastic.transfer import StateTransfer
from unisono.guard.silence import Board, Watch
from unisono.training.header import Signals
from unisono.training.session import Session
from unisono.training.settings import Settings
from unisono.training.state import LocalState
from unisono.training.step import StepResult
from unisono.training.worker_group import WorkerGroup

T = TypeVar("T")
LEAVES, ADMITS, GROWN = 1, 2, 4
"""Flags: this worker leaves after the step; others wait to join (worker 0 says so); its part of the optimizer's state has
something new."""
logger = logging.getLogger("unisono")


class ElasticSession(Session):
    """See the module.

    Args:
        equipment: What this worker trains with.
        settings: What steps are computed by.
        part: The rest of the trainer.
        board: Where this worker shows what it does.
        link: How workers meet again; None: they cannot, and a lost worker ends the run.

    Attributes:
        crew: The workers of now.
        acts: How many acts are done.
        parted: The last act of which this worker knows that all have its result, where that matters.
        reached: The last step that the state which this worker holds has behind it.
        committed: The last step of the run. Only while steps are done again it is ahead of ``reached``.
        silence: What was found out about a worker that did not answer, if that ended the generation before.
    """

    def __init__(
        self, equipment: LocalState, settings: Settings, *, part: Part, board: Board | None = None, link: Link | None = None
    ) -> None:
        self._own, self._settings, self._part = equipment, settings, part
        self._board, self._link = board, link
        self.crew: WorkerGroup
        self.acts = 0
        self.parted = 0
        self.reached = 0
        self.committed = 0
        self.silence: str | None = None
        self._last: Any = None
        self._repeats = ReplayLog()
        self._holdings: SharedState | None = None
        self._has_all = False  # of the state, in its own optimizer; else the host's workers hold it in common
        self._number = link.trainers if link is not None else 1
        self._stepping = False
        self._changing = False

    @property
    def collective(self) -> Collective:
        """*local*. The workers of now."""
        return self.crew.collective

    # ------------------------------------------------------------------ the first team

    def found(self, collective: Collective, body: Callable[[], int]) -> None:
        """*collective*, once. Makes the first team, or that of a worker that is to join another one.

        Args:
            collective: Its workers.
            body: *collective*. Brings the state to where the run begins, and says how many steps are behind it.
        """
        self.acts = NEW
        again = False
        while True:
            try:
                self._muster(collective, self._watch(collective))
                reports = self._reports(collective) if again or self._number > 1 else []
                if any(report.trainer < self._number for report in reports):
                    raise LostWorker("another worker has still to come from the trainer before this one")
                if any(report.acts != NEW for report in reports):
                    # The others had heard all that they needed.
                    self._go_on_with(reports, collective, self.crew.watch)
                else:
                    self._hold(body())
                if self._link is not None:
                    self._link.part = self._part_from_others
                return
            except LostWorker as failure:
                if self._link is None or self._link.generation is None:
                    raise
                logger.info("meeting again: %s", failure)
                again = True
                collective.close()
                collective = self._link.first(keep=self._own.weights.flats)

    def _muster(self, collective: Collective, watch: Watch, *, learned: Mapping[str, Any] | None = None) -> None:
        per_host = self._link is not None
        self.crew = WorkerGroup(self._own, self._settings, collective, watch, session=self, per_host=per_host, learned=learned)

    def _watch(self, collective: Collective) -> Watch:
        return Watch.begin(collective, self._settings.timeout_s, self._board)

    def _part_from_others(self) -> None:
        """*collective*. The script comes to another trainer: once this returns all have done everything with this one."""
        with contextlib.suppress(Parted):
            self.act(lambda: self.collective.barrier(), edits=False)

    def _hold(self, step: int) -> None:
        """*collective*. The run begins after step ``step``."""
        self.reached = self.committed = step
        reduction = self.crew.reduction
        self._has_all = reduction.replicates
        generation = self._link.generation if self._link is not None else None
        if self._link is not None and generation is not None and not reduction.replicates:
            holdings = SharedState(self._own.replica, self._own.weights)
            if holdings.bind(self.collective, reduction, generation.number, step):
                self._holdings = holdings
            elif self.collective.rank == 0:
                self._link.tell("whole", "0")
        if self._link is None or generation is not None:
            self.acts = 0

    def begin(self, *, replay: bool) -> None:
        """*collective*. Steps will follow, and the weights may have changed since the last one.

        Args:
            replay: Whether nobody but the trainer changes weights between steps.
        """
        weights = self._own.weights
        weights.bind(self.collective, share=weights.wanted and not self.crew.reduction.replicates)
        self._repeats.begin(allowed=replay)
        if self._holdings is not None:
            self._holdings.renew(self.committed, replay=replay)

    @property
    def can_change(self) -> bool:
        """*local*. Whether workers may be lost, leave and come while the run goes on."""
        return self._link is not None

    def flags(self, *, leaves: bool = False, admits: bool = False) -> int:
        """*local*. What the others are told with the next step.

        Args:
            leaves: Whether this worker leaves after it.
            admits: Whether others wait to join.
        """
        grown = self._holdings is not None and (self._holdings.grown or self._holdings.will_grow)
        return LEAVES * leaves | ADMITS * admits | GROWN * grown

    @contextlib.contextmanager
    def updating(self, step: int, flags: Sequence[int], step_s: float, *, skips: bool = False) -> Iterator[None]:
        held = self._holdings
        if held is None:
            yield
            return
        grown = any(flag & GROWN for flag in flags)
        if grown:
            held.settle(step - 1)
        if skips:
            held.skip(step)
            yield
            return
        held.before_update(step, step_s, settles=grown)
        yield
        held.after_update(step)
        if grown:  # a death meanwhile is one before the step's end, so that it is done again
            held.settle(step)

    def end(self) -> None:
        """*collective*. No more steps follow for now, and those that are done can soon not be done again."""
        if self._link is not None:
            self.act(self._settle, edits=False)

    # ------------------------------------------------------------------ acts

    def act(self, body: Callable[[], T], *, edits: bool = True) -> T:
        """*collective*. Does something together with the others; if one of them is lost meanwhile, does it again without it.

        Args:
            edits: Whether code that follows may change weights or buffers before the next act.

        Raises:
            LostWorker: One was lost, and there is no way to meet again.
            StateLost: One was lost, and with it what cannot be computed again.
        """
        expected = self.acts + 1
        while True:
            try:
                if self.acts < expected:
                    result = body()
                    self.acts, self._last = expected, result
                if edits:
                    self._see_through(expected)
                received: T = self._last
                return received
            except LostWorker as failure:
                self._recover(failure)

    def _see_through(self, act: int) -> None:
        """*collective*. Until all have the result of the act. Whoever is behind takes the state from one who is ahead, as the act
        has left it, and must not find there what that one's script has done since then, which it is about to do itself. What is
        new in the optimizer's state is held in common before that: without it nobody could go back to where the act began."""
        if self._link is not None and self.parted < act:
            self._settle()
            self.parted = act

    def _settle(self) -> None:
        grown = self.collective.all_gather(torch.tensor([self._holdings is not None and self._holdings.grown]))
        if self._holdings is not None and any(map(bool, grown)):
            self._holdings.settle(self.committed)

    def step(self, batch: Batch, step: int, signals: Callable[[], Signals]) -> Taken:
        """*collective*. Trains on ``batch`` as step number ``step`` of the run.

        Args:
            signals: What to tell the others.
        """

        groups = self._groups()
        tries = 0
        computed = False

        def body() -> Taken:
            nonlocal tries, computed
            tries += 1
            if tries > 1:
                self._own.replica.set_hyperparameters(groups, exactly=True)  # some optimizers count their steps there
            mine = batch
            if batch.made_for not in (None, self.crew.token):
                mine = self._part.batch(batch.epoch, batch.number)  # loaded for another team
            self.crew.reassign(mine)
            past = Past(step=step, epoch=batch.epoch, number=batch.number, groups=groups)
            result, told = self._run(mine, past, signals())
            self.committed = step
            computed = True
            uids = self._link.uids if self._link is not None else []
            return Taken(
                result=result,
                told=told,
                leavers=[uid for uid, signals in zip(uids, told, strict=False) if signals.session & LEAVES],
                admits=bool(told[0].session & ADMITS),
                groups=self._groups(),
            )

        taken = self.act(body, edits=not self._repeats.allowed)
        if not computed:  # another worker has, with the same result
            self._own.replica.set_hyperparameters(taken.groups, exactly=True)
            self.crew.stepper.seed_what_follows(step)
        return taken

    def _groups(self) -> list[dict[str, Any]]:
        return self._own.replica.hyperparameters() if self._link is not None else []

    def _run(self, batch: Batch, past: Past, signals: Signals) -> tuple[StepResult, list[Signals]]:
        holdings = self._holdings if self._holdings is not None and self._holdings.replay else None
        if holdings is None:
            done = self._stepped(batch, past.step, signals)
        else:
            self._repeats.note(past)
            begun = self._own.replica.buffers.values()
            try:
                done = self._stepped(batch, past.step, signals)
            finally:  # the copy is there, whatever came afterwards
                if holdings.copied == past.step - 1:
                    self._repeats.copied(past, begun)
        self.reached = past.step
        return done

    def _stepped(self, batch: Batch, step: int, signals: Signals) -> tuple[StepResult, list[Signals]]:
        self._stepping = True
        done = self.crew.stepper.run(batch, step, signals)
        self._stepping = False
        return done

    # ------------------------------------------------------------------ those who come and go

    def applicants(self) -> bool:
        """*local*, on worker 0. Whether others wait to join."""
        if self._link is None or self.collective.rank or self.collective.size >= self._settings.microbatches:
            return False
        return bool(self._link.membership.applicants())

    def change(self, leavers: Sequence[str], *, admit: bool) -> None:
        """*collective*. Goes on without those who leave, and with those who wait to join.

        Raises:
            SystemExit: With status 0, on a worker that leaves.
        """
        link = self._link
        if link is None or link.generation is None:
            return
        expected = self.acts + 1

        def body() -> None:
            gone = [uid for uid in leavers if uid in link.uids]
            waiting = link.membership.applicants(at_once=True) if admit and self.collective.rank == 0 else []
            room = self._settings.microbatches - self.collective.size + len(gone)
            joiners = json.loads(self.collective.all_gather_bytes(json.dumps(waiting[:room]).encode())[0])
            if not (joiners or gone):
                return
            if self._holdings is not None:
                self._holdings.settle(self.committed)
            if self.collective.rank == 0:
                link.membership.admit(joiners, gone)
            self.collective.barrier()
            if link.membership.me.uid in gone:
                self.collective.close()
                link.leaves = True
                raise SystemExit(0)
            self._regroup(leavers=gone, joiners=joiners, acts=expected, reason=_changes(link, gone, joiners))

        self._changing = True
        try:
            self.act(body)
        finally:
            self._changing = False

    def join(self, over: Callable[[], bool]) -> bool:
        """*local* until the others meet this worker. Waits to be let in; False if ``over`` says that there is nothing to join."""
        assert self._link is not None
        try:
            collective = self._link.join(over, keep=self._own.weights.flats)
            if collective is None:
                return False
            self._gather(collective, "")
        except LostWorker as failure:
            self._recover(failure)
        while True:
            try:
                self._see_through(self.acts)  # to meet was an act of theirs
                return True
            except LostWorker as failure:
                self._recover(failure)

    def await_more(self) -> None:
        """*collective*. Where there are fewer workers than the minimum: until there are enough.

        Raises:
            TooFewWorkers: None came in time.
        """
        link = self._link
        if link is None:
            return
        began = time.monotonic()
        while self.collective.size < link.minimum:
            if time.monotonic() - began > link.wait_s:
                raise TooFewWorkers(
                    f"{self.collective.size} of at least {link.minimum} workers are left, and no others came within "
                    f"{link.wait_s:g} s (--wait). Start the same command again to go on from the last checkpoint, or "
                    "with a smaller minimum (--workers MIN:MAX)"
                )
            self.change((), admit=True)
            if self.collective.size < link.minimum:
                link.pause(0.05)

    # ------------------------------------------------------------------ recovery

    def _recover(self, failure: LostWorker) -> None:
        """Meets those who are left, and brings the state to where the act can be done (again)."""
        if self._link is None or self._link.generation is None:
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
        acts: int | None = None,
        reason: str = "",
        before: Generation | None = None,
    ) -> None:
        """*collective*.

        Args:
            silent: The rank of a worker that has not answered.
            acts: How many acts are done once the workers have met: to meet is this one.
        """
        assert self._link is not None
        self._abandon()
        collective = self._link.meet(leavers=leavers, joiners=joiners, silent=silent, keep=self._own.weights.flats)
        self.silence = None
        if acts is not None:
            self.acts, self._last, self._changing = acts, None, False
        if before is not None:
            gone = [member for member in before.members if member.uid not in self._link.uids]
            reason = "; ".join(self._obituary(before, member) for member in gone)
            self.silence = self._link.ask(f"silence/{before.number}")
        self._gather(collective, reason)

    def _obituary(self, before: Generation, member: Member) -> str:
        assert self._link is not None
        why = self._link.membership.why(member.uid) or "was lost"
        return f"worker {before.members.index(member)} ({member.host}, process {member.process.pid}) {why}"

    def _abandon(self) -> None:
        """*local*. Leaves the generation; whoever still waits for this worker notices. The step under way is undone."""
        self.collective.close()
        if not self._stepping:
            return
        self._stepping = False
        self._own.buffers.restore()

    def _gather(self, collective: Collective, reason: str) -> None:
        """*collective*. Makes a team of these workers, whose state may differ by one act, or be none at all."""
        watch = self._watch(collective)
        self._go_on_with(self._reports(collective), collective, watch, reason)

    def _reports(self, collective: Collective) -> list[Report]:
        mine = Report(
            trainer=self._number,
            acts=self.acts,
            parted=self.parted,
            reached=self.reached,
            committed=self.committed,
            tracked=self._own.buffers.tracked.hex(),
            dense=self.crew.reduction.state_dict().get("dense", ()),
            unsaved=self._part.unsaved(),
            changing=self._changing,
            has_all=self._has_all,
            has_part=self._holdings is not None,
            may_share=self._own.weights.wanted,
        )
        return [Report(**json.loads(text)) for text in collective.all_gather_bytes(json.dumps(dataclasses.asdict(mine)).encode())]

    def _go_on_with(self, reports: Sequence[Report], collective: Collective, watch: Watch, reason: str = "") -> None:
        """*collective*. Brings all these workers to one point, from which the run goes on."""
        try:
            found = RecoveryPlan.of(reports, trainer=self._number)
        except Parted:
            collective.close()
            raise
        if found.meeting_was_act:
            self._last = None
        if found.ahead.has_all:
            # If a meeting was broken off, some hold the state as before it, and others as after it.
            self._holdings = None
            reached, needy = found.ahead.reached, found.unlike
        else:
            reached, needy = self._go_back(collective, found)
        collective.barrier()
        self._muster(collective, watch, learned={"dense": found.dense})
        self._own.buffers.track(found.tracked)
        self._hand_over(found, needy, reached)
        self._hold_on(reached)
        replicates = self.crew.reduction.replicates
        self._own.weights.bind(collective, share=found.may_share and not replicates)
        self._has_all = replicates  # only now: one that is lost before this leaves the state where it was
        if replicates:
            self._holdings = None
        self.committed = found.committed
        self._part.regrouped(reason, found.unsaved)
        self._replay()
        self.acts, self.parted = found.acts, found.parted

    def _go_back(self, collective: Collective, found: RecoveryPlan) -> tuple[int, list[int]]:
        """*collective*. Brings what each host holds in common to where the host of the source can go on from.

        Returns:
            The step that its state shows then, and the workers that have to be given all of the state.
        """
        near = next(host for host in collective.hosts if collective.rank in host)
        survivors = [rank for rank in near if found.reports[rank].acts != NEW]
        point: Point | None = None
        if self.acts != NEW and self._holdings is not None:
            point = self._holdings.point(max(found.reports[rank].reached for rank in survivors))
        mine = [] if point is None else [point.step, bool(point.parts)]
        points = [json.loads(text) for text in collective.all_gather_bytes(json.dumps(mine).encode())]
        if not points[found.source]:
            raise StateLost("a worker was lost, and with it what it held, or what it was changing")
        step = points[found.source][0]
        needy = [
            rank
            for host in collective.hosts
            if found.source not in host and [step, False] not in [points[rank] for rank in host]
            for rank in host
        ]
        if collective.rank in needy:
            if len(near) > 1:  # another worker of this host may soon have overwritten the weights that they share
                self._holdings = None
            return step, needy
        if point is not None and point.parts and self._holdings is not None:
            self._holdings.restore(point, main=collective.rank == survivors[0])
            if step != self.reached:
                if not self._repeats.begins_after(step):
                    raise StateLost(f"the buffers after step {step} are not known any more")
                self._own.replica.buffers.go_to(self._repeats.buffers)
        elif point is not None and self._holdings is not None:
            self._holdings.read_numbers()
        self.reached = min(self.reached, step)  # whoever is behind has yet to be given what it lacks
        return step, needy

    def _hand_over(self, found: RecoveryPlan, needy: Sequence[int], reached: int) -> None:
        """*collective*. Whoever is behind, or new, or on a host that lacks the state, gets it from the source.

        Args:
            reached: The step that the source's state shows.
        """
        receivers = found.behind.union(needy)
        if not receivers:
            return
        data = b""
        if self.collective.rank == found.source:
            state = found.ahead.has_all or bool(needy)
            weights = state or not self._own.weights.shared
            parcel = StateTransfer.of(
                self._own, last=self._last, weights=weights, state=state, repeats=self._repeats, part=self._part.describe()
            )
            data = parcel.to_bytes()
        data = self.collective.all_gather_bytes(data)[found.source]
        if self.collective.rank not in receivers:
            return
        parcel = StateTransfer.from_bytes(data)
        if found.ahead.has_all or self.collective.rank in needy:
            self._holdings = None
        else:
            parcel = dataclasses.replace(parcel, state=None)  # this worker's host has it
        parcel.put_into(self._own, new=self.acts == NEW)
        # Whoever has been helped stands where the source stands, also if this meeting is broken off.
        self._last, self.reached = parcel.last, reached
        self._repeats.adopt(parcel.repeats)
        if self.acts == NEW:
            self._part.adopt(parcel.part)
        elif self.collective.rank not in needy:
            self.acts, self.committed = found.acts, found.committed

    def _hold_on(self, step: int) -> None:
        """*collective*. From step ``step`` on the workers of each host hold the state in common, unless each has all of it."""
        assert self._link is not None
        assert self._link.generation is not None
        if self.crew.reduction.replicates:
            return
        holdings = self._holdings or SharedState(self._own.replica, self._own.weights)
        if not holdings.bind(self.collective, self.crew.reduction, self._link.generation.number, step):
            raise StateLost("the state cannot be held in common")
        holdings.replay = self._repeats.allowed
        self._holdings = holdings

    def _replay(self) -> None:
        """*collective*. From where the state is to the last step of the run: the same bits as the first time."""
        if self.reached == self.committed:
            return
        todo = self._repeats.between(self.reached, self.committed)
        now = self._own.replica.hyperparameters()
        try:
            for one in todo:
                self._own.replica.set_hyperparameters(one.groups, exactly=True)
                batch = self._part.batch(one.epoch, one.number)
                self.crew.reassign(batch)
                self._run(batch, one, Signals(session=self.flags()))
        finally:  # another worker may be lost meanwhile
            self._own.replica.set_hyperparameters(now, exactly=True)


def _changes(link: Link, leavers: Sequence[str], joiners: Sequence[str]) -> str:
    texts = [f"worker {link.uids.index(uid)} left, as it was told to" for uid in leavers]
    if joiners:
        texts.append(f"{len(joiners)} worker{'s'[: len(joiners) != 1]} joined")
    return "; ".join(texts)
