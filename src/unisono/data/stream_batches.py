"""Global batches from streams: this worker's microbatches of each, and where their streams can be resumed. *Local.*"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from unisono.checkpoint.message import from_bytes, to_bytes
from unisono.collective import Collective
from unisono.data.batch import Batch
from unisono.data.epochs import EpochFollowers
from unisono.data.loader import Loader, failure, load_with, one_thread
from unisono.data.streams import Lane, StreamPlan
from unisono.errors import DataError
from unisono.guard.ledger import entry, total
from unisono.observe.timing import StepClock
from unisono.order import derive_seed
from unisono.replica.base import Microbatch
from unisono.replica.randomness import seed_generators
from unisono.system.output import say
from unisono.tree import Span

_Share = tuple[Sequence[Span], int, object]
"""Each worker's microbatches, this worker's rank, and what the batches say of the team that they are divided among."""


class Positions:
    """From where streams can be resumed: what they were before some batches, by microbatch.

    Attributes:
        told: Microbatches of which all workers have known that since their last exchange.
    """

    def __init__(self) -> None:
        self.told: set[int] = set()
        self._data: object = None
        self._known: dict[int, dict[tuple[int, int], Any]] = {}
        self._own: dict[int, tuple[int, int]] = {}

    def begin(self, data: object) -> None:
        """Streams of ``data`` follow: what is known of others does not help."""
        if self._data not in (None, data):
            self.__init__()  # type: ignore[misc]
        self._data = data

    def note(self, microbatch: int, epoch: int, number: int, start: Any) -> None:
        """The streams were there before batch ``number`` of ``epoch``, as this worker has seen."""
        self._own[microbatch] = (epoch, number)
        self._keep(microbatch, epoch, number, start)

    def _keep(self, microbatch: int, epoch: int, number: int, start: Any) -> None:
        known = self._known.setdefault(microbatch, {})
        known[epoch, number] = start
        # Steps may be taken again from further back: of those that are about as old, the oldest is kept.
        spread = {(number - older).bit_length(): older for at, older in sorted(known, reverse=True) if at == epoch}
        self._known[microbatch] = {(epoch, older): known[epoch, older] for older in spread.values() if older <= number}

    def before(self, microbatch: int, epoch: int, number: int) -> tuple[int, Any]:
        """The last batch up to ``number`` before which it is known where the streams were, and where that is; (0, None): none."""
        known = self._known.get(microbatch, {})
        found = max((at for one, at in known if one == epoch and at <= number), default=0)
        return found, known.get((epoch, found))

    def describe(self) -> dict[int, Any]:
        """The newest of what this worker has seen, for a checkpoint or for the others."""
        return {m: [*at, self._known[m][at]] for m, at in self._own.items() if at in self._known[m]}

    def adopt(self, *described: Mapping[int, Any]) -> None:
        """Takes over what other workers have seen."""
        self.told = {microbatch for one in described for microbatch in one}
        for microbatch, (epoch, number, start) in (item for one in described for item in one.items()):
            if (epoch, number) > max(self._known.get(microbatch, ()), default=(-1, -1)):
                self._keep(microbatch, epoch, number, start)

    def exchange(self, collective: Collective) -> None:
        """*collective*. What one worker has seen, all know."""
        self.adopt(*map(from_bytes, collective.all_gather_bytes(to_bytes(self.describe()))))


@dataclasses.dataclass(frozen=True)
class _Request:
    """A microbatch, and where its streams can be resumed if nobody has them open."""

    epoch: int
    number: int
    microbatch: int
    start: tuple[int, Any]


@dataclasses.dataclass(frozen=True)
class _Loaded:
    data: Any
    numbers: npt.NDArray[np.int64]
    goes_on: bool
    start: Any
    forward: tuple[int, float]
    """Batches that were read only to come to this one, from the beginning, and seconds that it took."""


class _StreamFetcher(Dataset[Any]):
    """A data set of microbatches, which keeps their streams open."""

    def __init__(self, plan: StreamPlan, collate_fn: Callable[[list[Any]], Any]) -> None:
        self._plan, self._collate = plan, collate_fn
        self._followers = EpochFollowers(plan.streams.open, collate_fn)
        self._lanes: dict[int, Lane] = {}

    def keep(self, microbatches: range) -> None:
        """Closes the streams of all others."""
        self._lanes = {m: lane for m, lane in self._lanes.items() if m in microbatches}

    def __getitem__(self, request: _Request | None) -> Any:
        if request is None:
            return None
        lane: Lane | None = self._lanes.get(request.microbatch)
        where = f"stream {request.microbatch} of {self._plan.count}"
        with one_thread():
            try:
                forward = (0, 0.0)
                if lane is None or (lane.epoch, lane.number) != (request.epoch, request.number):
                    self._lanes.pop(request.microbatch, None)
                    self._followers.set_epoch(request.epoch)
                    number, start = request.start
                    began = time.monotonic()
                    lane = Lane(self._plan, request.microbatch, request.epoch, number, start)
                    self._lanes[request.microbatch] = lane
                    while lane.number < request.number:
                        lane.take()
                    forward = (request.number if start is None else 0, time.monotonic() - began)
                part = lane.take()
            except Exception as error:
                return failure(error, None, f"{where if lane is None else lane.where}: the next sample could not be read")
            short = not part.samples or (self._plan.drop_last and len(part.samples) < self._plan.size(request.microbatch))
            if request.number == 0 and short:
                return failure(DataError(_ended_at_once(where, len(part.samples), self._plan)), None, "")
            seed_generators(derive_seed("collate", self._plan.seed, request.epoch, request.number, request.microbatch))
            try:
                data = self._collate(part.samples) if part.samples else None
            except Exception as error:
                return failure(error, None, f"{lane.where}: samples could not be collated into a microbatch")
        return _Loaded(data, part.numbers, part.goes_on, part.start, forward)


def _ended_at_once(where: str, samples: int, plan: StreamPlan) -> str:
    short = f"gave {samples} samples, fewer than the {plan.batch_size // plan.microbatches} of a microbatch (drop_last=True)"
    return (
        f"{where} {short if samples else 'ended at once'}. Each of the {plan.count} streams needs samples: write the data into "
        "as many files (shards) as there are streams, divide by sample instead (each count-th one), or lower microbatches"
    )


class StreamFeed:
    """Batches of streams from any position, one after the other where that is what is asked for.

    Args:
        plan: Which streams, and how they are cut.
        share: Says what is this worker's share of now.
        positions: Where streams can be resumed.
        epochs: Where the last epoch ends.
        loader: How samples are loaded.
        device: Where they will go.
        clock: Told how long loading took.
        timeout_s: How long to wait for loader processes, in seconds.
    """

    def __init__(
        self,
        plan: StreamPlan,
        share: Callable[[], _Share],
        positions: Positions,
        *,
        epochs: int,
        loader: Loader,
        device: torch.device,
        clock: StepClock,
        timeout_s: float,
    ) -> None:
        self._plan, self._share, self._positions, self._epochs = plan, share, positions, epochs
        self._loader, self._device, self._clock, self._timeout_s = loader, device, clock, timeout_s
        self._fetcher = _StreamFetcher(plan, loader.collate_fn)
        self._loaded: Any = None
        self._next = (-1, -1)
        self._ranges: Sequence[Span] = ()
        self._own = range(0)
        self._team: object = None
        self._has_told = False

    def at(self, epoch: int, number: int) -> Batch | None:
        """Batch ``number`` of ``epoch``; None behind the last epoch."""
        if epoch >= self._epochs:
            return None
        with self._clock.phase("data"):
            if self._loaded is None or self._next != (epoch, number):
                self._begin(epoch, number)
            found = [(m, next(self._loaded)) for m in self._own]
            for _ in range(self._spare):
                next(self._loaded)
        self._next = (epoch, number + 1)
        self._tell_forward([loaded.forward for _, loaded in found])
        for m, loaded in found:
            if loaded.start is not None:
                self._positions.note(m, epoch, number, loaded.start)
        batch = self._batch(epoch, number, found)
        # Reading samples seeds, too. What the user's loop draws must not depend on which ones this worker has read.
        seed_generators(derive_seed("batch", self._plan.seed, epoch, number), self._device)
        return batch

    def _batch(self, epoch: int, number: int, found: Sequence[tuple[int, _Loaded]]) -> Batch:
        parts = tuple(Microbatch(m, loaded.numbers, loaded.data) for m, loaded in found if len(loaded.numbers))
        go_on = [loaded.goes_on for _, loaded in found]
        return Batch(
            epoch=epoch,
            number=number,
            of=0,
            samples=0,
            filled=self._plan.microbatches,
            parts=parts,
            digest=derive_seed("streams", epoch, number),
            tally=(parts, total(entry(part.indices) for part in parts)),
            ranges=self._ranges,
            made_for=self._team,
            goes_on=all(go_on) if self._plan.drop_last else any(go_on),
            drops_last=self._plan.drop_last,
        )

    @property
    def _spare(self) -> int:
        """Empty requests after each batch: loader processes take turns, and each is to have the same streams every time."""
        return -len(self._own) % max(1, self._loader.num_workers)

    def _begin(self, epoch: int, number: int) -> None:
        self.drop()
        self._ranges, rank, self._team = self._share()
        self._own = range(*self._ranges[rank])
        self._fetcher.keep(self._own)
        self._loaded = load_with(
            self._fetcher,
            self._requests(epoch, number),
            self._loader,
            seed=self._plan.seed,
            device=self._device,
            timeout_s=self._timeout_s,
        )

    def _requests(self, epoch: int, number: int) -> Iterator[_Request | None]:
        own, spare, first = self._own, self._spare, number
        while True:
            for m in own:
                yield _Request(epoch, number, m, self._positions.before(m, epoch, number) if number == first else (0, None))
            for _ in range(spare):
                yield None
            number += 1

    def _tell_forward(self, forward: Sequence[tuple[int, float]]) -> None:
        batches, seconds = max(batches for batches, _ in forward), sum(seconds for _, seconds in forward)
        if batches and not self._has_told:
            self._has_told = True
            say(
                f"the streams were read forward over {batches:,} batches in {seconds:.1f} s, since their iterators have no "
                "state_dict() and load_state_dict() by which they could be resumed at once"
            )

    @property
    def can_move(self) -> bool:
        """Whether another worker can go on with a microbatch at once; the same on all workers."""
        return len(self._positions.told) == self._plan.microbatches

    def reassign(self, ranges: Sequence[Span]) -> None:
        """From the next batch on these are each worker's microbatches: what is loaded ahead is not this worker's any more."""
        self.drop()

    def drop(self) -> None:
        """Forgets what has been loaded ahead."""
        if self._loaded is not None:
            self._loaded.close()
        self._loaded = None
