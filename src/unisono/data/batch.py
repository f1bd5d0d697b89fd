"""A global batch, as one worker holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NoReturn

from unisono.guard.ledger import Entry
from unisono.replica.base import Microbatch
from unisono.tree import Span


@dataclasses.dataclass(frozen=True)
class Batch:
    """A global batch, as one worker holds it: its own microbatches, and how many there are in all."""

    epoch: int
    number: int
    """k: which batch of the epoch, from 0."""
    of: int
    """Batches in that epoch; 0: that is known at its end only, since it is read from streams."""
    samples: int
    """Samples of the global batch, over all workers; 0: not known before the step."""
    filled: int
    """Microbatches that hold samples: numbers below this one. (Of streams some may have ended.)"""
    parts: tuple[Microbatch, ...]
    digest: int = 0
    """Of the sample indices of the global batch and of its place in the run: equal on all workers, or they have not been
    given the same order."""
    ledger: Entry | None = None
    """Of the samples of the global batch; None: not known, and nothing to check."""
    tally: tuple[tuple[Microbatch, ...], Entry] | None = None
    """Of the samples of these very ``parts``, if it was computed ahead."""
    ranges: Sequence[Span] = ()
    """Each worker's microbatches of this batch, by rank; empty: those of the batch before."""
    made_for: object = None
    """The team among whose workers it is divided so; None: the batch does not tell."""
    goes_on: bool | None = None
    """Whether the streams of this worker's microbatches go on after it; None: the data have a length."""
    drops_last: bool = False
    """Whether the epoch ends where the first stream does."""

    def __iter__(self) -> NoReturn:
        raise TypeError(
            "a Batch holds this worker's microbatches and is given to trainer.step(batch) as it is: the loss function unpacks "
            "microbatches"
        )
