"""Arrays of NumPy's interface and torch CPU tensors, as bytes of one another. Everything here is *local*."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_UNKNOWN_TO_NUMPY = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
"""Types that NumPy has from the package ml_dtypes only, which comes with every framework that uses them."""
_BYTES: dict[int, npt.DTypeLike] = {1: np.int8, 2: np.int16}


def tensor_from(array: Any) -> Tensor:
    """A copy, contiguous, of whatever NumPy takes for an array.

    Raises:
        TypeError: torch has no such type.
    """
    found = np.array(np.asarray(array), order="C")
    dtype = _UNKNOWN_TO_NUMPY.get(found.dtype.name)
    if dtype is None:
        return torch.from_numpy(found)
    return torch.from_numpy(found.view(_BYTES[found.dtype.itemsize])).view(dtype)


def array_from(tensor: Tensor) -> npt.NDArray[Any]:
    """The memory of ``tensor`` as an array, for reading."""
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in _UNKNOWN_TO_NUMPY:
        return tensor.detach().numpy()
    import ml_dtypes

    whole: npt.NDArray[Any] = tensor.detach().view(torch.int8 if tensor.element_size() == 1 else torch.int16).numpy()
    return whole.view(getattr(ml_dtypes, name))


def torch_dtype(name: str) -> torch.dtype:
    """The type that torch has under a framework's name of it."""
    found: torch.dtype = getattr(torch, name)
    return found
