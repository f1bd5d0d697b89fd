"""The loop over the data: which batch is next, what the others are told along with it, and who computes how much of it."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from unisono.checkpoint.format import check_tensors
from unisono.data.batch import Batch
from unisono.data.batches import Feed, following
from unisono.data.loader import Loader
from unisono.data.stream_batches import StreamFeed
from unisono.errors import ConfigurationError
from unisono.guard.stragglers import HostMonitor, TimingBlock
from unisono.order import OrderLike
from unisono.system.signals import StopRequest
from unisono.training.call_data import CallData, call_data
from unisono.training.header import Signals
from unisono.training.observer import Observer
from unisono.training.one_loop import only_loop
from unisono.training.run import Run
from unisono.training.same_data import EpochData
from unisono.training.session import Session, StepKey
from unisono.training.settings import Settings
from unisono.training.setup import check_alike
from unisono.training.state import LocalState
from unisono.training.step import StepResult
from unisono.tree import Span

_EXCHANGE_EVERY = 256
"""Batches of streams between two exchanges of where these are."""
Taken = tuple[StepResult, list[Signals]]
"""The result of a step, and what every worker signalled with it, by rank."""


class Loop:
    """Goes over the data, call by call of ``fit`` or ``batches``.

    Args:
        local: What this worker trains with.
        settings: What steps are computed by.
        session: The workers.
        run: How far the run has come.
        machine: What this worker runs on.
        observer: Sees the batches, and may end them.
        begin: Tells callbacks that steps will follow.

    Attributes:
        stop: Whether a person asked to stop; None between loops.
    """

    def __init__(
        self,
        local: LocalState,
        settings: Settings,
        session: Session,
        run: Run,
        *,
        machine: HostMonitor,
        observer: Observer,
        begin: Callable[[], None],
    ) -> None:
        self._local, self._settings, self._session, self._run = local, settings, session, run
        self._machine, self._observer, self._begin = machine, observer, begin
        self._troubles = machine.troubles()
        self._feed: Feed | StreamFeed | None = None
        self._arguments: list[str] = []
        self._looked_at: tuple[Any, dict[tuple[int, int], list[str]]] = (None, {})
        self._steps: int | None = None
        self.stop: StopRequest | None = None

    # ------------------------------------------------------------------ the data

    def data(self, dataset: Any, order: OrderLike, *, drop_last: bool, epochs: int, steps: int | None) -> CallData:
        """*collective*. What the call goes over, and whether that is how the run began.

        Args:
            steps: Of the whole run, if it ends with these rather than with epochs.

        Raises:
            ConfigurationError: It is not, and the run has stopped in the middle of an epoch; or workers were given other data.
        """
        data, self._steps = self._call_data(dataset, order, drop_last), steps
        if self._session.can_change:
            self._arguments = self.arguments(dataset, order, drop_last=drop_last, epochs=epochs, steps=steps)
        done = self.is_done(epochs)

        def compare() -> None:
            check_alike(self._session.collective, {**data.described, "epochs": epochs, "steps": steps})
            if not done:
                self._run.prepare()

        if not self._session.is_midway:  # else the others have compared this already
            self._session.perform("compare the data", compare)
        self._run.goes_over(data.described, done=done)
        if not done:
            self._run.recall(data)
        return data

    def arguments(self, dataset: Any, order: OrderLike, *, drop_last: bool, epochs: int, steps: int | None) -> list[str]:
        """*local*. What all workers in a loop must have alike, also those that join it: data and arguments."""
        data = self._call_data(dataset, order, drop_last)
        return [*data.probed(), json.dumps({**data.described, "epochs": epochs, "steps": steps})]

    def _call_data(self, dataset: Any, order: OrderLike, drop_last: bool) -> CallData:
        if self._looked_at[0] is not dataset:
            self._looked_at = (dataset, {})
        return call_data(dataset, order, drop_last=drop_last, settings=self._settings, known=self._looked_at[1])

    def is_done(self, epochs: int) -> bool:
        """*local*. Whether so many epochs of the whole run are behind it, or its last step."""
        if epochs < 1:
            raise ConfigurationError(f"epochs must be 1 or more, got {epochs}")
        # A worker that has joined the others in their last step ends the call as they do.
        return (self._run.position.epoch >= epochs or self._is_over()) and not self._session.is_midway

    def _is_over(self) -> bool:
        """Whether the run ends here, in whichever epoch."""
        position = self._run.position
        return position.finished or (self._steps is not None and position.step >= self._steps)

    def planned(self, data: CallData, epochs: int) -> tuple[int | None, int | None]:
        """*local*. Steps and epochs of the whole run, as far as can be said."""
        position, steps = self._run.position, self._steps
        each = data.steps_of(min(position.epoch, epochs - 1))
        if each is None:
            return steps, None if steps is not None else epochs
        first = position.step - position.batch
        if steps is not None:
            return steps, position.epoch + -(-(steps - first) // max(1, each))
        return first + max(0, epochs - position.epoch) * each, epochs

    # ------------------------------------------------------------------ batch after batch

    def batches(self, data: CallData, epochs: int, loader: Loader, *, own_loop: bool) -> Generator[Batch]:
        """*collective*. Those that are still to be trained; each is to be stepped before the next one.

        Args:
            own_loop: Whether a user's own code runs between steps.
        """
        if self.is_done(epochs):
            self._run.complete(epochs, self._steps)
            return
        local, session = self._local, self._session
        if self._run.is_kept or not own_loop:
            check_tensors(local.replica.model_state())  # rather than when the first checkpoint is due, or at the end
        self._begin()
        self._run.goes_into(EpochData(data, loader), joins=session.is_midway)
        local.replica.check_unchanged()
        local.clock.at(self._run.position.step + 1)
        planned = self.planned(data, epochs)
        if not own_loop and planned[0] is not None:
            local.replica.check_schedule(planned[0])
        self._run.begin_log(epochs=planned[1], steps=planned[0])
        feed = self._feed = data.feed(session, local, self._settings, loader, epochs)
        with only_loop(), session.training(), StopRequest() as self.stop, local.weights.in_common(self.may_share(own_loop)):
            try:
                self._begin_steps(data, redoable=self._may_redo(own_loop))
                yield from self._observer.around_batches(self._in_order(feed, own_loop=own_loop))
                session.end_steps()  # while batches can be had again
            finally:
                self.stop = None
                feed.drop()
                self._feed = None
                self._run.end_log()
        self._run.finish()

    def _in_order(self, feed: Feed | StreamFeed, *, own_loop: bool) -> Iterator[Batch]:
        batch = feed.at(self._run.position.epoch, self._run.position.batch)
        is_first = True
        while batch is not None:
            yield batch
            if is_first:  # and not with the first checkpoint, which may be hours away
                is_first = False
                self._local.user.describe()
                self._check_mode(own_loop)
            if self._is_over():
                return
            # Here, so that a worker that joins has missed nothing of what a user's own loop does after the step.
            self._session.between_steps(self._run.flush_log)
            # The position says also where an epoch has ended that nobody knew the end of.
            at = self._run.position.epoch, self._run.position.batch
            batch = feed.at(*(at if at > (batch.epoch, batch.number) else following(batch)))

    def _check_mode(self, own_loop: bool) -> None:
        if own_loop and self._local.replica.is_resting and self._run.is_main:
            warnings.warn(
                "the model is in evaluation mode (from_pretrained returns it so): it trains without dropout, and BatchNorm with "
                "the statistics that it has. In a loop of your own call model.train() first; fit does it by itself",
                stacklevel=4,
            )

    def _begin_steps(self, data: CallData, *, redoable: bool) -> None:
        if self._session.enter_steps():
            return  # the others are in the middle of it

        def begin() -> None:
            data.check(self._session.collective)
            weights = self._local.weights
            weights.bind(self._session.collective, share=weights.wanted and not self._session.group.reduction.replicates)
            self._session.begin_steps(self._arguments, redoable=redoable)

        self._session.perform("begin a loop", begin)

    def may_share(self, own_loop: bool) -> bool:
        """*local*. Whether nobody but the trainer writes to the weights while it trains: then a host needs one copy of them."""
        share = self._local.sync.share_weights
        return share if share is not None else self._may_redo(own_loop)

    def _may_redo(self, own_loop: bool) -> bool:
        """Whether steps may be taken again: nothing that a user's code has written would be left out then."""
        return not own_loop and not self._local.user.edits_weights()

    # ------------------------------------------------------------------ a step

    def take(self, batch: Batch, step: int) -> Taken:
        """*collective*. Trains on ``batch`` as step number ``step`` of the run."""
        if batch.made_for not in (None, self._session.group.token):
            batch = self._batch_at(batch.epoch, batch.number)  # it was loaded for other workers
        self._session.group.reassign(batch)
        return self._session.group.stepper.run(batch, step, self._signals(batch))

    def take_together(self, batch: Batch, step: int) -> tuple[Batch, StepResult, list[Signals]]:
        """*collective*. The same as an operation of the session: the result may be what another worker has computed. The batch
        comes back with what is known of it by then."""
        computed = False

        def take() -> Taken:
            nonlocal computed
            computed = False
            taken = self.take(batch, step)
            computed = True
            return taken

        taken = self._session.perform("take a step", take, step=StepKey(step, batch.epoch, batch.number))
        if not computed:
            self._session.group.stepper.seed_what_follows(step)
        return self._settled(batch, *taken), *taken

    def redo(self, key: StepKey, flags: int) -> None:
        """*collective*. Takes a step again that has been taken before.

        Args:
            flags: Of the session, for the others.
        """
        batch = self._batch_at(key.epoch, key.batch)
        self._session.group.reassign(batch)
        self._session.group.stepper.run(batch, key.step, Signals(session=flags, goes_on=bool(batch.goes_on)))

    def _batch_at(self, epoch: int, number: int) -> Batch:
        """This worker's share of a batch, as the batches are divided now."""
        batch = self._feed.at(epoch, number) if self._feed is not None else None
        if batch is None:
            raise ConfigurationError(
                f"batch {number} of epoch {epoch} is stepped outside the loop over batches(...) that yielded it: step each batch "
                "before the loop ends"
            )
        return batch

    def _settled(self, batch: Batch, result: StepResult, told: Sequence[Signals]) -> Batch:
        """*collective*. A batch of streams with what is known of it after its step."""
        if batch.goes_on is None:
            return batch
        go_on = [signals.goes_on for signals in told]
        ends = not (all(go_on) if batch.drops_last else any(go_on))
        number = batch.number + 1
        if number % _EXCHANGE_EVERY == 0 or number & (number - 1) == 0:
            # A worker's streams are to be resumed also when it is not there any more.
            exchange = self._local.positions.exchange
            self._session.perform("exchange positions", lambda: exchange(self._session.collective), edits=False)
        return dataclasses.replace(batch, of=number if ends else 0, samples=result.samples)

    def _signals(self, batch: Batch) -> Signals:
        stop, flags = self._session.signals(int(self.stop.requested or 0) if self.stop is not None else 0)
        return self._run.signals(stop)._replace(
            seconds=self._run.record.phases_s,
            work_s=self._session.group.stepper.work_s,
            troubles=self._troubles,
            session=flags,
            goes_on=bool(batch.goes_on),
        )

    def balance(self, block: TimingBlock) -> Sequence[Span] | None:
        """*local*, alike on all workers. Everybody's microbatches from the next batch on, if they change.

        Args:
            block: Where everybody's time went in the last steps.
        """
        self._troubles = self._machine.troubles()
        if self._feed is None or not self._feed.can_move:
            return None
        moved = self._session.group.balance.add(block)
        if moved is not None:
            self._feed.reassign(moved)
        return moved

    def rebuild(self) -> None:
        """*local*. Others take part from now on: what is loaded ahead is not this worker's share any more."""
        if self._feed is not None:
            self._feed.drop()
