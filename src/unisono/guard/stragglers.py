"""A worker that is slower than the others is named once, with the likely cause where the system shows one.

With every step each worker tells all others where its time has gone so far, so that all compute the same: what a microbatch
costs each worker in loading and computing. Sums over a window of at least ``STEPS`` steps and ``SECONDS`` seconds are compared,
as differences of the readings at its ends; the steps in between cost nothing. To tell a straggler from a single hiccup, a worker
must also be slow in most parts of the window.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from unisono.observe.timing import PHASES
from unisono.system.cgroups import throttling
from unisono.tree import Span
from unisono.world import World, usable_cores

SLOWER = 1.2
"""A straggler takes this many times as long for a microbatch as the median worker (the lower one of an even number)."""
STEPS = 50
SECONDS = 5.0
"""What a window spans at least: steps, and time of worker 0. Fifty steps of a millisecond say nothing about a machine."""
PARTS = 5
SLOW_PARTS = 4
"""A straggler is slow in this many of the window's equal parts."""
BLOCK_S = 0.1
"""Steps are summed in blocks of about this time: at least one step, at most ``MOST_STEPS``."""
MOST_STEPS = 200

LOOK_EVERY_S = 5.0
THROTTLED_SHARE = STOLEN_SHARE = 0.02
"""Shares of time from which on throttling and steal time count as trouble."""

THROTTLED, STOLEN, CROWDED = 1, 2, 4
"""The bits of ``Signals.troubles``."""
TROUBLES = {
    THROTTLED: "its cgroup is throttled at the CPU quota",
    STOLEN: "its host gives CPU time to other guests (steal time)",
    CROWDED: "its host has fewer usable cores than the workers have threads",
}

Array = npt.NDArray[np.float64]
_DATA, _COMPUTE = PHASES.index("data"), PHASES.index("compute")


class Told(Protocol):
    """What a worker tells the others with each step (``unisono.training.header.Signals``)."""

    @property
    def seconds(self) -> tuple[float, float, float, float]: ...

    @property
    def work_s(self) -> float: ...

    @property
    def troubles(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class TimingBlock:
    """Some consecutive steps, in all of which the workers had the same ranges."""

    steps: int
    seconds: Array
    """Summed over these steps: float64 ``[workers, phases]``."""
    leaves: Array
    """Microbatches that each worker computed in them: float64 ``[workers]``."""
    troubles: tuple[int, ...]
    """The troubles of each worker in the last of them."""
    shares: tuple[int, ...]
    """Microbatches that each worker has in a full step."""
    full: int
    """How many of these steps were full: all microbatches held samples."""
    full_seconds: Array
    """Summed over these: float64 ``[workers, phases]``."""
    full_work_s: Array
    """Seconds of that spent on microbatches, without loading: float64 ``[workers]``."""


@dataclasses.dataclass(frozen=True)
class Straggler:
    """A worker that the others wait for."""

    rank: int
    slowness: float
    """Its time for a microbatch, as a multiple of the median worker's."""
    loading: bool
    """Whether it loses most of its time in loading samples."""
    troubles: int


class _Stretch(NamedTuple):
    """Consecutive steps with equally many microbatches."""

    steps: int
    filled: int
    """Microbatches of each of them that hold samples."""
    seconds: Array
    """By phase, and last ``work_s``, summed over these steps: float64 ``[workers, phases + 1]``."""


class Stragglers:
    """Collects what all workers tell, and finds stragglers. *Collective*: all workers call it with the same values.

    Args:
        ranges: Each worker's microbatches.
        warn: Called with a straggler when it is found, once for each worker.
    """

    def __init__(self, ranges: Sequence[Span], warn: Callable[[Straggler], None]) -> None:
        self._warn = warn
        self._named: set[int] = set()
        self.found: list[Straggler] = []
        """The stragglers that the last block showed."""
        self._due = 1  # steps of the next block, by the speed of the one before
        self.reassign(ranges)

    def reassign(self, ranges: Sequence[Span]) -> None:
        """From the next step on these are each worker's microbatches. Times measured with other ranges are dropped."""
        self._lo, self._hi = np.array(list(zip(*ranges, strict=True)))
        self._shares = tuple(hi - lo for lo, hi in ranges)
        self._full = ranges[-1][1]
        self._filled = -1  # microbatches of the steps whose times come next; -1: no step yet
        self._alike = 0  # how many such steps there were
        self._wait = self._due  # and how many there may be before a block is complete
        self._readings: Array = np.zeros((len(ranges), len(PHASES) + 1))  # when these steps began
        self._stretches: list[_Stretch] = []
        self._blocks: list[TimingBlock] = []

    def add(self, told: Sequence[Told], filled: int) -> TimingBlock | None:
        """Takes what the workers told with a step.

        Args:
            told: By rank; the seconds are those up to this step.
            filled: Microbatches of this step that hold samples.

        Returns:
            The block that this completes, if it does.
        """
        self._alike += 1
        if self._alike < self._wait and filled == self._filled:
            return None
        return self._read(told, filled)

    def _read(self, told: Sequence[Told], filled: int) -> TimingBlock | None:
        """A block may be complete, or the steps that follow have another number of microbatches."""
        before, self._filled = self._filled, filled
        steps, self._alike = self._alike, 0
        if len(told) == 1:
            self._wait = MOST_STEPS
            return None
        readings = np.array([(*one.seconds, one.work_s) for one in told])
        if before >= 0:
            self._stretches.append(_Stretch(steps, before, readings - self._readings))
        self._readings = readings
        self._wait = self._due - sum(stretch.steps for stretch in self._stretches)
        if self._wait > 0:
            return None
        block = self._block(tuple(one.troubles for one in told))
        self._stretches.clear()
        seconds = float(block.seconds[0].sum())
        self._wait = self._due = min(max(1, round(BLOCK_S * block.steps / seconds)), MOST_STEPS) if seconds > 0 else 1
        self._blocks.append(block)
        self.found = []
        window_s = sum(float(block.seconds[0].sum()) for block in self._blocks)
        if sum(block.steps for block in self._blocks) >= STEPS and window_s >= SECONDS:
            self._judge()
        return block

    def _block(self, troubles: tuple[int, ...]) -> TimingBlock:
        zeros = np.zeros_like(self._readings)
        full = [stretch for stretch in self._stretches if stretch.filled == self._full]
        seconds = sum((stretch.seconds for stretch in self._stretches), zeros)
        full_seconds = sum((stretch.seconds for stretch in full), zeros)
        return TimingBlock(
            steps=sum(stretch.steps for stretch in self._stretches),
            seconds=seconds[:, :-1],
            leaves=sum((stretch.steps * self._leaves(stretch.filled) for stretch in self._stretches), zeros[:, 0]),
            troubles=troubles,
            shares=self._shares,
            full=sum(stretch.steps for stretch in full),
            full_seconds=full_seconds[:, :-1],
            full_work_s=full_seconds[:, -1],
        )

    def _leaves(self, filled: int) -> Array:
        """How many of a step's microbatches each worker has, of which the first ``filled`` hold samples."""
        leaves: Array = np.clip(np.minimum(self._hi, filled) - self._lo, 0.0, None)
        return leaves

    def _judge(self) -> None:
        for straggler in find_stragglers(self._blocks):
            if straggler.rank not in self._named:
                self._named.add(straggler.rank)
                self.found.append(straggler)
                self._warn(straggler)
        self._blocks.clear()


def find_stragglers(blocks: Sequence[TimingBlock]) -> list[Straggler]:
    """*local*. The workers that were slow over all these blocks, and in most parts of them."""
    seconds = np.array([block.seconds[:, [_DATA, _COMPUTE]] for block in blocks])
    leaves = np.array([block.leaves for block in blocks])
    whole = _costs(seconds, leaves)
    cuts = [len(blocks) * part // PARTS for part in range(PARTS + 1)]
    parts = [_slow(_costs(seconds[lo:hi], leaves[lo:hi]).sum(axis=1)) for lo, hi in itertools.pairwise(cuts) if hi > lo]
    often = np.sum(parts, axis=0) * PARTS >= SLOW_PARTS * len(parts)
    # What a step costs once, whatever its microbatches, weighs more on a worker with few of them, which is still done first.
    own = seconds.sum(axis=(0, 2))
    ordered = np.sort(own)  # not np.median, whose first call takes 30 ms
    holding_up = own >= (ordered[(len(own) - 1) // 2] + ordered[len(own) // 2]) / 2
    costs = whole.sum(axis=1)
    typical = whole[np.argsort(costs)[(len(costs) - 1) // 2]]
    found = []
    for rank in np.flatnonzero(_slow(costs) & often & holding_up):
        excess = whole[rank] - typical
        troubles = int(np.bitwise_or.reduce([block.troubles[rank] for block in blocks]))
        found.append(Straggler(int(rank), float(costs[rank] / typical.sum()), bool(excess[0] > excess[1]), troubles))
    return found


def _costs(seconds: Array, leaves: Array) -> Array:
    """Seconds that a microbatch took each worker to load and to compute: float64 ``[workers, 2]``.

    Args:
        seconds: Of each block, float64 ``[blocks, workers, 2]``.
        leaves: Microbatches in it, float64 ``[blocks, workers]``.
    """
    costs: Array = seconds.sum(axis=0) / np.maximum(leaves.sum(axis=0), 1)[:, None]
    return costs


def _slow(costs: Array) -> npt.NDArray[np.bool_]:
    median = np.sort(costs)[(len(costs) - 1) // 2]
    slow: npt.NDArray[np.bool_] = (costs >= SLOWER * median) & (costs > 0)
    return slow


def warning(straggler: Straggler, identity: str) -> str:
    """*local*. The warning's text; ``identity`` names the worker's host and process."""
    return f"worker {straggler.rank} ({identity}) is slow: {reason(straggler)}"


def reason(straggler: Straggler) -> str:
    """*local*. How slow it is, and why."""
    causes = ["most of that is loading samples: raise Loader(num_workers=...), or look at its disk"] if straggler.loading else []
    causes += [text for bit, text in TROUBLES.items() if straggler.troubles & bit]
    cause = f"Likely cause: {'; '.join(causes)}" if causes else "The system shows no cause: see what else runs on that host"
    return (
        f"a microbatch takes it {straggler.slowness:.2f} times as long as the median worker, and the others wait for it. {cause}"
    )


def warn_about(identity: Callable[[int], str], *, main: bool) -> Callable[[Straggler], None]:
    """*local*. What ``Stragglers`` calls: warns on the main worker.

    Args:
        identity: Host and process of a worker, by rank.
        main: Whether this is the main worker.
    """

    def warn(straggler: Straggler) -> None:
        if main:
            warnings.warn(warning(straggler, identity(straggler.rank)), stacklevel=2)

    return warn


class HostMonitor:
    """Looks from time to time for what slows this worker's host down. *Local.*

    Args:
        world: How many workers this host has, and their threads.
        root: Where /proc and /sys/fs/cgroup are looked up.
        clock: Gives seconds; only differences are used.
    """

    def __init__(self, world: World, *, root: Path = Path("/"), clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._root = clock, root
        self._cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        self._fixed = CROWDED if world.local_size * world.threads > usable_cores(root) else 0
        self._troubles = self._fixed
        self._looked_s = clock()
        self._counts = self._read()

    def troubles(self) -> int:
        """What may slow this worker down, as bits, found at most ``LOOK_EVERY_S`` ago."""
        now = self._clock()
        elapsed_s = now - self._looked_s
        if elapsed_s >= LOOK_EVERY_S:
            counts = self._read()
            throttled_s, stolen, ticks = (new - old for new, old in zip(counts, self._counts, strict=True))
            throttled, robbed = throttled_s >= THROTTLED_SHARE * elapsed_s, stolen >= max(1, STOLEN_SHARE * ticks)
            self._troubles = self._fixed | THROTTLED * throttled | STOLEN * robbed
            self._looked_s, self._counts = now, counts
        return self._troubles

    def _read(self) -> tuple[float, int, int]:
        """Seconds that this process's cgroups were throttled, on all cores; ticks stolen from its cores, and all their ticks."""
        stolen = ticks = 0
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in (self._root / "proc/stat").read_text().splitlines():
                name, *fields = line.split()
                if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in self._cores:
                    # user nice system idle iowait irq softirq steal; guest time is counted in user already
                    stolen += int(fields[7])
                    ticks += sum(map(int, fields[:8]))
        return sum(cgroup.throttled_s for cgroup in throttling(self._root)), stolen, ticks
