"""The loop over the data: which batch is next, what the others are told along with it, and who computes how much of it."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch

from unisono.data.batch import Batch
from unisono.data.batches import BatchStream, Feed, following
from unisono.data.loader import Loader, dataset_length, read_sample
from unisono.elastic.call_log import CallLog
from unisono.elastic.link import Link
from unisono.elastic.session import ElasticSession
from unisono.errors import ConfigurationError
from unisono.guard.data import check_same_data, probe
from unisono.guard.stragglers import Block, Machine
from unisono.order import Order, OrderLike, make_order
from unisono.system.signals import StopRequest
from unisono.training.header import Signals
from unisono.training.observer import Observer
from unisono.training.run import Run
from unisono.training.setup import check_alike
from unisono.training.state import LocalState
from unisono.tree import Span


class Loop:
    """Goes through the data, call by call of ``fit`` or ``batches``.

    Args:
        equipment: What this worker trains with.
        batch_size: Samples of a global batch.
        microbatches: M.
        seed: The run's seed.
        device: Where batches go.
        timeout_s: How long to wait for loader processes, in seconds.
        edits_weights: Whether a callback may change weights: asked when a loop begins.
        machine: What this worker runs on.
        link: How workers meet again; None: they cannot.
        history: What the workers have done together.
        between: *collective*. What is due between two batches.
        observer: Sees the batches, and may end them.

    Attributes:
        team: Who takes the steps.
        run: How far they have come.
        stop: Whether a person asked to stop; None between loops.
    """

    team: ElasticSession
    run: Run

    def __init__(
        self,
        equipment: LocalState,
        *,
        batch_size: int,
        microbatches: int,
        seed: int,
        device: torch.device,
        timeout_s: float,
        edits_weights: Callable[[], bool],
        machine: Machine,
        link: Link | None,
        history: CallLog,
        between: Callable[[], None],
        observer: Observer,
    ) -> None:
        self._own = equipment
        self._batch_size, self._microbatches, self._seed = batch_size, microbatches, seed
        self._device, self._timeout_s = device, timeout_s
        self._edits_weights = edits_weights
        self._machine = machine
        self._troubles = machine.troubles()
        self._link = link
        self._history = history
        self._between, self._observer = between, observer
        self._feed: Feed | None = None
        self._call: list[str] = []
        self.stop: StopRequest | None = None

    # ------------------------------------------------------------------ the data

    def order(self, dataset: Any, order: OrderLike, *, drop_last: bool, epochs: int) -> Order:
        """*collective*. Which samples are in which batch, and whether that is how the run began.

        Raises:
            ConfigurationError: It is not, and the run has stopped in the middle of an epoch; or workers were given other data.
        """
        length = dataset_length(dataset)
        data = _described(length, order, drop_last=drop_last)
        if self._link is not None:
            self._call = self.call(dataset, order, drop_last=drop_last, epochs=epochs)
        made = make_order(order, length=length, batch_size=self._batch_size, seed=self._seed, drop_last=drop_last)
        done = self.is_done(epochs)

        def act() -> None:
            check_alike(self.team.collective, {**data, "epochs": epochs})
            if not done:
                self.run.prepare()

        if not self._history.just_joined:  # the others have compared this already
            self.team.act(act)
        self.run.goes_over(data, done=done)
        return made

    def call(self, dataset: Any, order: OrderLike, *, drop_last: bool, epochs: int) -> list[str]:
        """*local*. What all workers in a call must have alike, whoever comes later: data and arguments."""
        length = dataset_length(dataset)
        read = functools.partial(read_sample, dataset, seed=self._seed)
        arguments = {**_described(length, order, drop_last=drop_last), "epochs": epochs}
        return [*probe(read, length), json.dumps(arguments)]

    def is_done(self, epochs: int) -> bool:
        """*local*. Whether so many epochs of the whole run are behind it."""
        if epochs < 1:
            raise ConfigurationError(f"epochs must be 1 or more, got {epochs}")
        # Whoever joined the others in their last step ends the call as they do.
        return self.run.position.epoch >= epochs and not self._history.just_joined

    def planned(self, samples: Order, epochs: int) -> int:
        """*local*. Steps of the whole run, as far as can be said."""
        position = self.run.position
        each = samples.epoch(min(position.epoch, epochs - 1)).batches
        return position.step + max(0, epochs - position.epoch) * each - position.batch

    # ------------------------------------------------------------------ batch after batch

    def batches(self, dataset: Any, samples: Order, epochs: int, loader: Loader, *, own_loop: bool) -> Generator[Batch]:
        """*collective*. Those that are still to be trained; each is to be stepped before the next one.

        Args:
            own_loop: Whether a user's own code runs between steps.
        """
        if self.is_done(epochs):
            self.run.complete(epochs)
            return
        self._own.replica.check_unchanged()
        self._own.clock.at(self.run.position.step + 1)
        self.run.begin_log(epochs=epochs, steps=self.planned(samples, epochs))
        feed = self._feed = Feed(lambda: self._stream(dataset, samples, loader), epochs)
        self._trains(True)
        with StopRequest() as self.stop, self._own.weights.in_common(self.may_share(own_loop)):
            try:
                self._begin_steps(dataset, replay=self._may_repeat(own_loop))
                yield from self._observer.around_batches(self._in_order(feed))
                self.team.end()  # while batches can be had again
            finally:
                self.stop = None
                feed.drop()
                self._feed = None
                self.run.end_log()
        self._trains(False)
        self.run.finish()

    def _in_order(self, feed: Feed) -> Iterator[Batch]:
        batch = feed.at(self.run.position.epoch, self.run.position.batch)
        while batch is not None:
            yield batch
            self._between()
            batch = feed.at(*following(batch))

    def _trains(self, whether: bool) -> None:
        if self._link is not None:
            self._link.trains = whether

    def _begin_steps(self, dataset: Any, *, replay: bool) -> None:
        if self._history.just_joined:
            self._history.just_joined = False
            return  # the others are in the middle of it
        length = dataset_length(dataset)
        read = functools.partial(read_sample, dataset, seed=self._seed)

        def act() -> None:
            check_same_data(read, length, self.team.collective)
            self.team.begin(replay=replay)

        self.team.act(act)
        if self._link is not None:
            self._history.begin_loop(self._call, main=self.team.collective.rank == 0)

    def _stream(self, dataset: Any, samples: Order, loader: Loader) -> BatchStream:
        crew = self.team.crew
        return BatchStream(
            dataset,
            samples,
            ranges=crew.balance.ranges,
            rank=crew.collective.rank,
            batch_size=self._batch_size,
            microbatches=self._microbatches,
            loader=loader,
            seed=self._seed,
            device=self._device,
            clock=self._own.clock,
            timeout_s=self._timeout_s,
            made_for=crew.token,
        )

    def batch_at(self, epoch: int, number: int) -> Batch:
        """*local*. This worker's share of a batch, as the batches are divided now.

        Raises:
            ConfigurationError: No loop is under way.
        """
        batch = self._feed.at(epoch, number) if self._feed is not None else None
        if batch is None:
            raise ConfigurationError(
                f"batch {number} of epoch {epoch} is stepped outside the loop over batches(...) that yielded it: step each batch "
                "before the loop ends"
            )
        return batch

    def may_share(self, own_loop: bool) -> bool:
        """*local*. Whether nobody but the trainer writes to the weights while it trains: then a host needs one copy of them."""
        share = self._own.sync.share_weights
        return share if share is not None else self._may_repeat(own_loop)

    def _may_repeat(self, own_loop: bool) -> bool:
        """Whether steps may be done again in between: nothing that a user has written would be left out then."""
        return not own_loop and not self._edits_weights()

    # ------------------------------------------------------------------ along with a step

    def signals(self) -> Signals:
        """*local*. What the others are told with the next step."""
        stop = int(self.stop.requested or 0) if self.stop is not None else 0
        # Whoever gets the signal alone is to leave; a stop of all is announced by the launcher first.
        leaves = stop == signal.SIGTERM and self._link is not None and self._link.ask("stop") is None
        if leaves:
            stop = 0
        return self.run.signals(stop)._replace(
            seconds=self.run.record.phases_s,
            work_s=self.team.crew.stepper.work_s,
            troubles=self._troubles,
            session=self.team.flags(leaves=leaves, admits=self.team.applicants()),
        )

    def balance(self, block: Block) -> tuple[Span, ...] | None:
        """*local*, alike on all workers. Everybody's microbatches from the next batch on, if they change.

        Args:
            block: Where everybody's time went in the last steps.
        """
        self._troubles = self._machine.troubles()
        if self._feed is None:
            return None
        moved = self.team.crew.balance.add(block)
        if moved is not None:
            self._feed.reassign(moved)
        return moved

    def regroup(self) -> None:
        """*local*. Others take part from now on: what is loaded ahead is not this worker's share any more."""
        if self._feed is not None:
            self._feed.drop()


def _described(samples: int, order: OrderLike, *, drop_last: bool) -> dict[str, Any]:
    return {"samples": samples, "order": order if isinstance(order, str) else "given", "drop_last": drop_last}
