"""The fold: one worker's microbatches, summed along the tree into pieces. Everything here is *local*.

A sum of gradients lies in flat memory that the transport sends well. Two kinds of gradients need no copy into it: large ones
of parameters that this worker updates itself are kept where backward wrote them, and those with few rows (of an embedding
table) stay rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from unisono.layout import ALIGNMENT_BYTES, Allocate, Layout, Slot
from unisono.sync.rows import Rows
from unisono.tree import Span, is_node, middle


class Sums:
    """A gradient, or a sum of gradients, of all parameters.

    Args:
        layout: Where they lie.
        allocate: Gives the flat memory.

    Attributes:
        flats: One flat tensor a block.
        views: Each slot's sum: a view into ``flats``, or the tensor that backward made, if that was kept.
        rows: The sums of slots that have few rows, by index.
    """

    def __init__(self, layout: Layout, allocate: Allocate) -> None:
        self.flats = [allocate(block.numel, block.dtype, block.device) for block in layout.blocks]
        self._homes = layout.views(self.flats)
        self.views = list(self._homes)
        self.rows: dict[int, Rows] = {}
        self._kept: set[int] = set()
        for block, flat in zip(layout.blocks, self.flats, strict=True):
            for slot, end in zip(block.slots, block.ends, strict=True):
                flat[slot.offset + slot.numel : end].zero_()  # padding is added along: it must never hold a NaN

    def keep(self, slot: Slot, gradient: Tensor) -> bool:
        """Takes ``gradient`` itself as the slot's sum, if it lies as the slot would: same strides, aligned."""
        if gradient.stride() != slot.stride or gradient.data_ptr() % ALIGNMENT_BYTES:
            return False
        self.views[slot.index] = gradient.detach()
        self._kept.add(slot.index)
        return True

    def flat(self, slot: Slot) -> Tensor:
        """The slot's elements as they lie in memory, 1-D."""
        view = self.views[slot.index]
        return view.as_strided((slot.numel,), (1,), view.storage_offset())

    def release(self, slots: Collection[int] | None = None) -> None:
        """Drops what was kept of these slots (of all, if None): they lie in the flat memory again, for another sum."""
        for index in self._kept if slots is None else self._kept.intersection(slots):
            self.views[index] = self._homes[index]
        if slots is None:
            self._kept.clear()
            self.rows.clear()
        else:
            self._kept.difference_update(slots)


@dataclasses.dataclass(frozen=True)
class NodePlan:
    """What a microbatch, or a node, does to the stack of sums: put or add its gradients to ``target``, then merge neighbours."""

    target: Sums
    fresh: bool
    merges: tuple[tuple[Sums, Sums], ...]


class LocalFold:
    """Sums the gradients of one worker's microbatches, which arrive in order.

    Args:
        layout: Where parameters lie.
        span: This worker's microbatches.
        microbatches: M, microbatches a step.
        allocate: Gives memory from which the transport sends.
        kept: Slots (by index) whose gradient may stay where backward wrote it, since nobody else reads it.
        sparse: Slots whose gradients stay rows.
        resting: Whether sums that were sent must be left alone for one more step, since others may still read them.

    Attributes:
        present: For each slot, 1 if any own microbatch of this step had a gradient for it.
        stack: The pieces folded so far: node and sum, None if all its leaves are absent.
        stray: Slots of ``sparse`` that had a dense gradient in this step.
        last: This worker's last microbatch that holds samples.
    """

    def __init__(
        self,
        layout: Layout,
        span: Span,
        microbatches: int,
        allocate: Allocate,
        *,
        kept: Collection[int],
        sparse: Collection[int],
        resting: bool,
    ) -> None:
        self._layout = layout
        self._span = span
        self._microbatches = microbatches
        self._allocate = allocate
        self._kept = frozenset(kept)
        self.sparse = frozenset(sparse)
        self._rests = resting
        self._pool: list[Sums] = []
        self._resting: list[Sums] = []
        self.stack: list[tuple[Span, Sums | None]] = []
        self.present = bytearray(len(layout.slots))
        self.stray: set[int] = set()
        self.last: int | None = None

    def begin(self, filled: int) -> None:
        """A step in which microbatches ``0 <= m < filled`` hold samples."""
        used = [sums for _, sums in self.stack if sums is not None]
        for sums in used:
            sums.release()
        if self._rests:
            used, self._resting = self._resting, used
        self._pool += used
        self.stack.clear()
        self.present[:] = bytes(len(self.present))
        self.stray.clear()
        lo, hi = self._span
        self.last = min(hi, filled) - 1 if filled > lo else None

    def reassign(self, span: Span) -> None:
        """From the next step on this worker has these microbatches. Sums are used again: memory of a transport is never given
        back."""
        self._span = span

    def densify(self, slots: Collection[int]) -> None:
        """From the next step on, the gradients of these slots are dense."""
        self.sparse -= frozenset(slots)

    def pieces(self) -> list[Sums]:
        """The sums of this worker's pieces, in order of microbatches."""
        return [sums for _, sums in self.stack if sums is not None]

    def plan(self, span: Span) -> NodePlan:
        """Puts a node on the stack, and the absent microbatches behind the last; the sums themselves follow in ``fold``."""
        last = span[1] - 1
        left = self.stack[-1][1] if self._completes(span) else None
        fresh = left is None
        if left is None:
            target = self._pool.pop() if self._pool else Sums(self._layout, self._allocate)
        else:
            # Adding a microbatch to its sibling's memory is the tree's own sum: a + b, in place.
            target = left
            span = (self.stack.pop()[0][0], span[1])
        merges, span, sums = self._merge(span, target)
        self.stack.append((span, sums))
        if last == self.last:
            for absent in range(last + 1, self._span[1]):
                more, span, rest = self._merge((absent, absent + 1), None)
                merges += more
                self.stack.append((span, rest))
        return NodePlan(target, fresh, tuple(merges))

    def fold(self, plan: NodePlan, slots: Sequence[Slot], gradients: Sequence[Tensor | None]) -> None:
        """Takes the gradients of these slots into the sums.

        Args:
            gradients: By slot index, of all slots.
        """
        grads: list[Tensor] = []
        places: list[Tensor] = []
        target = plan.target
        for slot in slots:
            grad = gradients[slot.index]
            if grad is None:
                if plan.fresh and slot.index not in self.sparse:
                    # -0.0 is what adding leaves untouched, sign of zero included: the sum of an absent microbatch and x is x.
                    real(target.views[slot.index]).fill_(-0.0)
                continue
            self.present[slot.index] = 1
            if slot.index in self.sparse:
                self._take_rows(target, slot, grad)
                continue
            if grad.layout != torch.strided:
                grad = grad.to_dense()
            if not (plan.fresh and slot.index in self._kept and target.keep(slot, grad)):
                grads.append(real(grad))
                places.append(real(target.views[slot.index]))
        with torch.no_grad():
            if places:
                (torch._foreach_copy_ if plan.fresh else torch._foreach_add_)(places, grads)
            for left, right in plan.merges:
                _merge(left, right, slots, self.sparse)

    def _take_rows(self, target: Sums, slot: Slot, grad: Tensor) -> None:
        if grad.layout != torch.sparse_coo:
            self.stray.add(slot.index)
            return
        rows = Rows.of(grad)
        held = target.rows.get(slot.index)
        target.rows[slot.index] = rows if held is None else held + rows

    def _merge(self, span: Span, sums: Sums | None) -> tuple[list[tuple[Sums, Sums]], Span, Sums | None]:
        merges: list[tuple[Sums, Sums]] = []
        while self._completes(span):
            (lo, _), left = self.stack.pop()
            span = (lo, span[1])
            if left is not None and sums is not None:
                merges.append((left, sums))
                self._pool.append(sums)
            sums = sums if left is None else left
        return merges, span, sums

    def _completes(self, span: Span) -> bool:
        if not self.stack:
            return False
        lo, hi = self.stack[-1][0][0], span[1]
        return is_node(lo, hi, self._microbatches) and middle(lo, hi) == span[0]


def _merge(left: Sums, right: Sums, slots: Sequence[Slot], sparse: Collection[int]) -> None:
    """``left += right`` in these slots; ``right`` is free afterwards."""
    dense = [slot.index for slot in slots if slot.index not in sparse]
    if dense:
        torch._foreach_add_([real(left.views[i]) for i in dense], [real(right.views[i]) for i in dense])
    for slot in slots:
        more = right.rows.pop(slot.index, None)
        if more is not None:
            held = left.rows.get(slot.index)
            left.rows[slot.index] = more if held is None else held + more
    right.release({slot.index for slot in slots})


def real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones: their own sum multiplies by 1 + 0i first, which may change the sign of a zero."""
    return torch.view_as_real(tensor.resolve_conj().resolve_neg()) if tensor.is_complex() else tensor
