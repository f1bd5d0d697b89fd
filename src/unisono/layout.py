"""Where every trainable parameter lies in flat, aligned memory, and who owns which part of it.

Matrix kernels give other bits at other alignments, so each parameter starts at a fixed multiple of 64 bytes that depends
on the model alone, never on the number of workers. Ownership is split at whole parameters, because an optimizer may look
at a parameter as a whole (Muon, Adafactor) and because its vector kernels treat a tensor's tail apart.

Everything here is *local*.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from unisono.errors import ConfigurationError

ALIGNMENT_BYTES = 64
Allocate = Callable[[int, torch.dtype, torch.device], Tensor]
"""Gives flat memory: number of elements, dtype, device."""


class ParameterSpec(NamedTuple):
    """A trainable parameter, in whatever framework: what its memory must look like."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """Dense, but in any order of dimensions: kernels choose by it."""
    dtype: torch.dtype
    device: torch.device

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """One parameter's place in a block: ``numel`` elements from ``offset``, seen with ``shape`` and ``stride``."""

    name: str
    index: int
    """Position among all slots of the layout."""
    block: int
    """Position of its block."""
    offset: int
    numel: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, flat: Tensor, start: int = 0) -> Tensor:
        """The parameter's view into ``flat``, whose first element is element ``start`` of the block."""
        return flat.as_strided(self.shape, self.stride, flat.storage_offset() + self.offset - start)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlatBlock:
    """All slots of one dtype, one after the other: a flat tensor of ``numel`` elements, each slot at 64 bytes."""

    dtype: torch.dtype
    device: torch.device
    slots: tuple[Slot, ...]
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def ends(self) -> tuple[int, ...]:
        """Where each slot's room ends (the next slot's offset), in elements."""
        return (*(slot.offset for slot in self.slots[1:]), self.numel)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Every slot's view into a flat tensor of this block."""
        return [slot.view(flat) for slot in self.slots]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """What one worker owns of one block: elements ``lo <= i < hi``, which are whole ``slots``."""

    lo: int
    hi: int
    slots: tuple[Slot, ...]


class Layout:
    """Places trainable parameters into one flat block per dtype.

    Args:
        parameters: In model order, each once, all on one device.

    Attributes:
        blocks: One block per dtype, in order of first appearance.
        slots: All slots, block after block.
        names: Their names, in the same order.

    Raises:
        ConfigurationError: There is no parameter, or they lie on several devices.
    """

    def __init__(self, parameters: Iterable[ParameterSpec]) -> None:
        specs = list(parameters)
        _check(specs)
        by_dtype: dict[torch.dtype, list[ParameterSpec]] = {}
        for spec in specs:
            by_dtype.setdefault(spec.dtype, []).append(spec)
        blocks: list[FlatBlock] = []
        self.slots: list[Slot] = []
        for members in by_dtype.values():
            blocks.append(_place(members, number=len(blocks), first=len(self.slots)))
            self.slots.extend(blocks[-1].slots)
        self.blocks = tuple(blocks)
        self.names = [slot.name for slot in self.slots]

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters, hence of one full gradient, padding included."""
        return sum(block.nbytes for block in self.blocks)

    def flats(self, allocate: Allocate) -> list[Tensor]:
        """Zeroed memory for all parameters: one flat tensor per block."""
        flats: list[Tensor] = []
        for block in self.blocks:
            flat = allocate(block.numel, block.dtype, block.device)
            check_alignment(flat)
            flats.append(flat.zero_())
        return flats

    def views(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """Every slot's view into ``flats``, in slot order."""
        return [view for block, flat in zip(self.blocks, flats, strict=True) for view in block.views(flat)]

    def segments(self, workers: int) -> list[tuple[Segment, ...]]:
        """For each block, the segment of each worker: contiguous whole slots, the largest as small as it can be."""
        return [_divide(block, workers) for block in self.blocks]


def allocate(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory, aligned as the promise needs it."""
    return torch.empty(numel, dtype=dtype, device=device)


def check_alignment(flat: Tensor) -> None:
    """Raises if ``flat`` does not start at a multiple of 64 bytes, which every allocator of PyTorch provides."""
    if flat.data_ptr() % ALIGNMENT_BYTES:
        raise ConfigurationError(
            f"memory at {flat.data_ptr():#x} is not aligned to {ALIGNMENT_BYTES} bytes, so results would depend on where "
            "tensors lie: use PyTorch's own allocator"
        )


def _check(specs: Sequence[ParameterSpec]) -> None:
    if not specs:
        raise ConfigurationError("the model has no trainable parameter: nothing to train (is requires_grad off everywhere?)")
    first = specs[0]
    for spec in specs:
        if spec.device != first.device:
            raise ConfigurationError(
                f"parameters lie on two devices: {first.name!r} on {first.device}, {spec.name!r} on {spec.device}. "
                "Data parallelism needs the whole model on each worker's one device: move it with model.to(device)"
            )


def _place(members: Sequence[ParameterSpec], *, number: int, first: int) -> FlatBlock:
    dtype, device = members[0].dtype, members[0].device
    step = max(1, ALIGNMENT_BYTES // dtype.itemsize)
    slots: list[Slot] = []
    offset = 0
    for index, (spec, numel) in enumerate(((spec, spec.numel) for spec in members), start=first):
        slots.append(
            Slot(name=spec.name, index=index, block=number, offset=offset, numel=numel, shape=spec.shape, stride=spec.stride)
        )
        offset += -(-numel // step) * step
    return FlatBlock(dtype=dtype, device=device, slots=tuple(slots), numel=offset)


def _divide(block: FlatBlock, workers: int) -> tuple[Segment, ...]:
    """The contiguous partition at slot boundaries with the smallest maximum: bisection over that maximum."""
    ends = block.ends
    sizes = [end - slot.offset for slot, end in zip(block.slots, ends, strict=True)]
    low, high = max(max(sizes), -(-block.numel // workers)), block.numel
    while low < high:
        capacity = (low + high) // 2
        if _fill(ends, workers, capacity)[-1] == len(sizes):
            high = capacity
        else:
            low = capacity + 1
    stops = [0, *_fill(ends, workers, low)]
    borders = [0, *accumulate(sizes)]
    return tuple(Segment(lo=borders[start], hi=borders[stop], slots=block.slots[start:stop]) for start, stop in pairwise(stops))


def _fill(ends: Sequence[int], workers: int, capacity: int) -> list[int]:
    """For each worker in turn, the slot at which it must stop so as to hold at most ``capacity`` elements."""
    stops: list[int] = []
    start = 0
    for _ in range(workers):
        begin = ends[start - 1] if start else 0
        start = bisect_right(ends, begin + capacity)
        stops.append(start)
    return stops
