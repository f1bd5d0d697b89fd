"""The variables of a Keras model that are not trained, but for the states of its random generators."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from unisono.replica.arrays import tensor_from
from unisono.replica.buffers import Buffers
from unisono.replica.mirror import Mirror


class KerasBuffers(Buffers):
    """See the module. Everything here is *local*.

    Which of them forward changes is known from its trace: of a frozen model's many weights none is copied or compared.

    Args:
        names: Of each variable.
        variables: Keras variables.
    """

    def __init__(self, names: Sequence[str], variables: Sequence[Any]) -> None:
        super().__init__(names, [tensor_from(variable) for variable in variables])
        self._floating = []
        self._changing: set[int] = set()
        self._mirror = Mirror(variables, self.tensors)

    def pull(self) -> None:
        """Takes over what has been assigned to the variables."""
        self._copy(self.start, self.tensors, self._mirror.pull())

    def push(self, *, whole: bool) -> None:
        """Gives the variables (else those that forward changes) the values of now."""
        self._mirror.push(None if whole else sorted(self._changing))

    def inputs(self) -> list[Any]:
        """The values of now, as the framework's tensors."""
        return self._mirror.values()

    def put(self, changed: Mapping[int, Any]) -> None:
        """Forward has made these values, by index."""
        new = changed.keys() - self._changing
        self._changing |= new
        self._copy(self.start, self.tensors, sorted(new))
        for index, value in changed.items():
            self.tensors[index].copy_(tensor_from(value))

    def changes(self, known: Sequence[bool]) -> list[int]:
        return [i for i in sorted(self._changing) if known[i] or not torch.equal(self.tensors[i], self.start[i])]

    def written(self) -> Collection[int]:
        return self._changing
