"""What a worker tells is what the others hear, to the last bit: all of them decide by it, and must decide alike."""

from __future__ import annotations

import math

import numpy as np

from unisono.guard.ledger import entry
from unisono.training.header import Header, HeaderFormat, Signals


def header(signals: Signals) -> Header:
    return Header(
        losses=(0.0, 1 / 3, math.inf, -0.1),
        counts=(0.0, 7.0, 1e300, 2.5),
        digest=2**64 - 1,
        ledger=entry(np.arange(2**22, 2**22 + 50)),
        replica=2**63 + 1,
        changed=bytes([1, 0]),
        empty=bytes([0, 0, 1, 0]),
        signals=signals,
    )


def test_a_header_arrives_as_it_was_sent() -> None:
    sent = header(
        Signals(
            stop=15,
            written=10**12,
            failed=True,
            seconds=(1 / 3, 1e5 + 1e-7, math.pi, 0.0),
            work_s=86_400.1,
            troubles=5,
            session=5,
            goes_on=True,
        )
    )
    form = HeaderFormat(microbatches=4, buffers=2)

    packed = form.pack(sent)

    assert form.unpack(packed) == sent
    assert form.unpack(memoryview(packed + b"something else")) == sent


def test_all_headers_have_the_same_size() -> None:
    form = HeaderFormat(microbatches=4, buffers=2)
    assert len(form.pack(header(Signals()))) == len(form.pack(header(Signals(stop=15, written=10**12, work_s=86_400.1))))


def test_time_that_was_not_told_is_not_taken_for_none() -> None:
    form = HeaderFormat(microbatches=4, buffers=2)
    assert all(map(math.isnan, form.unpack(form.pack(header(Signals()))).signals.seconds))
