"""What every worker tells all others along with each step, in a fixed number of bytes. *Local.*"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

from unisono.data.batch import Batch
from unisono.errors import ConfigurationError, Desync
from unisono.guard.ledger import ENTRY_BYTES, LOWER_HALVES, NOTHING, Entry, samples_of

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
    goes_on: bool = False
    """Whether its streams go on after this batch."""


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
    changed: bytes
    """For each buffer, 1 if any own microbatch changed it."""
    empty: bytes
    """For each microbatch, 1 if it is an own one whose streams have ended."""
    signals: Signals


class HeaderFormat:
    """Headers as bytes.

    Args:
        microbatches: M, microbatches a step.
        buffers: Number of buffers.
    """

    def __init__(self, microbatches: int, buffers: int) -> None:
        self._microbatches = microbatches
        self._struct = struct.Struct(f"<Q{ENTRY_BYTES}sQqBBBBB5d{microbatches}d{microbatches}d{buffers}s{microbatches}s")

    def pack(self, header: Header) -> bytes:
        """As many bytes for every header."""
        signals = header.signals
        return self._struct.pack(
            header.digest,
            header.ledger.to_bytes(ENTRY_BYTES, "little"),
            header.replica,
            signals.written,
            signals.stop,
            signals.failed,
            signals.troubles,
            signals.session,
            signals.goes_on,
            *signals.seconds,
            signals.work_s,
            *header.losses,
            *header.counts,
            header.changed,
            header.empty,
        )

    def unpack(self, packed: bytes | memoryview) -> Header:
        """What ``pack`` was given; something else may follow."""
        fields = self._struct.unpack_from(packed)
        digest, ledger, replica, written, stop, failed, troubles, session, goes_on, *seconds, work = fields[:_FIXED]
        numbers = fields[_FIXED:]
        return Header(
            losses=numbers[: self._microbatches],
            counts=numbers[self._microbatches : 2 * self._microbatches],
            digest=digest,
            ledger=int.from_bytes(ledger, "little"),
            replica=replica,
            changed=numbers[-2],
            empty=numbers[-1],
            signals=Signals(
                stop=stop,
                written=written,
                failed=bool(failed),
                seconds=tuple(seconds),
                work_s=work,
                troubles=troubles,
                session=session,
                goes_on=bool(goes_on),
            ),
        )


def union(flags: Sequence[bytes]) -> bytes:
    """A 1 wherever any of them has one."""
    first = flags[0]
    if all(other == first for other in flags):
        return first
    return bytes(map(max, *flags))


def check_headers(headers: Sequence[Header], batch: Batch, step: int) -> bool:
    """*local*. Whether what was looked at of the replicas is alike. One pass for three guards: each of its own costs more in
    code that is in no cache than in work.

    Raises:
        ConfigurationError: Workers were given different batches.
        Desync: Not each sample of the batch was computed once.
    """
    first = headers[0]
    alike, used = True, NOTHING
    for rank, header in enumerate(headers):
        if header.digest != first.digest:
            raise ConfigurationError(
                f"step {step}: worker {rank} was given other samples than worker 0, or another position in the data. Nothing "
                "was updated. Every worker must be given the same order: seed the shuffle or sampler that makes it, alike on "
                "all of them"
            )
        used += header.ledger
        if header.replica != first.replica:
            alike = False
    used &= LOWER_HALVES
    if used != batch.ledger and batch.ledger is not None:
        raise Desync(
            f"step {step}: the workers together computed {samples_of(used)} samples of a global batch of {batch.samples}, "
            "and not each of them once. Nothing was updated. Pass batches to step() as batches() gave them",
            step=step,
        )
    return alike
