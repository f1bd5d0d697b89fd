"""The end of the reduction: for the slots that a worker updates, the tree over all workers' pieces, one division, and norms.

On a CPU this goes over memory in stretches that stay in the cache, so that adding, dividing and taking the norm cost one
journey of the gradient through memory instead of three. Everything here is *local*.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from unisono.errors import ConfigurationError
from unisono.layout import Allocate, Layout, Slot
from unisono.sync.fold import Sums, real
from unisono.tree import Span, combine

_STRETCH = 128 * 1024
"""Elements that are added, divided and measured in one go on a CPU: 512 KiB of float32, a quarter of a usual L2 cache.
Part of the result: the norm of a larger parameter is put together from those of its stretches."""


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Elements ``lo <= i < hi`` of a block that are finished in one go: several whole slots, or a part of one large slot."""

    block: int
    lo: int
    hi: int
    slots: tuple[Slot, ...]
    large: bool


def stretches(block: int, slots: Sequence[Slot], ends: Mapping[int, int], device: torch.device) -> list[Stretch]:
    """Cuts neighbouring slots of a block into stretches.

    Args:
        ends: Where each slot's room ends, by index.
        device: On CUDA every stretch costs a kernel launch and there is no cache to stay in: one for all.
    """
    if device.type != "cpu":
        return [Stretch(block, slots[0].offset, ends[slots[-1].index], tuple(slots), large=False)] if slots else []
    found: list[Stretch] = []
    small: list[Slot] = []

    def close() -> None:
        if small:
            found.append(Stretch(block, small[0].offset, ends[small[-1].index], tuple(small), large=False))
            small.clear()

    for slot in slots:
        if is_large(slot):
            close()
            stop = slot.offset + slot.numel
            for lo in range(slot.offset, stop, _STRETCH):
                found.append(Stretch(block, lo, min(lo + _STRETCH, stop), (slot,), large=True))
        else:
            if small and ends[slot.index] - small[0].offset > _STRETCH:
                close()
            small.append(slot)
    close()
    return found


def is_large(slot: Slot) -> bool:
    """Whether the slot has stretches of its own."""
    return slot.numel > _STRETCH // 2


class Finisher:
    """Finishes the tree for the stretches that this worker updates.

    Args:
        layout: Where parameters lie.
        spans: For each worker, its pieces.
        rank: This worker.
        microbatches: M.
        allocate: Gives memory for sums that may not lie in this worker's own pieces.
        own_changes: Whether own pieces may be changed: nobody else reads these parts of them.
    """

    def __init__(
        self,
        layout: Layout,
        spans: Sequence[Sequence[Span]],
        rank: int,
        microbatches: int,
        *,
        allocate: Allocate,
        own_changes: bool,
    ) -> None:
        self._layout = layout
        self.reassign(spans)
        self._rank = rank
        self._microbatches = microbatches
        self._allocate = allocate
        self._own_changes = own_changes
        self._spare: Sums | None = None
        self._scratch: dict[tuple[int, torch.dtype], Tensor] = {}

    def reassign(self, spans: Sequence[Sequence[Span]]) -> None:
        """From the next step on these are the pieces of each worker."""
        self._spans = tuple(tuple(pieces) for pieces in spans)

    def finish(
        self, stretch: Stretch, own: Sequence[Sums], others: Sequence[Sequence[Tensor]], origin: int, filled: int, count: float
    ) -> Sums:
        """The sum over all pieces in this stretch, divided by ``count``.

        Args:
            own: This worker's pieces.
            others: For each worker, its pieces' elements of the block from element ``origin`` on; own rank: ignored.
            filled: Microbatches that hold samples.

        Returns:
            The sums that hold the result, in the stretch's elements.
        """
        memory: list[Tensor] = []
        for worker, tensors in enumerate(others):
            if worker == self._rank:
                memory += [_part(sums, stretch) for sums in own]
            else:
                memory += [real(tensor[stretch.lo - origin : stretch.hi - origin]) for tensor in tensors]
        plan = _plan(self._spans, self._microbatches, filled, self._rank if self._own_changes else None)
        for number in range(plan.scratch):
            memory.append(self._room(number, memory[0]))
        if plan.result is None:
            if self._spare is None:
                self._spare = Sums(self._layout, self._allocate)
            holder = self._spare
            memory.append(_part(holder, stretch))
            result = memory[-1]
        else:
            holder, result = own[0], memory[plan.result]
        if not plan.additions and plan.result is None:
            result.copy_(memory[0])
        for left, right, out in plan.additions:
            torch.add(memory[left], memory[right], out=memory[out])
        if count != 1:
            result.div_(count)
        return holder

    def _room(self, number: int, like: Tensor) -> Tensor:
        key = (number, like.dtype)
        if key not in self._scratch or self._scratch[key].numel() < like.numel():
            self._scratch[key] = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
        return self._scratch[key][: like.numel()].view(like.shape)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The tree as additions ``(left, right, out)`` of memory by number: pieces in order, scratch, and the spare result."""

    additions: tuple[tuple[int, int, int], ...]
    scratch: int
    result: int | None
    """The own piece that ends as the result; None: spare memory does."""


@dataclasses.dataclass(frozen=True)
class NodeSums:
    """How pieces are added up to nodes of the tree: additions ``(left, right, out)`` of memory by number: first the pieces, in
    order, then scratch."""

    pieces: int
    additions: tuple[tuple[int, int, int], ...]
    nodes: tuple[int | None, ...]
    """Which memory ends as each node; None: all its microbatches are absent."""
    changed: frozenset[int]
    """Memory that may be written to."""


@lru_cache(maxsize=256)
def node_sums(
    spans: tuple[tuple[Span, ...], ...], microbatches: int, filled: int, owner: int | None, nodes: tuple[Span, ...]
) -> NodeSums:
    """*local*. The sums of ``nodes`` from the pieces that some workers have.

    Args:
        spans: For each of them, its pieces; those that begin at microbatch ``filled`` or later are absent.
        owner: The one of them, by place, whose pieces may be written to; None: nobody's.
    """
    parts: dict[Span, int | None] = {}
    changeable: set[int] = set()
    number = 0
    for place, pieces in enumerate(spans):
        for span in pieces:
            if span[0] >= filled:
                parts[span] = None
                continue
            parts[span] = number
            if place == owner:
                changeable.add(number)
            number += 1
    additions: list[tuple[int, int, int]] = []
    free = number

    def add(left: int, right: int) -> int:
        nonlocal free
        # a + b and b + a are the same bits, so the sum may go to whichever of the two may change.
        out = left if left in changeable else right if right in changeable else free
        if out == free:
            changeable.add(free)
            free += 1
        additions.append((left, right, out))
        return out

    found = tuple(combine(parts, microbatches, add, lo=lo, hi=hi) for lo, hi in nodes)
    return NodeSums(number, tuple(additions), found, frozenset(changeable))


@lru_cache(maxsize=64)
def _plan(spans: tuple[tuple[Span, ...], ...], microbatches: int, filled: int, owner: int | None) -> _Plan:
    sums = node_sums(spans, microbatches, filled, owner, ((0, microbatches),))
    if sums.nodes[0] is None:
        raise ConfigurationError("a step without a single sample has no gradient")  # pragma: no cover - never planned
    number, additions = sums.pieces, list(sums.additions)
    result = min((memory for memory in sums.changed if memory < number), default=None)
    if additions:
        left, right, _ = additions[-1]
        # Nothing reads the root's operands any more. A scratch that only the root would have needed is not made.
        needed = max((out for _, _, out in additions[:-1]), default=0)
        scratch = max(0, needed + 1 - number)
        additions[-1] = (left, right, number + scratch if result is None else result)
    else:
        scratch = 0
    return _Plan(tuple(additions), scratch, result)


def _part(sums: Sums, stretch: Stretch) -> Tensor:
    if stretch.large:
        slot = stretch.slots[0]
        return real(sums.flat(slot)[stretch.lo - slot.offset : stretch.hi - slot.offset])
    return real(sums.flats[stretch.block][stretch.lo : stretch.hi])


class Norms:
    """Collects L2 norms on the device, and brings them to the CPU in one go.

    The norm of a slot with several stretches is the root of the sum of squares of theirs, in float64.
    """

    def __init__(self) -> None:
        self._values: dict[torch.dtype, list[Tensor]] = {}
        self._owners: dict[torch.dtype, list[int]] = {}

    def add(self, stretch: Stretch, holder: Sums) -> None:
        """Takes the norms of the slots of a stretch, or of a part of a slot."""
        if stretch.large:
            self.add_tensors([stretch.slots[0].index], [_part(holder, stretch)])
        else:
            self.add_tensors([slot.index for slot in stretch.slots], [real(holder.views[slot.index]) for slot in stretch.slots])

    def add_tensors(self, slots: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Takes the norm of each tensor, as a part of the slot of that index."""
        if not tensors:
            return
        dtype = tensors[0].dtype
        # Half precision is too coarse for a norm.
        norms = torch._foreach_norm(list(tensors), 2, torch.float32 if dtype.itemsize < 4 else None)
        self._values.setdefault(norms[0].dtype, []).extend(norms)
        self._owners.setdefault(norms[0].dtype, []).extend(slots)

    def values(self) -> dict[int, float]:
        """The norm of each slot, by index."""
        squares: dict[int, list[float]] = {}
        for dtype, values in self._values.items():
            for slot, value in zip(self._owners[dtype], torch.stack(values).tolist(), strict=True):
                squares.setdefault(slot, []).append(value)
        return {
            slot: parts[0] if len(parts) == 1 else math.sqrt(math.fsum(part * part for part in parts))
            for slot, parts in squares.items()
        }
