"""The workers of a run, and how a trainer does things together with them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from unisono.collective import Collective
from unisono.errors import ConfigurationError
from unisono.guard.silence import SilenceWatch, StatusBoard
from unisono.world import World

if TYPE_CHECKING:
    from unisono.training.participant import Participant
    from unisono.training.worker_group import WorkerGroup

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class StepKey:
    """Which step of a run, and which batch it is taken on."""

    step: int
    """Number of the step, from 1."""
    epoch: int
    batch: int
    """Number of the batch in that epoch."""


@dataclasses.dataclass
class Call:
    """One call of the user's to the trainer, such as ``fit``, which all workers make alike."""

    result: Any = None
    """What it returns; plain enough for JSON."""
    is_done: bool = False
    """Whether the result is known already, so that nothing is left to do."""


class Session:
    """A session whose workers stay the same from beginning to end: it just does what it is asked to.

    Three verbs carry a run: ``perform`` does something together with the others, ``updating`` stands around the update of a step,
    and between two steps the workers may change (``between_steps``) in sessions that allow it.

    Args:
        collective: The workers.

    Attributes:
        can_change: Whether the workers may change while the run goes on.
        everyone_leaves: Whether all workers were told to leave, and nobody waits to take over.
        group: What depends on who the workers are.
        watch: Looks after workers that do not answer.
    """

    can_change = False
    everyone_leaves = False
    group: WorkerGroup
    watch: SilenceWatch

    def __init__(self, collective: Collective) -> None:
        self._collective = collective

    @classmethod
    def open(
        cls,
        world: World,
        collective: Collective | Any,
        connect: Callable[[], Collective],
        *,
        device: torch.device,
        timeout_s: float,
        microbatches: int,
    ) -> Session:
        """*collective*. The session of this process.

        Args:
            collective: The workers, if they were given to the trainer.
            connect: Meets those of ``world``.
            device: Where this worker computes.
            timeout_s: How long workers wait for one of them.
            microbatches: M, the most workers that there can be.

        Raises:
            ConfigurationError: There are more workers than microbatches.
        """
        return cls(check_size(connect() if collective is None else collective, microbatches))

    @property
    def collective(self) -> Collective:
        """*local*. The workers of now."""
        return self._collective

    @property
    def transport(self) -> Collective:
        """*local*. The same, but for a worker that has yet to join the others: its own, which reaches itself alone."""
        return self._collective

    @property
    def is_outside(self) -> bool:
        """*local*. Whether this worker has yet to come to where the others are."""
        return False

    @property
    def is_midway(self) -> bool:
        """*local*. Whether this worker has entered a call of the others in the middle, and has yet to begin its loop."""
        return False

    def begin(
        self, participant: Participant, *, identity: Mapping[str, Any], timeout_s: float, board: StatusBoard | None
    ) -> None:
        """*collective*, once. Brings all workers to where the run begins.

        Args:
            participant: The trainer.
            identity: What makes the run this run, as plain JSON.
            timeout_s: How long workers wait for one of them.
            board: Where this worker shows what it is doing.
        """
        self.watch = SilenceWatch.begin(self._collective, timeout_s, board)
        self.group = participant.rebuild(self._collective)
        participant.start()

    # ------------------------------------------------------------------ the three verbs

    def perform(self, name: str, body: Callable[[], T], *, edits: bool = True, step: StepKey | None = None) -> T:
        """*collective*. Does something together with the others.

        Args:
            name: What it is, for a person.
            body: *collective*. Does it; its result is the same on all workers.
            edits: Whether the user's code may change weights or buffers before the next call of ``perform``.
            step: The step that it is, if it is one.
        """
        return body()

    def updating(
        self, step: int, flags: Sequence[int], step_s: float, *, skips: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """*collective*. Around the update, in place, of what this worker updates in step ``step``.

        Args:
            flags: What every worker's session has told the others with this step, by rank.
            step_s: Seconds that the step before took, as all workers know it; 0 if they do not.
            skips: Whether the step updates nothing.
        """
        return contextlib.nullcontext()

    def between_steps(self, prepare: Callable[[], None]) -> None:
        """*collective*. The place where workers may leave and others may come.

        Args:
            prepare: *local*. Called first if they will.
        """

    # ------------------------------------------------------------------ a loop over batches

    def begin_steps(self, arguments: Sequence[str], *, redoable: bool) -> None:
        """*collective*. Steps will follow, and the weights may have changed since the last one.

        Args:
            arguments: What all workers in this loop must have alike.
            redoable: Whether nobody but the trainer changes weights between steps, so that steps may be taken again.
        """

    def enter_steps(self) -> bool:
        """*local*. Whether this worker enters a loop of the others in the middle; from now on it is in it."""
        return False

    def end_steps(self) -> None:
        """*collective*. No more steps follow for now, and those that are done can soon not be taken again."""

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """*local*. Around a loop over batches."""
        yield

    def signals(self, stop: int) -> tuple[int, int]:
        """*local*. What goes to the others along with a step: a signal number that asks all to stop (0: none), and flags of this
        session.

        Args:
            stop: The signal number by which this worker was asked to stop; 0 if it was not.
        """
        return stop, 0

    # ------------------------------------------------------------------ calls of the user's

    def enter_call(self, arguments: Callable[[], Sequence[str]] | None = None) -> Call:
        """*collective*. A call of the user's begins.

        Args:
            arguments: *local*. What all workers in it must have alike; None: it cannot be entered in the middle.
        """
        return Call()

    @contextlib.contextmanager
    def making(self, call: Call) -> Iterator[None]:
        """*collective*. Around what is done in a call."""
        yield

    def is_past(self) -> bool:
        """*local*. Whether the others have gone on without this worker."""
        return False

    def place(self, world: World) -> World:
        """*local*. ``world`` with the rank that this worker has by now."""
        return world


def session_class(world: World, given: Any) -> type[Session]:
    """*local*. The kind of session that the launcher serves: by its name, since nothing here depends on what that one does.

    Args:
        given: What the trainer was given in place of the workers of ``world``: a collective, or what names its session itself.
    """
    name = world.session if given is None else getattr(given, "session", None)
    if name is None:
        return Session
    module, _, kind = name.partition(":")
    found: type[Session] = getattr(importlib.import_module(module), kind)
    return found


def check_size(collective: Collective, microbatches: int) -> Collective:
    """*local*. The collective, if each of its workers can have a microbatch.

    Raises:
        ConfigurationError: There are more workers than microbatches.
    """
    if collective.size > microbatches:
        raise ConfigurationError(
            f"{collective.size} workers but only {microbatches} microbatches: start at most {microbatches} workers, or raise "
            "microbatches"
        )
    return collective
