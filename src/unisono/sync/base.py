"""What keeps replicas together, as the step sees it."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from unisono.collective import Collective
from unisono.layout import Layout, Segment, Slot
from unisono.tree import Span


class Sync(abc.ABC):
    """How replicas are kept together: settings that become a ``Reduction`` once model and workers are known."""

    @abc.abstractmethod
    def bind(self, layout: Layout, collective: Collective, leaves: int) -> Reduction:
        """*local*. The reduction of gradients laid out by ``layout`` over ``leaves`` microbatches a step."""

    @abc.abstractmethod
    def overlaps(self, device: torch.device) -> bool:
        """*local*. Whether gradients leave while the last microbatch's backward still runs, on such a device."""


class Reduction(abc.ABC):
    """From the gradients of this worker's microbatches to the global sum of the parameters that this worker owns.

    A step calls ``begin``, then ``add`` for each own microbatch in order, then ``launch`` and ``finish``.

    Attributes:
        ranges: Each worker's microbatches.
        segments: For each block of the layout, each worker's segment.
        present: For each slot, 1 if any own microbatch of this step had a gradient for it (uint8).
    """

    ranges: Sequence[Span]
    segments: Sequence[Sequence[Segment]]
    present: npt.NDArray[np.uint8]

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
    def launch(self) -> None:
        """*collective*. Sends what has not been sent yet; does not wait."""

    @abc.abstractmethod
    def finish(self) -> list[tuple[Slot, Tensor]]:
        """*collective*. Waits for the other workers' pieces: each owned slot with its summed gradient, which is this
        worker's to change until the next step."""

    @property
    @abc.abstractmethod
    def torn(self) -> bool:
        """Whether a gradient arrived after its bucket had been sent: the step must be done again without overlap."""
