"""Who sums up, updates and saves which parameters. Everything here is *local*, and the same on all workers.

Usually each worker does all three for the parameters of its segment. A small model is summed up and updated by every worker as a
whole, and so is one whose optimizer may mix parameters in its update. Where each host is to have all state, the workers of every
host divide all parameters among them. On more than two such hosts, and where more than two workers update a large model as a
whole, each gradient is still summed up by one worker of all, who relays it to the others (``delivery.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from unisono.collective import Collective
from unisono.collective.hosts import HostMap
from unisono.layout import Layout, Segment

Bounds = tuple[int, int]
"""Elements ``lo <= i < hi`` of a block."""


class Ownership:
    """See the module.

    Args:
        layout: Where parameters lie.
        collective: The workers.
        hosts: The same by host.
        per_host: Whether each host is to have all state.
        small: Whether every worker may well update the whole model.
        whole: Whether every worker has to.

    Attributes:
        segments: For each block, each worker's segment: what it saves, and what it publishes.
        apart: Whether there are several hosts, each of which updates everything.
        replicates: Whether, where there are several workers, every one updates every parameter.
        replicated: Whether there are, and does.
        delivers: Whether those who sum up a gradient are not those who update with it.
        summed: For each block, the elements that each worker sums up.
        updated: For each block, the elements that each worker updates.
        measurers: Workers that sum up all gradients among them, each one once.
        savers: Workers that save what they update; the others update the same.
    """

    def __init__(
        self, layout: Layout, collective: Collective, hosts: HostMap, *, per_host: bool, small: bool, whole: bool = False
    ) -> None:
        everybody = tuple(range(collective.size))
        self.apart = per_host and len(hosts.groups) > 1
        groups = hosts.groups if self.apart else [everybody]
        self.segments: list[tuple[Segment, ...]] = [
            tuple(itertools.chain.from_iterable(of_host))
            for of_host in zip(*(layout.segments(len(group)) for group in groups), strict=True)
        ]
        self.savers = groups[0]
        self._updaters = next(group for group in groups if collective.rank in group)
        # Only CPU memory can be held in common by a host: elsewhere every worker has to have everything.
        lone = max(map(len, groups)) == 1 if self.apart else per_host and layout.blocks[0].device.type != "cpu"
        self.replicates = small or lone or whole
        self.replicated = collective.size > 1 and self.replicates
        self.delivers = not small and ((self.apart and len(groups) > 2) or (whole and collective.size > 2))
        self.measurers = everybody if self.delivers else self._updaters
        self._summed_segments = layout.segments(collective.size) if self.delivers else self.segments
        everything = [[(0, block.numel)] * collective.size for block in layout.blocks]
        self.summed = everything if self.replicated and not self.delivers else _bounds(self._summed_segments)
        self.updated = everything if self.replicated else _bounds(self.segments)

    def saved_by(self, rank: int) -> list[int]:
        """The slots (by index) whose optimizer state a worker saves."""
        return _slots(self.segments, rank) if rank in self.savers else []

    def updated_by(self, rank: int) -> list[int]:
        """The slots (by index) that a worker updates."""
        if not self.replicated:
            return _slots(self.segments, rank)
        return [slot.index for segments in self.segments for peer in self._updaters for slot in segments[peer].slots]

    def summed_by(self, rank: int) -> list[int]:
        """The slots (by index) whose gradients a worker sums up."""
        return _slots(self._summed_segments, rank) if self.delivers else self.updated_by(rank)


def _slots(segments: Sequence[Sequence[Segment]], rank: int) -> list[int]:
    return [slot.index for of_block in segments for slot in of_block[rank].slots]


def _bounds(segments: Sequence[Sequence[Segment]]) -> list[list[Bounds]]:
    return [[(segment.lo, segment.hi) for segment in of_block] for of_block in segments]
