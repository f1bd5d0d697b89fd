"""How state becomes files: a safetensors file for the tensors, strict JSON for everything else. Nothing is pickled.

JSON has no tuples, no integer keys, no NaN. Such a value becomes an object with the key "$" that names its kind:
``{"$": "tuple", "items": [...]}``. A tensor becomes ``{"$": "tensor", "name": ...}``, its name in the safetensors file, with
``"stride"`` if it is not contiguous: kernels go on from equal values in another memory order to other bits. A tensor that occurs
twice has one name.
All other values are written as they are, so that the file can be read with any JSON tool.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from typing import Any, NoReturn, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from unisono.errors import CheckpointError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

_TAG = "$"
_MAPPINGS: dict[str, type[dict[Any, Any]]] = {"dict": dict, "ordered_dict": OrderedDict, "counter": Counter}
_MAPPING_TAGS = {kind: tag for tag, kind in _MAPPINGS.items()}
_NUMPY = {
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
}  # fmt: skip
# Larger integers are exact in Python, but not in every reader of JSON.
_EXACT_INT = 2**53
_KEYS = {str, int, float}
_TENSORS = {Tensor, nn.Parameter, nn.Buffer}
# What torch says of a tensor of which several elements surely lie in one place.
_OVERLAPS = 1
# An entry of the safetensors header, which no tensor can be named after.
_RESERVED = "__metadata__"
_DTYPES = {
    torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.uint64, torch.complex64,
}  # fmt: skip


def pack(state: object) -> tuple[Json, dict[str, Tensor]]:
    """Splits nested state into JSON and named tensors. *local*

    Args:
        state: None, bool, int, float, str, torch.Tensor, torch.dtype, NumPy scalar, or a list, tuple, deque, dict, OrderedDict or
            Counter of such, with str, int or float keys, or tuples of these. Exactly these types: a subclass would come back as
            something else.

    Returns:
        The JSON value, and the tensors themselves (not copied) under their paths, for example "state[3].exp_avg".

    Raises:
        CheckpointError: A value of another type; its path and type are named.
    """
    tensors = _Tensors()
    try:
        return _pack(state, "", tensors), tensors.named
    except RecursionError as error:
        raise CheckpointError(
            "cannot save a state that is nested too deeply or contains itself. Keep only plain values in it."
        ) from error


def unpack(packed: Json, tensors: Mapping[str, Tensor]) -> Any:
    """The state that `pack` split, with the same types, key types and order of keys. *local*

    Raises:
        CheckpointError: `packed` or `tensors` is not what `pack` returned.
    """
    try:
        return _unpack(packed, dict(tensors))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"cannot read packed state ({type(error).__name__}: {error}). "
            "It was damaged, or written by another version of unisono; use an older checkpoint."
        ) from error


def snapshot(state: Any) -> Any:
    """A copy of `state` that later training steps cannot change, with tensors on the CPU. *local*

    It takes what `pack` accepts. Take it before handing state to a background writer. Raises as `pack` does.
    """
    packed, tensors = pack(state)
    return unpack(packed, {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()})


def check(state: object) -> None:
    """Whether `state` can be saved and sent. *local*

    Raises:
        CheckpointError: It cannot; the value that is to blame is named.
    """
    for name, tensor in pack(state)[1].items():
        _check_plain(name, tensor)


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Whether a file can hold these. *local*

    Raises:
        CheckpointError: As `encode` does.
    """
    for name, tensor in tensors.items():
        _check_plain(name, tensor)


def encode(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a safetensors file with these tensors. *local*

    The bytes depend on names, dtypes, shapes and values only: not on order, strides or device. Tied or overlapping
    tensors are written in full under each name.

    Raises:
        CheckpointError: A tensor that the format cannot hold (complex128, sparse, quantized, meta, ...); it is named.
    """
    from safetensors.torch import save

    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name in sorted(tensors):
        tensor = _plain(name, tensors[name])
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    try:
        return save(plain, metadata={"format": "pt"})
    except Exception as error:
        raise CheckpointError(f"cannot write tensors as safetensors: {error}. Names: {', '.join(plain)}.") from error


def decode(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the CPU, each in memory of its own, aligned to 64 bytes. *local*

    Raises:
        CheckpointError: `data` is no safetensors file.
    """
    from safetensors.torch import load

    try:
        # A copy: the file's tensors lie at any offset, and results of vector kernels can depend on the alignment.
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in load(data).items()}
    except Exception as error:
        raise CheckpointError(f"cannot read {len(data):,} bytes as safetensors: {error}. Use an older file.") from error


def digest(data: bytes | memoryview) -> str:
    """SHA-256 of `data` in hexadecimal, as `sha256sum` prints it. *local*"""
    return hashlib.sha256(data).hexdigest()


def to_json(value: Json, *, indent: int | None = None) -> bytes:
    """Standard JSON (ASCII, no NaN), ending with a newline. *local*

    Raises:
        CheckpointError: `value` holds NaN, an infinity or a type that JSON has not: `pack` it first.
    """
    try:
        return json.dumps(value, allow_nan=False, indent=indent).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot write as JSON: {error}.") from error


def from_json(data: bytes) -> Json:
    """The value of standard JSON. *local*

    Raises:
        CheckpointError: `data` is not standard JSON in UTF-8.
    """
    try:
        value: Json = json.loads(data.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not JSON: {error}.") from error
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not standard JSON")


class _Tensors:
    """Tensors by name, each once."""

    def __init__(self) -> None:
        self.named: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}

    def name(self, tensor: Tensor, path: str) -> str:
        """The name of the tensor: ``path``, unless it has one already."""
        name = self._names.setdefault(id(tensor), path)
        self.named[name] = tensor
        return name


def _pack(value: object, path: str, tensors: _Tensors) -> Json:
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value  # type: ignore[return-value]
    if type(value) is int:
        return value if abs(value) <= _EXACT_INT else {_TAG: "int", "hex": hex(value)}
    if type(value) is float:
        return value if math.isfinite(value) else {_TAG: "float", "value": repr(value)}
    if isinstance(value, Tensor):
        return _pack_tensor(value, path or "state", tensors)  # a state that is a single tensor has no path
    if kind is list or kind is tuple:
        sequence = cast("list[object] | tuple[object, ...]", value)
        items = [_pack(item, f"{path}[{i}]", tensors) for i, item in enumerate(sequence)]
        return items if kind is list else {_TAG: "tuple", "items": items}
    if kind is deque:
        ends = cast("deque[object]", value)
        return {_TAG: "deque", "items": _pack([*ends], path, tensors), "maxlen": ends.maxlen}
    if kind in _MAPPING_TAGS:
        return _pack_mapping(value, path, tensors)  # type: ignore[arg-type]
    if isinstance(value, torch.dtype):
        return {_TAG: "dtype", "name": str(value).removeprefix("torch.")}
    if isinstance(value, np.generic) and value.dtype.name in _NUMPY:
        return {_TAG: "numpy", "dtype": value.dtype.name, "value": _pack(value.item(), path, tensors)}
    raise CheckpointError(
        f"cannot save {path or 'the state'}: its type is {kind.__module__}.{kind.__qualname__}. A checkpoint holds "
        "tensors, numbers, strings, lists, tuples and dicts; leave it out of the state_dict, or make it one of these."
    )


def _pack_tensor(value: Tensor, path: str, tensors: _Tensors) -> Json:
    if type(value) not in _TENSORS:
        raise CheckpointError(
            f"cannot save {path}: its type is {type(value).__module__}.{type(value).__qualname__}, a tensor that would come "
            "back as another. A checkpoint holds plain tensors; leave it out of the state_dict, or make it one."
        )
    node: dict[str, Json] = {_TAG: "tensor", "name": tensors.name(value, path)}
    if value.layout is torch.strided and not value.is_contiguous() and torch._debug_has_internal_overlap(value) != _OVERLAPS:
        node["stride"] = [*value.stride()]
    return node


def _pack_mapping(value: dict[Any, Any], path: str, tensors: _Tensors) -> Json:
    for key in value:
        if any(type(part) not in _KEYS for part in (key if type(key) is tuple else (key,))):
            raise CheckpointError(
                f"cannot save {path or 'the state'}: its key {key!r} is a {type(key).__name__}. "
                "Keys in a checkpoint are strings, numbers, or tuples of these."
            )
    items = {key: _pack(item, _join(path, key), tensors) for key, item in value.items()}
    if type(value) is dict and _TAG not in items and all(type(key) is str for key in items):
        return items
    pairs: list[Json] = [[_pack(key, path, tensors), item] for key, item in items.items()]
    return {_TAG: _MAPPING_TAGS[type(value)], "items": pairs}


def _join(path: str, key: str | float | tuple[str | float, ...]) -> str:
    """The path of a mapping's item. Different keys give different paths, because these are the names of tensors."""
    if type(key) is str and re.fullmatch(r"[A-Za-z_]\w*", key, re.ASCII) and key != _RESERVED:
        return f"{path}.{key}" if path else key
    return f"{path}[{key!r}]"


def _unpack(node: Json, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_unpack(item, tensors) for item in node]
    if isinstance(node, dict):
        if _TAG in node:
            return _unpack_tagged(node, tensors)
        return {key: _unpack(item, tensors) for key, item in node.items()}
    return node


def _unpack_tagged(node: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    tag = node[_TAG]
    if tag == "tensor":
        tensor = tensors[node["name"]]
        if "stride" in node and [*tensor.stride()] != node["stride"]:
            restrided = torch.empty_strided(tensor.shape, node["stride"], dtype=tensor.dtype, device=tensor.device)
            tensors[node["name"]] = tensor = restrided.copy_(tensor)
        return tensor
    if tag == "tuple":
        return tuple(_unpack(item, tensors) for item in node["items"])
    if tag == "deque":
        return deque((_unpack(item, tensors) for item in node["items"]), node["maxlen"])
    if tag in _MAPPINGS:
        return _MAPPINGS[tag]({_unpack(key, tensors): _unpack(item, tensors) for key, item in node["items"]})
    if tag == "int":
        return int(node["hex"], 16)
    if tag == "float":
        return float(node["value"])
    if tag == "dtype":
        dtype = getattr(torch, node["name"])
        if isinstance(dtype, torch.dtype):
            return dtype
    if tag == "numpy" and node["dtype"] in _NUMPY:
        return np.dtype(node["dtype"]).type(_unpack(node["value"], tensors))
    raise ValueError(f"unknown kind {tag!r}")


def _check_plain(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise CheckpointError(
            f"cannot save {name!r} of the state dict: it is a {type(tensor).__name__}, and safetensors holds tensors only. "
            "Return a tensor from get_extra_state(), or leave it out."
        )
    if name == _RESERVED:
        raise CheckpointError(f"a tensor cannot be called {name!r}: the safetensors format uses this name. Rename it.")
    if tensor.layout is not torch.strided or tensor.device.type == "meta" or tensor.dtype not in _DTYPES:
        raise CheckpointError(
            f"cannot save tensor {name!r}: safetensors has no {tensor.layout} {tensor.dtype} on {tensor.device.type}. "
            "Make it a dense tensor of a plain dtype, or leave it out of the state_dict."
        )


def _plain(name: str, tensor: Tensor) -> Tensor:
    _check_plain(name, tensor)
    try:
        return tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"cannot save tensor {name!r} ({type(tensor).__name__}): {error}.") from error
