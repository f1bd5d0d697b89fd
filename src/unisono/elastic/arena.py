"""Memory that the workers of a host share, and the values of the optimizer's state that lie in it. *Local.*"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unisono.layout import ALIGNMENT_BYTES

_NUMBERS: dict[type, torch.dtype] = {int: torch.int64, float: torch.float64, bool: torch.bool}
_INT64 = range(-(1 << 63), 1 << 63)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One value of the optimizer's state: a tensor, a number, or None."""

    slot: int
    key: str
    dtype: str | None
    """None: the value is None."""
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = 0
    """In bytes, from the beginning of its arena."""
    nbytes: int = 0
    number: str = ""
    """Name of the Python type of a plain number, which lies there as a tensor of no dimensions."""

    @classmethod
    def of(cls, slot: int, key: str, value: Any) -> Entry | None:
        """None: it cannot be held."""
        if value is None:
            return cls(slot=slot, key=key, dtype=None)
        if _is_number(value):
            return _of_tensor(slot, key, torch.empty((), dtype=_NUMBERS[type(value)]), number=type(value).__name__)
        return _of_tensor(slot, key, value) if isinstance(value, Tensor) and value.device.type == "cpu" else None

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Entry:
        return cls(**{**fields, "shape": tuple(fields["shape"]), "stride": tuple(fields["stride"])})

    def fits(self, value: Any) -> bool:
        """Whether the value can be where this one was."""
        if self.number:
            return type(value).__name__ == self.number and _is_number(value)
        if self.dtype is None or not isinstance(value, Tensor):
            return self.dtype is None and value is None
        kind = str(value.dtype).removeprefix("torch.")
        return value.device.type == "cpu" and (kind, tuple(value.shape)) == (self.dtype, self.shape)

    def view(self, arena: Tensor) -> Tensor | None:
        """Where it lies; None if it is None."""
        if self.dtype is None:
            return None
        room = arena[self.offset : self.offset + self.nbytes].view(getattr(torch, self.dtype))
        return room.as_strided(self.shape, self.stride)

    def shown(self, view: Tensor | None) -> Any:
        """What the optimizer finds in its state for what lies at ``view``."""
        return view.item() if self.number and view is not None else view


def _is_number(value: Any) -> bool:
    return type(value) in _NUMBERS and (type(value) is not int or value in _INT64)


def _of_tensor(slot: int, key: str, value: Tensor, number: str = "") -> Entry:
    room = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
    return Entry(
        slot=slot,
        key=key,
        dtype=str(value.dtype).removeprefix("torch."),
        shape=tuple(value.shape),
        stride=value.stride(),
        nbytes=room * value.element_size(),
        number=number,
    )


@dataclasses.dataclass(kw_only=True)
class Arena:
    """State that came to be at the same time, of all parameters: entries in slot order, at multiples of 64 bytes.

    What did not fit any more where it was lies in a later arena; what it was before stays in the earlier one, for going back.
    """

    born: int
    """The step after which it was there."""
    entries: list[Entry]
    nbytes: int
    memory: Tensor | None = None
    """uint8 ``[nbytes]``."""
    copy: Tensor | None = None
    _runs: dict[frozenset[int], list[tuple[int, int]]] = dataclasses.field(default_factory=dict)

    def runs(self, slots: frozenset[int]) -> list[tuple[int, int]]:
        """The stretches of memory, in bytes, that hold what belongs to these slots."""
        if slots not in self._runs:
            found: list[tuple[int, int]] = []
            ends = [*(entry.offset for entry in self.entries[1:]), self.nbytes]
            for entry, end in zip(self.entries, ends, strict=True):
                if entry.slot not in slots:
                    continue
                if found and found[-1][1] == entry.offset:
                    found[-1] = (found[-1][0], end)
                else:
                    found.append((entry.offset, end))
            self._runs[slots] = found
        return self._runs[slots]


def new_arena(entries: Sequence[Entry], step: int) -> Arena:
    placed: list[Entry] = []
    end = 0
    for entry in sorted(entries, key=lambda entry: (entry.slot, entry.key)):
        placed.append(dataclasses.replace(entry, offset=end))
        end += -(-entry.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return Arena(born=step, entries=placed, nbytes=max(end, ALIGNMENT_BYTES))
