"""Buffers that forward changes: every microbatch starts from the step's start, and the step ends with one result.

A floating-point buffer (BatchNorm's statistics) becomes the tree mean, in float64 and cast once, of what each microbatch made
of it; a microbatch that left it alone made of it what it was. Integer and boolean buffers (``num_batches_tracked``) must come
out the same from every microbatch.

Only buffers that some forward has changed are followed. When one changes for the first time, the step is done again with it:
same seeds, same start, same result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from unisono.errors import ConfigurationError
from unisono.tree import Fold, Span, combine, pieces


class Buffers:
    """The buffers of a model over the steps of a run.

    Args:
        model: The model; its buffers are followed by name, so a module may rebind them.
        leaves: Number of microbatches a step.

    Attributes:
        changed: For each buffer, 1 if a microbatch of this worker changed it in this step (uint8).
    """

    def __init__(self, model: nn.Module, leaves: int) -> None:
        self._leaves = leaves
        self._model = model
        self._modules = list(model.modules())
        self._places = list(_places(model))
        self.names = [name for name, _, _ in self._places]
        self._tensors = [tensor for _, module, key in self._places if (tensor := module._buffers[key]) is not None]
        self._start = [tensor.detach().clone() for tensor in self._tensors]
        self._versions = [tensor._version for tensor in self._tensors]
        self._tracked = np.zeros(len(self._tensors), dtype=np.uint8)
        self.changed = np.zeros(len(self._tensors), dtype=np.uint8)
        self._known = self._count()
        self._fold: Fold[Tensor] = Fold(leaves, Tensor.add_)
        self._exact: Tensor | None = None
        self._select()

    def begin(self) -> None:
        """*local*. The values of now are the step's start."""
        if not self._tensors:
            return
        self._rebind()
        # Changed between steps: loaded, edited by a callback, or by a forward of the user's own, in which batch norm's kernels
        # write statistics without counting a version.
        moved = [
            index
            for index, tensor in enumerate(self._tensors)
            if tensor.is_floating_point() or tensor._version != self._versions[index]
        ]
        if moved:
            torch._foreach_copy_([self._start[i] for i in moved], [self._tensors[i].detach() for i in moved])
            for i in moved:
                self._versions[i] = self._tensors[i]._version
        self.restart()

    def restart(self) -> None:
        """*local*. Forgets what this step's microbatches did; they will be computed again."""
        if not self._tensors:
            return
        self.changed[:] = 0
        self._fold = Fold(self._leaves, Tensor.add_)
        self._exact = None

    def add(self, leaf: int) -> None:
        """*local*. Takes what microbatch ``leaf`` made of the buffers and puts the step's start back."""
        if not self._tensors:
            return
        self._find_changes()
        if self._floats:
            values = torch.empty(self._numel, dtype=torch.float64, device=self._tensors[self._floats[0]].device)
            torch._foreach_copy_(self._views(values), [self._tensors[i] for i in self._floats])
            self._fold.push(leaf, values)
        if self._exacts:
            self._take_exact(leaf)
        self.restore()

    def restore(self) -> None:
        """*local*. Puts the step's start back."""
        moved = [
            index
            for index, tensor in enumerate(self._tensors)
            if self.changed[index] or self._silent[index] or tensor._version != self._versions[index]
        ]
        if moved:
            with torch.no_grad():
                torch._foreach_copy_([self._tensors[i] for i in moved], [self._start[i] for i in moved])
            for i in moved:
                self._versions[i] = self._tensors[i]._version

    @property
    def tracked(self) -> bytes:
        """*local*. For each buffer, 1 if some forward has changed it."""
        return self._tracked.tobytes()

    def start(self) -> list[Tensor]:
        """*local*. Copies of the values of now, for ``go_to``."""
        return [tensor.detach().clone() for tensor in self._tensors]

    def go_to(self, values: Sequence[Tensor]) -> None:
        """*local*. Makes the values of ``start`` those of now."""
        with torch.no_grad():
            for tensor, value in zip(self._tensors, values, strict=True):
                tensor.copy_(value)

    def put_back(self) -> None:
        """*local*. Undoes whatever happened to the buffers since ``begin``, outside a step."""
        for tensor, (_, module, key) in zip(self._tensors, self._places, strict=True):
            if key not in module._buffers or module._buffers[key] is not tensor:
                module._buffers[key] = tensor
        if self._tensors:
            with torch.no_grad():
                torch._foreach_copy_(self._tensors, self._start)
            self._versions = [tensor._version for tensor in self._tensors]

    def check_known(self) -> None:
        """*local*. Whether the model has just the buffers that it had at the beginning.

        Raises:
            ConfigurationError: A forward has made another one, which nobody keeps equal on all workers.
        """
        if self._count() != self._known:
            new = [name for name, _, _ in _places(self._model) if name not in self.names]
            raise ConfigurationError(
                f"buffers of the model came or went after the Trainer was made{': ' + ', '.join(new[:3]) if new else ''}. "
                "Register them when the model is made (or run it once before Trainer(...)); keep a cache in a plain attribute"
            )

    def _count(self) -> int:
        # Most modules have none: this is looked at after every microbatch.
        return sum(tensor is not None for module in self._modules if module._buffers for tensor in module._buffers.values())

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
        if not self._tensors:
            return _NOTHING
        for absent in range(max(filled, span[0]), span[1]):
            self._fold.push(absent, None)
        parts = [value.cpu() for value in self._fold.parts().values() if value is not None]
        if self._exact is not None:
            parts.append(self._exact.cpu().view(torch.float64))
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)

    def message_size(self, span: Span, filled: int) -> int:
        """*local*. Number of float64 elements that the worker with microbatches ``span`` sends."""
        present = sum(1 for piece in pieces(*span, self._leaves) if piece[0] < filled) if self._floats else 0
        exact = self._exact_numel if span[0] < filled else 0
        return present * self._numel + exact

    def finish(
        self,
        messages: list[Tensor],
        ranges: Sequence[Span],
        filled: int,
        changed: bytes,
    ) -> None:
        """*local*. Sets every buffer in ``changed`` to its result, given all workers' messages.

        Raises:
            ConfigurationError: Microbatches disagree about an integer buffer.
        """
        if not (self._floats or self._exacts):
            return
        parts: dict[Span, Tensor | None] = {}
        exact: list[Tensor] = []
        for span, message in zip(ranges, messages, strict=True):
            offset = 0
            for piece in pieces(*span, self._leaves):
                if self._floats and piece[0] < filled:
                    parts[piece] = message[offset : offset + self._numel]
                    offset += self._numel
                else:
                    parts[piece] = None
            if message.numel() > offset:
                exact.append(message[offset:].view(torch.int64))
        with torch.no_grad():
            total = combine(parts, self._leaves, torch.add)
            if total is not None:
                mean = total / filled
                for index, view in zip(self._floats, self._views(mean), strict=True):
                    if changed[index]:
                        self._settle(index, view)
            for other in exact[1:]:
                if not torch.equal(exact[0], other):
                    self._disagree(exact[0], other)
            if exact:
                for index, view in zip(self._exacts, self._exact_views(exact[0]), strict=True):
                    if changed[index]:
                        self._settle(index, view)

    def _settle(self, index: int, value: Tensor) -> None:
        self._tensors[index].copy_(value)
        self._start[index].copy_(self._tensors[index])
        self._versions[index] = self._tensors[index]._version

    def _select(self) -> None:
        tracked = [i for i, tensor in enumerate(self._tensors) if self._tracked[i] and tensor.numel()]
        self._floats = [i for i in tracked if self._tensors[i].is_floating_point()]
        self._exacts = [i for i in tracked if not self._tensors[i].is_floating_point()]
        # These count as changed without a look: if one was not, the mean of equal values, in float64, is that value.
        self._silent = np.zeros(len(self._tensors), dtype=bool)
        self._silent[[i for i in self._floats if self._tensors[i].dtype != torch.float64]] = True
        self._numel = sum(self._tensors[i].numel() for i in self._floats)
        self._exact_numel = sum(self._tensors[i].numel() for i in self._exacts)

    def _views(self, flat: Tensor) -> list[Tensor]:
        return _split(flat, [self._tensors[i] for i in self._floats])

    def _exact_views(self, flat: Tensor) -> list[Tensor]:
        return _split(flat, [self._tensors[i] for i in self._exacts])

    def _take_exact(self, leaf: int) -> None:
        values = torch.cat([self._tensors[i].reshape(-1).to(torch.int64) for i in self._exacts])
        if self._exact is None:
            self._exact = values
        elif not torch.equal(self._exact, values):
            self._disagree(self._exact, values)

    def _disagree(self, one: Tensor, other: Tensor) -> None:
        for index, left, right in zip(self._exacts, self._exact_views(one), self._exact_views(other), strict=True):
            if not torch.equal(left, right):
                raise ConfigurationError(
                    f"buffer {self.names[index]!r} ({self._tensors[index].dtype}) comes out differently from the "
                    "microbatches of one step, so no single value is right for all: make it floating point (it will be "
                    "averaged), or change it by the same amount in every forward"
                )

    def _rebind(self) -> None:
        """Takes the values of buffers that were replaced, and puts the tensors that others may hold back in their places."""
        for index, (name, module, key) in enumerate(self._places):
            tensor = self._tensors[index]
            now = module._buffers[key] if key in module._buffers else None  # noqa: SIM401 - a ScriptModule's have no get
            if now is not tensor:
                if now is None or now.shape != tensor.shape or now.dtype != tensor.dtype:
                    raise ConfigurationError(
                        f"buffer {name!r} was replaced by one of another shape or dtype: keep such a cache in a plain attribute, "
                        "not in a buffer"
                    )
                with torch.no_grad():
                    tensor.copy_(now)
                module._buffers[key] = tensor

    def _find_changes(self) -> None:
        self._rebind()
        for index, (name, _, _) in enumerate(self._places):
            tensor = self._tensors[index]
            if self._silent[index] or self._has_changed(index):
                if tensor.is_complex():
                    raise ConfigurationError(f"buffer {name!r} is complex and changes in forward: use two real buffers")
                self.changed[index] = 1

    def _has_changed(self, index: int) -> bool:
        tensor = self._tensors[index]
        if tensor._version != self._versions[index]:
            return True
        # Batch norm's kernels write statistics without counting a version.
        return tensor.is_floating_point() and not torch.equal(tensor, self._start[index])


_NOTHING = torch.empty(0, dtype=torch.float64)


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, module and key of every buffer, each once, non-persistent ones included."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for key, tensor in module._buffers.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield (f"{prefix}.{key}" if prefix else key), module, key


def _split(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    views = torch.split(flat, [tensor.numel() for tensor in like])
    return [view.view(tensor.shape) for view, tensor in zip(views, like, strict=True)]
