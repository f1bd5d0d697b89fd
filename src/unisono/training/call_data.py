"""What a call of ``fit`` or ``batches`` goes over: samples that are read by number, or streams. *Local* but for ``check``."""

from __future__ import annotations

import abc
import functools
import json
from collections.abc import Callable
from typing import Any

from unisono.collective import Collective
from unisono.data.batches import BatchStream, Feed
from unisono.data.epochs import EpochFollowers, Remembered, kept_attributes
from unisono.data.loader import Loader, dataset_length, read_sample
from unisono.data.stream_batches import StreamFeed
from unisono.data.streams import StreamPlan, Streams, streams_of
from unisono.errors import ConfigurationError, DataError
from unisono.guard.data import check_same_data, content_digest, probe
from unisono.order import OrderLike, make_order
from unisono.replica.randomness import kept_generators
from unisono.training.session import Session
from unisono.training.settings import Settings
from unisono.training.state import LocalState

_PROBED = 4
"""Samples at the beginning of a stream by which it is known."""


class CallData(abc.ABC):
    """See the module.

    Attributes:
        described: What all workers must have alike, and a run that goes on.
        length: How many samples or streams ``reader`` reads.
        followed: What is told of epochs.
    """

    described: dict[str, Any]
    length: int
    followed: Any

    @abc.abstractmethod
    def reader(self, epoch: int) -> Callable[[int], Any]:
        """Gives a sample by its number, or the beginning of a stream, to compare with what others read there."""

    @abc.abstractmethod
    def digest(self, epoch: int) -> str:
        """Of the order of an epoch; "" where that follows from ``described``."""

    @abc.abstractmethod
    def steps_of(self, epoch: int) -> int | None:
        """Batches of an epoch; None: nobody knows before its end."""

    @abc.abstractmethod
    def feed(self, session: Session, local: LocalState, settings: Settings, loader: Loader, epochs: int) -> Feed | StreamFeed:
        """This worker's share of the batches."""

    def probed(self, epoch: int = 0) -> list[str]:
        """What tells these data from others, as far as one worker can say."""
        return probe(self.reader(epoch), self.length)

    def check(self, collective: Collective) -> None:
        """*collective*. Whether all workers have the same."""
        check_same_data(self.reader(0), self.length, collective)


class NumberedData(CallData):
    """A map-style data set, and the order of its samples."""

    def __init__(self, dataset: Any, order: OrderLike, *, drop_last: bool, settings: Settings) -> None:
        self.length, self.followed = dataset_length(dataset), dataset
        self._dataset, self._given, self._drop_last, self._settings = dataset, order, drop_last, settings
        kind = order if isinstance(order, str) else "given"
        self.described = {"samples": self.length, "order": kind, "drop_last": drop_last}

    @functools.cached_property
    def _order(self) -> Remembered:
        settings = self._settings
        return Remembered(
            make_order(
                self._given,
                length=self.length,
                batch_size=settings.batch_size,
                seed=settings.seed,
                drop_last=self._drop_last,
            )
        )

    def reader(self, epoch: int) -> Callable[[int], Any]:
        return functools.partial(read_sample, self._dataset, seed=self._settings.seed)

    def digest(self, epoch: int) -> str:
        return self._order.digest(epoch)

    def steps_of(self, epoch: int) -> int | None:
        return self._order.epoch(epoch).batches

    def feed(self, session: Session, local: LocalState, settings: Settings, loader: Loader, epochs: int) -> Feed:
        def stream() -> BatchStream:
            group = session.group
            return BatchStream(
                self._dataset,
                self._order,
                ranges=group.balance.ranges,
                rank=group.collective.rank,
                batch_size=settings.batch_size,
                microbatches=settings.microbatches,
                loader=loader,
                seed=settings.seed,
                device=local.replica.device,
                clock=local.clock,
                timeout_s=settings.timeout_s,
                made_for=group.token,
            )

        return Feed(stream, epochs)


class StreamedData(CallData):
    """Streams, which have their own order."""

    def __init__(
        self, streams: Streams, order: OrderLike, *, drop_last: bool, settings: Settings, known: dict[tuple[int, int], list[str]]
    ) -> None:
        if not isinstance(order, str) or order not in ("shuffle", "sequential"):
            raise ConfigurationError(
                "order=... is of data sets that are read by number. The samples of a stream come in its own order, or shuffled "
                "in blocks: unisono.Streams(open, shuffle=10_000)"
            )
        self._plan = plan = StreamPlan(
            streams=streams,
            batch_size=settings.batch_size,
            microbatches=settings.microbatches,
            drop_last=drop_last,
            seed=settings.seed,
        )
        self.length, self.followed = plan.count, streams.open
        self.described = {"streams": plan.count, "shuffle": streams.shuffle, "order": "streams", "drop_last": drop_last}
        self._known = known

    def reader(self, epoch: int) -> Callable[[int], Any]:
        return lambda stream: self._beginning(stream, epoch)

    def _beginning(self, stream: int, epoch: int) -> list[str]:
        """Digests of its first samples: once, since it may take long to open it."""
        if (epoch, stream) not in self._known:
            with kept_generators(), kept_attributes(self.followed):
                EpochFollowers(self.followed).set_epoch(epoch)
                try:
                    samples = self._plan.beginning(stream, epoch, _PROBED)
                except Exception as error:
                    raise DataError(
                        f"the beginning of stream {stream} of {self.length} cannot be read: {type(error).__name__}: {error}"
                    ) from error
            self._known[epoch, stream] = [content_digest(sample) for sample in samples]
        return self._known[epoch, stream]

    def digest(self, epoch: int) -> str:
        return ""

    def steps_of(self, epoch: int) -> int | None:
        return None

    def feed(self, session: Session, local: LocalState, settings: Settings, loader: Loader, epochs: int) -> StreamFeed:
        local.positions.begin(str((self.described, self.probed())))
        return StreamFeed(
            self._plan,
            lambda: (session.group.balance.ranges, session.collective.rank, session.group.token),
            local.positions,
            epochs=epochs,
            loader=loader,
            device=local.replica.device,
            clock=local.clock,
            timeout_s=settings.timeout_s,
        )

    def check(self, collective: Collective) -> None:
        """*collective*. Also whether no two streams begin alike: such data do not divide themselves.

        Raises:
            ConfigurationError: Two do.
        """
        super().check(collective)
        mine = {}
        for stream in range(collective.rank, self.length, collective.size):
            try:
                mine[stream] = self._beginning(stream, 0)
            except TypeError:
                continue  # samples that cannot be compared
        told = [json.loads(text) for text in collective.all_gather_bytes(json.dumps(mine).encode())]
        seen: dict[str, str] = {}
        for stream, beginning in sorted((int(stream), found) for one in told for stream, found in one.items()):
            other = seen.setdefault(str(beginning), str(stream)) if beginning else str(stream)
            if other != str(stream):
                raise ConfigurationError(
                    f"streams {other} and {stream} of {self.length} begin with the same samples, so samples would be trained "
                    "several times: divide the data. An IterableDataset does it by torch.utils.data.get_worker_info(), whose id "
                    f"is the stream, 0 to {self.length - 1}, and num_workers {self.length}; unisono.Streams(open) by the "
                    "arguments of open(stream, of)"
                )


def call_data(
    dataset: Any, order: OrderLike, *, drop_last: bool, settings: Settings, known: dict[tuple[int, int], list[str]]
) -> CallData:
    """What a call goes over.

    Args:
        known: How its streams begin, by epoch and number, as far as they have been looked at.

    Raises:
        ConfigurationError: It cannot be trained on.
    """
    streams = streams_of(dataset)
    if streams is not None:
        return StreamedData(streams, order, drop_last=drop_last, settings=settings, known=known)
    return NumberedData(dataset, order, drop_last=drop_last, settings=settings)
