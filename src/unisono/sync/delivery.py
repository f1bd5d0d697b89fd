"""Finished gradients on their way from whoever summed them up to all who update with them.

Where each host keeps all of the state, every parameter is updated once a host. Its gradient is summed up by one worker of all
and brought to the others, instead of being summed up on each host: from three hosts on these are fewer bytes, those of a ring
all-reduce on any number of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from unisono.collective import Collective, Expected
from unisono.layout import Layout, allocate
from unisono.sync.fold import Sums

Part = tuple[int, int]
"""Elements ``lo <= i < hi`` of a block."""


class Delivery:
    """Brings sums to those who update with them. *Collective* as a whole.

    Args:
        layout: Where parameters lie.
        collective: The workers.
        summed: For each block, the elements that each worker sums up: each element once.
        updated: For each block, the elements that each worker updates.
    """

    def __init__(
        self, layout: Layout, collective: Collective, summed: Sequence[Sequence[Part]], updated: Sequence[Sequence[Part]]
    ) -> None:
        self._layout = layout
        self._collective = collective
        self._summed = summed
        self._updated = updated
        self._room: Sums | None = None

    def deliver(self, stretches: Sequence[tuple[int, int, int]], holder: Sums | None) -> Sums:
        """*collective*.

        Args:
            stretches: What is to be delivered: block, first element, and the element behind the last one.
            holder: The sums that this worker has finished, in its elements; None: it had none to finish.

        Returns:
            The sums in the elements that this worker updates, in memory of its own.
        """
        collective, rank = self._collective, self._collective.rank
        if self._room is None:
            self._room = Sums(self._layout, allocate)
        outgoing = [
            [] if holder is None else [holder.flats[block][lo:hi] for block, lo, hi in self._parts(stretches, rank, peer)]
            for peer in range(collective.size)
        ]
        incoming: list[list[Expected]] = []
        for peer in range(collective.size):
            kinds = [(self._layout.blocks[block], hi - lo) for block, lo, hi in self._parts(stretches, peer, rank)]
            incoming.append([(numel, block.dtype, block.device) for block, numel in kinds])
        received = collective.exchange(outgoing, incoming, name="delivery")
        for peer, tensors in enumerate(received):
            for (block, lo, hi), tensor in zip(self._parts(stretches, peer, rank), tensors, strict=True):
                self._room.flats[block][lo:hi].copy_(tensor)
        return self._room

    def _parts(self, stretches: Sequence[tuple[int, int, int]], source: int, target: int) -> list[tuple[int, int, int]]:
        """Of each stretch, what ``source`` sums up and ``target`` updates; without those of which that is nothing."""
        found = []
        for block, lo, hi in stretches:
            (from_lo, from_hi), (to_lo, to_hi) = self._summed[block][source], self._updated[block][target]
            part = max(lo, from_lo, to_lo), min(hi, from_hi, to_hi)
            if part[0] < part[1]:
                found.append((block, *part))
        return found
