"""The trainable weights: one copy for each worker, or, while nobody else may write to them, one for all workers of a host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from unisono.collective import Collective
from unisono.errors import ConfigurationError
from unisono.replica.base import Replica
from unisono.system.budget import Dose
from unisono.system.memory import give_back_freed_memory

_PROBES = 16
"""Elements of each parameter by which a change is noticed: so many at a time as there is time for, at least one."""
_SHARE = 0.002
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the size of an element: NumPy knows these."""

Array = npt.NDArray[Any]


class Weights:
    """The flat memory of all trainable parameters.

    Args:
        replica: Whose they are; they move into flat memory now.
        collective: Gives that memory.

    Attributes:
        flats: One flat tensor a block.
        shared: Whether the workers of this host have them in common now.
        wanted: Whether they may have them in common.
    """

    def __init__(self, replica: Replica, collective: Collective) -> None:
        self.flats: Sequence[Tensor] = replica.adopt(collective.allocate)
        give_back_freed_memory()  # where they lay before
        self.shared = False
        self.wanted = False
        self._replica = replica
        self._collective = collective
        self._probes = [np.stack([_probe(s.offset, s.numel) for s in block.slots], axis=1) for block in replica.layout.blocks]
        self._dose = Dose(_SHARE, _PROBES)
        self._turn = 0
        self._known_places: dict[tuple[int, int], list[Array]] = {}
        self._integers: list[Array] = []
        self._seen: tuple[Sequence[int], list[Array], list[bytes]] | None = None

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """*local*. Every parameter's memory as it lies, 1-D."""
        for block, flat in zip(self._replica.layout.blocks, self.flats, strict=True):
            for slot in block.slots:
                yield f"parameter {slot.name!r}", flat[slot.offset : slot.offset + slot.numel]

    def want(self, wanted: bool) -> None:
        """*local*. Whether the workers of a host may share the weights."""
        self.wanted = wanted

    @contextlib.contextmanager
    def in_common(self, wanted: bool) -> Iterator[None]:
        """*local*. While the body runs the workers of a host may share the weights; afterwards they do not."""
        self.wanted = wanted
        try:
            yield
        finally:
            self.wanted = False
            self._unshare()

    def _unshare(self) -> None:
        for flat in self.flats:
            self._collective.unshare(flat)
        self.shared = False
        self._seen = None
        self._integers = []

    def bind(self, collective: Collective, *, share: bool) -> None:
        """*collective*. From now on these are the other workers.

        Args:
            share: Whether those of each host have the weights in common now, if they can. The same on all workers.
        """
        self._collective = collective
        self._seen = None
        if not share:
            self._unshare()
        else:
            shared = [collective.share(flat) for flat in self.flats]
            self.shared = any(shared)
            self._integers = []
            if self.shared:
                self._integers = [flat.view(_INTEGERS.get(flat.element_size(), flat.dtype)).numpy() for flat in self.flats]

    def remember(self) -> None:
        """*local*. The values of now are those that the trainer has made."""
        self._seen = None
        if not self.shared:
            return
        self._dose.adjust()
        began_s = self._dose.begin()
        places = self._places(self._turn, self._dose.amount)
        self._turn = (self._turn + self._dose.amount) % _PROBES
        self._seen = (self._replica.edits(), places, self._values(places))
        self._dose.end(began_s)

    def check_untouched(self) -> None:
        """*local*. Whether shared weights are still as the trainer made them: if every worker changes them in place, they
        change several times.

        Raises:
            ConfigurationError: They are not.
        """
        if self._seen is None:
            return
        began_s = self._dose.begin()
        versions, places, values = self._seen
        if versions == self._replica.edits() and values == self._values(places):
            self._dose.end(began_s)
            return
        raise ConfigurationError(
            "weights were changed between two steps while the workers of this host share them, so the change was made once by "
            "each worker. Pass sync=Exact(share_weights=False), and leave Callback.edits_weights True where a callback edits them"
        )

    def _places(self, turn: int, amount: int) -> list[Array]:
        found = self._known_places.get((turn, amount))
        if found is None:
            found = self._known_places[turn, amount] = [probes[turn : turn + amount].ravel() for probes in self._probes]
        return found

    def _values(self, places: Sequence[Array]) -> list[bytes]:
        # As bytes, so that a NaN equals itself.
        return [integers.take(where).tobytes() for integers, where in zip(self._integers, places, strict=True)]


def _probe(offset: int, numel: int) -> Array:
    """Positions spread over a parameter, in an order in which any few of them are far apart: int64 ``[_PROBES]``."""
    spread = np.linspace(0, max(numel - 1, 0), _PROBES).astype(np.int64)
    return offset + spread[[0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15]]
