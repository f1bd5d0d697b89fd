"""The trainable weights: one copy for each worker, or, while nobody else may write to them, one for all workers of a host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from unisono.collective import Collective
from unisono.errors import ConfigurationError
from unisono.layout import Layout
from unisono.training.memory import give_back_freed_memory

_PROBES = 16
"""Elements of each parameter that are looked at to notice a change."""


class Weights:
    """The flat memory of all trainable parameters.

    Args:
        layout: Where they lie; they move into flat memory now.
        collective: Gives that memory.

    Attributes:
        flats: One flat tensor a block.
        shared: Whether the workers of this host have them in common now.
    """

    def __init__(self, layout: Layout, collective: Collective) -> None:
        self.flats: Sequence[Tensor] = layout.adopt(collective.allocate)
        give_back_freed_memory()  # where they lay before
        self.shared = False
        self._wanted = False
        self._layout = layout
        self._collective = collective
        self._probes = [torch.cat([_probe(slot.offset, slot.numel) for slot in block.slots]) for block in layout.blocks]
        self._seen: tuple[list[int], list[Tensor]] | None = None

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """*local*. Every parameter's memory as it lies, 1-D."""
        for block, flat in zip(self._layout.blocks, self.flats, strict=True):
            for slot in block.slots:
                yield f"parameter {slot.name!r}", flat[slot.offset : slot.offset + slot.numel]

    def want(self, wanted: bool) -> None:
        """*local*. Whether ``bind`` lets the workers of a host share the weights, if they can."""
        self._wanted = wanted

    @contextlib.contextmanager
    def in_common(self, wanted: bool) -> Iterator[None]:
        """*local*. While the body runs, ``bind`` lets the workers of a host share the weights, if they can."""
        self._wanted = wanted
        try:
            yield
        finally:
            self._wanted = False
            for flat in self.flats:
                self._collective.unshare(flat)
            self.shared = False
            self._seen = None

    def bind(self, collective: Collective) -> None:
        """*collective*. From now on these are the other workers; shares the weights with those of this host, if wanted."""
        self._collective = collective
        self._seen = None
        if self._wanted:
            shared = [collective.share(flat) for flat in self.flats]
            self.shared = any(shared)

    def remember(self) -> None:
        """*local*. The values of now are those that the trainer has made."""
        self._seen = (self._versions(), self._values()) if self.shared else None

    def check_untouched(self) -> None:
        """*local*. Whether shared weights are still as the trainer made them: if every worker changes them in place, they
        change several times.

        Raises:
            ConfigurationError: They are not.
        """
        if self._seen is None:
            return
        versions, values = self._seen
        if versions == self._versions() and all(map(torch.equal, values, self._values())):
            return
        raise ConfigurationError(
            "weights were changed between two steps while the workers of this host share them, so the change was made once by "
            "each worker. Pass sync=Exact(share_weights=False), and leave Callback.edits_weights True where a callback edits them"
        )

    def _versions(self) -> list[int]:
        return [parameter._version for parameter in self._layout.parameters]

    def _values(self) -> list[Tensor]:
        # As bytes, so that a NaN equals itself.
        return [flat.index_select(0, where).view(torch.uint8) for flat, where in zip(self.flats, self._probes, strict=True)]


def _probe(offset: int, numel: int) -> Tensor:
    """Positions spread over a parameter, int64."""
    return offset + torch.linspace(0, max(numel - 1, 0), min(numel, _PROBES), dtype=torch.float64).long()
