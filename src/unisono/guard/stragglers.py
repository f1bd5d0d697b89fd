"""A worker that is slower than the others is named once, with the likely cause where the system knows it.

With every step each worker tells all others where its time has gone so far. From that everybody reckons the same: what a
microbatch costs each worker in computing and loading. Compared are sums over a window of at least ``STEPS`` steps and
``SECONDS`` seconds, as differences of what was told at its ends: the steps in between cost nothing. A single hiccup is no
straggler, so a worker must be slow in most parts of the window, too.
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
"""Steps are summed up in blocks of about this time, or of one step if that takes longer, or of ``MOST_STEPS`` if those take
less."""
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
    """What a worker says with each step (``unisono.training.header.Signals``)."""

    @property
    def seconds(self) -> tuple[float, float, float, float]: ...

    @property
    def work_s(self) -> float: ...

    @property
    def troubles(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Block:
    """Some steps of all workers, who had the same ranges in all of them."""

    steps: int
    seconds: Array
    """Summed over these steps: float64 ``[workers, phases]``."""
    leaves: Array
    """Microbatches that each worker computed in them: float64 ``[workers]``."""
    troubles: tuple[int, ...]
    """What each worker complained of in the last of them."""
    shares: tuple[int, ...]
    """Microbatches that each worker has in a full step."""
    full: int
    """How many of these steps were full: all microbatches held samples."""
    full_seconds: Array
    """Summed over these: float64 ``[workers, phases]``."""
    full_work_s: Array
    """What of that went into microbatches, loading aside, summed over these: float64 ``[workers]``."""


@dataclasses.dataclass(frozen=True)
class Straggler:
    """A worker that the others wait for."""

    rank: int
    slowness: float
    """Its time for a microbatch, in that of the median worker."""
    loading: bool
    """Whether most of what it takes longer goes into loading samples."""
    troubles: int


class _Stretch(NamedTuple):
    """Steps that follow each other, with as many microbatches each."""

    steps: int
    filled: int
    """Microbatches of each of them that hold samples."""
    seconds: Array
    """By phase, and last ``work_s``, summed over these steps: float64 ``[workers, phases + 1]``."""


class Stragglers:
    """Collects what all workers tell, and finds stragglers. *Collective*: all workers call it with the same.

    Args:
        ranges: Each worker's microbatches.
        warn: Called with a straggler when it is found, once for each worker.
    """

    def __init__(self, ranges: Sequence[Span], warn: Callable[[Straggler], None]) -> None:
        self._warn = warn
        self._named: set[int] = set()
        self.found: list[Straggler] = []
        """Whom the last block named."""
        self._due = 1  # steps of the next block, by the speed of the one before
        self._blocks: list[Block] = []
        self._steps, self._seconds = 0, 0.0  # of these blocks
        self.reassign(ranges)

    def reassign(self, ranges: Sequence[Span]) -> None:
        """From the next step on these are each worker's microbatches. What was told of others is forgotten."""
        self._lo, self._hi = np.array(list(zip(*ranges, strict=True)))
        self._shares = tuple(hi - lo for lo, hi in ranges)
        self._full = ranges[-1][1]
        self._full_leaves: Array = (self._hi - self._lo).astype(np.float64)
        self._filled = -1  # microbatches of the steps that are to be told; -1: no step yet
        self._alike = 0  # so many of these steps there have been
        self._wait = self._due  # and so many there may be before a block is complete
        self._readings: Array = np.zeros((len(ranges), len(PHASES) + 1))  # when these steps began
        self._stretches: list[_Stretch] = []
        self._forget()

    def add(self, told: Sequence[Told], filled: int) -> Block | None:
        """Takes what was told with a step.

        Args:
            told: By rank; the seconds are those up to this step.
            filled: Microbatches of this step that hold samples.

        Returns:
            The block that this completes, if it does.
        """
        self._alike += 1
        if self._alike < self._wait and filled == self._filled:
            return None
        return self._look(told, filled)

    def _look(self, told: Sequence[Told], filled: int) -> Block | None:
        """A block may be complete, or the steps that follow have other microbatches."""
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
        self._steps += block.steps
        self._seconds += seconds
        self.found = []
        if self._steps >= STEPS and self._seconds >= SECONDS:
            self._judge()
        return block

    def _block(self, troubles: tuple[int, ...]) -> Block:
        stretches = self._stretches
        full = [stretch for stretch in stretches if stretch.filled == self._full]
        seconds = full_seconds = stretches[0].seconds
        if len(stretches) > 1 or not full:
            seconds = np.sum([stretch.seconds for stretch in stretches], axis=0)
            full_seconds = np.sum([np.zeros_like(seconds), *(stretch.seconds for stretch in full)], axis=0)
        return Block(
            steps=sum(stretch.steps for stretch in stretches),
            seconds=seconds[:, :-1],
            leaves=np.sum([stretch.steps * self._leaves(stretch.filled) for stretch in stretches], axis=0),
            troubles=troubles,
            shares=self._shares,
            full=sum(stretch.steps for stretch in full),
            full_seconds=full_seconds[:, :-1],
            full_work_s=full_seconds[:, -1],
        )

    def _leaves(self, filled: int) -> Array:
        if filled == self._full:
            return self._full_leaves
        leaves: Array = np.clip(np.minimum(self._hi, filled) - self._lo, 0.0, None)
        return leaves

    def _judge(self) -> None:
        for straggler in find_stragglers(self._blocks):
            if straggler.rank not in self._named:
                self._named.add(straggler.rank)
                self.found.append(straggler)
                self._warn(straggler)
        self._forget()

    def _forget(self) -> None:
        self._blocks.clear()
        self._steps, self._seconds = 0, 0.0


def find_stragglers(blocks: Sequence[Block]) -> list[Straggler]:
    """*local*. Who was slow over all these blocks, and in most parts of them."""
    seconds = np.array([block.seconds[:, [_DATA, _COMPUTE]] for block in blocks])
    leaves = np.array([block.leaves for block in blocks])
    whole = _costs(seconds, leaves)
    cuts = [len(blocks) * part // PARTS for part in range(PARTS + 1)]
    parts = [_slow(_costs(seconds[lo:hi], leaves[lo:hi]).sum(axis=1)) for lo, hi in itertools.pairwise(cuts) if hi > lo]
    often = np.sum(parts, axis=0) * PARTS >= SLOW_PARTS * len(parts)
    # A worker that has less to do than the others pays what is due once a step with fewer microbatches, and is still done first.
    own = seconds.sum(axis=(0, 2))
    ordered = np.sort(own)  # not np.median, whose first call takes 30 ms
    holding_up = own >= (ordered[(len(own) - 1) // 2] + ordered[len(own) // 2]) / 2
    costs = whole.sum(axis=1)
    found = []
    for rank in np.flatnonzero(_slow(costs) & often & holding_up):
        typical = whole[np.argsort(costs)[(len(costs) - 1) // 2]]
        excess = whole[rank] - typical
        troubles = 0
        for block in blocks:
            troubles |= block.troubles[rank]
        found.append(
            Straggler(int(rank), float(costs[rank] / typical.sum()), bool(excess[0] > excess[1]), troubles),
        )
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
    """*local*. The text that a person sees.

    Args:
        identity: Host and process of the worker.
    """
    return f"worker {straggler.rank} ({identity}) is slow: {reason(straggler)}"


def reason(straggler: Straggler) -> str:
    """*local*. How slow it is, and why."""
    causes = ["most of that is loading samples: raise Loader(num_workers=...), or look at its disk"] if straggler.loading else []
    causes += [text for bit, text in TROUBLES.items() if straggler.troubles & bit]
    cause = f"Likely cause: {'; '.join(causes)}" if causes else "The system knows no cause: look what else runs on that host"
    return (
        f"a microbatch takes it {straggler.slowness:.2f} times as long as the median worker, and the others wait for it. {cause}"
    )


def warn_about(identity: Callable[[int], str], *, main: bool) -> Callable[[Straggler], None]:
    """*local*. What ``Stragglers`` calls: warns on the worker that speaks for all.

    Args:
        identity: Host and process of a worker, by rank.
        main: Whether this is that worker.
    """

    def warn(straggler: Straggler) -> None:
        if main:
            warnings.warn(warning(straggler, identity(straggler.rank)), stacklevel=2)

    return warn


# ---------------------------------------------------------------------- the machine


class Machine:
    """Looks at this worker's machine now and then. *Local.*

    Args:
        world: How many workers this host has, and their threads.
        root: Where /proc and /sys/fs/cgroup are looked up.
        clock: Gives seconds; only differences are used.
    """

    def __init__(self, world: World, *, root: Path = Path("/"), clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stat = root / "proc/stat"
        self._root = root
        self._cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        self._fixed = CROWDED if world.local_size * world.threads > usable_cores(root) else 0
        self._troubles = self._fixed
        self._looked_s = clock()
        self._throttled_s, (self._stolen, self._ticks) = self._read_throttled(), self._read_ticks()

    def troubles(self) -> int:
        """What might slow this worker down, as bits; as of the last look, at most ``LOOK_EVERY_S`` ago."""
        now = self._clock()
        if now - self._looked_s >= LOOK_EVERY_S:
            self._look(now - self._looked_s)
            self._looked_s = now
        return self._troubles

    def _look(self, elapsed_s: float) -> None:
        throttled_s, (stolen, ticks) = self._read_throttled(), self._read_ticks()
        throttled = throttled_s - self._throttled_s >= THROTTLED_SHARE * elapsed_s
        robbed = stolen - self._stolen >= max(1, STOLEN_SHARE * (ticks - self._ticks))
        self._troubles = self._fixed | THROTTLED * throttled | STOLEN * robbed
        self._throttled_s, self._stolen, self._ticks = throttled_s, stolen, ticks

    def _read_throttled(self) -> float:
        """Seconds that the cgroups around this process have been throttled, all cores together."""
        return sum(cgroup.throttled_s for cgroup in throttling(self._root))

    def _read_ticks(self) -> tuple[int, int]:
        """Ticks that this process's cores were stolen, and all their ticks."""
        stolen = ticks = 0
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in self._stat.read_text().splitlines():
                name, *fields = line.split()
                if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in self._cores:
                    # user nice system idle iowait irq softirq steal; guest time is counted in user already
                    stolen += int(fields[7])
                    ticks += sum(map(int, fields[:8]))
        return stolen, ticks
