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

from unisono.checkpoint.format import decode, encode, from_json, pack, to_json, unpack
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
    head = to_json(packed)
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
    state = unpack(from_json(data[start : start + length]), decode(data[start + length :]))
    return _lift(state, {kind.__name__: kind for kind in types})


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
