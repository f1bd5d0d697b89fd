"""What keeps replicas together, as the step sees it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection, Mapping, Sequence, Set

import torch
from torch import Tensor

from unisono.collective import Collective, Expected
from unisono.layout import Layout, Segment, Slot
from unisono.tree import Span


class Sync(abc.ABC):
    """How replicas are kept together: settings that become a ``Reduction`` once model and workers are known."""

    share_weights: bool | None
    """Whether the workers of a host may keep one copy of the weights among them; None: where nobody else can write to it."""

    @abc.abstractmethod
    def bind(
        self,
        layout: Layout,
        collective: Collective,
        leaves: int,
        *,
        sparse: Collection[int] = (),
        per_host: bool = False,
        ranges: Sequence[Span] | None = None,
    ) -> Reduction:
        """*local*. The reduction of gradients laid out by ``layout`` over ``leaves`` microbatches a step.

        Args:
            sparse: Slots (by index) whose gradients have few rows.
            per_host: Whether the workers of each host are to update all parameters among them, so that each host has all state.
            ranges: Each worker's microbatches: contiguous, in order of rank, at least one each. None: as even as can be.

        Raises:
            ConfigurationError: Such ranges cannot be.
        """

    @abc.abstractmethod
    def overlaps(self, device: torch.device) -> bool:
        """*local*. Whether gradients leave while the last microbatch's backward still runs, on such a device."""


@dataclasses.dataclass(frozen=True)
class Reduced:
    """The gradients that this worker updates with; its own to change until the next step."""

    slots: Sequence[Slot]
    gradients: Sequence[Tensor]
    """Of each of these slots: summed over the global batch and divided by the count."""
    norms: Mapping[int, float]
    """L2 norm of those gradients that this worker has summed up, by slot index."""


class Reduction(abc.ABC):
    """From the gradients of this worker's microbatches to the global sum of the parameters that this worker updates.

    A step calls ``begin``, then ``add`` for each own microbatch in order, then ``launch``, ``notes``, and either ``finish`` and
    ``deliver`` or, if the step must be done again, ``drop``.

    Attributes:
        ranges: Each worker's microbatches.
        segments: For each block of the layout, each worker's segment: what it saves, and what it publishes.
        replicates: Whether, where there are several workers, every one updates every parameter.
        replicated: Whether that is so now, and nothing has to be published.
        relays: Whether those who sum up a gradient are not those who update with it.
        updaters: Workers that update all parameters among them, each one once: all workers, or those of this host.
        measurers: Workers that sum up all gradients among them, each one once.
        savers: Workers that save what they update; the others update the same.
        densified: Slots that were said to get few rows, but got a dense gradient at some step.
        present: For each slot, 1 if any own microbatch of this step had a gradient for it.
    """

    ranges: Sequence[Span]
    segments: Sequence[Sequence[Segment]]
    replicates: bool
    replicated: bool
    relays: bool
    densified: Set[int]
    updaters: Sequence[int]
    measurers: Sequence[int]
    savers: Sequence[int]

    @property
    @abc.abstractmethod
    def present(self) -> bytes: ...

    def owned_by(self, rank: int) -> list[int]:
        """*local*. The slots (by index) whose optimizer state worker ``rank`` saves."""
        return self._segment_of(rank) if rank in self.savers else []

    def updated_by(self, rank: int) -> list[int]:
        """*local*. The slots (by index) that worker ``rank`` updates."""
        if not self.replicated:
            return self._segment_of(rank)
        return [slot.index for segments in self.segments for rank in self.updaters for slot in segments[rank].slots]

    def _segment_of(self, rank: int) -> list[int]:
        return [slot.index for segments in self.segments for slot in segments[rank].slots]

    @abc.abstractmethod
    def reassign(self, ranges: Sequence[Span]) -> None:
        """*local*, alike on all workers, between two steps. From now on each worker has other microbatches; what it updates,
        and the memory that it works in, stay.

        Raises:
            ConfigurationError: Such ranges cannot be.
        """

    @abc.abstractmethod
    def densify(self, slots: Collection[int]) -> None:
        """*local*, alike on all workers. From now on the gradients of these slots are dense."""

    @abc.abstractmethod
    def begin(self, filled: int, *, overlap: bool) -> None:
        """*local*. A step in which microbatches ``0 <= m < filled`` hold samples. With ``overlap``, gradients may leave
        while the last microbatch's backward still runs; all workers must say the same."""

    @abc.abstractmethod
    def before_backward(self, leaf: int) -> None:
        """*local*. Announces the backward pass of microbatch ``leaf``."""

    @abc.abstractmethod
    def add(self, leaf: int) -> None:
        """*local*. Takes the gradients of microbatch ``leaf`` from the parameters' ``.grad`` and clears them."""

    @abc.abstractmethod
    def launch(self, notes: Sequence[Tensor] = (), expected: Sequence[Sequence[Expected]] | None = None) -> None:
        """*collective*. Sends what has not been sent yet, and ``notes`` along with it; does not wait.

        Args:
            notes: 1-D CPU tensors for every worker.
            expected: What each worker's notes will be.
        """

    @abc.abstractmethod
    def notes(self) -> list[list[Tensor]]:
        """*collective*. Waits for the other workers' notes: for each worker, its own included, in order of rank."""

    @property
    @abc.abstractmethod
    def unfit(self) -> bool:
        """Whether, as all workers know once they have the notes, the step must be done again in another way."""

    @abc.abstractmethod
    def drop(self) -> None:
        """*collective*. Waits for what is under way and forgets it: the step will be done again."""

    @abc.abstractmethod
    def finish(self, count: float, present: bytes) -> Reduced:
        """*collective*. Waits for the other workers' pieces, sums up this worker's part of them and divides by ``count``.

        Args:
            present: Which slots have a gradient from any microbatch of any worker.
        """

    @abc.abstractmethod
    def deliver(self, reduced: Reduced, present: bytes) -> Reduced:
        """*collective*. Where the reduction ``relays``: brings sums to those who update with them.

        Args:
            reduced: What this worker has summed up, from ``finish``.
            present: As for ``finish``.

        Returns:
            What this worker updates with.
        """

    def close(self) -> None:  # noqa: B027 - most leave nothing behind
        """*local*. Another one takes its place: takes its hooks off the parameters."""

    @property
    @abc.abstractmethod
    def torn(self) -> bool:
        """Whether a gradient arrived after its bucket had been sent: the step must be done again without overlap."""
