"""What every worker tells all others along with each step, in a fixed number of bytes. *Local.*"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unisono.collective import Expected
from unisono.guard.ledger import ENTRY_BYTES, Entry

_FIXED = 14
"""Numbers in a header before the losses."""


class Signals(NamedTuple):
    """What a worker tells the others besides what it has computed. (Tuples: several are made in every step.)"""

    stop: int = 0
    """Signal number of a request to stop; 0 if there was none."""
    written: int = -1
    """Step of the newest checkpoint whose part this worker has written."""
    failed: bool = False
    """Whether this worker could not write its part."""
    seconds: tuple[float, float, float, float] = (math.nan,) * 4
    """Where its time has gone up to this step: data, compute, communication, waiting, added up since some moment. What some steps
    took is the difference of two readings. Not numbers: not told."""
    work_s: float = 0.0
    """How much of that went into its microbatches and would not, if others computed them; loading aside."""
    troubles: int = 0
    """What might slow it down, as bits (see ``unisono.guard.stragglers``)."""
    session: int = 0
    """What its session has to tell those of the others, as 8 bits."""


class Header(NamedTuple):
    """One worker's part of a step, but for the gradients."""

    losses: Sequence[float]
    """For each microbatch of the global batch its loss sum; 0 for those of other workers."""
    counts: Sequence[float]
    """The same for the counts."""
    digest: int
    """Of the samples of the global batch, 64 bits."""
    ledger: Entry
    """Of the samples of this worker's own microbatches."""
    replica: int
    """Digest of a part of what all workers hold alike, 64 bits; 0 in steps in which none is compared."""
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
        self._struct = struct.Struct(f"<Q{ENTRY_BYTES}sQqBBBBB5d{leaves}d{leaves}d{slots}s{buffers}s")

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
            header.ledger.to_bytes(ENTRY_BYTES, "little"),
            header.replica,
            signals.written,
            signals.stop,
            signals.failed,
            header.torn,
            signals.troubles,
            signals.session,
            *signals.seconds,
            signals.work_s,
            *header.losses,
            *header.counts,
            header.present,
            header.changed,
        )
        return torch.frombuffer(raw, dtype=torch.uint8)

    def unpack(self, packed: Tensor) -> Header:
        """What ``pack`` was given."""
        fields = self._struct.unpack(packed.numpy().data)
        digest, ledger, replica, written, stop, failed, torn, troubles, session, s0, s1, s2, s3, work = fields[:_FIXED]
        numbers = fields[_FIXED:]
        return Header(
            losses=numbers[: self._leaves],
            counts=numbers[self._leaves : 2 * self._leaves],
            digest=digest,
            ledger=int.from_bytes(ledger, "little"),
            replica=replica,
            present=numbers[-2],
            changed=numbers[-1],
            torn=bool(torn),
            signals=Signals(
                stop=stop,
                written=written,
                failed=bool(failed),
                seconds=(s0, s1, s2, s3),
                work_s=work,
                troubles=troubles,
                session=session,
            ),
        )


def union(flags: Sequence[bytes]) -> bytes:
    """A 1 wherever any of them has one."""
    first = flags[0]
    if all(other == first for other in flags):
        return first
    return bytes(map(max, *flags))
