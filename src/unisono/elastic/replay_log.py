"""The steps since the last copy of the state, and what taking them again requires. *Local.*"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from unisono.elastic.membership import StateLost
from unisono.training.participant import Visible
from unisono.training.session import StepKey


@dataclasses.dataclass(frozen=True)
class PastStep:
    """A step that may have to be taken again."""

    key: StepKey
    groups: list[dict[str, Any]]
    """The optimizer's hyperparameters before it, by parameter group."""
    visible: Visible | None
    """What user code could read; None: the step will not be taken again once it is done."""

    @property
    def step(self) -> int:
        """Its number."""
        return self.key.step


class ReplayLog:
    """Keeps the steps from the one on whose beginning is in the copy.

    Attributes:
        allowed: Whether nobody but the trainer changes weights between steps.
        buffers: The model's buffers as they were at the copy.
    """

    def __init__(self) -> None:
        self.allowed = False
        self.buffers: list[Tensor] = []
        self._steps: list[PastStep] = []

    def begin(self, *, allowed: bool) -> None:
        """Steps will follow, and the weights may have changed since the last one."""
        self.allowed = allowed
        self._steps.clear()

    def note(self, past: PastStep) -> None:
        """This step is about to be taken, or taken again."""
        self._steps = [*(one for one in self._steps if one.step < past.step), past, *self._after(past)]

    def copied(self, past: PastStep, buffers: list[Tensor]) -> None:
        """The copy shows the state before this step, when the buffers were these."""
        self._steps, self.buffers = [past, *self._after(past)], buffers

    def begins_after(self, step: int) -> bool:
        """Whether the copy shows the state after this step, so that ``buffers`` belong to it."""
        return bool(self._steps) and self._steps[0].step == step + 1

    def _after(self, past: PastStep) -> list[PastStep]:
        """Steps that are still to be taken again after this one."""
        return [one for one in self._steps if one.step > past.step]

    def between(self, reached: int, committed: int) -> Sequence[PastStep]:
        """The steps after ``reached``, up to ``committed``.

        Raises:
            StateLost: Some of them are not known any more.
        """
        known = {one.step: one for one in self._steps}
        wanted = range(reached + 1, committed + 1)
        if any(step not in known for step in wanted):
            raise StateLost(f"steps {wanted[0]} to {wanted[-1]} cannot be replayed")
        return [known[step] for step in wanted]

    def describe(self) -> dict[str, Any]:
        """For ``adopt`` on another worker."""
        return {"steps": self._steps, "buffers": self.buffers, "allowed": self.allowed}

    def adopt(self, description: Mapping[str, Any]) -> None:
        """Takes over the log of another worker."""
        self._steps, self.buffers, self.allowed = list(description["steps"]), description["buffers"], description["allowed"]
