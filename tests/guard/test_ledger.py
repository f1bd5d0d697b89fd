"""The ledger: sums that do not depend on order, and that any single fault changes."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.guard.ledger import ENTRY_BYTES, LANES, NOTHING, Entry, entries, entry, order_sums, samples_of, total, whole


def of(*indices: int) -> Entry:
    return entry(np.array(indices, dtype=np.int64))


def lanes(entry: Entry) -> tuple[int, ...]:
    return struct.unpack("<" + "Q8x" * LANES, entry.to_bytes(ENTRY_BYTES, "little"))


@given(st.permutations(range(40)), st.lists(st.integers(0, 40), max_size=6))
def test_the_whole_is_the_sum_of_any_parts_in_any_order(order: list[int], cuts: list[int]) -> None:
    borders = [0, *sorted(cuts), 40]
    parts = [of(*order[lo:hi]) for lo, hi in itertools.pairwise(borders)]

    assert total(parts) == whole(40)


@given(st.integers(0, 39), st.integers(0, 45))
def test_a_sample_taken_for_another_shows(missing: int, instead: int) -> None:
    found = total([of(*(index for index in range(40) if index != missing)), of(instead)])

    assert (found == whole(40)) == (missing == instead)


@pytest.mark.parametrize("length", [0, 1, 2, 1000, 100_003])
def test_the_closed_form_is_the_sum(length: int) -> None:
    assert whole(length) == entry(np.arange(length))


def test_sums_are_modulo_2_to_the_64_and_cost_nothing_for_a_million_million_samples() -> None:
    large = 10**12
    assert samples_of(whole(large)) == large
    assert lanes(whole(large))[1] == large * (large - 1) // 2 % 2**64
    assert lanes(total([whole(large)] * 3)) == tuple(3 * number % 2**64 for number in lanes(whole(large)))
    assert total([whole(large), of(large)]) == whole(large + 1)


def test_nothing_adds_nothing() -> None:
    assert total([]) == NOTHING == of()
    assert total([NOTHING, of(3, 4)]) == of(4, 3)


@given(st.lists(st.integers(0, 2**62), max_size=12), st.data())
def test_many_entries_at_once_are_those_of_each_alone(samples: list[int], data: st.DataObject) -> None:
    borders = st.integers(0, len(samples))
    spans = [sorted(span) for span in data.draw(st.lists(st.tuples(borders, borders), min_size=1, max_size=5))]

    found = entries(np.array(samples, dtype=np.int64), np.array(spans))

    parts = [samples[lo:hi] for lo, hi in spans]
    assert [lanes(one) for one in found] == [(len(part), *(sum(i**n for i in part) % 2**64 for n in (1, 2, 3))) for part in parts]


def test_the_order_sum_tells_other_samples_and_another_order() -> None:
    weights = np.random.default_rng(0).integers(2**63, size=4, dtype=np.uint64)
    batches = [[0, 1, 2], [1, 0, 2], [0, 1], [0, 1, 2, 0], [0, 1, 3]]
    starts = [0, *itertools.accumulate(map(len, batches[:-1]))]

    together = order_sums(np.array([index for batch in batches for index in batch], dtype=np.int64), starts, weights)

    assert len(set(together)) == len(batches)
    assert together == [order_sums(np.array(batch, dtype=np.int64), [0], weights)[0] for batch in batches]
