"""State that travels between workers."""

from __future__ import annotations

import dataclasses
import pickle
from typing import NamedTuple

import pytest
import torch

from unisono.checkpoint.message import from_bytes, to_bytes
from unisono.errors import CheckpointError


class Pair(NamedTuple):
    left: int
    right: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Named:
    name: str
    pairs: list[Pair]


def test_plain_values_and_the_types_that_are_allowed_come_back_as_they_were() -> None:
    state = {"one": [1, 2.5, None, (True, "x")], 3: float("inf"), "named": Named("a", [Pair(1, (0.5, float("-inf")))])}
    assert from_bytes(to_bytes(state, [Named, Pair]), [Named, Pair]) == state


def test_tensors_keep_dtype_shape_and_strides() -> None:
    columns = torch.arange(12.0).reshape(3, 4).t()
    images = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    state = {"columns": columns, "images": images, "step": torch.tensor(3), "half": torch.ones(2, dtype=torch.bfloat16)}
    found = from_bytes(to_bytes(state))
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor)
        assert (found[name].dtype, found[name].stride()) == (tensor.dtype, tensor.stride())


def test_a_type_that_is_not_expected_is_refused() -> None:
    with pytest.raises(CheckpointError, match='holds a "Pair"'):
        from_bytes(to_bytes(Pair(1, ()), [Pair]), [Named])
    with pytest.raises(CheckpointError, match=r"x.*its type is .*Pair"):
        to_bytes({"x": Pair(1, ())})


@pytest.mark.parametrize("data", [b"", b"unisono1", pickle.dumps({"weights": [1, 2]}), b"\x80\x04K\x01."])
def test_what_is_no_message_is_refused_unread(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"not a unisono message|not JSON"):
        from_bytes(data)


def test_a_pickle_inside_a_message_is_never_loaded() -> None:
    whole = to_bytes({"weights": torch.ones(3)})
    with pytest.raises(CheckpointError, match="safetensors"):
        from_bytes(whole[: whole.index(b"F32") - 40] + pickle.dumps({"weights": [1.0]}))
