"""The global batches of a run, as one worker sees them: its own microbatches of each, loaded ahead."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from unisono.data.batch import Batch
from unisono.data.epochs import Copies, EpochFollowers
from unisono.data.loader import Loader, Request, load
from unisono.guard.ledger import Entry, entries, order_sums
from unisono.observe.timing import StepClock
from unisono.order import Epoch, Indices, Order, Permutation, derive_seed, microbatch_bounds
from unisono.replica.base import Microbatch
from unisono.replica.randomness import seed_generators
from unisono.tree import Span

_BLOCK = 4096
"""Samples that are looked ahead for, if batches are smaller."""
_Key = tuple[int, int, int]
"""A microbatch: epoch, number of the batch, number of the microbatch."""


@dataclasses.dataclass(frozen=True)
class _Outline:
    """A batch that was planned, but not given yet."""

    batch: Batch
    indices: Indices
    """Of all its samples."""
    bounds: Sequence[tuple[int, int]]
    """Where each microbatch lies among them."""
    own: Span
    """The microbatches that were this worker's when it was planned."""
    tally: Entry
    """The ledger's entry of their samples."""

    def samples(self, microbatch: int) -> Indices:
        return self.indices[slice(*self.bounds[microbatch])]


class BatchStream:
    """Yields batches from a position in the data to the end of the last epoch. *Local.*

    Args:
        dataset: Map-style dataset.
        order: Which samples are in which batch.
        ranges: Each worker's microbatches.
        rank: This worker.
        batch_size: Samples of a global batch.
        microbatches: M.
        loader: How samples are loaded.
        seed: The run's seed.
        device: Where they will go.
        clock: Told how long loading took.
        timeout_s: How long to wait for loader processes, in seconds.
        made_for: What the batches say of the team that they are divided among.
    """

    def __init__(
        self,
        dataset: Any,
        order: Order,
        *,
        ranges: Sequence[Span],
        rank: int,
        batch_size: int,
        microbatches: int,
        loader: Loader,
        seed: int,
        device: torch.device,
        clock: StepClock,
        timeout_s: float,
        made_for: object = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._made_for = made_for
        self._dataset = dataset
        self._order = order
        self._ranges = tuple(ranges)
        self._rank = rank
        self._batch_size = batch_size
        self._microbatches = microbatches
        self._loader = loader
        self._seed = seed
        self._device = device
        self._clock = clock
        self._weights = Permutation(2**62, derive_seed("order sums")).at(np.arange(batch_size)).astype(np.uint64)
        self._requests = _Requests(iter(()))

    def reassign(self, ranges: Sequence[Span]) -> None:
        """From the next batch on these are each worker's microbatches. Loader processes go on, and what they have loaded ahead
        is used, as far as it is still this worker's."""
        self._ranges = tuple(ranges)
        self._requests.reassign(range(*ranges[self._rank]))

    def batches(self, epoch: int, number: int, epochs: int) -> Iterator[Batch]:
        """From batch ``number`` of ``epoch`` to the end of epoch ``epochs`` - 1, prefetching across both."""
        self._requests = requests = _Requests(self._plan(epoch, number, epochs))
        requests.reassign(range(*self._ranges[self._rank]))
        loaded = self._load(requests)
        processes = self._loader.num_workers
        copies = Copies(self._dataset, processes)
        # Loader processes tell their copies. (Without them each microbatch is read here, when it is asked for.)
        followers = EpochFollowers(*((self._dataset, self._loader.collate_fn) if processes else ()))
        while True:
            with self._clock.phase("data"):
                outline = requests.next_outline()
                if outline is None:
                    break
                copies.check()
                followers.set_epoch(outline.batch.epoch)
                parts: list[Microbatch] = []
                for key in requests.wanted(outline):
                    while not requests.has(key):
                        try:
                            microbatch = next(loaded)
                        except StopIteration:
                            # The loader was at the end of the data, when this worker got more of it.
                            loaded = self._load(requests)
                            microbatch = next(loaded)
                        requests.take(microbatch)
                    parts.append(Microbatch(key[2], outline.samples(key[2]), requests.hand_out(key)))
                batch = self._batch(outline, tuple(parts))
            # Reading samples seeds, too. What the user's loop draws must not depend on which ones this worker has read.
            seed_generators(derive_seed("batch", self._seed, batch.epoch, batch.number), self._device)
            yield batch

    def _batch(self, outline: _Outline, parts: tuple[Microbatch, ...]) -> Batch:
        tally = (parts, outline.tally) if outline.own == self._ranges[self._rank] else None
        return dataclasses.replace(outline.batch, parts=parts, ranges=self._ranges, tally=tally)

    def _load(self, requests: Iterator[Request]) -> Iterator[Any]:
        return load(self._dataset, requests, self._loader, seed=self._seed, device=self._device, timeout_s=self._timeout_s)

    def _plan(self, epoch: int, number: int, epochs: int) -> Iterator[_Outline]:
        for current in range(epoch, epochs):
            plan = self._order.epoch(current)
            first = number if current == epoch else 0
            while first < plan.batches:
                block = self._block(plan, current, first)
                yield from block
                first += len(block)

    def _block(self, plan: Epoch, epoch: int, first: int) -> list[_Outline]:
        """The next batches, of a few thousand samples together: what is reckoned of each costs less if it is done for all."""
        numbers = range(first, min(plan.batches, first + max(1, _BLOCK // self._batch_size)))
        batches = [plan.batch(k) for k in numbers]
        bounds = [microbatch_bounds(len(indices), self._batch_size, self._microbatches) for indices in batches]
        own = self._ranges[self._rank]
        orders, ledgers, tallies = self._accounts(batches, [(cuts[own[0]][0], cuts[own[1] - 1][1]) for cuts in bounds])
        block: list[_Outline] = []
        for at, (k, indices, cuts) in enumerate(zip(numbers, batches, bounds, strict=True)):
            batch = Batch(
                epoch=epoch,
                number=k,
                of=plan.batches,
                samples=len(indices),
                filled=sum(hi > lo for lo, hi in cuts),
                parts=(),
                digest=_placed(orders[at], epoch, k, plan.batches),
                ledger=ledgers[at],
                made_for=self._made_for,
            )
            block.append(_Outline(batch, indices, cuts, own, tallies[at]))
        return block

    def _accounts(self, batches: Sequence[Indices], own: Sequence[Span]) -> tuple[list[int], list[Entry], list[Entry]]:
        """What tells each batch's order, and the ledger's entries of the whole and of this worker's samples.

        Args:
            own: Where these lie among the batch's samples.
        """
        samples = np.concatenate(batches)
        spans = np.array([(0, len(indices), *span) for indices, span in zip(batches, own, strict=True)])
        sizes = spans[:, 1]
        starts = np.cumsum(sizes) - sizes
        found = entries(samples, (starts[:, None] + spans).reshape(-1, 2))
        return order_sums(samples, starts, self._weights), found[::2], found[1::2]


class _Requests(Iterator[Request]):
    """What to load, in order. A loader takes from it ahead of the batches; it may go on after it has stopped, if this worker
    gets more microbatches of batches that were planned already.

    Args:
        plan: The batches that follow.
    """

    def __init__(self, plan: Iterator[_Outline]) -> None:
        self._plan = plan
        self._own = range(0)
        self._outlines: deque[_Outline] = deque()  # planned, not given yet
        self._queue: deque[tuple[_Key, Request]] = deque()  # not asked for yet
        self._asked: deque[_Key] = deque()  # the loader's answers come in this order
        self._loaded: dict[_Key, Any] = {}

    def __next__(self) -> Request:
        while not self._queue:
            if not self._plan_more():
                raise StopIteration
        key, request = self._queue.popleft()
        self._asked.append(key)
        return request

    def reassign(self, own: range) -> None:
        """From the next batch on this worker has the microbatches ``own``."""
        self._own = own
        self._loaded = {key: data for key, data in self._loaded.items() if key[2] in own}
        self._queue.clear()
        there = {*self._asked, *self._loaded}
        for outline in self._outlines:
            self._ask(outline, there)

    def next_outline(self) -> _Outline | None:
        """The next batch; None after the last one."""
        return self._outlines.popleft() if self._outlines or self._plan_more() else None

    def wanted(self, outline: _Outline) -> list[_Key]:
        """This worker's microbatches of a batch that hold samples."""
        return [(outline.batch.epoch, outline.batch.number, m) for m in self._own if m < outline.batch.filled]

    def has(self, key: _Key) -> bool:
        """Whether this microbatch has been loaded."""
        return key in self._loaded

    def take(self, data: Any) -> None:
        """Keeps the next microbatch that was loaded, if this worker still has it."""
        key = self._asked.popleft()
        if key[2] in self._own:
            self._loaded[key] = data

    def hand_out(self, key: _Key) -> Any:
        """What this microbatch is, once."""
        return self._loaded.pop(key)

    def _plan_more(self) -> bool:
        outline = next(self._plan, None)
        if outline is None:
            return False
        self._outlines.append(outline)
        self._ask(outline, ())
        return True

    def _ask(self, outline: _Outline, there: Collection[_Key]) -> None:
        for key in self.wanted(outline):
            if key not in there:
                self._queue.append((key, Request(outline.batch.epoch, outline.samples(key[2]))))


class Feed:
    """Batches from any position, one after the other where that is what is asked for. *Local.*

    Args:
        stream: Makes a stream of this worker's share of now.
        epochs: Where the last epoch ends.
    """

    can_move = True  # any worker can read any sample

    def __init__(self, stream: Callable[[], BatchStream], epochs: int) -> None:
        self._make = stream
        self._stream: BatchStream | None = None
        self._epochs = epochs
        self._batches: Iterator[Batch] | None = None
        self._next = (-1, -1)

    def at(self, epoch: int, number: int) -> Batch | None:
        """Batch ``number`` of ``epoch``; None behind the last epoch."""
        if self._batches is None or self._next != (epoch, number):
            self.drop()
            self._stream = self._make()
            self._batches = self._stream.batches(epoch, number, self._epochs)
        batch = next(self._batches, None)
        if batch is not None:
            self._next = following(batch)
        return batch

    def reassign(self, ranges: Sequence[Span]) -> None:
        """From the next batch on these are each worker's microbatches."""
        if self._stream is not None:
            self._stream.reassign(ranges)

    def drop(self) -> None:
        """Forgets what has been loaded ahead: the share of this worker has changed, or nothing more is wanted."""
        if isinstance(self._batches, Generator):
            self._batches.close()
        self._batches = self._stream = None


def following(batch: Batch) -> tuple[int, int]:
    """Epoch and number of the batch after this one."""
    return (batch.epoch + 1, 0) if batch.number + 1 == batch.of else (batch.epoch, batch.number + 1)


def _placed(order: int, *position: int) -> int:
    """64 bits that tell batches of other samples, of another order, or at another place apart."""
    return (order + sum(weight * number for weight, number in zip(_PLACES, position, strict=True))) % 2**64


_PLACES = [derive_seed("place", number) | 1 for number in range(3)]
