"""Buffers that forward changes: every microbatch starts from the step's start, and the step ends with one result.

A floating-point buffer (BatchNorm's statistics) becomes the tree mean, in float64 and cast once, of what each microbatch made
of it; a microbatch that left it alone made of it what it was. Integer and boolean buffers (``num_batches_tracked``) must come
out the same from every microbatch.

Only buffers that some forward has changed are followed. When one changes for the first time, the step is done again with it:
same seeds, same start, same result.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from unisono.errors import ConfigurationError
from unisono.tree import Fold, Span, combine, pieces


class Buffers:
    """The buffers of a model, and what they were when the step began. Everything here is *local*.

    A framework that counts writes, or lets a buffer be replaced, says so in a subclass.

    Args:
        names: Of each buffer.
        tensors: Their memory: forward leaves its changes there, and starts from what is written there.

    Attributes:
        names: As given.
        tensors: As given.
        start: Their values when the step began.
    """

    def __init__(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        self.names = list(names)
        self.tensors = list(tensors)
        self.start = [tensor.detach().clone() for tensor in self.tensors]
        self._floating = [index for index, tensor in enumerate(self.tensors) if tensor.is_floating_point()]

    def named(self) -> dict[str, Tensor]:
        """By name, as they are now."""
        self.collect()
        return dict(zip(self.names, self.tensors, strict=True))

    def values(self) -> list[Tensor]:
        """Copies of the values of now."""
        return [tensor.detach().clone() for tensor in self.named().values()]

    def go_to(self, values: Sequence[Tensor]) -> None:
        """Makes the ``values`` of some moment those of now."""
        with torch.no_grad():
            for tensor, value in zip(self.tensors, values, strict=True):
                tensor.copy_(value)

    def begin(self) -> None:
        """The values of now are the step's start."""
        self.collect()
        self._copy(self.start, self.tensors, sorted({*self._floating, *self.written()}))

    def restore(self, changed: Collection[int] | None = None) -> None:
        """Puts the step's start back.

        Args:
            changed: Buffers (by index) that have changed, besides those that were ``written``; None: any may have.
        """
        moved = range(len(self.tensors)) if changed is None else sorted({*changed, *self.written()})
        self._copy(self.tensors, self.start, moved)

    def settle(self, index: int, value: Tensor) -> None:
        """Gives a buffer a value, from which the next step starts."""
        self.tensors[index].copy_(value)
        self._copy(self.start, self.tensors, [index])

    def _copy(self, to: Sequence[Tensor], source: Sequence[Tensor], moved: Sequence[int]) -> None:
        if moved:
            with torch.no_grad():
                torch._foreach_copy_([to[i] for i in moved], [source[i] for i in moved])
            self.settled(moved)

    def collect(self) -> None:
        """What forward, or someone else, has made of the buffers is in ``tensors`` now."""

    def changes(self, known: Sequence[bool]) -> list[int]:
        """Buffers (by index) that are unlike the step's start, or ``known`` to be."""
        return [i for i, tensor in enumerate(self.tensors) if known[i] or not torch.equal(tensor, self.start[i])]

    def written(self) -> Collection[int]:
        """Buffers (by index) that may have been written to since they were ``settled``."""
        return range(len(self.tensors))

    def settled(self, indices: Sequence[int]) -> None:
        """These buffers are as the step began."""


class BufferFold:
    """What the microbatches of a step, of all workers, make of the buffers.

    Args:
        buffers: Of this worker's replica.
        microbatches: M, microbatches a step.

    Attributes:
        buffers: As given.
        changed: For each buffer, 1 if a microbatch of this worker changed it in this step (uint8).
    """

    def __init__(self, buffers: Buffers, microbatches: int) -> None:
        self.buffers = buffers
        self._microbatches = microbatches
        count = len(buffers.tensors)
        self._tracked = np.zeros(count, dtype=np.uint8)
        self.changed = np.zeros(count, dtype=np.uint8)
        self._fold: Fold[Tensor] = Fold(microbatches, Tensor.add_)
        self._exact: Tensor | None = None
        self._select()

    def begin(self) -> None:
        """*local*. The values of now are the step's start."""
        if self.buffers.tensors:
            self.buffers.begin()
            self.restart()

    def restart(self) -> None:
        """*local*. Forgets what this step's microbatches did; they will be computed again."""
        self.changed[:] = 0
        self._fold = Fold(self._microbatches, Tensor.add_)
        self._exact = None

    def add(self, microbatch: int) -> None:
        """*local*. Takes what a microbatch made of the buffers and puts the step's start back."""
        tensors = self.buffers.tensors
        if not tensors:
            return
        self.buffers.collect()
        for index in self.buffers.changes(self._silent):
            if tensors[index].is_complex():
                raise ConfigurationError(
                    f"buffer {self.buffers.names[index]!r} is complex and changes in forward: use two real buffers"
                )
            self.changed[index] = 1
        if self._floats:
            values = torch.empty(self._numel, dtype=torch.float64, device=tensors[self._floats[0]].device)
            torch._foreach_copy_(self._views(values, self._floats), [tensors[i] for i in self._floats])
            self._fold.push(microbatch, values)
        if self._exacts:
            self._take_exact()
        self.restore()

    def skip(self, microbatch: int) -> None:
        """*local*. A microbatch without samples, among others that have some."""
        if self._floats:
            device = self.buffers.tensors[self._floats[0]].device
            # -0.0 is what adding leaves untouched, sign of zero included.
            self._fold.push(microbatch, torch.full((self._numel,), -0.0, dtype=torch.float64, device=device))

    def restore(self) -> None:
        """*local*. Puts the step's start back."""
        if self.buffers.tensors:
            self.buffers.restore([index for index, changed in enumerate(self.changed) if changed or self._silent[index]])

    @property
    def tracked(self) -> bytes:
        """*local*. For each buffer, 1 if some forward has changed it."""
        return self._tracked.tobytes()

    def track(self, changed: bytes) -> bool:
        """*local*. Whether any buffer in ``changed`` (over all workers) was not followed in this step; it is from now on."""
        if not any(changed):
            return False
        flags = np.frombuffer(changed, dtype=np.uint8)
        unknown = bool(np.any(flags & ~self._tracked & 1))
        if unknown:
            self._tracked |= flags
            self._select()
        return unknown

    def message(self, span: Span, filled: int) -> Tensor:
        """*local*. What the other workers need from this one, which has microbatches ``span``: its piece sums, then its
        integers as raw 8 bytes (float64)."""
        if not self.buffers.tensors:
            return _NOTHING
        for absent in range(max(filled, span[0]), span[1]):
            self._fold.push(absent, None)
        parts = [value.cpu() for value in self._fold.parts().values() if value is not None]
        if self._exact is not None:
            parts.append(self._exact.cpu().view(torch.float64))
        elif self._exact_numel and span[0] < filled:
            parts.append(torch.zeros(self._exact_numel, dtype=torch.float64))  # all its streams have ended
        return torch.cat(parts) if parts else _NOTHING

    def message_size(self, span: Span, filled: int) -> int:
        """*local*. Number of float64 elements that the worker with microbatches ``span`` sends."""
        present = sum(1 for piece in pieces(*span, self._microbatches) if piece[0] < filled) if self._floats else 0
        exact = self._exact_numel if span[0] < filled else 0
        return present * self._numel + exact

    def finish(self, messages: Sequence[Tensor], ranges: Sequence[Span], filled: int, changed: bytes, empty: bytes = b"") -> None:
        """*local*. Sets every buffer in ``changed`` to its result, given all workers' messages.

        Args:
            empty: For each microbatch, 1 if it has no samples though its number is below ``filled``.

        Raises:
            ConfigurationError: Microbatches disagree about an integer buffer.
        """
        if not (self._floats or self._exacts):
            return
        parts: dict[Span, Tensor | None] = {}
        exact: list[Tensor] = []
        for span, message in zip(ranges, messages, strict=True):
            offset = 0
            for piece in pieces(*span, self._microbatches):
                if self._floats and piece[0] < filled:
                    parts[piece] = message[offset : offset + self._numel]
                    offset += self._numel
                else:
                    parts[piece] = None
            if message.numel() > offset and not all(empty[slice(*span)] or b"\0"):
                exact.append(message[offset:].view(torch.int64))
        with torch.no_grad():
            total = combine(parts, self._microbatches, torch.add)
            if total is not None:
                self._settle(self._floats, total / (filled - sum(empty)), changed)
            for other in exact[1:]:
                if not torch.equal(exact[0], other):
                    self._disagree(exact[0], other)
            if exact:
                self._settle(self._exacts, exact[0], changed)

    def _settle(self, indices: Sequence[int], flat: Tensor, changed: bytes) -> None:
        for index, view in zip(indices, self._views(flat, indices), strict=True):
            if changed[index]:
                self.buffers.settle(index, view)

    def _select(self) -> None:
        tensors = self.buffers.tensors
        tracked = [i for i, tensor in enumerate(tensors) if self._tracked[i] and tensor.numel()]
        self._floats = [i for i in tracked if tensors[i].is_floating_point()]
        self._exacts = [i for i in tracked if not tensors[i].is_floating_point()]
        # These count as changed without a look: if one was not, the mean of equal values, in float64, is that value.
        silent = {i for i in self._floats if tensors[i].dtype != torch.float64}
        self._silent = [i in silent for i in range(len(tensors))]
        self._numel = sum(tensors[i].numel() for i in self._floats)
        self._exact_numel = sum(tensors[i].numel() for i in self._exacts)

    def _views(self, flat: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """Consecutive parts of ``flat``, shaped like these buffers."""
        like = [self.buffers.tensors[i] for i in indices]
        parts = torch.split(flat, [tensor.numel() for tensor in like])
        return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]

    def _take_exact(self) -> None:
        values = torch.cat([self.buffers.tensors[i].reshape(-1).to(torch.int64) for i in self._exacts])
        if self._exact is None:
            self._exact = values
        elif not torch.equal(self._exact, values):
            self._disagree(self._exact, values)

    def _disagree(self, one: Tensor, other: Tensor) -> None:
        views = zip(self._exacts, self._views(one, self._exacts), self._views(other, self._exacts), strict=True)
        for index, left, right in views:
            if not torch.equal(left, right):
                raise ConfigurationError(
                    f"buffer {self.buffers.names[index]!r} ({self.buffers.tensors[index].dtype}) comes out differently from the "
                    "microbatches of one step, so no single value is right for all: make it floating point (it will be "
                    "averaged), or change it by the same amount in every forward"
                )


_NOTHING = torch.empty(0, dtype=torch.float64)
