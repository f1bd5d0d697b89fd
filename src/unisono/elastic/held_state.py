"""What a worker holds of the run between two operations, and what guards it while a step changes it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from unisono.collective import Collective
from unisono.elastic.membership import StateLost
from unisono.elastic.replay_log import PastStep, ReplayLog
from unisono.elastic.shared_state import SharedState
from unisono.sync import Reduction
from unisono.training.state import LocalState

T = TypeVar("T")
LEAVES, ADMITS, GROWN = 1, 2, 4
"""Flags that go to all workers with a step: this worker leaves after it; others wait to join (worker 0 says so); this worker's
part of the optimizer's state has something new."""
NEW = -1
"""Operations of a worker that has not been in the run before."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an operation has come to, the same on all workers."""

    result: Any = None
    workers: int = 0
    """How many workers took part in it, if it was a step."""
    leavers: Sequence[str] = ()
    """uids of the workers that leave after it."""
    admits: bool = False
    """Whether others wait to join."""
    groups: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """The optimizer's hyperparameters after it, by parameter group."""

    @property
    def everyone_leaves(self) -> bool:
        """Whether all workers leave after it."""
        return 0 < self.workers == len(self.leavers)


class HeldState:
    """How far a worker has come, and where its part of the state is. What it says of itself is true at every moment.

    Args:
        local: What this worker trains with.

    Attributes:
        operations: Operations that are done.
        outcome: Of the last one.
        confirmed: The last operation of which this worker knows that all have its result, where that matters.
        reached: The last step that the state which this worker holds has behind it.
        committed: The last step of the run. It is ahead of ``reached`` only while steps are taken again.
        has_all: Whether this worker has all of the state itself; else the workers of its host share it.
        shared: The state that they share; None if they do not.
        replay_log: The steps since the last copy of it.
        is_stepping: Whether a step is under way.
        flags: What all workers told each other with the last step.
    """

    def __init__(self, local: LocalState) -> None:
        self.local = local
        self.operations = NEW
        self.outcome = Outcome()
        self.confirmed = self.reached = self.committed = 0
        self.has_all = False
        self.shared: SharedState | None = None
        self.replay_log = ReplayLog()
        self.is_stepping = False
        self.flags: Sequence[int] = ()
        self._underway: PastStep | None = None

    @property
    def is_new(self) -> bool:
        """*local*. Whether this worker has not been in the run before."""
        return self.operations == NEW

    def done(self, operation: int, outcome: Outcome) -> None:
        """*local*. That many operations are done, the last with this outcome."""
        self.operations, self.outcome = operation, outcome

    # ------------------------------------------------------------------ a generation begins

    def share(self, collective: Collective, reduction: Reduction, generation: int, step: int) -> bool:
        """*collective*. From step ``step`` on the workers of each host share the state.

        Returns:
            Whether they can; the same on all workers.
        """
        shared = self.shared or SharedState(self.local.replica, self.local.weights)
        if not shared.bind(collective, reduction, generation, step):
            return False
        shared.replay = self.replay_log.allowed
        self.shared = shared
        return True

    def go_to(self, step: int, parts: Sequence[int], *, main: bool) -> None:
        """*local*. Goes back to the state after step ``step``.

        Args:
            parts: Places on this host whose parts must go back to their copies; none: the state is whole as it is.
            main: Whether this worker does it for all workers of the host.

        Raises:
            StateLost: The buffers of that time are not known any more.
        """
        assert self.shared is not None
        if not parts:
            self.shared.read_numbers()
            return
        self.shared.restore(step, parts, main=main)
        if step != self.reached:
            if not self.replay_log.begins_after(step):
                raise StateLost(f"the buffers after step {step} are no longer available")
            self.local.replica.buffers.go_to(self.replay_log.buffers)

    # ------------------------------------------------------------------ a step

    def begin_steps(self, *, redoable: bool) -> None:
        """*collective*. Steps will follow, and the weights may have changed since the last one."""
        self.replay_log.begin(allowed=redoable)
        if self.shared is not None:
            self.shared.renew(self.committed, replay=redoable)

    def run_step(self, past: PastStep, body: Callable[[], T]) -> T:
        """*collective*. Takes a step, for the first time or again."""
        if self.shared is not None and self.shared.replay:
            self.replay_log.note(past)
        self._underway = past
        self.is_stepping = True
        result = body()
        self.is_stepping = False  # not after an error: then the step is to be undone
        self.reached = past.step
        return result

    def undo_step(self) -> None:
        """*local*. The step under way, if there is one, has not been taken."""
        if self.is_stepping:
            self.is_stepping = False
            self.local.undo_step()

    @contextlib.contextmanager
    def updating(self, step: int, flags: Sequence[int], step_s: float, *, skips: bool) -> Iterator[None]:
        """*collective*. See ``Session.updating``."""
        self.flags = flags
        shared = self.shared
        if shared is None:
            yield
            return
        grown = any(flag & GROWN for flag in flags)
        if grown:
            shared.settle(step - 1)
        if skips:
            shared.skip(step)
            yield
            return
        shared.before_update(step, step_s, settles=grown)
        if shared.replay and shared.copied == step - 1 and self._underway is not None:
            # The buffers are those of the step's beginning until the update is done.
            self.replay_log.copied(self._underway, self.local.replica.buffers.values())
        yield
        shared.after_update(step)
        if grown:  # a death meanwhile is one before the step's end, so that it is done again
            shared.settle(step)

    @property
    def grown(self) -> int:
        """*local*. The flag that says whether this worker's part of the state has something new, or will after the next step."""
        return GROWN * (self.shared is not None and (self.shared.grown or self.shared.will_grow))

    def settle(self, collective: Collective) -> None:
        """*collective*. What is new in the optimizer's state is shared from now on."""
        grown = collective.all_gather(torch.tensor([self.shared is not None and self.shared.grown]))
        if self.shared is not None and any(map(bool, grown)):
            self.shared.settle(self.committed)
