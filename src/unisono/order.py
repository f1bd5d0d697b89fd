"""Which samples are in batch *k* of an epoch: a function of the seed, the epoch and *k*, and of nothing else.

This module needs only NumPy and the standard library. It holds the seeds that all randomness of a run derives from, a seeded
permutation in O(1) memory, the split of a global batch into microbatches, and the orders that a user can choose from. Everything
here is *local* and gives the same answer on every worker, for any world size and in any sequence of calls.

The values are part of the promise: a checkpoint stores only a position in the order, so a change of :func:`derive_seed`,
:class:`Permutation` or :func:`microbatch_bounds` changes what resumed runs train on. Tests pin them.
"""

from __future__ import annotations

import contextlib
import math
import random
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from operator import index as as_int
from typing import Any, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

from unisono.errors import ConfigurationError

Indices: TypeAlias = NDArray[np.int64]
OrderLike: TypeAlias = str | Sequence[int] | NDArray[Any] | Iterable[int] | Iterable[Sequence[int]]
_Words: TypeAlias = NDArray[np.uint64]

_MAX_LENGTH = 2**62
_SMALL_LENGTH = 1024
_ROUNDS = 12
# Halves of a few values mix slowly. Computed exactly for 7 elements, with ideal round functions: after 12 rounds the permutation
# is 4 % from uniform in total variation, after 32 rounds 0.02 %.
_ROUNDS_SMALL = 32


def derive_seed(*parts: int | str) -> int:
    """Return a 64-bit seed, ``0 <= seed < 2**64``, that depends on every part, its type and its place. *Local.*

    BLAKE2b over an encoding in which different lists of parts never look alike: ``derive_seed("ab", "c")`` differs from
    ``derive_seed("a", "bc")``, and ``derive_seed(1)`` from ``derive_seed("1")``. The same on every machine and Python version.

    Raises:
        TypeError: If a part is neither an integer nor a string.
    """
    encoded = bytearray()
    for part in parts:
        if isinstance(part, str):
            text = part.encode("utf-8", "surrogatepass")
            encoded += b"s%d:" % len(text) + text
        else:
            encoded += b"i%d;" % as_int(part)
    return int.from_bytes(blake2b(encoded, digest_size=8).digest(), "little")


@final
class Permutation:
    """A seeded pseudo-random permutation of ``range(length)`` in O(1) memory. *Local.*

    A cycle-walking Feistel network (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): a position is a pair
    ``(left, right)`` with ``left < rows`` and ``right < columns``; each round adds to one of them a hash of the other. Images
    beyond ``length`` are encrypted again until they fall inside. The domain has less than ``length + sqrt(length) + 3`` and at
    most ``2 * length`` values, so hardly any walk is needed. One side is even: otherwise only even permutations could come out.

    Args:
        length: Number of elements, 0 to 2**62.
        key: Any integer. Different keys give unrelated permutations.

    Raises:
        ConfigurationError: If ``length`` is out of range.
    """

    def __init__(self, length: int, key: int) -> None:
        if not 0 <= length <= _MAX_LENGTH:
            raise ConfigurationError(f"a permutation has 0 to 2**62 elements, not {length}")
        rows = math.isqrt(max(length - 1, 0)) + 1
        if rows % 2 and _ceil_div(length, rows) % 2:
            rows += 1
        self._length = length
        self._limits = np.uint64(rows), np.uint64(max(_ceil_div(length, rows), 1))  # rows and columns
        rounds = range(_ROUNDS if length >= _SMALL_LENGTH else _ROUNDS_SMALL)
        self._rounds = [(number, np.uint64(derive_seed("permutation", key, length, number))) for number in rounds]

    def __len__(self) -> int:
        return self._length

    def at(self, positions: NDArray[np.integer[Any]]) -> Indices:
        """Return the elements at ``positions``: an int64 array of the same shape.

        Raises:
            IndexError: If a position is outside ``range(length)``.
        """
        positions = np.asarray(positions)
        if positions.size == 0:
            return np.zeros(positions.shape, np.int64)
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= self._length:
            raise IndexError(f"{low if low < 0 else high} is outside a permutation of {self._length} elements")
        out = self._encrypt(positions.astype(np.uint64).ravel())
        outside = np.flatnonzero(out >= self._length)
        while outside.size:
            again = self._encrypt(out[outside])
            out[outside] = again
            outside = outside[again >= self._length]
        return out.astype(np.int64).reshape(positions.shape)

    def _encrypt(self, values: _Words) -> _Words:
        sides = list(np.divmod(values, self._limits[1]))
        for number, key in self._rounds:
            side = number % 2
            limit = self._limits[side]
            total = sides[side] + _hash_below(sides[1 - side], key, limit)
            # Modulo the limit: below it, the difference wraps around to a huge number, so the minimum needs no branch.
            sides[side] = np.minimum(total, total - limit)
        encrypted: _Words = sides[0] * self._limits[1] + sides[1]
        return encrypted


def _hash_below(values: _Words, key: np.uint64, limit: np.uint64) -> _Words:
    """Hash each value under ``key`` into ``range(limit)``, ``limit < 2**32``, by SplitMix64 (Steele et al., 2014)."""
    mixed = values * np.uint64(0x9E3779B97F4A7C15) + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    # Scaling the upper half needs no division, and its bias of at most limit / 2**32 leaves every round a bijection.
    return ((mixed >> np.uint64(32)) * limit) >> np.uint64(32)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def microbatch_bounds(size: int, batch_size: int, microbatches: int) -> tuple[tuple[int, int], ...]:
    """Cut a global batch that holds ``size`` of at most ``batch_size`` samples into microbatches. *Local.*

    A full batch is cut into ``microbatches`` parts whose sizes differ by at most one, larger ones first. A short batch is cut as
    evenly, but into as few parts as keep each no larger than the largest part of a full one; the other microbatches are empty.
    Spread over all of them it would give BatchNorm microbatches of a single sample.

    Returns:
        ``microbatches`` pairs ``(lo, hi)`` of positions in the batch, contiguous and ascending; empty ones have
        ``lo == hi == size``.

    Raises:
        ConfigurationError: If a full batch has fewer samples than microbatches, or ``size`` does not fit a full batch.
    """
    _check_at_least_one(batch_size=batch_size, microbatches=microbatches)
    if batch_size < microbatches:
        raise ConfigurationError(
            f"batch_size {batch_size} cannot be cut into {microbatches} microbatches: "
            f"raise batch_size to {microbatches} or more, or lower microbatches"
        )
    if not 0 <= size <= batch_size:
        raise ConfigurationError(f"a global batch holds 0 to batch_size = {batch_size} samples, not {size}")
    parts = microbatches if size == batch_size else _ceil_div(size, _ceil_div(batch_size, microbatches))
    base, larger = divmod(size, parts) if parts else (0, 0)
    edges = [min(m, parts) * base + min(m, larger) for m in range(microbatches + 1)]
    return tuple((edges[m], edges[m + 1]) for m in range(microbatches))


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Epoch:
    """The global batches of one epoch. *Local.*"""

    samples: int
    """Samples in all batches together."""
    starts: Sequence[int]
    """For each global batch the place of its first sample among the epoch's samples, ascending from 0."""
    take: Callable[[int, int], Indices]
    """``take(lo, hi)`` gives the dataset indices of the epoch's samples lo to hi - 1: int64, ``[hi - lo]``."""

    @property
    def batches(self) -> int:
        """Number of global batches."""
        return len(self.starts)

    def batch(self, k: int) -> Indices:
        """Return the dataset indices of global batch ``k``: int64, shape ``[samples in the batch]``, the caller's own.

        Raises:
            IndexError: If ``k`` is not in ``range(batches)``.
        """
        if not 0 <= k < self.batches:
            raise IndexError(f"batch {k} is outside an epoch of {self.batches} batches")
        hi = self.starts[k + 1] if k + 1 < self.batches else self.samples
        return self.take(self.starts[k], hi)


class Order(ABC):
    """Decides which samples are in which global batch. Epochs do not depend on which epochs were asked for before."""

    @abstractmethod
    def epoch(self, epoch: int) -> Epoch:
        """Return the batches of epoch number ``epoch``, counted from 0. *Local*; the same on every worker.

        Raises:
            ConfigurationError: If the epoch would have no batch, or a sampler gives what cannot be trained on.
        """


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Shuffled(Order):
    """Every sample once an epoch, in an order drawn from ``(seed, epoch)``. Memory does not grow with ``length``."""

    length: int
    batch_size: int
    seed: int
    drop_last: bool = False

    def epoch(self, epoch: int) -> Epoch:
        permutation = Permutation(self.length, derive_seed("order", self.seed, epoch))
        return _even_epoch(self.length, self.batch_size, self.drop_last, lambda lo, hi: permutation.at(np.arange(lo, hi)))


@final
class Listed(Order):
    """The given dataset indices in the given order, the same in every epoch. A ``range`` takes no memory.

    Raises:
        ConfigurationError: If the list is empty or holds something that is no index of the dataset.
    """

    def __init__(self, indices: Sequence[int] | NDArray[Any], *, length: int, batch_size: int, drop_last: bool = False) -> None:
        self._indices = _checked_indices(indices, length, "the order")
        self._batch_size, self._drop_last = batch_size, drop_last

    def epoch(self, epoch: int) -> Epoch:
        return _even_epoch(len(self._indices), self._batch_size, self._drop_last, _slicer(self._indices))


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Sampled(Order):
    """The dataset indices that a sampler in the style of ``torch.utils.data.Sampler`` yields, cut into global batches.

    In each epoch the sampler's ``set_epoch`` is called if it has one. While it is read, its own generators and the global ones of
    torch, NumPy and ``random`` are seeded from ``(seed, epoch)``; afterwards they are as before. A sampler that keeps other state
    across epochs cannot be resumed exactly: let it derive that state in ``set_epoch``. The indices of one epoch are in memory.
    """

    sampler: Iterable[int] | Iterable[Sequence[int]]
    is_batched: bool
    """A batch sampler: each list of dataset indices that it yields is one global batch, of at most ``batch_size``."""
    length: int
    batch_size: int
    seed: int
    drop_last: bool = False

    def epoch(self, epoch: int) -> Epoch:
        with _seeded(self.sampler, self.seed, epoch):
            # A copy of each list, because some batch samplers refill and yield the same one.
            drawn: list[Any] = [list(one) if self.is_batched and isinstance(one, Iterable) else one for one in self.sampler]
        if not self.is_batched:
            indices = _checked_indices(drawn, self.length, f"the sampler in epoch {epoch}")
            return _even_epoch(len(indices), self.batch_size, self.drop_last, _slicer(indices))
        where = f"the batch sampler in epoch {epoch}"
        if not drawn:
            raise ConfigurationError(f"{where} gives no batch: check its length and drop_last")
        batches = [self._checked_batch(batch, f"{where}, batch {k}") for k, batch in enumerate(drawn)]
        edges = np.cumsum([0, *map(len, batches)]).tolist()
        return Epoch(samples=edges[-1], starts=edges[:-1], take=_slicer(np.concatenate(batches)))

    def _checked_batch(self, batch: Any, where: str) -> Indices | range:
        if not isinstance(batch, list):
            raise ConfigurationError(f"{where} is {batch!r}: a batch sampler yields lists of dataset indices")
        if len(batch) > self.batch_size:
            raise ConfigurationError(
                f"{where} holds {len(batch)} samples, more than batch_size {self.batch_size}: "
                f"raise batch_size to the sampler's largest batch, or let the sampler make smaller ones"
            )
        return _checked_indices(batch, self.length, where)


def make_order(order: OrderLike, *, length: int, batch_size: int, seed: int, drop_last: bool = False) -> Order:
    """Make the order that a user asked for. *Local.*

    Args:
        order: ``"shuffle"``; ``"sequential"``; a list or one-dimensional array of dataset indices; a sampler, which yields
            indices; or a batch sampler, which yields lists of them. The two are told apart by their first element, which is drawn
            once for that; random states are left as they were.
        length: Samples in the dataset.
        batch_size: Samples in a global batch, at most.
        seed: The run's seed.
        drop_last: Leave out the last batch of an epoch if it is short.

    Raises:
        ConfigurationError: If ``order`` is none of these, cannot be iterated again (a generator), or splits the data between
            workers by itself; if it names a sample that the dataset does not have, if the dataset is empty, or if ``drop_last``
            meets a batch sampler.
    """
    _check_at_least_one(batch_size=batch_size)
    if length < 1:
        raise ConfigurationError(f"the dataset has {length} samples: there is nothing to train on")
    if isinstance(order, str):
        if order == "shuffle":
            return Shuffled(length=length, batch_size=batch_size, seed=seed, drop_last=drop_last)
        if order == "sequential":
            return Listed(range(length), length=length, batch_size=batch_size, drop_last=drop_last)
        raise ConfigurationError(f"order {order!r} is unknown: use 'shuffle', 'sequential', indices or a sampler")
    if hasattr(order, "__array__"):
        return Listed(np.asarray(order), length=length, batch_size=batch_size, drop_last=drop_last)
    _check_sampler(order)
    given: Any = order
    is_batched = _is_batch(_first_element(given, seed))
    if is_batched and drop_last:
        raise ConfigurationError("drop_last is set, but a batch sampler makes its own batches: set drop_last there")
    if isinstance(given, Sequence) and not is_batched:
        return Listed(given, length=length, batch_size=batch_size, drop_last=drop_last)
    return Sampled(sampler=given, is_batched=is_batched, length=length, batch_size=batch_size, seed=seed, drop_last=drop_last)


def _even_epoch(total: int, batch_size: int, drop_last: bool, take: Callable[[int, int], Indices]) -> Epoch:
    """Cut ``total`` samples into batches of ``batch_size``; the last one may be short."""
    samples = total - total % batch_size if drop_last else total
    if samples == 0:
        raise ConfigurationError(
            f"drop_last leaves no batch of {total} samples with batch_size {batch_size}: lower batch_size or keep it"
        )
    return Epoch(samples=samples, starts=range(0, samples, batch_size), take=take)


def _slicer(indices: range | Indices) -> Callable[[int, int], Indices]:
    return lambda lo, hi: np.array(indices[lo:hi], np.int64)


def _check_at_least_one(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise ConfigurationError(f"{name} is {value}: it must be at least 1")


def _checked_indices(values: Sequence[Any] | NDArray[Any], length: int, where: str) -> range | Indices:
    """Return a range as it is, or a copy of ``values`` as int64 ``[n]``; n is at least 1.

    Raises:
        ConfigurationError: If a value is no index of the dataset.
    """
    if isinstance(values, np.ndarray) and values.ndim != 1:
        raise ConfigurationError(f"{where} has shape {list(values.shape)}: dataset indices come as one dimension")
    if len(values) == 0:
        raise ConfigurationError(f"{where} is empty: give at least one dataset index")
    if isinstance(values, range):
        _check_each(values, (0, len(values) - 1), length, where)
        return values
    try:
        array = np.asarray(values)
    except ValueError:  # a list of lists of different lengths
        array = np.empty(0, object)
    if array.ndim == 1 and array.dtype.kind in "iu":
        _check_each(array, np.flatnonzero((array < 0) | (array >= length)), length, where)
        return array.astype(np.int64)
    _check_each(values, range(len(values)), length, where)
    return np.array([as_int(value) for value in values], np.int64)


def _check_each(values: Sequence[Any] | NDArray[Any], positions: Iterable[int], length: int, where: str) -> None:
    for position in positions:
        value: Any = values[position]
        value = value.item() if isinstance(value, np.generic) else value
        with contextlib.suppress(TypeError):
            if not isinstance(value, bool) and 0 <= as_int(value) < length:
                continue
        raise ConfigurationError(
            f"{where}: position {position} holds {reprlib.repr(value)}; expected an integer from 0 to {length - 1}, "
            f"because the dataset has {length} samples"
        )


def _is_batch(element: object) -> bool:
    dimensions = getattr(element, "ndim", None)
    return isinstance(element, Iterable) and not isinstance(element, str) if dimensions is None else dimensions > 0


def _first_element(order: Iterable[Any], seed: int) -> Any:
    with contextlib.nullcontext() if isinstance(order, Sequence) else _seeded(order, seed, 0):
        for element in order:
            return element
    raise ConfigurationError(f"the order {reprlib.repr(order)} is empty: give at least one dataset index")


def _check_sampler(sampler: object) -> None:
    if not isinstance(sampler, Iterable):
        raise ConfigurationError(
            f"the order is {reprlib.repr(sampler)}: use 'shuffle', 'sequential', dataset indices or a sampler"
        )
    if isinstance(sampler, Iterator):
        raise ConfigurationError(
            f"the order is a {type(sampler).__name__}, which can be iterated only once, but each epoch and each resume "
            "iterates anew: give a list or a sampler, that is an object whose __iter__ starts from the beginning"
        )
    for part in _parts(sampler):
        if getattr(part, "num_replicas", 1) not in (1, None):
            raise ConfigurationError(
                f"{type(part).__name__} splits the data between {part.num_replicas} workers, but unisono splits each "
                "global batch itself: remove it, or give the sampler that you would use on one worker"
            )


def _parts(sampler: Any) -> Iterator[Any]:
    """Yield the sampler and those that it wraps, outermost first."""
    seen: list[Any] = []
    while sampler is not None and all(sampler is not part for part in seen):
        seen.append(sampler)
        yield sampler
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)


@contextlib.contextmanager
def _seeded(sampler: Any, seed: int, epoch: int) -> Iterator[None]:
    """Within, what ``sampler`` draws depends on ``(seed, epoch)`` only; afterwards every generator is as it was."""
    import torch  # here, because the rest of the module works without

    parts = list(_parts(sampler))
    with contextlib.ExitStack() as undo:
        for name, generator in (("torch", torch.default_generator), ("numpy", np.random), ("random", random)):
            undo.callback(_reseed(generator, derive_seed("sampler", seed, epoch, name)))
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        own = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
        for depth, part in enumerate(parts):
            for name, value in list(getattr(part, "__dict__", {}).items()):
                if isinstance(value, own):
                    undo.callback(_reseed(value, derive_seed("sampler", seed, epoch, depth, name)))
        yield


def _reseed(generator: Any, seed: int) -> Callable[[], object]:
    """Seed a generator, or a module that acts as one, and return the function that puts its state back."""
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        restore = partial(setattr, bits, "state", bits.state)
        bits.state = type(bits)(seed).state
    elif generator is np.random or isinstance(generator, np.random.RandomState):
        restore = partial(generator.set_state, generator.get_state())
        generator.seed(seed % 2**32)
    elif generator is random or isinstance(generator, random.Random):
        restore = partial(generator.setstate, generator.getstate())
        generator.seed(seed)
    else:
        restore = partial(generator.set_state, generator.get_state())
        generator.manual_seed(seed)
    return restore
