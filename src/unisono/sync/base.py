"""What keeps replicas together, as the step sees it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol

from torch import Tensor

from unisono.collective import Collective
from unisono.layout import Layout, Segment, Slot
from unisono.tree import Span


class GradientSink(abc.ABC):
    """Where a replica puts gradients, microbatch by microbatch or node by node of the tree, in order. Tensors become the sink's
    own. Everything here is *local*."""

    def takes_early(self, microbatch: int) -> bool:
        """Announces the backward pass of a microbatch: whether its gradients are wanted one by one, as soon as they are there. A
        replica that cannot give them so gives all to ``add``."""
        return False

    def early(self, slot: int, gradient: Tensor) -> None:
        """Takes one gradient while the backward pass still runs."""
        raise NotImplementedError

    @abc.abstractmethod
    def add(self, microbatch: int, gradients: Sequence[Tensor | None]) -> None:
        """Takes the gradients of a microbatch, by slot; None: the slot has none, or it went ``early``."""

    def nodes(self, lo: int, hi: int, kept_bytes: int) -> Sequence[Span]:
        """How own microbatches ``lo <= m < hi`` may be computed together: nodes of the tree, in order, which ``add_node`` takes
        where they are more than one microbatch.

        Args:
            kept_bytes: What the forward pass of one microbatch keeps for its backward; 0: not known.
        """
        return [(microbatch, microbatch + 1) for microbatch in range(lo, hi)]

    def add_node(self, node: Span, gradients: Sequence[Tensor | None]) -> None:
        """Takes the gradients of some microbatches at once, summed along the tree, by slot."""
        raise NotImplementedError


class Clock(Protocol):
    """Told what a worker's time goes into (``unisono.observe.timing.StepClock`` is one)."""

    def phase(self, name: Literal["compute", "communication", "waiting"]) -> AbstractContextManager[None]: ...


class NoClock:
    """Nobody wants to know."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()


class Sync(abc.ABC):
    """How replicas are kept together: settings that become a ``Reduction`` once model and workers are known."""

    share_weights: bool | None
    """Whether the workers of a host may keep one copy of the weights among them; None: where nobody else can write to it."""

    @abc.abstractmethod
    def bind(
        self,
        layout: Layout,
        collective: Collective,
        microbatches: int,
        *,
        sparse: Collection[int] = (),
        per_host: bool = False,
        whole: bool = False,
        ranges: Sequence[Span] | None = None,
        clock: Clock | None = None,
    ) -> Reduction:
        """*local*. The reduction of gradients laid out by ``layout`` over ``microbatches`` microbatches a step.

        Args:
            sparse: Slots (by index) whose gradients have few rows.
            per_host: Whether the workers of each host are to update all parameters among them, so that each host has all state.
            whole: Whether every worker is to update all parameters, since the optimizer may mix them.
            ranges: Each worker's microbatches: contiguous, in order of rank, at least one each. None: as even as can be.
            clock: Told what ``finish`` and ``publish`` spend time on.

        Raises:
            ConfigurationError: Such ranges cannot be.
        """


@dataclasses.dataclass(frozen=True)
class Reduced:
    """The gradients that this worker updates with; its own to change until the next step."""

    slots: Sequence[Slot]
    gradients: Sequence[Tensor]
    """Of each of these slots: summed over the global batch and divided by the count."""
    norms: Sequence[float]
    """L2 norm of the gradient of each slot of the layout (0: it has none); the same on all workers."""
    rows: Mapping[int, Tensor] = dataclasses.field(default_factory=dict)
    """Of slots (by index) whose gradient has few rows: which ones, ascending. All others are zero."""


class Reduction(GradientSink):
    """From the gradients of this worker's microbatches to the gradients that it updates with. A ``GradientSink``.

    A step calls ``begin``, gives the gradients of the own microbatches, in order, and calls ``launch`` and ``notes``. Then it
    calls either ``finish``, and after the update ``publish``; or ``drop``, and the step is done again or left out.

    Attributes:
        ranges: Each worker's microbatches.
        segments: For each block of the layout, the elements of which each worker holds the weights and the optimizer's state when
            all have been published.
        replicates: Whether, where there are several workers, every one updates every parameter.
        updates_whole: Whether it does so only since the optimizer is not known to update each parameter on its own.
        must_repeat: Whether the step must be done again, as all workers know once they have the notes: the reduction does then
            what it did not expect.
    """

    ranges: Sequence[Span]
    segments: Sequence[Sequence[Segment]]
    replicates: bool
    updates_whole: bool = False
    must_repeat: bool = False

    @abc.abstractmethod
    def begin(self, filled: int) -> None:
        """*local*. A step in which microbatches ``0 <= m < filled`` hold samples."""

    @abc.abstractmethod
    def launch(self, header: bytes, message: Tensor, sizes: Sequence[int]) -> None:
        """*collective*. Sends what has not been sent yet, and a note for every worker along with it; does not wait.

        Args:
            header: As many bytes on every worker.
            message: float64 ``[sizes[rank]]``, on the CPU.
            sizes: Of every worker's message.
        """

    @abc.abstractmethod
    def notes(self) -> list[tuple[memoryview, Tensor]]:
        """*collective*. Waits for the other workers' notes: every worker's header and message, its own included, by rank. A
        header may be followed by what reductions tell each other."""

    @abc.abstractmethod
    def drop(self) -> None:
        """*collective*. Waits for what is under way and forgets it."""

    @abc.abstractmethod
    def finish(self, count: float) -> Reduced:
        """*collective*. Waits for the other workers' gradients; the sum of all, divided by ``count``, of the slots that this
        worker updates, without those for which no microbatch has a gradient."""

    @abc.abstractmethod
    def publish(self, flats: Sequence[Tensor]) -> None:
        """*collective*. After the update: makes the weights, one flat tensor a block, what the next step starts from."""

    @abc.abstractmethod
    def reassign(self, ranges: Sequence[Span]) -> None:
        """*local*, alike on all workers, between two steps. From now on each worker has other microbatches; what it updates,
        and the memory that it works in, stay.

        Raises:
            ConfigurationError: Such ranges cannot be.
        """

    @abc.abstractmethod
    def updated_by(self, rank: int) -> list[int]:
        """*local*. The slots (by index) that worker ``rank`` updates."""

    def saved_by(self, rank: int) -> list[int]:
        """*local*. The slots (by index) whose optimizer state worker ``rank`` saves: each slot is saved by one."""
        return [slot.index for segments in self.segments for slot in segments[rank].slots]

    def state_dict(self) -> dict[str, Any]:
        """*local*. What it has learned and another one, perhaps with other workers, must know: plain JSON, the same on all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """*local*, alike on all workers. Adds what another one's ``state_dict`` says; what else ``state`` holds, or lacks, does
        not matter."""
