"""The place where a tool such as ``unisono verify`` looks into a trainer's loop and may end it early."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unisono.data.batch import Batch


class Observer:
    """Changes nothing; a tool overrides what it needs and sets ``observer`` in a subclass of ``Trainer``."""

    def around_batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """*collective*. The batches to train, in order, each stepped before the next is asked for. Ending before ``batches``
        does ends the run there, as if its last epoch were over; all workers must end after the same step."""
        return batches
