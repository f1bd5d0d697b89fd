"""What PyTorch loss and metric functions are given, and what they may return. Everything here is *local*."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils.data import Dataset

from unisono.errors import ConfigurationError, DataError
from unisono.layout import ALIGNMENT_BYTES


def sum_and_count(returned: Any, samples: int, *, what: str) -> tuple[Tensor, float]:
    """The ``(sum, count)`` that a loss or metric function has returned; a lone scalar is a mean over ``samples``.

    Raises:
        ConfigurationError: It is neither a scalar nor such a pair, or the count is negative or not finite.
    """
    pair = isinstance(returned, (tuple, list))
    if pair and len(returned) != 2:
        raise ConfigurationError(_shape_advice(what, f"{len(returned)} values"))
    value, count = returned if pair else (returned, samples)
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or what == "loss":
            raise ConfigurationError(_shape_advice(what, f"a {type(value).__name__}"))
        value = torch.tensor(float(value), dtype=torch.float64)
    if value.numel() != 1:
        raise ConfigurationError(_shape_advice(what, f"a tensor of shape {tuple(value.shape)}"))
    if isinstance(count, Tensor) and count.numel() != 1:
        raise ConfigurationError(_shape_advice(what, f"a count of shape {tuple(count.shape)}"))
    try:
        number = float(count)
    except (TypeError, ValueError):
        raise ConfigurationError(_shape_advice(what, f"a count of type {type(count).__name__}")) from None
    if not math.isfinite(number) or number < 0:
        raise ConfigurationError(f"the {what}'s count is {number}: it must be finite and not negative")
    value = value.reshape(())
    return (value if pair else value * samples), number


def _shape_advice(what: str, got: str) -> str:
    return (
        f"the {what} function returned {got}. Return the pair (sum over the microbatch as a scalar tensor, count to divide "
        'by), for example (F.cross_entropy(output, target, reduction="sum"), len(target)), or one scalar: the mean over '
        "the samples"
    )


def to_device(data: Any, device: torch.device) -> Any:
    """*local*. ``data`` with every tensor on ``device``, at an address that does not change the bits of what is computed
    from it. Understands mappings, sequences, named tuples and objects with ``to(device)``."""
    if isinstance(data, Tensor):
        if device.type != "cpu":
            return data.to(device, non_blocking=True)
        data = data.to(device)
        # Matrix kernels choose their path by alignment: memory that came from numpy, say, starts anywhere.
        if data.layout == torch.strided and data.data_ptr() % ALIGNMENT_BYTES:
            return data.clone()
        return data
    if isinstance(data, Mapping):
        moved = {key: to_device(value, device) for key, value in data.items()}
        return moved if type(data) is dict else _rebuilt(data, moved)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(to_device(value, device) for value in data))
    if isinstance(data, (list, tuple)):
        return type(data)(to_device(value, device) for value in data)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return dataclasses.replace(
            data, **{f.name: to_device(getattr(data, f.name), device) for f in dataclasses.fields(data) if f.init}
        )
    if hasattr(data, "to") and callable(data.to):
        moved = data.to(device)
        if device.type == "cpu":
            _align_inside(moved, set())
        return moved
    return data


def _align_inside(data: Any, seen: set[int], depth: int = 6) -> None:
    """Moves the tensors that an object holds in its attributes to aligned memory; they stay the same objects."""
    if isinstance(data, Tensor):
        if data.layout == torch.strided and data.is_cpu and data.data_ptr() % ALIGNMENT_BYTES and not data.is_inference():
            data.data = data.detach().clone()
        return
    if id(data) in seen or not depth or isinstance(data, (type, str, bytes, torch.nn.Module, Dataset, ref)):
        return
    seen.add(id(data))
    if isinstance(data, Mapping):
        inside = list(data.values())
    elif isinstance(data, (list, tuple)):
        inside = list(data) if data and not isinstance(data[0], (int, float, str)) else []
    else:
        inside = list(getattr(data, "__dict__", {}).values())
        inside += [getattr(data, name, None) for kind in type(data).__mro__ for name in kind.__dict__.get("__slots__", ())]
    for value in inside:
        _align_inside(value, seen, depth - 1)


def _rebuilt(data: Mapping[Any, Any], moved: dict[Any, Any]) -> Any:
    try:
        return type(data)(moved)  # type: ignore[call-arg]
    except TypeError as error:
        raise DataError(
            f"a batch holds a {type(data).__name__}, which cannot be rebuilt from a dict: return a dict from collate_fn"
        ) from error
