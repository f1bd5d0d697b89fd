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
import io
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from unisono.collective import Collective, LostWorker
from unisono.elastic.link import Link
from unisono.elastic.membership import Generation, Member, StateLost
from unisono.errors import WorkerFailure
from unisono.guard.replicas import ReplicaGuard
from unisono.guard.silence import Board, Watch
from unisono.guard.stragglers import Stragglers, warn_about
from unisono.layout import Layout
from unisono.observe.timing import StepClock
from unisono.sync import Reduction, Sync
from unisono.sync.exact import host_sizes
from unisono.training.acts import NEW, Part, Parted, Report, Settings, Taken
from unisono.training.balance import Balance
from unisono.training.buffers import Buffers
from unisono.training.header import Signals
from unisono.training.holdings import Holdings, Point
from unisono.training.optimizer import copied_hyperparameters, full_state, set_full_state, set_hyperparameters
from unisono.training.repeats import Past, Repeats
from unisono.training.replica import TorchReplica
from unisono.training.state import State
from unisono.training.step import Batch, Stepper, StepResult
from unisono.training.weights import Weights

T = TypeVar("T")
logger = logging.getLogger("unisono")


class Team:
    """See the module.

    Args:
        part: The rest of the trainer.
        board: Where this worker shows what it does.
        link: How workers meet again; None: they cannot, and a lost worker ends the run.

    Attributes:
        collective: The workers of now.
        reduction: How gradients are summed over them.
        stragglers: Looks for slow ones among them.
        balance: Says how much each of them computes.
        token: Stands for the workers of now, in batches that are divided among them.
        state: The run's state, as this worker holds it.
        acts: How many acts are done.
        silence: What was found out about a worker that did not answer, if that ended the generation before.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: Any,
        layout: Layout,
        weights: Weights,
        buffers: Buffers,
        replica: TorchReplica,
        sync: Sync,
        settings: Settings,
        clock: StepClock,
        board: Board | None,
        link: Link | None,
        part: Part,
    ) -> None:
        self._model, self._optimizer, self._scheduler = model, optimizer, scheduler
        self._layout, self._weights, self._buffers, self._replica = layout, weights, buffers, replica
        self._sync, self._settings, self._clock = sync, settings, clock
        self._board, self._link, self._part = board, link, part
        self._holdings: Holdings | None = None
        self.collective: Collective
        self.reduction: Reduction
        self.stepper: Stepper
        self.stragglers: Stragglers
        self.balance: Balance
        self.token: object
        self.state: State
        self.guard: ReplicaGuard
        self._watch: Watch
        self.acts = 0
        self.reached = 0
        self.committed = 0
        self._last: Any = None
        self._repeats = Repeats()
        self.silence: str | None = None
        self._number = link.trainers if link is not None else 1
        self._stepping = False
        self._changing = False
        self._has_all = False  # of the state, in its own optimizer; else the host's workers hold it in common

    # ------------------------------------------------------------------ the workers of now

    def muster(self, collective: Collective, watch: Watch, *, dense: Sequence[int] = ()) -> None:
        """*local*. Makes everything that depends on who takes part."""
        settings = self._settings
        if hasattr(self, "reduction"):
            self.reduction.close()
        self.collective, self._watch = collective, watch
        self.reduction = self._sync.bind(
            self._layout,
            collective,
            settings.microbatches,
            sparse=self._replica.tables.slots(self._layout),
            per_host=self._link is not None,
        )
        if dense:
            self.reduction.densify(dense)
        self.stragglers = Stragglers(self.reduction.ranges, warn_about(watch.identity, main=collective.rank == 0))
        self.balance = Balance(self.reduction.ranges, host_sizes(collective))
        self.token = object()
        self.state = State(
            model=self._model,
            optimizer=self._optimizer,
            scheduler=self._scheduler,
            layout=self._layout,
            weights=self._weights,
            reduction=self.reduction,
            collective=collective,
        )
        self.guard = ReplicaGuard(
            self.state.replicated, self.state.replicated_tensors, collective, settings.on_desync, settings.compare_every
        )
        self.stepper = Stepper(
            replica=self._replica,
            layout=self._layout,
            weights=self._weights,
            buffers=self._buffers,
            reduction=self.reduction,
            optimizer=self._optimizer,
            collective=collective,
            leaves=settings.microbatches,
            seed=settings.seed,
            max_grad_norm=settings.max_grad_norm,
            guard=self.guard,
            on_nonfinite=settings.on_nonfinite,
            overlap=settings.overlap,
            clock=self._clock,
        )

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
                self.muster(collective, Watch.begin(collective, self._settings.timeout_s, self._board))
                reports = self._reports(collective) if again or self._number > 1 else []
                if any(report.trainer < self._number for report in reports):
                    raise LostWorker("another worker has still to come from the trainer before this one")
                if any(report.acts != NEW for report in reports):
                    self._gather_from(collective, reports, "")  # the others had heard all that they needed
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
                collective = self._link.first(keep=self._weights.flats)

    def _part_from_others(self) -> None:
        """*collective*. The script comes to another trainer: once this returns all have done everything with this one."""
        with contextlib.suppress(Parted):
            self.act(lambda: self.collective.barrier())

    def _hold(self, step: int) -> None:
        self.reached = self.committed = step
        self._has_all = self.reduction.replicates
        generation = self._link.generation if self._link is not None else None
        if self._link is not None and generation is not None and not self.reduction.replicates:
            holdings = Holdings(self._layout, self._weights, self._optimizer)
            if holdings.bind(self.collective, self.reduction, generation.number, step):
                self._holdings = self.stepper.holdings = holdings
            elif self.collective.rank == 0:
                self._link.tell("whole", "0")
        if self._link is None or generation is not None:
            self.acts = 0

    def begin(self, *, replay: bool) -> None:
        """*collective*. Steps will follow, and the weights may have changed since the last one.

        Args:
            replay: Whether nobody but the trainer changes weights between steps.
        """
        self._weights.bind(self.collective, share=self._weights.wanted and not self.reduction.replicates)
        self._repeats.begin(allowed=replay)
        if self._holdings is not None:
            self._holdings.renew(self.committed, replay=replay)

    @property
    def can_change(self) -> bool:
        """*local*. Whether workers may be lost, leave and come while the run goes on."""
        return self._link is not None

    @property
    def grown(self) -> bool:
        """*local*. Whether this worker's part of the optimizer's state has something new."""
        return self._holdings is not None and self._holdings.grown

    # ------------------------------------------------------------------ acts

    def act(self, body: Callable[[], T]) -> T:
        """*collective*. Does something together with the others; if one of them is lost meanwhile, does it again without it.

        Raises:
            LostWorker: One was lost, and there is no way to meet again.
            StateLost: One was lost, and with it what cannot be computed again.
        """
        expected = self.acts + 1
        while True:
            try:
                result = body()
                break
            except LostWorker as failure:
                self._recover(failure)
                if self.acts >= expected:
                    received: T = self._last
                    return received
        self.acts, self._last = expected, result
        return result

    def step(self, batch: Batch, step: int, signals: Callable[[], Signals]) -> Taken:
        """*collective*. Trains on ``batch`` as step number ``step`` of the run.

        Args:
            signals: What to tell the others.
        """

        def body() -> Taken:
            mine = batch
            if batch.made_for not in (None, self.token):
                mine = self._part.batch(batch.epoch, batch.number)  # loaded for another team
            self._reassign(mine)
            groups = copied_hyperparameters(self._optimizer) if self._link is not None else []
            past = Past(step=step, epoch=batch.epoch, number=batch.number, groups=groups)
            result, told = self._run(mine, past, signals())
            uids = self._link.uids if self._link is not None else []
            return Taken(
                result=result,
                told=told,
                leavers=[uid for uid, signal in zip(uids, told, strict=False) if signal.leaves],
                admits=told[0].admits,
            )

        taken = self.act(body)
        self.committed = step
        return taken

    def _run(self, batch: Batch, past: Past, signals: Signals) -> tuple[StepResult, list[Signals]]:
        holdings = self._holdings if self._holdings is not None and self._holdings.replay else None
        if holdings is None:
            done = self._stepped(batch, past.step, signals)
        else:
            self._repeats.note(past)
            begun = self._buffers.start()
            try:
                done = self._stepped(batch, past.step, signals)
            finally:  # the copy is there, whatever came afterwards
                if holdings.copied == past.step - 1:
                    self._repeats.copied(past, begun)
        self.reached = past.step
        return done

    def _reassign(self, batch: Batch) -> None:
        """*local*, alike on all workers. Takes the ranges over by which the batch is divided."""
        if batch.ranges and batch.ranges != self.reduction.ranges:
            self.reduction.reassign(batch.ranges)
            self.stragglers.reassign(batch.ranges)

    def _stepped(self, batch: Batch, step: int, signals: Signals) -> tuple[StepResult, list[Signals]]:
        self._stepping = True
        done = self.stepper.run(batch, step, signals)
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
        flats = self._weights.flats
        try:
            collective = self._link.join(over, keep=flats)
            if collective is None:
                return False
            self._gather(collective, "")
        except LostWorker as failure:
            self._recover(failure)
        return True

    def await_more(self) -> None:
        """*collective*. Where there are fewer workers than the minimum: until there are enough.

        Raises:
            WorkerFailure: None came in time.
        """
        link = self._link
        if link is None:
            return
        began = time.monotonic()
        while self.collective.size < link.minimum:
            if time.monotonic() - began > link.wait_s:
                raise WorkerFailure(
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
        collective = self._link.meet(leavers=leavers, joiners=joiners, silent=silent, keep=self._weights.flats)
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
        self._buffers.restore()
        for parameter in self._layout.parameters:
            parameter.grad = None

    def _gather(self, collective: Collective, reason: str) -> None:
        """*collective*. Makes a team of these workers, whose state may differ by one act, or be none at all."""
        watch = Watch.begin(collective, self._settings.timeout_s, self._board)
        reports = self._reports(collective)
        self._gather_from(collective, reports, reason, watch)

    def _gather_from(self, collective: Collective, reports: Sequence[Report], reason: str, watch: Watch | None = None) -> None:
        if any(report.trainer > self._number for report in reports):
            collective.close()
            raise Parted("another worker has come to the next trainer already")
        ahead = max(report.acts for report in reports)
        if ahead == NEW:
            raise StateLost("all workers that held the run's state were lost")
        source = _source(reports)
        if reports[source].changing and any(report.acts == NEW for report in reports):
            ahead += 1  # to meet those who come was the act under way
            self._last = None
        committed = max(report.committed for report in reports)
        everywhere = reports[source].has_all
        if everywhere:
            # If a meeting was broken off, some hold the state as before it, and others as after it.
            self._holdings = None
            reached = reports[source].reached
            needy = [rank for rank, report in enumerate(reports) if not report.is_like(reports[source])]
        else:
            reached, needy = self._go_back(collective, reports, source)
        collective.barrier()
        self.muster(collective, watch or self._watch, dense=sorted({slot for report in reports for slot in report.dense}))
        self._buffers.track(_union(reports))
        self._hand_over(reports, source, needy, everywhere)
        self._hold_on(reached)
        self._weights.bind(collective, share=all(report.may_share for report in reports) and not self.reduction.replicates)
        self._has_all = self.reduction.replicates
        if self._has_all:
            self._holdings = None
        self.committed, self.reached = committed, reached
        self._part.regrouped(reason, any(report.unsaved for report in reports))
        self._replay(committed)
        self.acts = ahead

    def _reports(self, collective: Collective) -> list[Report]:
        mine = Report(
            trainer=self._number,
            acts=self.acts,
            reached=self.reached,
            committed=self.committed,
            tracked=self._buffers.tracked.hex(),
            dense=sorted(self.reduction.densified),
            unsaved=self._part.unsaved(),
            changing=self._changing,
            has_all=self._has_all,
            has_part=self._holdings is not None,
            may_share=self._weights.wanted,
        )
        return [Report(**json.loads(text)) for text in collective.all_gather_bytes(json.dumps(dataclasses.asdict(mine)).encode())]

    def _go_back(self, collective: Collective, reports: Sequence[Report], source: int) -> tuple[int, list[int]]:
        """*collective*. Brings what each host holds in common to where the host of ``source`` can go on from.

        Returns:
            The step that its state shows then, and the workers that have to be given all of the state.
        """
        near = next(host for host in collective.hosts if collective.rank in host)
        survivors = [rank for rank in near if reports[rank].acts != NEW]
        point: Point | None = None
        if self.acts != NEW and self._holdings is not None:
            point = self._holdings.point(max(reports[rank].reached for rank in survivors))
        mine = [] if point is None else [point.step, bool(point.parts)]
        points = [json.loads(text) for text in collective.all_gather_bytes(json.dumps(mine).encode())]
        if not points[source]:
            raise StateLost("a worker was lost, and with it what it held, or what it was changing")
        step = points[source][0]
        needy = [
            rank
            for host in collective.hosts
            if source not in host and [step, False] not in [points[rank] for rank in host]
            for rank in host
        ]
        if collective.rank in needy:
            if len(near) > 1:  # another worker of this host may soon have overwritten the weights that they share
                self._holdings = None
        elif point is not None and point.parts and self._holdings is not None:
            self._holdings.restore(point, main=collective.rank == survivors[0])
        return step, needy

    def _hold_on(self, step: int) -> None:
        """*collective*. From step ``step`` on the workers of each host hold the state in common, unless each has all of it."""
        assert self._link is not None
        assert self._link.generation is not None
        if self.reduction.replicates:
            return
        holdings = self._holdings or Holdings(self._layout, self._weights, self._optimizer)
        if not holdings.bind(self.collective, self.reduction, self._link.generation.number, step):
            raise StateLost("the state cannot be held in common")
        holdings.replay = self._repeats.allowed
        self._holdings = self.stepper.holdings = holdings

    # ------------------------------------------------------------------ what others lack

    def _hand_over(self, reports: Sequence[Report], source: int, needy: Sequence[int], everywhere: bool) -> None:
        """*collective*. Whoever is behind, or new, or on a host that lacks the state, gets it from worker ``source``."""
        receivers = {rank for rank, report in enumerate(reports) if report.acts < reports[source].acts}.union(needy)
        if not receivers:
            return
        weights = everywhere or bool(needy) or not self._weights.shared
        state = everywhere or bool(needy)
        data = self._packed(weights=weights, state=state) if self.collective.rank == source else b""
        data = self.collective.all_gather_bytes(data)[source]
        if self.collective.rank in receivers:
            self._unpack(data, state=everywhere or self.collective.rank in needy)

    def _packed(self, *, weights: bool, state: bool) -> bytes:
        content = {
            "last": self._last,
            "buffers": [tensor.detach() for tensor in self._model.buffers()],
            "weights": list(self._weights.flats) if weights else None,
            "optimizer": full_state(self._optimizer, self._layout) if state else None,
            "common": self.state.common(),
            "repeats": self._repeats.describe(),
            "part": self._part.describe(),
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    def _unpack(self, data: bytes, *, state: bool) -> None:
        """*local*.

        Args:
            state: Whether this worker's host lacks the optimizer's state.
        """
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
        with torch.no_grad():
            for tensor, value in zip(self._model.buffers(), content["buffers"], strict=True):
                tensor.copy_(value)
            if content["weights"] is not None:
                for flat, value in zip(self._weights.flats, content["weights"], strict=True):
                    flat.copy_(value)
        if state:
            self._holdings = None
            set_full_state(self._optimizer, self._layout, content["optimizer"])
        if self.acts == NEW:
            set_hyperparameters(self._optimizer, content["common"]["groups"])
            if self._scheduler is not None:
                self._scheduler.load_state_dict(content["common"]["scheduler"])
            self._part.adopt(content["part"])
        self._last = content["last"]
        self._repeats.adopt(content["repeats"])
        self._buffers.begin()
        vars(self._optimizer)["_opt_called"] = True  # by another worker; PyTorch's schedulers warn if nobody has

    # ------------------------------------------------------------------ steps that are done again

    def _replay(self, committed: int) -> None:
        """*collective*. From where the state is to the last step of the run: the same bits as the first time."""
        if self.reached == committed:
            return
        todo = self._repeats.between(self.reached, committed)
        now = copied_hyperparameters(self._optimizer)
        self._buffers.go_to(self._repeats.buffers)
        try:
            for one in todo:
                set_hyperparameters(self._optimizer, one.groups)
                batch = self._part.batch(one.epoch, one.number)
                self._reassign(batch)
                self._run(batch, one, Signals())
        finally:  # another worker may be lost meanwhile
            set_hyperparameters(self._optimizer, now)


def _source(reports: Sequence[Report]) -> int:
    """The rank of a worker whose state the others can go on from: the furthest, and of these one that has all of it, if any, or
    else a part."""
    places = [(report.acts, report.has_all, report.has_part, report.reached if report.has_all else 0) for report in reports]
    return places.index(max(places))


def _union(reports: Sequence[Report]) -> bytes:
    flags = [bytes.fromhex(report.tracked) for report in reports]
    return bytes(map(max, *flags)) if len(flags) > 1 else flags[0]


def _changes(link: Link, leavers: Sequence[str], joiners: Sequence[str]) -> str:
    texts = [f"worker {link.uids.index(uid)} left, as it was told to" for uid in leavers]
    if joiners:
        texts.append(f"{len(joiners)} worker{'s'[: len(joiners) != 1]} joined")
    return "; ".join(texts)
