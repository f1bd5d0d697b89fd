"""Data that are read in sequence: M streams, one for each microbatch, whoever computes it. *Local.*

A stream is a function of its number and the epoch. So its position follows from the batch's number, and any worker can go on with
it: an iterator that keeps a state is set to it, any other is read forward.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import IterableDataset
from torch.utils.data._utils import worker

from unisono.checkpoint.format import snapshot
from unisono.errors import CheckpointError, ConfigurationError
from unisono.order import Permutation, derive_seed, microbatch_bounds
from unisono.replica.randomness import seed_generators

_END = object()
_MARK_SHARE = 0.01
"""The share of a stream's time that may go into asking for its state."""
_STATE_METHODS = (("state_dict", "load_state_dict"), ("get_state", "set_state"))
"""The second pair is Grain's."""


@dataclasses.dataclass(frozen=True)
class Streams:
    """Samples that are read in sequence, in numbered streams. Each microbatch has its own, whoever computes it."""

    open: Callable[[int, int], Iterable[Any]]
    """``open(stream, of)`` returns the samples of stream number ``stream`` of ``of``: the same ones in the same order whenever
    it is called in the same epoch (of which its ``set_epoch(epoch)`` is told before, if there is one). What it returns may have
    ``state_dict()`` and ``load_state_dict(state)`` (plain values and tensors), by which it is resumed at once."""

    _: dataclasses.KW_ONLY

    count: int | None = None
    """Streams: a multiple of ``microbatches``, of which each takes from its streams in turn; None: one for each."""

    shuffle: int = 0
    """Samples of a stream that are shuffled together, block after block; up to twice as many are in memory. 0: as they come."""

    def __post_init__(self) -> None:
        if not callable(self.open):
            raise ConfigurationError(f"Streams(open) is a {type(self.open).__name__}: give a function open(stream, of)")
        if self.count is not None and self.count < 1:
            raise ConfigurationError(f"count must be 1 or more, got {self.count}")
        if self.shuffle < 0:
            raise ConfigurationError(f"shuffle must be 0 or more samples, got {self.shuffle}")


def streams_of(dataset: Any) -> Streams | None:
    """The streams of an iterable data set; None: it is read by number."""
    if isinstance(dataset, Streams):
        return dataset
    if any(kind.__module__ == "datasets.iterable_dataset" for kind in type(dataset).__mro__):
        return Streams(_OfHub(dataset))
    return Streams(_Divided(dataset)) if isinstance(dataset, IterableDataset) else None


class _Divided:
    """A data set that divides itself by ``get_worker_info()``, as in the processes of a ``DataLoader``."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def set_epoch(self, epoch: int) -> None:
        if callable(getattr(self.dataset, "set_epoch", None)):
            self.dataset.set_epoch(epoch)

    def __call__(self, stream: int, of: int) -> Iterable[Any]:
        found: Iterable[Any] = copy.copy(self.dataset)  # what it keeps of its iteration is the stream's own
        return found


class _OfHub:
    """An ``IterableDataset`` of Hugging Face's ``datasets``."""

    def __init__(self, dataset: Any) -> None:
        if dataset._distributed is not None:
            raise ConfigurationError(
                "the data set was divided by split_dataset_by_node, so it depends on the number of workers: give it undivided; "
                "unisono divides it into streams"
            )
        self.dataset = dataset

    def __call__(self, stream: int, of: int) -> Iterable[Any]:
        split = importlib.import_module("datasets.distributed").split_dataset_by_node
        found: Iterable[Any] = split(self.dataset, rank=stream, world_size=of)
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """Which streams a run reads, and how they are cut."""

    streams: Streams
    batch_size: int
    microbatches: int
    drop_last: bool
    seed: int

    def __post_init__(self) -> None:
        if self.count % self.microbatches:
            raise ConfigurationError(
                f"count={self.count} streams cannot be shared evenly by {self.microbatches} microbatches: give a multiple of it"
            )

    @property
    def count(self) -> int:
        """Streams of all microbatches together."""
        return self.streams.count or self.microbatches

    def size(self, microbatch: int) -> int:
        """Samples of this microbatch in a full batch."""
        lo, hi = microbatch_bounds(self.batch_size, self.batch_size, self.microbatches)[microbatch]
        return hi - lo

    def beginning(self, stream: int, epoch: int, samples: int) -> list[Any]:
        """The first samples of a stream, drawn as if all streams had one seed: two that are alike show."""
        opened = _Stream(self, stream, epoch, seed=derive_seed("beginning", self.seed))
        found = [opened.read() for _ in range(samples)]
        return [sample for sample in found if sample is not _END]


class _Stream:
    """A stream in one epoch.

    Args:
        plan: Of the run.
        number: Of the stream.
        epoch: Which epoch.
        seed: Of what is drawn while its samples are read.
        state: Where to begin, as ``state`` gave it; None: at the beginning.

    Attributes:
        position: Samples that have been read.
        ended: Whether there are no more.
    """

    def __init__(self, plan: StreamPlan, number: int, epoch: int, *, seed: int, state: Any = None) -> None:
        self.position = 0
        self.ended = False
        self._seed = seed
        opener, of = plan.streams.open, plan.count
        divided = opener.dataset if isinstance(opener, _Divided) else None
        self._info = None if divided is None else worker.WorkerInfo(id=number, num_workers=of, seed=seed, dataset=divided)
        with self._reading("open"):
            self._iterable = opener(number, of)
            if divided is None and callable(getattr(self._iterable, "set_epoch", None)):
                self._iterable.set_epoch(epoch)  # type: ignore[attr-defined]
            self._iterator = iter(self._iterable)
            self._keeper, self._save, self._load = _keeper(self._iterator, self._iterable)
            if state is not None:
                self.position = state["position"]
                getattr(self._keeper, self._load)(state["state"])
                if self._keeper is self._iterable:
                    self._iterator = iter(self._iterable)

    @contextlib.contextmanager
    def _reading(self, *what: int | str) -> Iterator[None]:
        """As the process of a ``DataLoader`` that has this stream alone, and with random numbers of its own."""
        seed_generators(derive_seed(self._seed, *what))
        before, worker._worker_info = worker._worker_info, self._info
        try:
            yield
        finally:
            worker._worker_info = before

    def read(self) -> Any:
        """The next sample, or ``_END``."""
        if self.ended:
            return _END
        with self._reading(self.position):
            sample = next(self._iterator, _END)
        if sample is _END:
            self.ended = True
        else:
            self.position += 1
        return sample

    def state(self) -> Any:
        """Where the stream is; None: its iterator does not say."""
        if self._keeper is None:
            return None
        state = getattr(self._keeper, self._save)()
        try:
            return {"position": self.position, "state": snapshot(state)}
        except CheckpointError as error:
            raise ConfigurationError(
                f"{self._save}() of a stream ({type(self._keeper).__name__}) cannot be saved: {error} Or leave {self._save}() "
                "away: the stream is read forward then"
            ) from error


def _keeper(*objects: Any) -> tuple[Any, str, str]:
    """What knows where a stream is, and its methods for that."""
    for one in objects:
        for save, load in _STATE_METHODS:
            if callable(getattr(one, save, None)) and callable(getattr(one, load, None)) and not _forgets(one):
                return one, save, load
    return None, "", ""


def _forgets(dataset: Any) -> bool:
    """Whether it is a Hugging Face data set whose state is not exact: without what a shuffle buffer holds, or one that is divided
    by sample (seen with datasets 5.2.0: samples come twice)."""
    part = getattr(dataset, "_ex_iterable", None)
    divided = getattr(dataset, "_distributed", None)
    if part is not None and divided is not None and part.num_shards % divided.world_size:
        return True
    while part is not None:
        if type(part).__name__ == "BufferShuffledExamplesIterable":
            return True
        part = getattr(part, "ex_iterable", None)
    return False


class _Shuffled:
    """A stream whose samples come in another order within blocks. The next block is read as this one is given away.

    Args:
        stream: Gives its samples for ``number`` and ``state``.
        size: Samples of a block.
        seed: Of the order.
        state: As ``state`` gave it.
    """

    def __init__(self, open_stream: Callable[[Any], _Stream], size: int, seed: int, state: Any = None) -> None:
        block, given, inner = (0, 0, None) if state is None else (state["block"], state["given"], state["stream"])
        self._stream = open_stream(inner)
        self._size, self._seed = size, seed
        self._block, self._given = block - 1, 0  # the number of this block, and how much of it was given away
        self._now: list[Any] = []
        self._next: list[Any] = []
        self._start = self._next_start = inner
        self.ended = False
        for _ in range(given):
            self.read()

    def read(self) -> Any:
        if not self._now:
            while len(self._next) < self._size and self._read_ahead():
                pass
            if not self._next:
                self.ended = True
                return _END
            self._block, self._given, self._start = self._block + 1, 0, self._next_start
            order = Permutation(len(self._next), derive_seed("block", self._seed, self._block)).at(np.arange(len(self._next)))
            self._now, self._next = [self._next[place] for place in order[::-1]], []
            self._next_start = self._stream.state()
        if len(self._next) < self._size:
            self._read_ahead()
        self._given += 1
        return self._now.pop()

    def _read_ahead(self) -> bool:
        sample = self._stream.read()
        if sample is not _END:
            self._next.append(sample)
        return sample is not _END

    def state(self) -> Any:
        """Where the block began, and how much of it was given away; None: that is not known."""
        if self._start is None and self._block > 0:
            return None
        return {"block": max(self._block, 0), "given": self._given, "stream": self._start}


@dataclasses.dataclass(frozen=True)
class Part:
    """What a microbatch is made of."""

    samples: list[Any]
    numbers: npt.NDArray[np.int64]
    """Which samples of all streams they are: position x count + stream."""
    goes_on: bool
    """Whether the microbatch of the next batch has samples (as many as it should, with ``drop_last``)."""
    start: Any
    """Where its streams were before it; None: that is not known."""


class Lane:
    """The streams of one microbatch, in one epoch: gives its samples, batch after batch.

    Args:
        plan: Of the run.
        microbatch: Whose they are.
        epoch: Which epoch.
        number: The batch that comes first.
        start: Where the streams are then, as ``Part.start``; None: batch 0, at the beginning.

    Attributes:
        epoch: As given.
        number: The batch that comes next.
    """

    def __init__(self, plan: StreamPlan, microbatch: int, epoch: int, number: int = 0, start: Any = None) -> None:
        self.epoch, self.number = epoch, number
        self._plan, self._first = plan, number
        self._size = plan.size(microbatch)
        self._numbers = range(microbatch, plan.count, plan.microbatches)
        self.where = f"stream {microbatch} of {plan.count}"
        self._given = [0] * len(self._numbers) if start is None else list(start["given"])
        self._read = number * self._size
        self._turn = 0 if start is None else start["turn"]
        states = [None] * len(self._numbers) if start is None else start["streams"]
        ended = [False] * len(self._numbers) if start is None else start["ended"]
        self._streams = [
            None if over else self._open(stream, state) for stream, state, over in zip(self._numbers, states, ended, strict=True)
        ]
        self._ahead: list[tuple[int, Any]] = []
        self._marks: dict[int, Any] = {}
        self._mark_at = 0.0

    def _open(self, stream: int, state: Any) -> _Stream | _Shuffled:
        plan, epoch = self._plan, self.epoch
        self.where = f"stream {stream} of {plan.count}"
        seed = derive_seed("stream", plan.seed, epoch, stream)

        def opened(state: Any) -> _Stream:
            return _Stream(plan, stream, epoch, seed=seed, state=state)

        return _Shuffled(opened, plan.streams.shuffle, seed, state) if plan.streams.shuffle else opened(state)

    def take(self) -> Part:
        """The next batch's samples; fewer, or none, at the end of the streams."""
        size = self._size
        self._fill((self.number + 1) * size + (size if self._plan.drop_last else 1))
        taken, self._ahead = self._ahead[:size], self._ahead[size:]
        start = self._marks.pop(self.number, None)
        self.number += 1
        goes_on = len(self._ahead) >= (size if self._plan.drop_last else 1)
        return Part([sample for _, sample in taken], np.array([number for number, _ in taken], np.int64), goes_on, start)

    def _fill(self, until: int) -> None:
        """Reads ahead, so that it is known whether anything follows."""
        while self._read < until and any(stream is not None for stream in self._streams):
            if self._read % self._size == 0:
                self._mark(self._read // self._size)
            turn = self._turn
            stream = self._streams[turn]
            self._turn = (turn + 1) % len(self._streams)
            if stream is None:
                continue
            self.where = f"stream {self._numbers[turn]} of {self._plan.count}, after {self._given[turn]:,} samples"
            sample = stream.read()
            if sample is _END:
                self._streams[turn] = None
                continue
            self._ahead.append((self._given[turn] * self._plan.count + self._numbers[turn], sample))
            self._given[turn] += 1
            self._read += 1

    def _mark(self, number: int) -> None:
        """Keeps where the streams are before batch ``number``, as often as costs little."""
        began = time.monotonic()
        if number in (0, self._first) or number in self._marks or began < self._mark_at:
            return
        states = [None if stream is None else stream.state() for stream in self._streams]
        if any(state is None for state, stream in zip(states, self._streams, strict=True) if stream is not None):
            if not self._plan.streams.shuffle:
                self._mark_at = math.inf  # they have none
            return
        self._marks[number] = {
            "given": list(self._given),
            "turn": self._turn,
            "ended": [stream is None for stream in self._streams],
            "streams": states,
        }
        now = time.monotonic()
        self._mark_at = now + (now - began) / _MARK_SHARE
