"""What changes from epoch to epoch: who is told, what an epoch's order was, and what loader processes cannot see. *Local.*"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset

from unisono.errors import ConfigurationError
from unisono.order import Epoch, Order, Shuffled

_KEPT = 2
"""Epochs whose order is remembered: that of now, and the next one, which is loaded ahead."""
_PLAIN = (bool, int, float, str, type(None))


class EpochFollowers:
    """Data set and collate function, as far as they have ``set_epoch(epoch)``: each process tells its own.

    Args:
        objects: They, and what a ``Subset`` or ``ConcatDataset`` holds.
    """

    def __init__(self, *objects: Any) -> None:
        self._told = [one for given in objects for one in _inner(given) if callable(getattr(one, "set_epoch", None))]
        self._epoch: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """Tells them, if it is another epoch than the last time."""
        if epoch != self._epoch:
            self._epoch = epoch
            for one in self._told:
                one.set_epoch(epoch)


class Copies:
    """A data set of which loader processes have copies: changes in this process do not reach them.

    Args:
        dataset: As they have got it.
        processes: How many they are.
    """

    def __init__(self, dataset: Any, processes: int) -> None:
        self._processes = processes
        # One with set_epoch is told in every process, and may be told by its owner here, too.
        self._parts = [one for one in _inner(dataset) if processes and not hasattr(one, "set_epoch")]
        self._seen = [_attributes(one) for one in self._parts]

    def check(self) -> None:
        """Raises:
        ConfigurationError: A number or text in it is another one by now.
        """
        for part, seen in zip(self._parts, self._seen, strict=True):
            now = _attributes(part)
            if now == seen:
                continue
            name = next(name for name in {**seen, **now} if seen.get(name, self) != now.get(name, self))
            raise ConfigurationError(
                f"{name!r} of the data set ({type(part).__name__}) was changed from {seen.get(name)!r} to {now.get(name)!r} in "
                f"this process, but {self._processes} loader processes have copies of their own, in which it is as before: give "
                "the data set a method set_epoch(epoch), which is called in every process, or load with num_workers=0"
            )


@contextlib.contextmanager
def kept_attributes(*objects: Any) -> Iterator[None]:
    """After the body numbers and texts in these are as before it: to look at a sample leaves no trace in its data set."""
    parts = [(one, _attributes(one)) for given in objects for one in _inner(given)]
    try:
        yield
    finally:
        for one, before in parts:
            for name, value in before.items():
                if one.__dict__.get(name) is not value:
                    one.__dict__[name] = value


def _inner(dataset: Any) -> Iterator[Any]:
    yield dataset
    if isinstance(dataset, Subset):
        yield from _inner(dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        for one in dataset.datasets:
            yield from _inner(one)


def _attributes(value: Any) -> dict[str, Any]:
    return {name: item for name, item in getattr(value, "__dict__", {}).items() if type(item) in _PLAIN}


class Remembered(Order):
    """An order that is read once an epoch, however often it is asked for: a sampler may give another one each time.

    Args:
        order: As the user asked for it.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._epochs: dict[int, Epoch] = {}
        self._digests: dict[int, str] = {}

    def epoch(self, epoch: int) -> Epoch:
        if epoch not in self._epochs:
            self._epochs[epoch] = self._order.epoch(epoch)
            for old in sorted(self._epochs)[:-_KEPT]:
                del self._epochs[old]
        return self._epochs[epoch]

    def digest(self, epoch: int) -> str:
        """Of the samples of an epoch, in order and cut into batches; "" where that follows from seed and length."""
        if isinstance(self._order, Shuffled):
            return ""
        if epoch not in self._digests:
            self._digests = {epoch: _digest(self.epoch(epoch))}
        return self._digests[epoch]


def _digest(plan: Epoch) -> str:
    found = blake2b(digest_size=8)
    starts: Sequence[int] = plan.starts
    found.update(np.asarray(starts, np.int64).data)
    for lo in range(0, plan.samples, 2**20):
        found.update(plan.take(lo, min(lo + 2**20, plan.samples)).data)
    return found.hexdigest()
