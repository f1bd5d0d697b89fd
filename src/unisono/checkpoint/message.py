"""State as bytes that travel between workers: JSON and safetensors, as in a checkpoint. Nothing is pickled. *Local.*

A message is the length of its JSON (8 bytes, little-endian), the JSON, and a safetensors file. Tensors keep their dtype, shape
and strides, so that equal values go on to equal results.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unisono.checkpoint.format import Json, decode, encode, from_json, pack, to_json, unpack
from unisono.errors import CheckpointError

_LENGTH = struct.Struct("<Q")
_MAGIC = b"unisono1"


def to_bytes(state: Any, types: Sequence[type] = ()) -> bytes:
    """The message that holds ``state``.

    Args:
        state: What ``format.pack`` takes, and instances of ``types`` anywhere in it.
        types: Dataclasses and named tuples that may be in it, told apart by their names.

    Raises:
        CheckpointError: It holds something else; the path and the type are named.
    """
    packed, tensors = pack(_lower(state, types))
    strides: dict[str, Json] = {name: [*tensor.stride()] for name, tensor in tensors.items() if not _is_contiguous(tensor)}
    head = to_json([packed, strides])
    return b"".join((_MAGIC, _LENGTH.pack(len(head)), head, encode(tensors)))


def from_bytes(data: bytes, types: Sequence[type] = ()) -> Any:
    """The state in a message.

    Raises:
        CheckpointError: ``data`` is no such message, a pickle for instance.
    """
    start = len(_MAGIC) + _LENGTH.size
    if data[: len(_MAGIC)] != _MAGIC or len(data) < start:
        raise CheckpointError(
            f"{len(data):,} bytes that came from another worker are not a unisono message (they begin with {data[:8]!r}); "
            "nothing was read from them. Another program uses the run's ports, or a worker runs another version of unisono"
        )
    (length,) = _LENGTH.unpack(data[len(_MAGIC) : start])
    head: Any = from_json(data[start : start + length])
    if not (isinstance(head, list) and len(head) == 2 and isinstance(head[1], dict)):
        raise CheckpointError("a message from another worker is damaged: its JSON is not that of a message")
    tensors = {name: _restride(tensor, head[1].get(name)) for name, tensor in decode(data[start + length :]).items()}
    return _lift(unpack(head[0], tensors), {kind.__name__: kind for kind in types})


def _is_contiguous(tensor: Tensor) -> bool:
    return tensor.layout is not torch.strided or tensor.is_contiguous()


def _restride(tensor: Tensor, stride: Sequence[int] | None) -> Tensor:
    if stride is None:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)


_TYPE = "$type"


def _lower(value: Any, types: Sequence[type]) -> Any:
    """Instances of ``types`` as dicts that name their type."""
    if type(value) in types:
        names = value._fields if hasattr(value, "_fields") else [field.name for field in dataclasses.fields(value)]
        fields = {name: getattr(value, name) for name in names}
        return {_TYPE: type(value).__name__, **{name: _lower(field, types) for name, field in fields.items()}}
    if type(value) is dict:
        return {key: _lower(item, types) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_lower(item, types) for item in value)
    return value


def _lift(value: Any, types: Mapping[str, type]) -> Any:
    if type(value) is dict:
        fields = {key: _lift(item, types) for key, item in value.items() if key != _TYPE}
        if _TYPE not in value:
            return fields
        if value[_TYPE] not in types:
            raise CheckpointError(
                f"a message from another worker holds a {json.dumps(value[_TYPE])}, which a message cannot hold"
            )
        return types[value[_TYPE]](**fields)
    if type(value) in (list, tuple):
        return type(value)(_lift(item, types) for item in value)
    return value
