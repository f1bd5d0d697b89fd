"""How far each worker of a host has come with its update, in memory that they share. *Local* but for ``make``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from unisono.collective import Collective

_MOST_WORKERS = 1024
_HEAD = 8
"""Numbers at the beginning."""
COPIED, BEGUN, DONE = range(3)
"""Columns: the step that a worker's copy shows, the step whose update it has begun, and has finished."""

Marks = npt.NDArray[np.int64]


class ProgressTable:
    """Marks of two generations, of which one counts: the present one, or the one before until all workers have taken over its
    state.

    Args:
        memory: int64, the same for all workers of a host.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self._numbers: Marks = memory.numpy()
        self._side = 0

    @classmethod
    def make(cls, collective: Collective, mine: ProgressTable | None) -> ProgressTable | None:
        """*collective*. The table of this host's workers; None where they cannot share memory.

        Args:
            mine: This worker's from an earlier generation.
        """
        memory = collective.common(_HEAD + 2 * _MOST_WORKERS * 3, torch.int64, None if mine is None else mine.memory)
        if memory is None:
            return None
        return cls(memory) if mine is None or mine.memory is not memory else mine

    @property
    def generation(self) -> int:
        """The generation whose marks count."""
        return int(self._numbers[0]) // 2

    def counting(self) -> Marks:
        """The marks that count: int64 ``[workers, 3]``, by place on the host."""
        return self._marks(int(self._numbers[0]) % 2)

    def open(self) -> None:
        """The marks of the coming generation go where those that count are not."""
        self._side = 1 - int(self._numbers[0]) % 2

    def mine(self, place: int) -> Marks:
        """The marks of the worker at ``place`` in the present generation: int64 ``[3]``, to be written to."""
        marks: Marks = self._marks(self._side)[place]
        return marks

    def count(self, generation: int) -> None:
        """From now on the marks of the present generation, with this number, are the ones that count."""
        self._numbers[0] = 2 * generation + self._side

    def _marks(self, side: int) -> Marks:
        size = _MOST_WORKERS * 3
        start = _HEAD + size * side
        return self._numbers[start : start + size].reshape(_MOST_WORKERS, 3)
