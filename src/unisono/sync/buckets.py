"""Slots that are reduced together: all of a block, or as many as leave together during backward. Everything here is *local*."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from unisono.layout import Layout, Slot


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A run of slots of one block, reduced together."""

    number: int
    block: int
    slots: tuple[Slot, ...]
    lo: int
    hi: int

    def part(self, bounds: tuple[int, int]) -> tuple[int, int]:
        """The elements of the block that lie in both."""
        return max(self.lo, bounds[0]), min(self.hi, bounds[1])


def buckets(layout: Layout, limit_bytes: float | None, skip: Collection[int]) -> list[Bucket]:
    """Runs of neighbouring slots, none of them in ``skip``, of at most ``limit_bytes`` (or one slot), from the last layer to the
    first; None: as long as they can be."""
    found: list[Bucket] = []
    for number in reversed(range(len(layout.blocks))):
        block = layout.blocks[number]
        ends = block.ends
        stop = len(block.slots)
        while stop:
            start = stop - 1
            if block.slots[start].index in skip:
                stop = start
                continue
            while (
                start
                and block.slots[start - 1].index not in skip
                and (
                    limit_bytes is None or (ends[stop - 1] - block.slots[start - 1].offset) * block.dtype.itemsize <= limit_bytes
                )
            ):
                start -= 1
            found.append(Bucket(len(found), number, block.slots[start:stop], lo=block.slots[start].offset, hi=ends[stop - 1]))
            stop = start
    return found
