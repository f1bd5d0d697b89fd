"""The ledger: sums that do not depend on order, and that any single fault changes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.guard.ledger import NOTHING, entries, entry, order_sums, tallied, total, whole


def of(*indices: int) -> tuple[int, int, int, int]:
    return entry(np.array(indices, dtype=np.int64))


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
    assert all(0 <= number < 2**64 for number in whole(large))
    assert total([whole(large), of(large)]) == whole(large + 1)


def test_nothing_adds_nothing() -> None:
    assert total([]) == NOTHING == of()
    assert total([NOTHING, of(3, 4)]) == of(4, 3)


@given(
    st.lists(st.lists(st.lists(st.integers(0, 2**62), min_size=1, max_size=4), min_size=1, max_size=3), min_size=1, max_size=4)
)
def test_many_entries_at_once_are_those_of_each_alone(groups: list[list[list[int]]]) -> None:
    parts = [part for group in groups for part in group]
    starts = [0, *itertools.accumulate(map(len, parts[:-1]))]
    firsts = [0, *itertools.accumulate(map(len, groups[:-1]))]

    of_parts, of_groups = entries(np.array([index for part in parts for index in part], dtype=np.int64), starts, firsts)

    assert of_parts == [
        (len(part), sum(part) % 2**64, sum(i**2 for i in part) % 2**64, sum(i**3 for i in part) % 2**64) for part in parts
    ]
    assert of_groups == [total([of(*part) for part in group]) for group in groups]


def test_an_entry_reckoned_ahead_counts_for_its_own_samples_only() -> None:
    samples = np.array([4, 5])
    assert tallied((samples, (9, 9, 9, 9)), samples) == (9, 9, 9, 9)
    assert tallied((samples, (9, 9, 9, 9)), np.array([4, 5])) == of(4, 5)
    assert tallied(None, samples) == of(4, 5)


def test_the_order_sum_tells_other_samples_and_another_order() -> None:
    weights = np.random.default_rng(0).integers(2**63, size=4, dtype=np.uint64)
    batches = [[0, 1, 2], [1, 0, 2], [0, 1], [0, 1, 2, 0], [0, 1, 3]]
    starts = [0, *itertools.accumulate(map(len, batches[:-1]))]

    together = order_sums(np.array([index for batch in batches for index in batch], dtype=np.int64), starts, weights)

    assert len(set(together)) == len(batches)
    assert together == [order_sums(np.array(batch, dtype=np.int64), [0], weights)[0] for batch in batches]
