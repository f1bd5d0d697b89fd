"""The steps since the last copy of the state, and what doing them again takes. *Local.*"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from unisono.elastic.membership import StateLost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Past:
    """What doing a step again takes, beside the state before it."""

    step: int
    epoch: int
    number: int
    """Which batch of the epoch."""
    groups: list[dict[str, Any]]
    """Hyperparameters of the optimizer, by parameter group."""


class ReplayLog:
    """Keeps what it takes, from the step on whose beginning is in the copy.

    Attributes:
        allowed: Whether nobody but the trainer changes weights between steps.
        buffers: The model's buffers as they were at the copy.
    """

    def __init__(self) -> None:
        self.allowed = False
        self.buffers: list[Tensor] = []
        self._past: list[Past] = []

    def begin(self, *, allowed: bool) -> None:
        """Steps will follow, and the weights may have changed since the last one."""
        self.allowed = allowed
        self._past.clear()

    def note(self, past: Past) -> None:
        """This step is about to be taken, or taken again."""
        self._past = [*(one for one in self._past if one.step < past.step), past, *self._after(past)]

    def copied(self, past: Past, buffers: list[Tensor]) -> None:
        """The copy is of the state before this step, when the buffers were these."""
        self._past, self.buffers = [past, *self._after(past)], buffers

    def begins_after(self, step: int) -> bool:
        """Whether the copy shows the state after this step, so that ``buffers`` are those of then."""
        return bool(self._past) and self._past[0].step == step + 1

    def _after(self, past: Past) -> list[Past]:
        """Steps that are still to be done again when this one is."""
        return [one for one in self._past if one.step > past.step]

    def between(self, reached: int, committed: int) -> Sequence[Past]:
        """The steps after ``reached``, up to ``committed``.

        Raises:
            StateLost: Some of them are not known any more.
        """
        known = {one.step: one for one in self._past}
        todo = range(reached + 1, committed + 1)
        if any(step not in known for step in todo):
            raise StateLost(f"steps {todo[0]} to {todo[-1]} cannot be done again")
        return [known[step] for step in todo]

    def describe(self) -> dict[str, Any]:
        """What a worker that joins must know."""
        return {"past": self._past, "buffers": self.buffers, "allowed": self.allowed}

    def adopt(self, description: dict[str, Any]) -> None:
        """Takes over what another worker has described."""
        self._past, self.buffers, self.allowed = description["past"], description["buffers"], description["allowed"]
