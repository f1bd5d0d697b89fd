"""The loop over the data: which batch is next, what the others are told along with it, and who computes how much of it."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from unisono.data.batch import Batch
from unisono.data.batches import BatchStream, Feed, following
from unisono.data.epochs import Remembered
from unisono.data.loader import Loader, dataset_length, read_sample
from unisono.errors import ConfigurationError
from unisono.guard.data import check_same_data, probe
from unisono.guard.stragglers import HostMonitor, TimingBlock
from unisono.order import OrderLike, make_order
from unisono.system.signals import StopRequest
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
        self._feed: Feed | None = None
        self._arguments: list[str] = []
        self._steps: int | None = None
        self.stop: StopRequest | None = None

    # ------------------------------------------------------------------ the data

    def order(self, dataset: Any, order: OrderLike, *, drop_last: bool, epochs: int, steps: int | None) -> Remembered:
        """*collective*. Which samples are in which batch, and whether that is how the run began.

        Args:
            steps: Of the whole run, if it ends with these rather than with epochs.

        Raises:
            ConfigurationError: It is not, and the run has stopped in the middle of an epoch; or workers were given other data.
        """
        length, self._steps = dataset_length(dataset), steps
        data = _described(length, order, drop_last=drop_last)
        if self._session.can_change:
            self._arguments = self.arguments(dataset, order, drop_last=drop_last, epochs=epochs, steps=steps)
        settings = self._settings
        made = Remembered(
            make_order(order, length=length, batch_size=settings.batch_size, seed=settings.seed, drop_last=drop_last)
        )
        done = self.is_done(epochs)

        def compare() -> None:
            check_alike(self._session.collective, {**data, "epochs": epochs, "steps": steps})
            if not done:
                self._run.prepare()

        if not self._session.is_midway:  # else the others have compared this already
            self._session.perform("compare the data", compare)
        self._run.goes_over(data, done=done)
        if not done:
            self._run.recall(made)
        return made

    def arguments(self, dataset: Any, order: OrderLike, *, drop_last: bool, epochs: int, steps: int | None) -> list[str]:
        """*local*. What all workers in a loop must have alike, also those that join it: data and arguments."""
        length = dataset_length(dataset)
        read = functools.partial(read_sample, dataset, seed=self._settings.seed)
        described = {**_described(length, order, drop_last=drop_last), "epochs": epochs, "steps": steps}
        return [*probe(read, length), json.dumps(described)]

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

    def planned(self, samples: Remembered, epochs: int) -> tuple[int, int]:
        """*local*. Steps and epochs of the whole run, as far as can be said."""
        position = self._run.position
        each = samples.epoch(min(position.epoch, epochs - 1)).batches
        first = position.step - position.batch
        if self._steps is not None:
            return self._steps, position.epoch + -(-(self._steps - first) // max(1, each))
        return first + max(0, epochs - position.epoch) * each, epochs

    # ------------------------------------------------------------------ batch after batch

    def batches(self, dataset: Any, samples: Remembered, epochs: int, loader: Loader, *, own_loop: bool) -> Generator[Batch]:
        """*collective*. Those that are still to be trained; each is to be stepped before the next one.

        Args:
            own_loop: Whether a user's own code runs between steps.
        """
        if self.is_done(epochs):
            self._run.complete(epochs, self._steps)
            return
        local, session = self._local, self._session
        self._begin()
        data = EpochData(dataset, samples, loader, self._settings.seed)
        self._run.goes_into(data, joins=session.is_midway)
        local.replica.check_unchanged()
        local.clock.at(self._run.position.step + 1)
        planned = self.planned(samples, epochs)
        self._run.begin_log(epochs=planned[1], steps=planned[0])
        feed = self._feed = Feed(lambda: self._stream(dataset, samples, loader), epochs)
        with only_loop(), session.training(), StopRequest() as self.stop, local.weights.in_common(self.may_share(own_loop)):
            try:
                self._begin_steps(dataset, redoable=self._may_redo(own_loop))
                yield from self._observer.around_batches(self._in_order(feed, own_loop=own_loop))
                session.end_steps()  # while batches can be had again
            finally:
                self.stop = None
                feed.drop()
                self._feed = None
                self._run.end_log()
        self._run.finish()

    def _in_order(self, feed: Feed, *, own_loop: bool) -> Iterator[Batch]:
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
            batch = feed.at(*following(batch))

    def _check_mode(self, own_loop: bool) -> None:
        if own_loop and self._local.replica.is_resting and self._run.is_main:
            warnings.warn(
                "the model is in evaluation mode (from_pretrained returns it so): it trains without dropout, and BatchNorm with "
                "the statistics that it has. In a loop of your own call model.train() first; fit does it by itself",
                stacklevel=4,
            )

    def _begin_steps(self, dataset: Any, *, redoable: bool) -> None:
        if self._session.enter_steps():
            return  # the others are in the middle of it
        length = dataset_length(dataset)
        read = functools.partial(read_sample, dataset, seed=self._settings.seed)

        def begin() -> None:
            check_same_data(read, length, self._session.collective)
            weights = self._local.weights
            weights.bind(self._session.collective, share=weights.wanted and not self._session.group.reduction.replicates)
            self._session.begin_steps(self._arguments, redoable=redoable)

        self._session.perform("begin a loop", begin)

    def _stream(self, dataset: Any, samples: Remembered, loader: Loader) -> BatchStream:
        group, settings = self._session.group, self._settings
        return BatchStream(
            dataset,
            samples,
            ranges=group.balance.ranges,
            rank=group.collective.rank,
            batch_size=settings.batch_size,
            microbatches=settings.microbatches,
            loader=loader,
            seed=settings.seed,
            device=self._local.replica.device,
            clock=self._local.clock,
            timeout_s=settings.timeout_s,
            made_for=group.token,
        )

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
        return self._session.group.stepper.run(batch, step, self._signals())

    def take_together(self, batch: Batch, step: int) -> Taken:
        """*collective*. The same as an operation of the session: the result may be what another worker has computed."""
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
        return taken

    def redo(self, key: StepKey, flags: int) -> None:
        """*collective*. Takes a step again that has been taken before.

        Args:
            flags: Of the session, for the others.
        """
        batch = self._batch_at(key.epoch, key.batch)
        self._session.group.reassign(batch)
        self._session.group.stepper.run(batch, key.step, Signals(session=flags))

    def _batch_at(self, epoch: int, number: int) -> Batch:
        """This worker's share of a batch, as the batches are divided now."""
        batch = self._feed.at(epoch, number) if self._feed is not None else None
        if batch is None:
            raise ConfigurationError(
                f"batch {number} of epoch {epoch} is stepped outside the loop over batches(...) that yielded it: step each batch "
                "before the loop ends"
            )
        return batch

    def _signals(self) -> Signals:
        stop, flags = self._session.signals(int(self.stop.requested or 0) if self.stop is not None else 0)
        return self._run.signals(stop)._replace(
            seconds=self._run.record.phases_s,
            work_s=self._session.group.stepper.work_s,
            troubles=self._troubles,
            session=flags,
        )

    def balance(self, block: TimingBlock) -> Sequence[Span] | None:
        """*local*, alike on all workers. Everybody's microbatches from the next batch on, if they change.

        Args:
            block: Where everybody's time went in the last steps.
        """
        self._troubles = self._machine.troubles()
        if self._feed is None:
            return None
        moved = self._session.group.balance.add(block)
        if moved is not None:
            self._feed.reassign(moved)
        return moved

    def rebuild(self) -> None:
        """*local*. Others take part from now on: what is loaded ahead is not this worker's share any more."""
        if self._feed is not None:
            self._feed.drop()


def _described(samples: int, order: OrderLike, *, drop_last: bool) -> dict[str, Any]:
    return {"samples": samples, "order": order if isinstance(order, str) else "given", "drop_last": drop_last}
