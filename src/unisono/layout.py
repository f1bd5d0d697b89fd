"""Where every trainable parameter lies in flat, aligned memory, and who owns which part of it.

Matrix kernels give other bits at other alignments, so each parameter starts at a fixed multiple of 64 bytes that depends
on the model alone, never on the number of workers. Ownership is split at whole parameters, because an optimizer may look
at a parameter as a whole (Muon, Adafactor) and because its vector kernels treat a tensor's tail apart.

Everything here is *local*.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from unisono.errors import ConfigurationError

ALIGNMENT_BYTES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """One parameter's place in a block: ``numel`` elements from ``offset``, seen with ``shape`` and ``stride``."""

    name: str
    index: int
    """Position among all slots of the layout."""
    offset: int
    numel: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, flat: Tensor, start: int = 0) -> Tensor:
        """The parameter's view into ``flat``, whose first element is element ``start`` of the block."""
        return flat.as_strided(self.shape, self.stride, flat.storage_offset() + self.offset - start)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
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
        parameters: ``(name, parameter)`` pairs in model order; each parameter once, floating point (or complex), dense,
            all on one device.

    Attributes:
        blocks: One block per dtype, in order of first appearance.
        parameters: The parameters, in slot order (block after block).
        names: Their names, in the same order.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        named = list(parameters)
        _check(named)
        by_dtype: dict[torch.dtype, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in named:
            by_dtype.setdefault(parameter.dtype, []).append((name, parameter))
        self.parameters: list[nn.Parameter] = []
        self.names: list[str] = []
        blocks: list[Block] = []
        for dtype, members in by_dtype.items():
            blocks.append(_place(dtype, members, first=len(self.parameters)))
            self.parameters.extend(parameter for _, parameter in members)
            self.names.extend(name for name, _ in members)
        self.blocks = tuple(blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters, hence of one full gradient, padding included."""
        return sum(block.nbytes for block in self.blocks)

    def adopt(self, allocate: Callable[[int, torch.dtype, torch.device], Tensor]) -> list[Tensor]:
        """Moves the parameters into flat memory; the ``Parameter`` objects stay the same.

        Returns:
            The flat tensors, one per block, of which the parameters are now views.
        """
        flats: list[Tensor] = []
        with torch.no_grad():
            for block in self.blocks:
                flat = allocate(block.numel, block.dtype, block.device)
                check_alignment(flat)
                flat.zero_()
                for slot in block.slots:
                    view = slot.view(flat)
                    parameter = self.parameters[slot.index]
                    view.copy_(parameter.data)
                    parameter.data = view
                flats.append(flat)
        return flats

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


def _check(named: Sequence[tuple[str, nn.Parameter]]) -> None:
    if not named:
        raise ConfigurationError("the model has no trainable parameter: nothing to train (is requires_grad off everywhere?)")
    for name, parameter in named:
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ConfigurationError(f"parameter {name!r} is lazy and has no shape yet: run the model once before Trainer(...)")
        if parameter.is_meta:
            raise ConfigurationError(f"parameter {name!r} is on the meta device: materialise the model before Trainer(...)")
        if parameter.layout != torch.strided:
            raise ConfigurationError(f"parameter {name!r} has layout {parameter.layout}: only dense parameters can be trained")
    first_at: dict[int, str] = {}
    for name, parameter in named:
        other = first_at.setdefault(parameter.data_ptr(), name) if parameter.numel() else name
        if other != name:
            raise ConfigurationError(
                f"parameters {other!r} and {name!r} share memory, but are two Parameter objects, which would be torn apart. Tie "
                "them by assigning the Parameter itself (decoder.weight = encoder.weight), not its .data"
            )
    first_name, first = named[0]
    for name, parameter in named:
        if parameter.device != first.device:
            raise ConfigurationError(
                f"parameters lie on two devices: {first_name!r} on {first.device}, {name!r} on {parameter.device}. "
                "Data parallelism needs the whole model on each worker's one device: move it with model.to(device)"
            )


def _place(dtype: torch.dtype, members: Sequence[tuple[str, nn.Parameter]], first: int) -> Block:
    step = max(1, ALIGNMENT_BYTES // dtype.itemsize)
    slots: list[Slot] = []
    offset = 0
    for index, (name, parameter) in enumerate(members, start=first):
        # The shape's own dense strides (channels_last, say) are kept: kernels choose by them.
        dense = torch.empty_like(parameter, device="meta")
        slots.append(
            Slot(
                name=name,
                index=index,
                offset=offset,
                numel=parameter.numel(),
                shape=tuple(parameter.shape),
                stride=dense.stride(),
            )
        )
        offset += -(-parameter.numel() // step) * step
    return Block(dtype=dtype, device=members[0][1].device, slots=tuple(slots), numel=offset)


def _divide(block: Block, workers: int) -> tuple[Segment, ...]:
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
