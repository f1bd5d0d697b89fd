"""Numbers and texts that all workers must have alike in every step: learning rates and the like. Everything here is *local*."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy as np
from torch import Tensor

Groups = Sequence[Mapping[str, Any]]
_DOUBLE = struct.Struct("<d")
_LEFT_OUT = ("params", "param_names")
_UNKNOWN, _CHANGES = object(), object()


class Values:
    """See the module.

    Args:
        groups: The parameter groups of now, as the optimizer has them.
        digest: 64 bits of the other values; they are compared in every step.
        named: The other values by name for a person, and more that is compared with each checkpoint only.
    """

    def __init__(self, groups: Callable[[], Groups], digest: Callable[[], int], named: Callable[[], Mapping[str, str]]) -> None:
        self._groups, self._digest, self._named = groups, digest, named
        self._known: list[_Group] = []

    def digest(self) -> int:
        """64 bits of all that is compared in every step."""
        groups = self._groups()
        if len(groups) != len(self._known):
            self._known = [_Group() for _ in groups]
        whole = self._digest()
        for known, group in zip(self._known, groups, strict=True):
            whole = whole * 31 + known.digest(group)
        return whole & (2**64 - 1)

    def named(self) -> dict[str, str]:
        """All values as texts, by name for a person."""
        groups = {
            f"{key!r} of parameter group {number}": repr(comparable(value))
            for number, group in enumerate(self._groups())
            for key, value in group.items()
            if key not in _LEFT_OUT
        }
        return {**groups, **self._named()}


class _Group:
    """A parameter group as it was in the step before: most of its values are still the very same objects."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._words: dict[str, int] = {}
        self._sum = 0

    def digest(self, group: Mapping[str, Any]) -> int:
        values = self._values
        if len(group) != len(values):
            values.clear()
            self._words.clear()
            self._sum = 0
        for key, value in group.items():
            if values.get(key, _UNKNOWN) is not value:
                # What can change without becoming another object is looked at anew each time.
                values[key] = value if key in _LEFT_OUT or _is_fixed(value) else _CHANGES
                word = 0 if key in _LEFT_OUT else hash((crc32(key.encode()), _word(value)))
                # A sum: who joins may have been given the values in another order.
                self._sum += word - self._words.get(key, 0)
                self._words[key] = word
        return self._sum


_FIXED = (bool, int, float, str, type(None))


def _is_fixed(value: Any) -> bool:
    return isinstance(value, _FIXED) or (type(value) is tuple and all(isinstance(item, _FIXED) for item in value))


def _word(value: Any) -> int:
    """A number that is the same in all processes, for values that are the same."""
    if type(value) is float:
        return int.from_bytes(_DOUBLE.pack(value), "little") if value == value else 1
    return crc32(repr(comparable(value)).encode())


def comparable(value: Any) -> Any:
    """*local*. What two processes can compare: of an object of another kind its type alone."""
    if isinstance(value, Tensor):
        return value.detach().tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [comparable(item) for item in value]
    return value if isinstance(value, _FIXED) else type(value).__qualname__
