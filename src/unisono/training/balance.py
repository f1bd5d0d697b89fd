"""Who computes how much: each worker's share of the microbatches follows its measured speed.

All workers know how long each of them took (every step's header says so), reckon the same from it, and so change their ranges
in the same step without another word. A change moves no bit of the result, only time.

Measured is what a worker takes to load and compute its microbatches in full steps: the median over the blocks of a *window*
of about a second. Ranges change if others would have made the steps of three windows in a row shorter by a tenth, and those of
most of their blocks shorter. So a persistently slower worker gets less to do after a few windows, and noise, a hiccup,
a short batch or the first steps change nothing.

A worker may look fast just because it has little to do: a container that may use half a core does short work at full speed.
So what a worker took when it had more is remembered for a while, and believed rather than its speed of now; for longer each
time it proves right again.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from unisono.assignment import assignment_by_time
from unisono.guard.stragglers import TimingBlock
from unisono.observe.timing import PHASES
from unisono.tree import Span

GAIN = 0.1
"""Other ranges must shorten a step by this share."""
WINDOWS = 3
"""So many windows in a row must say so."""
WINDOW_S = 1.0
BLOCKS = 10
"""A window spans at least this time of worker 0, and this many blocks."""
MOST_BLOCKS = 0.8
"""The share of a window's blocks in which a step must have become shorter."""
TOLERANCE = 0.03
"""Ranges with fewer pieces are preferred if they take at most this much longer."""
TRUST, MOST_TRUST = 16, 1024
"""For how many windows it is believed that a worker takes as long as it did when it had more to do: at first, and at most."""

Array = npt.NDArray[np.float64]
_DATA, _COMPUTE = PHASES.index("data"), PHASES.index("compute")


@dataclasses.dataclass(frozen=True)
class _Window:
    """Full steps of all workers under the same ranges; seconds a step."""

    work: Array
    """What each worker takes to load and compute its microbatches: float64 ``[blocks, workers]``."""
    rest: Array
    """What it takes besides, whatever its share: sums, norms, the update. The same shape."""
    whole: Array
    """How long steps take worker 0: float64 ``[blocks]``."""

    @classmethod
    def of(cls, blocks: Sequence[TimingBlock]) -> _Window:
        steps = np.array([[block.full] for block in blocks])
        phases = np.array([block.full_seconds for block in blocks])
        work = phases[:, :, _DATA] + np.array([block.full_work_s for block in blocks])
        own = phases[:, :, _DATA] + phases[:, :, _COMPUTE]
        return cls(work / steps, np.maximum(own - work, 0) / steps, phases[:, 0].sum(axis=1) / steps[:, 0])

    def __add__(self, other: _Window) -> _Window:
        pairs = ((self.work, other.work), (self.rest, other.rest), (self.whole, other.whole))
        return _Window(*map(np.concatenate, pairs))

    @functools.cached_property
    def typical(self) -> tuple[list[float], list[float]]:
        """The medians of ``work`` and ``rest``, by worker."""
        return np.median(self.work, axis=0).tolist(), np.median(self.rest, axis=0).tolist()

    def gains(self, ratios: Sequence[float]) -> bool:
        """Whether steps would have been shorter by ``GAIN`` if each worker's work had taken ``ratios`` times as long: the typical
        step, and the steps of most blocks."""
        work, rest = map(np.array, self.typical)
        step = float((work + rest).max() - (work * np.array(ratios) + rest).max()) / float(np.median(self.whole))
        blocks = ((self.work + self.rest).max(axis=1) - (self.work * np.array(ratios) + self.rest).max(axis=1)) / self.whole
        return min(step, float(np.median(blocks))) >= GAIN and float(np.mean(blocks > 0)) >= MOST_BLOCKS


@dataclasses.dataclass
class _Memory:
    """What is remembered of a worker."""

    trust: int = TRUST
    """For how many windows the next thing will be believed."""
    taken: dict[int, tuple[float, int]] = dataclasses.field(default_factory=dict)
    """Number of microbatches -> the seconds that they took, and the window until which that is believed."""

    def seconds(self, count: int, have: int, take: float, window: int) -> float:
        """How long ``count`` microbatches will take a worker that takes ``take`` seconds for the ``have`` of now."""
        guess = take * count / have
        for known, (taken, until) in self.taken.items():
            if known > have and until >= window and taken > take:
                slope = (taken - take) / (known - have)
                guess = max(guess, take + slope * (count - have) if count <= known else taken * count / known)
        return guess


class Balance:
    """Says when ranges change, and to which. *Local*, and the same on all workers, who call it with the same.

    Args:
        ranges: Each worker's microbatches, by rank.
        hosts: The number of workers of each host, where that matters (see ``unisono.assignment``).

    Attributes:
        ranges: The ranges that are wanted now.
    """

    def __init__(self, ranges: Sequence[Span], hosts: tuple[int, ...] = ()) -> None:
        self.ranges = tuple(ranges)
        self._microbatches = self.ranges[-1][1]
        self._hosts = hosts
        self._blocks: list[TimingBlock] = []
        self._seconds = 0.0  # of these blocks
        self._fresh = True
        self._window = 0
        self._windows: deque[_Window] = deque(maxlen=WINDOWS)  # the last ones, if each of them might be in favour of a change
        self._memory = [_Memory() for _ in self.ranges]
        self._expected: dict[int, float] = {}  # seconds of those who got more, if the change was right

    @property
    def shares(self) -> tuple[int, ...]:
        """Microbatches of each worker, by rank."""
        return tuple(hi - lo for lo, hi in self.ranges)

    def add(self, block: TimingBlock) -> tuple[Span, ...] | None:
        """Takes the times of some steps.

        Returns:
            The ranges to change to, if they should change.
        """
        if self._microbatches == len(self.ranges) or not block.full or block.shares != self.shares:
            return None  # nothing can be moved, or nothing said about steps as they are now
        if self._fresh:
            self._fresh = False  # the first steps of a run, or with new ranges, are not like others
            return None
        self._blocks.append(block)
        self._seconds += float(block.seconds[0].sum())
        if len(self._blocks) < BLOCKS or self._seconds < WINDOW_S:
            return None
        window = _Window.of(self._blocks)
        self._clear()
        self._window += 1
        return self._judge(window)

    def _clear(self) -> None:
        self._blocks.clear()
        self._seconds = 0.0

    def _judge(self, window: _Window) -> tuple[Span, ...] | None:
        self._learn(window)
        if not self._could_gain(window):
            self._windows.clear()
            return None
        self._windows.append(window)
        if len(self._windows) < WINDOWS:
            return None
        *_, together = itertools.accumulate(self._windows)
        for ranges in dict.fromkeys(map(self._best, (together, window))):
            if ranges != self.ranges and all(one.gains(self._ratios(one, ranges)) for one in self._windows):
                self._change(ranges, window)
                return ranges
        return None

    def _could_gain(self, window: _Window) -> bool:
        """Whether there would be a gain if work could be divided at will."""
        work, rest = window.typical
        if not all(work):
            return True
        speeds = [share / seconds for share, seconds in zip(self.shares, work, strict=True)]
        least = (self._microbatches + sum(map(operator.mul, speeds, rest))) / sum(speeds)
        return bool(max(map(operator.add, work, rest)) - least >= GAIN * float(np.median(window.whole)))

    def _best(self, window: _Window) -> tuple[Span, ...]:
        work, rest = window.typical
        return assignment_by_time(
            self._microbatches,
            len(self.ranges),
            lambda worker, count: self._predicted(work, worker, count) + rest[worker],
            self._hosts,
            previous=self.ranges,
            tolerance=TOLERANCE,
        )

    def _predicted(self, work: Sequence[float], worker: int, count: int) -> float:
        lo, hi = self.ranges[worker]
        return self._memory[worker].seconds(count, hi - lo, work[worker], self._window)

    def _ratios(self, window: _Window, ranges: Sequence[Span]) -> list[float]:
        """How many times as long each worker's work would take with these ranges."""
        work, _ = window.typical
        return [
            self._predicted(work, worker, hi - lo) / work[worker] if work[worker] > 0 else 1.0
            for worker, (lo, hi) in enumerate(ranges)
        ]

    def _change(self, ranges: tuple[Span, ...], window: _Window) -> None:
        work, _ = window.typical
        for worker, (memory, take, had, (lo, hi)) in enumerate(zip(self._memory, work, self.shares, ranges, strict=True)):
            if hi - lo < had:
                memory.taken[had] = take, self._window + memory.trust
            elif hi - lo > had:
                self._expected[worker] = self._predicted(work, worker, hi - lo)
        self.ranges = ranges
        self._fresh = True
        self._windows.clear()

    def _learn(self, window: _Window) -> None:
        """The first window under new ranges shows whether those who got more are as fast as they seemed."""
        for worker, expected in self._expected.items():
            memory = self._memory[worker]
            if window.typical[0][worker] > (1 + GAIN) * expected:
                memory.trust = min(2 * memory.trust, MOST_TRUST)
                continue
            memory.taken = {count: taken for count, taken in memory.taken.items() if count > self.shares[worker]}
            if not memory.taken:
                memory.trust = TRUST
        self._expected.clear()
