"""Gradients of few rows on their way to whoever updates the parameter.

How many rows a piece has is known to its worker alone, so the numbers travel first, along with the step's other notes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Collection, Sequence
from itertools import compress

import torch
from torch import Tensor

from unisono.collective import Collective, Expected
from unisono.layout import Layout, Slot
from unisono.sync.fold import LocalFold, Sums
from unisono.sync.rows import RowBuffer, Rows
from unisono.tree import Span, combine


class RowExchange:
    """Sums the rows of sparse slots over all workers. *Collective* as a whole.

    Args:
        slots: The slots whose gradients have few rows.
        pieces: Each worker's pieces.
        microbatches: M.
        updated_by: The slots (by index) that a worker updates.

    Attributes:
        strays: Slots (by index) for which some worker had a dense gradient in this step.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        layout: Layout,
        collective: Collective,
        pieces: Sequence[Sequence[Span]],
        microbatches: int,
        updated_by: Callable[[int], Collection[int]],
    ) -> None:
        self.slots = list(slots)
        self._layout = layout
        self._collective = collective
        self._pieces = pieces
        self._microbatches = microbatches
        updated = [set(updated_by(rank)) for rank in range(collective.size)]
        self._wanted = [[slot.index in mine for slot in slots] for mine in updated]
        self._filled = 0
        self._counts: list[list[tuple[int, ...]]] = []
        self._buffers: dict[int, RowBuffer] = {}
        self.strays: set[int] = set()

    def begin(self, filled: int) -> None:
        """*local*. A step in which microbatches ``0 <= m < filled`` hold samples."""
        self._filled = filled
        self.strays.clear()

    def reassign(self, pieces: Sequence[Sequence[Span]]) -> None:
        """*local*. From the next step on these are the pieces of each worker."""
        self._pieces = pieces

    def densify(self, slots: Collection[int]) -> None:
        """*local*. Leaves these slots (by index) to those who sum dense gradients."""
        stay = [slot.index not in slots for slot in self.slots]
        self._wanted = [list(compress(wanted, stay)) for wanted in self._wanted]
        self.slots = list(compress(self.slots, stay))

    def note(self, fold: LocalFold) -> bytes:
        """*local*. What the others must know first: for each slot, whether it strayed, and the rows of each own piece."""
        own = fold.pieces()
        numbers: list[int] = []
        for slot in self.slots:
            numbers.append(slot.index in fold.stray)
            numbers += [len(sums.rows[slot.index].indices) if slot.index in sums.rows else 0 for sums in own]
        return struct.pack(f"<{len(numbers)}q", *numbers)

    def note_size(self, worker: int) -> int:
        """*local*. Bytes of that worker's note."""
        return 8 * len(self.slots) * (1 + len(self._present(worker))) if self.slots else 0

    def read(self, notes: Sequence[memoryview]) -> None:
        """*local*. Takes all workers' notes, in order of rank."""
        self._counts = []
        for worker, note in enumerate(notes):
            numbers = struct.unpack(f"<{self.note_size(worker) // 8}q", note)
            width = len(numbers) // len(self.slots)
            lines = [numbers[start : start + width] for start in range(0, len(numbers), width)]
            self._counts.append([line[1:] for line in lines])
            self.strays |= {slot.index for slot, line in zip(self.slots, lines, strict=True) if line[0]}

    def finish(self, own: Sequence[Sums], count: float) -> list[tuple[Slot, Rows, Tensor]]:
        """*collective*. For each slot that this worker updates: the rows of the sum, divided by ``count``, and the dense
        gradient that they are. A slot that no piece has rows for is left out."""
        if not self.slots:
            return []
        rank, size = self._collective.rank, self._collective.size
        outgoing = [
            [] if peer == rank else [t for number in self._of(peer) for t in self._packed(own, number)] for peer in range(size)
        ]
        incoming = [[] if peer == rank else self._announced(peer) for peer in range(size)]
        arrived = self._collective.exchange(outgoing, incoming, name="rows")
        streams = [iter(tensors) for tensors in arrived]
        found: list[tuple[Slot, Rows, Tensor]] = []
        for number in self._of(rank):
            slot = self.slots[number]
            parts: dict[Span, Rows | None] = {span: None for spans in self._pieces for span in spans}
            for peer in range(size):
                for place, span in enumerate(self._present(peer)):
                    if peer == rank:
                        parts[span] = own[place].rows.get(slot.index)
                    elif self._counts[peer][number][place]:
                        indices, values = next(streams[peer]), next(streams[peer])
                        parts[span] = Rows(indices, values.view(-1, *slot.shape[1:]))
            total = combine(parts, self._microbatches, Rows.__add__)
            if total is not None:
                # A lone piece is somebody else's memory, or the fold's: divided into memory of its own.
                rows = Rows(total.indices.clone(), total.values / count)
                found.append((slot, rows, self._buffer(slot).fill(rows)))
        return found

    def _present(self, worker: int) -> list[Span]:
        return [span for span in self._pieces[worker] if span[0] < self._filled]

    def _of(self, worker: int) -> list[int]:
        return [number for number, wanted in enumerate(self._wanted[worker]) if wanted]

    def _packed(self, own: Sequence[Sums], number: int) -> list[Tensor]:
        index = self.slots[number].index
        rows = [sums.rows[index] for sums in own if index in sums.rows and len(sums.rows[index].indices)]
        return [t for part in rows for t in (part.indices.contiguous(), part.values.contiguous().view(-1))]

    def _announced(self, peer: int) -> list[Expected]:
        expected: list[Expected] = []
        for number in self._of(self._collective.rank):
            slot = self.slots[number]
            block, width = self._layout.blocks[slot.block], math.prod(slot.shape[1:])
            for rows in self._counts[peer][number]:
                if rows:
                    expected += [(rows, torch.int64, block.device), (rows * width, block.dtype, block.device)]
        return expected

    def _buffer(self, slot: Slot) -> RowBuffer:
        if slot.index not in self._buffers:
            block = self._layout.blocks[slot.block]
            self._buffers[slot.index] = RowBuffer(
                torch.zeros(slot.numel, dtype=block.dtype, device=block.device).as_strided(slot.shape, slot.stride)
            )
        return self._buffers[slot.index]
