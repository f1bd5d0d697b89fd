"""State goes through JSON and safetensors, and comes back exactly as it was."""

from __future__ import annotations

import collections
import enum
import json
import math
import struct
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unisono.checkpoint.format import decode, digest, encode, from_json, pack, snapshot, to_json, unpack
from unisono.errors import CheckpointError


def through_files(state: object) -> Any:
    packed, tensors = pack(state)
    text = to_json(packed)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not standard JSON"))
    return unpack(from_json(text), decode(encode(tensors)))


def assert_same(left: Any, right: Any) -> None:
    """Equal in types, bits, and order of keys."""
    if isinstance(left, Tensor):
        assert isinstance(right, Tensor)
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert raw(left) == raw(right)
        return
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert_same(list(left.keys()), list(right.keys()))
        assert_same(list(left.values()), list(right.values()))
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, float) and not isinstance(left, np.generic):
        assert math.isnan(left) == math.isnan(right)
        assert math.isnan(left) or struct.pack("d", left) == struct.pack("d", right)
    else:
        assert left == right or left != left


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


DTYPES = [
    torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2,
]  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    if dtype is torch.bool:
        return torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=dtype).reshape(shape)
    content = bytearray(draw(st.binary(min_size=size, max_size=size)))
    return torch.frombuffer(content, dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.just("$")
    | st.sampled_from(DTYPES)
    | st.integers(-128, 127).map(np.int8)
    | st.integers(0, 2**64 - 1).map(np.uint64)
    | st.floats(width=16).map(np.float16)
    | st.floats(width=32).map(np.float32)
    | st.floats().map(np.float64)
    | st.booleans().map(np.bool_)
    | tensors()
)
keys = st.integers() | st.text(max_size=4) | st.sampled_from(["$", "a", "a.b", "0", "__metadata__", "a]['b"])
states = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4).map(OrderedDict)
        | st.dictionaries(keys, st.integers(), max_size=4).map(Counter)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=200)
@given(states)
def test_any_state_comes_back_exactly(state: object) -> None:
    assert_same(through_files(state), state)


def optimizer_classes() -> list[type[torch.optim.Optimizer]]:
    found = [getattr(torch.optim, name) for name in dir(torch.optim)]
    return [
        kind
        for kind in found
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    ]


@pytest.mark.parametrize("kind", optimizer_classes(), ids=lambda kind: kind.__name__)
def test_the_state_of_every_torch_optimizer_comes_back_and_loads(kind: type[torch.optim.Optimizer]) -> None:
    # Matrices only, for Muon.
    parameters = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(parameters, lr=0.01, **options)  # type: ignore[call-arg]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(((parameter - 1) ** 2).sum() for parameter in parameters)
        assert isinstance(loss, Tensor)
        loss.backward()
        if kind is torch.optim.SparseAdam:
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad = parameter.grad.to_sparse()
        return loss

    for _ in range(2):
        closure()
        optimizer.step(closure)
    state = optimizer.state_dict()
    assert state["state"]
    back = through_files(state)
    assert_same(back, state)
    optimizer.load_state_dict(back)
    assert_same(optimizer.state_dict(), state)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3, 3]),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=9),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2),
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.MultiStepLR(o, [2])],
            milestones=[2],
        ),
        lambda o: torch.optim.lr_scheduler.ChainedScheduler(
            [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.StepLR(o, 2)], o
        ),
    ],
    ids=["lambda", "multistep", "onecycle", "cosine", "restarts", "exponential", "sequential", "chained"],
)
def test_the_state_of_schedulers_comes_back(make: Any, lr: Any) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=lr, momentum=0.9)
    scheduler = make(optimizer)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    state = scheduler.state_dict()
    assert_same(through_files(state), state)


def test_plain_json_is_written_as_itself() -> None:
    state = {"a": [1, 2.5, "x", None, True], "b": {"c": -0.0}}
    assert pack(state) == (state, {})


def test_tensors_are_named_by_their_path() -> None:
    state = {"state": {3: {"exp_avg": torch.zeros(1)}}, "list": [torch.zeros(1)]}
    assert sorted(pack(state)[1]) == ["list[0]", "state[3].exp_avg"]
    assert list(pack(torch.zeros(1))[1]) == ["state"]


class Colour(enum.IntEnum):
    RED = 1


Pair = collections.namedtuple("Pair", "left right")


@pytest.mark.parametrize(
    "value",
    [
        {1}, b"x", object(), lambda: 0, Colour.RED, Pair(1, 2), collections.defaultdict(int), complex(1, 2),
        torch.Size([1]), torch.device("cpu"), np.zeros(2), np.complex64(1), np.str_("x"), range(3), OrderedDict,
    ],
    ids=lambda value: getattr(type(value), "__name__", "?"),
)  # fmt: skip
def test_any_other_type_is_refused_by_path_and_type(value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"optimizer\.state\[3\]\.foo: its type is .*{type(value).__name__}"):
        pack({"optimizer": {"state": {3: {"foo": value}}}})


@pytest.mark.parametrize("key", [True, (1, None), None, np.int64(1), Colour.RED])
def test_keys_that_would_not_come_back_are_refused(key: object) -> None:
    with pytest.raises(CheckpointError, match=r"optimizer: its key .* is a "):
        pack({"optimizer": {key: 1}})


def test_a_state_that_contains_itself_is_refused() -> None:
    state: list[Any] = []
    state.append(state)
    with pytest.raises(CheckpointError, match="contains itself"):
        pack(state)


@pytest.mark.parametrize(
    "packed",
    [
        {"$": "tensor", "name": "gone"},
        {"$": "dtype", "name": "nn"},
        {"$": "dtype", "name": "gone"},
        {"$": "numpy", "dtype": "object", "value": 1},
        {"$": "tuple"},
        {"$": "pickle", "value": "x"},
        {"$": ["x"]},
        {"$": "int", "hex": 3},
    ],
)
def test_packed_state_that_makes_no_sense_is_an_error(packed: Any) -> None:
    with pytest.raises(CheckpointError, match="cannot read packed state"):
        unpack(packed, {})


@pytest.mark.parametrize("text", [b"NaN", b"[Infinity]", b"{", b"\xff", b"[" * 100_000])
def test_what_is_not_standard_json_is_an_error(text: bytes) -> None:
    with pytest.raises(CheckpointError, match="not JSON"):
        from_json(text)


def test_nan_is_never_written_as_json() -> None:
    with pytest.raises(CheckpointError, match="cannot write as JSON"):
        to_json([math.nan])


def test_a_snapshot_does_not_follow_later_changes() -> None:
    state = {"momentum": [torch.ones(3)], "step": (1, 2)}
    copy = snapshot(state)
    state["momentum"][0].zero_()  # type: ignore[union-attr]
    assert_same(copy, {"momentum": [torch.ones(3)], "step": (1, 2)})


def test_bytes_depend_on_content_only() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    values = {"a": base, "b": base.T, "c": torch.tensor(1), "d": torch.zeros(0, 3, dtype=torch.bfloat16)}
    other = {"d": values["d"].clone(), "c": torch.tensor(1), "b": base.T.contiguous(), "a": base.clone()}
    data = encode(values)
    assert data == encode(other)
    assert digest(data) == digest(encode(dict(reversed(values.items()))))
    assert data != encode({**values, "c": torch.tensor(2)})


def test_a_tensor_under_the_name_of_the_header_comes_back() -> None:
    assert_same(through_files({"__metadata__": torch.ones(2)}), {"__metadata__": torch.ones(2)})


def test_any_safetensors_reader_can_read_the_bytes() -> None:
    from safetensors.torch import load

    data = encode({"w": torch.nn.Parameter(torch.eye(2))})
    assert_same(load(data), {"w": torch.eye(2)})
    assert json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"] == {"format": "pt"}


def test_tied_and_overlapping_tensors_are_written_in_full() -> None:
    base = torch.arange(10.0)
    views = {
        "all": base,
        "tied": base,
        "head": base[:4],
        "tail": base[2:],
        "odd": base[1::2],
        "wide": base[:1].expand(3),
    }
    back = decode(encode(views))
    assert_same(back, {name: views[name] for name in back})
    assert sorted(back) == sorted(views)
    back["all"].zero_()
    assert_same(back["tied"], base)


def test_conjugate_and_negative_views_are_written_as_seen() -> None:
    value = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    back = decode(encode({"conj": value.conj(), "imag": value.conj().imag}))
    assert back["conj"].tolist() == [1 - 2j, 3 + 4j]
    assert back["imag"].tolist() == [-2.0, 4.0]


def test_decoded_tensors_are_aligned_and_writable() -> None:
    names = {f"{'x' * i}": torch.ones(i, dtype=torch.uint8 if i % 2 else torch.float32) for i in range(1, 20)}
    for tensor in decode(encode(names)).values():
        assert tensor.data_ptr() % 64 == 0
        assert tensor.is_contiguous()
        tensor.add_(1)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, dtype=torch.complex128),
        torch.eye(2).to_sparse(),
        torch.zeros(2, device="meta"),
        torch.nn.UninitializedParameter(),
    ],
    ids=["complex128", "sparse", "meta", "uninitialized"],
)
def test_tensors_that_the_format_cannot_hold_are_named(tensor: Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"'layers\.weight'"):
        encode({"fine": torch.zeros(1), "layers.weight": tensor})


def test_the_name_of_the_header_is_no_tensor_name() -> None:
    with pytest.raises(CheckpointError, match="__metadata__"):
        encode({"__metadata__": torch.zeros(1)})


@pytest.mark.parametrize("data", [b"", b"x" * 20, (2**62).to_bytes(8, "little") + b"{}"])
def test_bytes_that_are_no_safetensors_are_an_error(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="as safetensors"):
        decode(data)
