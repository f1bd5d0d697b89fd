"""What every worker tells all others along with each step, in a fixed number of bytes. *Local.*"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from unisono.collective import Expected


@dataclasses.dataclass(frozen=True)
class Signals:
    """What a worker tells the others besides what it has computed."""

    stop: int = 0
    """Signal number of a request to stop; 0 if there was none."""
    written: int = -1
    """Step of the newest checkpoint whose part this worker has written."""
    failed: bool = False
    """Whether this worker could not write its part."""


@dataclasses.dataclass(frozen=True)
class Header:
    """One worker's part of a step, but for the gradients."""

    losses: Sequence[float]
    """For each microbatch of the global batch its loss sum; 0 for those of other workers."""
    counts: Sequence[float]
    """The same for the counts."""
    digest: int
    """Of the samples of the global batch, 64 bits."""
    present: bytes
    """For each slot, 1 if any own microbatch had a gradient for it."""
    changed: bytes
    """For each buffer, 1 if any own microbatch changed it."""
    torn: bool
    """Whether the step must be done again, without overlap."""
    signals: Signals


class HeaderFormat:
    """Headers as bytes.

    Args:
        leaves: M, microbatches a step.
        slots: Number of parameters in the layout.
        buffers: Number of buffers.
    """

    def __init__(self, leaves: int, slots: int, buffers: int) -> None:
        self._leaves = leaves
        self._struct = struct.Struct(f"<QqBBB{leaves}d{leaves}d{slots}s{buffers}s")

    @property
    def expected(self) -> Expected:
        """What a worker receives."""
        return self._struct.size, torch.uint8, torch.device("cpu")

    def pack(self, header: Header) -> Tensor:
        """uint8 ``[n]``."""
        signals = header.signals
        raw = bytearray(self._struct.size)
        self._struct.pack_into(
            raw,
            0,
            header.digest,
            signals.written,
            signals.stop,
            signals.failed,
            header.torn,
            *header.losses,
            *header.counts,
            header.present,
            header.changed,
        )
        return torch.frombuffer(raw, dtype=torch.uint8)

    def unpack(self, packed: Tensor) -> Header:
        """What ``pack`` was given."""
        digest, written, stop, failed, torn, *rest = self._struct.unpack(packed.numpy().tobytes())
        return Header(
            losses=rest[: self._leaves],
            counts=rest[self._leaves : 2 * self._leaves],
            digest=digest,
            present=rest[-2],
            changed=rest[-1],
            torn=bool(torn),
            signals=Signals(stop=stop, written=written, failed=bool(failed)),
        )


def union(flags: Sequence[bytes]) -> bytes:
    """A 1 wherever any of them has one."""
    first = flags[0]
    if all(other == first for other in flags):
        return first
    return bytes(map(max, *flags))
