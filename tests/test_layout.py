"""Where parameters lie, and who owns them."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unisono.errors import ConfigurationError
from unisono.layout import ALIGNMENT_BYTES, FlatBlock, Layout, allocate
from unisono.replica.parameters import adopt, in_slot_order, layout_of, trainable

SIZES = st.lists(st.integers(0, 100), min_size=1, max_size=9)


def of(*tensors: Tensor) -> tuple[Layout, list[nn.Parameter]]:
    named = [(f"p{number}", nn.Parameter(tensor)) for number, tensor in enumerate(tensors)]
    layout = layout_of(named)
    return layout, in_slot_order(layout, named)


def of_model(model: nn.Module) -> tuple[Layout, list[nn.Parameter]]:
    layout = layout_of(trainable(model))
    return layout, in_slot_order(layout, trainable(model))


def of_sizes(sizes: list[int]) -> Layout:
    return of(*(torch.randn(size) for size in sizes))[0]


def rooms(block: FlatBlock) -> list[int]:
    return [hi - slot.offset for slot, hi in zip(block.slots, block.ends, strict=True)]


# ---- places ----


@settings(deadline=None)
@given(SIZES, st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.complex128]))
def test_every_parameter_starts_at_64_bytes_and_none_overlap(sizes: list[int], dtype: torch.dtype) -> None:
    (block,) = of(*(torch.zeros(size, dtype=dtype) for size in sizes))[0].blocks

    assert all(slot.offset * dtype.itemsize % ALIGNMENT_BYTES == 0 for slot in block.slots)
    assert all(slot.offset + slot.numel <= end for slot, end in zip(block.slots, block.ends, strict=True))
    assert block.ends[-1] == block.numel
    assert sum(rooms(block)) == block.numel
    assert block.nbytes - sum(sizes) * dtype.itemsize < ALIGNMENT_BYTES * len(sizes)


def test_adopted_parameters_are_aligned_views_of_the_flat_tensor() -> None:
    model = nn.Sequential(nn.Linear(10, 100), nn.Linear(257, 513), nn.Conv2d(3, 5, 3))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    same_objects = list(model.parameters())
    layout, parameters = of_model(model)

    (flat,) = adopt(layout, parameters, allocate)

    for parameter, old, value in zip(model.parameters(), same_objects, before, strict=True):
        assert parameter is old
        assert torch.equal(parameter, value)
        assert parameter.data_ptr() % ALIGNMENT_BYTES == 0
        assert parameter.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    with torch.no_grad():
        flat.fill_(3.0)
    assert all(bool((parameter == 3).all()) for parameter in model.parameters())


def test_padding_is_zero() -> None:
    layout, parameters = of(torch.ones(3), torch.ones(17))

    (flat,) = adopt(layout, parameters, lambda numel, dtype, device: torch.full((numel,), torch.nan, dtype=dtype))

    assert flat.tolist() == [1.0] * 3 + [0.0] * 13 + [1.0] * 17 + [0.0] * 15


def test_a_tied_weight_has_one_place_and_stays_tied() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    layout, parameters = of_model(model)

    adopt(layout, parameters, allocate)

    assert layout.names == ["0.weight"]
    assert model[1].weight is model[0].weight
    assert model[1].weight.data_ptr() == model[0].weight.data_ptr()


def test_channels_last_weights_keep_their_strides() -> None:
    model = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
    value, strides = model.weight.detach().clone(), model.weight.stride()
    layout, parameters = of_model(model)

    adopt(layout, parameters, allocate)

    assert model.weight.stride() == strides == layout.blocks[0].slots[0].stride
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.weight, value)


def test_a_transposed_weight_keeps_its_strides_and_value() -> None:
    weight = torch.randn(5, 7).t()
    layout, parameters = of(weight)

    adopt(layout, parameters, allocate)

    assert parameters[0].stride() == (1, 7)
    assert torch.equal(parameters[0], weight)


def test_a_slice_of_a_larger_tensor_becomes_dense() -> None:
    weight = torch.randn(5, 14)[:, ::2]
    layout, parameters = of(weight)

    adopt(layout, parameters, allocate)

    assert layout.blocks[0].slots[0].stride == (7, 1)
    assert torch.equal(parameters[0], weight)


def test_each_dtype_has_a_block_in_order_of_appearance() -> None:
    layout, parameters = of(torch.ones(3), torch.ones(4, dtype=torch.float64), torch.ones(5), torch.ones(6, dtype=torch.bfloat16))

    assert [block.dtype for block in layout.blocks] == [torch.float32, torch.float64, torch.bfloat16]
    assert layout.names == ["p0", "p2", "p1", "p3"]
    assert [slot.index for block in layout.blocks for slot in block.slots] == [0, 1, 2, 3]
    assert [parameter.numel() for parameter in parameters] == [3, 5, 4, 6]
    assert layout.nbytes == sum(block.nbytes for block in layout.blocks) == 4 * 32 + 8 * 8 + 2 * 32


def test_views_of_a_part_of_a_block_are_those_of_the_whole() -> None:
    (block,) = of_sizes([5, 20, 7]).blocks
    whole = torch.arange(float(block.numel))
    last = block.slots[-1]

    assert torch.equal(last.view(whole[last.offset :], last.offset), block.views(whole)[-1])


# ---- segments ----


@settings(deadline=None)
@given(SIZES, st.integers(1, 12))
def test_segments_cover_everything_at_whole_parameters(sizes: list[int], workers: int) -> None:
    layout = of_sizes(sizes)
    (block,) = layout.blocks
    (segments,) = layout.segments(workers)

    assert len(segments) == workers
    assert [0, *(s.hi for s in segments)] == [*(s.lo for s in segments), block.numel]
    assert [slot for segment in segments for slot in segment.slots] == list(block.slots)
    for segment in segments:
        assert all(segment.lo <= slot.offset and slot.offset + slot.numel <= segment.hi for slot in segment.slots)


@settings(deadline=None)
@given(SIZES, st.integers(1, 6))
def test_the_largest_segment_is_as_small_as_any_partition_allows(sizes: list[int], workers: int) -> None:
    layout = of_sizes(sizes)
    room = rooms(layout.blocks[0])
    (segments,) = layout.segments(workers)

    smallest = min(
        max(sum(room[lo:hi]) for lo, hi in pairwise([0, *cuts, len(room)]))
        for count in range(min(workers, len(room)))
        for cuts in combinations(range(1, len(room)), count)
    )

    assert max(segment.hi - segment.lo for segment in segments) == smallest


def test_workers_beyond_the_number_of_parameters_own_nothing() -> None:
    (segments,) = of_sizes([64, 64]).segments(5)

    assert [segment.hi - segment.lo for segment in segments] == [64, 64, 0, 0, 0]
    assert [len(segment.slots) for segment in segments] == [1, 1, 0, 0, 0]


def test_the_number_of_workers_moves_no_parameter() -> None:
    model = nn.Sequential(nn.Linear(10, 100), nn.Linear(257, 513))
    layout, _ = of_model(model)
    places = {slot.name: slot.offset for slot in layout.blocks[0].slots}

    for workers in range(1, 9):
        owned = [slot for segment in layout.segments(workers)[0] for slot in segment.slots]
        assert {slot.name: slot.offset for slot in owned} == places


# ---- errors ----


def test_a_model_without_a_trainable_parameter_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no trainable parameter"):
        Layout([])


def test_a_lazy_parameter_is_refused_by_name() -> None:
    model = nn.LazyLinear(3)

    with pytest.raises(ConfigurationError, match="'weight' is lazy"):
        layout_of(trainable(model))


def test_a_parameter_on_the_meta_device_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))

    with pytest.raises(ConfigurationError, match=r"'1\.weight' is on the meta device"):
        layout_of(trainable(model))


def test_a_sparse_parameter_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"'p0' has layout torch\.sparse_coo"):
        of(torch.eye(3).to_sparse())


def test_memory_that_is_not_aligned_is_refused() -> None:
    layout, parameters = of(torch.ones(8))

    with pytest.raises(ConfigurationError, match="not aligned to 64 bytes"):
        adopt(layout, parameters, lambda numel, dtype, device: torch.empty(numel + 1, dtype=dtype)[1:])
