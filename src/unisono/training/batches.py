"""The global batches of a run, as one worker sees them: its own microbatches of each, loaded ahead."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Iterator
from hashlib import blake2b
from typing import Any

import torch

from unisono.guard.ledger import entry
from unisono.observe.timing import StepClock
from unisono.order import Indices, Order, derive_seed, microbatch_bounds
from unisono.training.loader import Loader, Request, load
from unisono.training.randomness import seed_generators
from unisono.training.step import Batch, Microbatch
from unisono.tree import Span


@dataclasses.dataclass(frozen=True)
class _Outline:
    """A batch whose microbatches are still being loaded."""

    batch: Batch
    parts: list[tuple[int, Indices]]


class BatchStream:
    """Yields batches from a position in the data to the end of the last epoch. *Local.*

    Args:
        dataset: Map-style dataset.
        order: Which samples are in which batch.
        own: This worker's microbatches.
        batch_size: Samples of a global batch.
        microbatches: M.
        loader: How samples are loaded.
        seed: The run's seed.
        device: Where they will go.
        clock: Told how long loading took.
    """

    def __init__(
        self,
        dataset: Any,
        order: Order,
        *,
        own: Span,
        batch_size: int,
        microbatches: int,
        loader: Loader,
        seed: int,
        device: torch.device,
        clock: StepClock,
    ) -> None:
        self._dataset = dataset
        self._order = order
        self._own = range(*own)
        self._batch_size = batch_size
        self._microbatches = microbatches
        self._loader = loader
        self._seed = seed
        self._device = device
        self._clock = clock

    def batches(self, epoch: int, number: int, epochs: int) -> Iterator[Batch]:
        """From batch ``number`` of ``epoch`` to the end of epoch ``epochs`` - 1, prefetching across both."""
        outlines: deque[_Outline] = deque()
        loaded = load(
            self._dataset,
            self._requests(epoch, number, epochs, outlines),
            self._loader,
            seed=self._seed,
            device=self._device,
        )
        done = False
        while not done:
            with self._clock.phase("data"):
                ready, done = self._next(loaded, outlines)
            for batch in ready:
                # Reading samples seeds, too. What the user's loop draws must not depend on which ones this worker has read.
                seed_generators(derive_seed("batch", self._seed, batch.epoch, batch.number), self._device)
                yield batch

    def _requests(self, epoch: int, number: int, epochs: int, outlines: deque[_Outline]) -> Iterator[Request]:
        """What to load, in order; it runs ahead of the batches, so their outlines queue up in ``outlines``."""
        for current in range(epoch, epochs):
            plan = self._order.epoch(current)
            for k in range(number if current == epoch else 0, plan.batches):
                indices = plan.batch(k)
                bounds = microbatch_bounds(len(indices), self._batch_size, self._microbatches)
                filled = sum(hi > lo for lo, hi in bounds)
                parts = [(m, indices[slice(*bounds[m])]) for m in self._own if m < filled]
                batch = Batch(
                    epoch=current,
                    number=k,
                    of=plan.batches,
                    samples=len(indices),
                    filled=filled,
                    parts=(),
                    span=(self._own.start, self._own.stop),
                    digest=_digest(indices, current, k, plan.batches),
                    ledger=entry(indices),
                )
                outlines.append(_Outline(batch, parts))
                for _, part in parts:
                    yield Request(current, part)

    def _next(self, loaded: Iterator[Any], outlines: deque[_Outline]) -> tuple[list[Batch], bool]:
        """The next batch, after those in which this worker has no microbatch; and whether that was the end."""
        first = next(loaded, _END)
        ready: list[Batch] = []
        while outlines and not outlines[0].parts:
            ready.append(outlines.popleft().batch)
        if first is _END:
            return ready, True
        outline = outlines.popleft()
        data = [first, *(next(loaded) for _ in outline.parts[1:])]
        parts = [Microbatch(m, indices, one) for (m, indices), one in zip(outline.parts, data, strict=True)]
        return [*ready, dataclasses.replace(outline.batch, parts=parts)], False


class Feed:
    """Batches from any position, one after the other where that is what is asked for. *Local.*

    Args:
        stream: Makes a stream of this worker's share of now.
        epochs: Where the last epoch ends.
    """

    def __init__(self, stream: Callable[[], BatchStream], epochs: int) -> None:
        self._stream = stream
        self._epochs = epochs
        self._batches: Iterator[Batch] | None = None
        self._next = (-1, -1)

    def at(self, epoch: int, number: int) -> Batch | None:
        """Batch ``number`` of ``epoch``; None behind the last epoch."""
        if self._batches is None or self._next != (epoch, number):
            self.drop()
            self._batches = self._stream().batches(epoch, number, self._epochs)
        batch = next(self._batches, None)
        if batch is not None:
            self._next = following(batch)
        return batch

    def drop(self) -> None:
        """Forgets what has been loaded ahead: the share of this worker has changed, or nothing more is wanted."""
        if isinstance(self._batches, Generator):
            self._batches.close()
        self._batches = None


def following(batch: Batch) -> tuple[int, int]:
    """Epoch and number of the batch after this one."""
    return (batch.epoch + 1, 0) if batch.number + 1 == batch.of else (batch.epoch, batch.number + 1)


def _digest(indices: Indices, *position: int) -> int:
    """64 bits that tell batches of other samples, or at another place, apart."""
    whole = blake2b(indices.tobytes(), digest_size=8).digest()
    return derive_seed(int.from_bytes(whole, "little"), *position)


_END = object()
