"""The order of the samples: seeds, the permutation, microbatches, and what users may give instead of the shuffle."""

from __future__ import annotations

import random
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import unisono.order
from unisono.errors import ConfigurationError
from unisono.order import (
    Epoch,
    Listed,
    Order,
    OrderLike,
    Permutation,
    Sampled,
    Shuffled,
    derive_seed,
    make_order,
    microbatch_bounds,
)

MAX_LENGTH = 2**62


def batches(epoch: Epoch) -> list[list[int]]:
    return [epoch.batch(k).tolist() for k in range(epoch.batches)]


def chi_square(counts: Counter[object], cells: int, draws: int) -> float:
    """How far the chi-square statistic of ``counts`` is from that of a uniform choice, in standard deviations."""
    expected = draws / cells
    statistic = sum((n - expected) ** 2 for n in counts.values()) / expected + (cells - len(counts)) * expected
    return (statistic - (cells - 1)) / (2 * (cells - 1)) ** 0.5


# ---- seeds ----


def test_seeds_are_pinned_because_checkpoints_rely_on_them() -> None:
    assert derive_seed() == 13020603013274838756
    assert derive_seed(0) == 7754967453105325484
    assert derive_seed("order", 0, 0) == 3422575107415336828
    assert derive_seed(-1, "é", 2**80) == 8517118991040944705


def test_no_two_lists_of_parts_share_a_seed() -> None:
    lists = [
        (),
        (1,),
        ("1",),
        (-1,),
        (1, 1),
        (11,),
        ("i1;",),
        ("a", "bc"),
        ("ab", "c"),
        ("abc",),
        ("",),
        ("", ""),
        (0, 0),
    ]
    assert len({derive_seed(*parts) for parts in lists}) == len(lists)


@given(st.lists(st.integers() | st.text()))
def test_a_seed_fits_in_64_bits(parts: list[int | str]) -> None:
    assert 0 <= derive_seed(*parts) < 2**64


def test_a_numpy_integer_gives_the_seed_of_the_python_integer() -> None:
    assert derive_seed("a", np.int64(7)) == derive_seed("a", 7)


@pytest.mark.parametrize("part", [1.5, None, b"x"])
def test_a_seed_cannot_come_from_something_else(part: object) -> None:
    with pytest.raises(TypeError):
        derive_seed(part)  # type: ignore[arg-type]


# ---- the permutation ----


def test_the_permutation_is_pinned_because_checkpoints_rely_on_it() -> None:
    assert Permutation(10, 7).at(np.arange(10)).tolist() == [6, 5, 1, 0, 8, 3, 7, 2, 9, 4]
    assert Permutation(1797, 7).at(np.arange(5)).tolist() == [910, 1492, 136, 350, 1019]
    assert Permutation(10**12, 7).at(np.arange(3)).tolist() == [638186235854, 442878500919, 412761761872]


def test_lengths_up_to_2000_give_bijections() -> None:
    for length in (*range(500), *range(500, 2001, 9), 1023, 1024, 1025):
        permutation = Permutation(length, key=length)
        everything = np.arange(length)
        images = permutation.at(everything)
        assert len(permutation) == length
        assert np.array_equal(np.sort(images), everything), length


@given(st.integers(1, MAX_LENGTH), st.integers(), st.data())
def test_different_positions_of_any_permutation_have_different_images(length: int, key: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, length - 1), max_size=20, unique=True)), np.int64)
    permutation = Permutation(length, key)
    images = permutation.at(positions)
    assert images.dtype == np.int64
    assert ((images >= 0) & (images < length)).all()
    assert len(np.unique(images)) == len(positions)


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_small_permutations_are_uniform_over_keys(length: int) -> None:
    keys = 2000
    counts = Counter(tuple(Permutation(length, key).at(np.arange(length)).tolist()) for key in range(keys))
    cells = int(np.prod(np.arange(1, length + 1)))
    assert abs(chi_square(counts, cells, keys)) < 4.5


@pytest.mark.parametrize("length", [7, 100, 1200])
def test_any_element_may_come_first_and_any_may_follow_it(length: int) -> None:
    keys = 2500
    heads = np.array([Permutation(length, key).at(np.arange(2)) for key in range(keys)])
    distances = (heads[:, 1] - heads[:, 0]) % length
    assert abs(chi_square(Counter(heads[:, 0].tolist()), length, keys)) < 4.5
    assert abs(chi_square(Counter(distances.tolist()), length - 1, keys)) < 4.5
    assert abs(np.corrcoef(heads.T)[0, 1] + 1 / (length - 1)) < 4.5 / keys**0.5


@pytest.mark.parametrize("length", [1023, 1024, 5000, 60000])
def test_neighbours_stay_together_no_more_often_than_by_chance(length: int) -> None:
    images = Permutation(length, key=11).at(np.arange(length))
    steps = np.diff(images)
    assert np.count_nonzero(np.abs(steps) == 1) <= 12  # Poisson with mean 2
    assert np.count_nonzero(images == np.arange(length)) <= 10  # Poisson with mean 1
    assert abs(np.corrcoef(np.arange(length), images)[0, 1]) < 4.5 / length**0.5
    assert abs(np.corrcoef(images[1:], images[:-1])[0, 1]) < 4.5 / length**0.5


def test_permutations_of_nine_come_even_and_odd() -> None:
    def odd(images: list[int]) -> int:
        return sum(a > b for i, a in enumerate(images) for b in images[i + 1 :]) % 2

    count = sum(odd(Permutation(9, key).at(np.arange(9)).tolist()) for key in range(400))
    assert 150 < count < 250


def test_different_keys_give_unrelated_permutations() -> None:
    positions = np.arange(1000)
    a, b = Permutation(1000, 0).at(positions), Permutation(1000, 1).at(positions)
    assert np.count_nonzero(a == b) <= 10
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.15


@pytest.mark.alone
def test_256_positions_of_a_trillion_take_under_a_millisecond() -> None:
    permutation, positions, times = Permutation(10**12, 3), np.arange(10**11, 10**11 + 256), []
    for _ in range(20):
        start = time.perf_counter()
        permutation.at(positions)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3


def test_an_epoch_of_a_trillion_samples_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        epoch = make_order("shuffle", length=10**12, batch_size=256, seed=0).epoch(2)
        first, last = epoch.batch(0), epoch.batch(epoch.batches - 1)
        make_order("sequential", length=10**12, batch_size=256, seed=0).epoch(0).batch(10**9)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (len(first), len(last), epoch.batches) == (256, 256, 3906250000)
    assert peak < 200_000


def test_the_shape_of_the_positions_is_kept() -> None:
    permutation = Permutation(12, 0)
    grid = permutation.at(np.arange(12, dtype=np.int32).reshape(3, 4))
    assert grid.ravel().tolist() == permutation.at(np.arange(12)).tolist()
    assert grid.shape == (3, 4)
    assert permutation.at(np.zeros((0, 2), np.int64)).shape == (0, 2)


@pytest.mark.parametrize(("length", "position"), [(0, 0), (1, 1), (5, -1), (5, 5)])
def test_a_position_outside_the_permutation_is_refused(length: int, position: int) -> None:
    permutation = Permutation(length, 0)
    with pytest.raises(IndexError, match=f"{position} is outside a permutation of {length} elements"):
        permutation.at(np.array([position]))


@pytest.mark.parametrize("length", [-1, MAX_LENGTH + 1])
def test_an_impossible_length_is_refused(length: int) -> None:
    with pytest.raises(ConfigurationError, match=f"not {length}"):
        Permutation(length, 0)


# ---- microbatches ----


@given(st.integers(1, 300), st.integers(1, 40), st.data())
def test_microbatches_partition_the_batch_and_none_exceeds_the_largest_full_one(
    batch_size: int, microbatches: int, data: st.DataObject
) -> None:
    batch_size = max(batch_size, microbatches)
    size = data.draw(st.integers(0, batch_size))
    bounds = microbatch_bounds(size, batch_size, microbatches)
    sizes = [hi - lo for lo, hi in bounds]
    filled = [n for n in sizes if n]
    largest = -(-batch_size // microbatches)
    assert len(bounds) == microbatches
    assert [i for lo, hi in bounds for i in range(lo, hi)] == list(range(size))
    assert sizes == sorted(sizes, reverse=True)
    assert not filled or filled[0] - filled[-1] <= 1
    assert not filled or filled[0] <= largest
    assert len(filled) == (microbatches if size == batch_size else -(-size // largest))


def test_a_short_batch_fills_few_microbatches_rather_than_many_with_one_sample() -> None:
    assert microbatch_bounds(5, 32, 8) == ((0, 3), (3, 5), (5, 5), (5, 5), (5, 5), (5, 5), (5, 5), (5, 5))
    assert microbatch_bounds(32, 32, 8) == tuple((4 * m, 4 * m + 4) for m in range(8))
    assert microbatch_bounds(10, 10, 4) == ((0, 3), (3, 6), (6, 8), (8, 10))
    assert microbatch_bounds(0, 10, 2) == ((0, 0), (0, 0))


@given(st.integers(2, 30), st.integers(1, 16))
def test_a_single_sample_is_alone_only_where_that_is_unavoidable(per_microbatch: int, microbatches: int) -> None:
    batch_size = per_microbatch * microbatches
    for size in range(2, batch_size):
        sizes = [hi - lo for lo, hi in microbatch_bounds(size, batch_size, microbatches)]
        unavoidable = per_microbatch == 2 and size % 2
        assert 1 not in sizes or unavoidable


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 4, 5), "batch_size 4 cannot be cut into 5 microbatches"),
        ((9, 8, 4), "not 9"),
        ((-1, 8, 4), "not -1"),
        ((0, 0, 1), "batch_size is 0"),
        ((4, 8, 0), "microbatches is 0"),
    ],
)
def test_an_impossible_split_is_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        microbatch_bounds(*arguments)


# ---- shuffled, sequential, listed ----


@settings(max_examples=200)
@given(st.integers(1, 400), st.integers(1, 64), st.integers(1, 16), st.integers(), st.integers(0, 50), st.booleans())
def test_each_sample_is_in_exactly_one_microbatch_of_an_epoch(
    length: int, batch_size: int, microbatches: int, seed: int, number: int, shuffle: bool
) -> None:
    batch_size = max(batch_size, microbatches)
    order = "shuffle" if shuffle else "sequential"
    epoch = make_order(order, length=length, batch_size=batch_size, seed=seed).epoch(number)
    seen: list[int] = []
    for batch in batches(epoch):
        for lo, hi in microbatch_bounds(len(batch), batch_size, microbatches):
            seen += batch[lo:hi]
    assert sorted(seen) == list(range(length))
    assert epoch.samples == length
    assert epoch.batches == -(-length // batch_size)


def test_the_shuffle_is_pinned_because_checkpoints_rely_on_it() -> None:
    order = make_order("shuffle", length=10, batch_size=4, seed=0)
    assert [order.epoch(e).batch(0).tolist() for e in range(3)] == [[9, 8, 0, 6], [7, 8, 2, 0], [6, 5, 2, 9]]


def test_batches_do_not_depend_on_the_order_in_which_they_are_asked_for() -> None:
    order = make_order("shuffle", length=50, batch_size=8, seed=5)
    forward = {(e, k): order.epoch(e).batch(k).tolist() for e in range(3) for k in range(7)}
    again = make_order("shuffle", length=50, batch_size=8, seed=5)
    backward = {(e, k): again.epoch(e).batch(k).tolist() for e, k in reversed(forward)}
    assert forward == backward


def test_seeds_and_epochs_change_the_shuffle() -> None:
    drawn = {
        tuple(Shuffled(length=100, batch_size=100, seed=seed).epoch(e).batch(0).tolist()) for seed in range(3) for e in range(3)
    }
    assert len(drawn) == 9


def test_sequential_is_the_order_of_the_dataset() -> None:
    order = make_order("sequential", length=7, batch_size=3, seed=0)
    assert batches(order.epoch(0)) == batches(order.epoch(4)) == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize(
    "indices",
    [[5, 0, 0, 9], (5, 0, 0, 9), np.array([5, 0, 0, 9], np.uint8), torch.tensor([5, 0, 0, 9]), [np.int32(5), 0, 0, 9]],
)
def test_listed_indices_are_used_as_they_stand(indices: list[int]) -> None:
    order = make_order(indices, length=10, batch_size=3, seed=0)
    assert isinstance(order, Listed)
    assert batches(order.epoch(0)) == batches(order.epoch(1)) == [[5, 0, 0], [9]]
    assert order.epoch(0).batch(0).dtype == np.int64


def test_a_later_change_of_the_list_or_of_a_batch_changes_nothing() -> None:
    indices = np.array([3, 1, 2])
    order = make_order(indices, length=4, batch_size=3, seed=0)
    indices[:] = 0
    order.epoch(0).batch(0)[:] = 0
    assert order.epoch(0).batch(0).tolist() == [3, 1, 2]


@pytest.mark.parametrize("order", ["shuffle", [0, 1, 2, 3, 4, 5, 6]])
def test_drop_last_leaves_out_the_short_batch_and_only_that(order: str | list[int]) -> None:
    epoch = make_order(order, length=7, batch_size=3, seed=0, drop_last=True).epoch(0)
    assert [len(batch) for batch in batches(epoch)] == [3, 3]
    assert epoch.samples == 6
    assert make_order(order, length=6 + 1, batch_size=7, seed=0, drop_last=True).epoch(0).samples == 7


@pytest.mark.parametrize("k", [-1, 3])
def test_a_batch_outside_the_epoch_is_refused(k: int) -> None:
    with pytest.raises(IndexError, match=f"batch {k} is outside an epoch of 3 batches"):
        make_order("shuffle", length=7, batch_size=3, seed=0).epoch(0).batch(k)


# ---- samplers ----


class NumpySampler:
    """Draws from a NumPy generator and a Python one of its own, as home-made samplers do."""

    def __init__(self) -> None:
        self.draws = np.random.default_rng(1)
        self.coin = random.Random(1)

    def __iter__(self) -> Iterator[int]:
        yield from self.draws.permutation(20)[:9].tolist()
        yield self.coin.randrange(20)


class GlobalSampler:
    """Draws from the global generators."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(4):
            yield int(torch.randint(20, ()))
            yield int(np.random.randint(20))
            yield random.randrange(20)


class EpochSampler:
    def __init__(self) -> None:
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter([self.epoch] * 3)


def own() -> torch.Generator:
    return torch.Generator().manual_seed(4)


SAMPLERS = {
    "random": lambda: RandomSampler(range(20)),
    "random with its generator": lambda: RandomSampler(range(20), generator=own()),
    "weighted": lambda: WeightedRandomSampler([1.0, 2.0] * 10, 13),
    "weighted with its generator": lambda: WeightedRandomSampler([1.0, 2.0] * 10, 13, generator=own()),
    "subset": lambda: SubsetRandomSampler(range(5, 15), generator=own()),
    "numpy and random of its own": NumpySampler,
    "global generators": GlobalSampler,
    "batches": lambda: BatchSampler(RandomSampler(range(20)), 4, drop_last=False),
    "batches with a generator inside": lambda: BatchSampler(RandomSampler(range(20), generator=own()), 4, drop_last=False),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLERS)
def test_epoch_3_of_a_sampler_is_the_same_whatever_was_drawn_before(name: str) -> None:
    def order() -> Order:
        return make_order(SAMPLERS[name](), length=20, batch_size=4, seed=1)

    fresh = batches(order().epoch(3))
    used = order()
    earlier = [batches(used.epoch(e)) for e in range(3)]
    torch.rand(3), np.random.rand(3), random.random()
    assert batches(used.epoch(3)) == fresh
    assert batches(used.epoch(0)) == earlier[0]
    assert fresh not in earlier
    assert batches(make_order(SAMPLERS[name](), length=20, batch_size=4, seed=2).epoch(3)) != fresh


@pytest.mark.parametrize("name", SAMPLERS)
def test_drawing_from_a_sampler_leaves_every_generator_as_it_was(name: str) -> None:
    sampler = SAMPLERS[name]()
    generators = [getattr(part, "generator", None) for part in (sampler, getattr(sampler, "sampler", None))]

    def states() -> list[object]:
        own_states = [g.get_state().tolist() for g in generators if g is not None]
        numpy_state = np.random.get_state()
        mine = [sampler.draws.bit_generator.state, sampler.coin.getstate()] if isinstance(sampler, NumpySampler) else []
        return [
            torch.get_rng_state().tolist(),
            numpy_state[1].tolist(),
            numpy_state[2],
            random.getstate(),
            own_states,
            mine,
        ]

    before = states()
    order = make_order(sampler, length=20, batch_size=4, seed=1)
    order.epoch(0)
    order.epoch(5)
    assert states() == before


def test_generators_are_restored_even_if_the_sampler_fails() -> None:
    class Failing:
        def __iter__(self) -> Iterator[int]:
            yield random.randrange(5)
            raise RuntimeError("disk gone")

    before = random.getstate()
    order = Sampled(sampler=Failing(), is_batched=False, length=5, batch_size=2, seed=0)
    with pytest.raises(RuntimeError, match="disk gone"):
        order.epoch(0)
    assert random.getstate() == before


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_sampler_is_told_the_epoch(wrapped: bool) -> None:
    sampler = BatchSampler(EpochSampler(), 3, drop_last=False) if wrapped else EpochSampler()
    order = make_order(sampler, length=9, batch_size=3, seed=0)
    assert batches(order.epoch(4)) == [[4, 4, 4]]
    assert batches(order.epoch(0)) == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("order", "is_batched"),
    [
        (RandomSampler(range(9)), False),
        (BatchSampler(RandomSampler(range(9)), 3, drop_last=False), True),
        ([[0, 1], [2]], True),
        ([torch.tensor([0, 1])], True),
    ],
    ids=["a sampler", "a batch sampler", "lists", "tensors"],
)
def test_a_sampler_is_told_from_a_batch_sampler_by_what_it_yields(order: OrderLike, is_batched: bool) -> None:
    made = make_order(order, length=9, batch_size=3, seed=0)
    assert isinstance(made, Sampled)
    assert made.is_batched == is_batched


def test_each_list_of_a_batch_sampler_is_one_global_batch() -> None:
    epoch = make_order([[4, 1], (0, 2, 3), np.array([5])], length=6, batch_size=3, seed=0).epoch(0)
    assert batches(epoch) == [[4, 1], [0, 2, 3], [5]]
    assert (epoch.samples, epoch.batches) == (6, 3)


def test_a_batch_sampler_may_refill_the_same_list() -> None:
    class Refilling:
        def __iter__(self) -> Iterator[list[int]]:
            batch: list[int] = []
            for i in range(3):
                batch[:] = [i, i + 1]
                yield batch

    assert batches(make_order(Refilling(), length=4, batch_size=2, seed=0).epoch(0)) == [[0, 1], [1, 2], [2, 3]]


@pytest.mark.parametrize(
    "order",
    [RandomSampler(range(7)), SubsetRandomSampler(range(7))],
    ids=["random", "subset"],
)
def test_drop_last_applies_to_what_a_sampler_draws(order: RandomSampler) -> None:
    epoch = make_order(order, length=7, batch_size=3, seed=0, drop_last=True).epoch(0)
    assert [len(batch) for batch in batches(epoch)] == [3, 3]


# ---- bad input ----


class Yielding:
    """Yields the given elements, any number of times."""

    def __init__(self, *elements: object) -> None:
        self.elements = elements

    def __iter__(self) -> Iterator[object]:
        return iter(self.elements)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("random", "order 'random' is unknown: use 'shuffle'"),
        (7, "the order is 7: use 'shuffle'"),
        ((i for i in range(3)), "is a generator, which can be iterated only once"),
        (map(int, "123"), "is a map, which can be iterated only once"),
        ([], "is empty"),
        (np.zeros(0, np.int64), "is empty"),
        (range(0), r"is empty|range\(0, 0\) is empty"),
        (Yielding(), "is empty"),
        ([3, 20], "position 1 holds 20; expected an integer from 0 to 19"),
        (range(5, 30), "position 24 holds 29"),
        (np.array([3, -2]), "position 1 holds -2"),
        ([0, 2.0], "position 1 holds 2.0"),
        ([0, 2**70], f"position 1 holds {2**70}"),
        (np.array([False, True]), "position 0 holds"),
        ([False, True], "position 0 holds False"),
        ([0, [1]], r"position 1 holds \[1\]"),
        (np.zeros((2, 3), np.int64), r"shape \[2, 3\]"),
        (Yielding(3, 20), "the sampler in epoch 0: position 1 holds 20"),
        (Yielding(3, "a"), "position 1 holds 'a'"),
        (Yielding([3], []), "the batch sampler in epoch 0, batch 1 is empty"),
        (Yielding([3], [4, 20]), "batch 1: position 1 holds 20"),
        (Yielding([3], 4), "batch 1 is 4: a batch sampler yields lists"),
        (Yielding([3], [1, 2, 3, 4, 5]), "batch 1 holds 5 samples, more than batch_size 4: raise batch_size"),
        (DistributedSampler(range(20), num_replicas=2, rank=0), "splits the data between 2 workers"),
    ],
)
def test_an_order_that_cannot_be_used_is_refused_with_the_place_and_the_value(order: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_order(order, length=20, batch_size=4, seed=0).epoch(0)  # type: ignore[arg-type]


def test_a_one_shot_iterator_is_not_consumed_by_the_refusal() -> None:
    indices = iter([1, 2, 3])
    with pytest.raises(ConfigurationError):
        make_order(indices, length=4, batch_size=2, seed=0)
    assert list(indices) == [1, 2, 3]


def test_an_epoch_without_a_batch_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="the dataset has 0 samples"):
        make_order("shuffle", length=0, batch_size=4, seed=0)
    with pytest.raises(ConfigurationError, match="drop_last leaves no batch of 3 samples with batch_size 4"):
        make_order("shuffle", length=3, batch_size=4, seed=0, drop_last=True).epoch(0)


def test_a_batch_size_below_one_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="batch_size is 0"):
        make_order("shuffle", length=3, batch_size=0, seed=0)


def test_drop_last_is_refused_beside_a_batch_sampler() -> None:
    with pytest.raises(ConfigurationError, match="set drop_last there"):
        make_order([[0, 1], [2]], length=3, batch_size=2, seed=0, drop_last=True)


def test_the_module_needs_no_torch_to_shuffle() -> None:
    # A bare package stands in for unisono, whose __init__ imports what needs torch.
    script = (
        "import sys, types\n"
        "sys.modules['torch'] = None\n"
        "package = sys.modules['unisono'] = types.ModuleType('unisono')\n"
        f"package.__path__ = [{str(Path(unisono.order.__file__).parent)!r}]\n"
        "from unisono.order import make_order\n"
        "print(make_order('shuffle', length=10, batch_size=4, seed=0).epoch(0).batch(0).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[9, 8, 0, 6]", done.stderr
