"""Variables of Keras, and the torch memory in which the rest of the house finds their values. Everything here is *local*.

The memory rules: what is written there is what the next microbatch is computed with. The variables follow after each step,
so that callbacks and loops of the user's own see the model as it is. What such code assigns to a variable is found without a look
at its values: assigning gives a variable another buffer, also in TensorFlow, which writes in place only to a buffer that nobody
else holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from unisono.replica.arrays import array_from, tensor_from


class Mirror:
    """See the module.

    Args:
        variables: Keras variables.
        tensors: Their memory, with the same values.
    """

    def __init__(self, variables: Sequence[Any], tensors: Sequence[Tensor]) -> None:
        self.variables = list(variables)
        self.tensors = list(tensors)
        self._held = [_buffer(variable) for variable in self.variables]

    def values(self) -> list[Any]:
        """What is in memory, as the framework's tensors."""
        from keras import ops

        return [ops.convert_to_tensor(array_from(tensor)) for tensor in self.tensors]

    def pull(self) -> list[int]:
        """Takes over what has been assigned to variables; says to which, by index."""
        edited: list[int] = []
        for index, variable in enumerate(self.variables):
            buffer = _buffer(variable)
            if _address(buffer) != _address(self._held[index]):
                self.tensors[index].copy_(tensor_from(buffer))
                self._held[index] = buffer
                edited.append(index)
        return edited

    def push(self, indices: Iterable[int] | None = None) -> None:
        """Gives variables (None: all) what is in memory."""
        for index in range(len(self.variables)) if indices is None else indices:
            variable = self.variables[index]
            variable.assign(np.array(array_from(self.tensors[index])))  # a copy: some frameworks would use the memory itself
            self._held[index] = _buffer(variable)

    def take(self, values: Sequence[Any]) -> None:
        """The variables have been given ``values``: so is the memory."""
        for index, (variable, value) in enumerate(zip(self.variables, values, strict=True)):
            self.tensors[index].copy_(tensor_from(value))
            self._held[index] = _buffer(variable)


def _buffer(variable: Any) -> npt.NDArray[Any]:
    """The memory in which a variable has its value now. As long as it is held nothing is written to it."""
    value = variable.value
    return np.asarray(value.read_value() if hasattr(value, "read_value") else value)


def _address(array: npt.NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
