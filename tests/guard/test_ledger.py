"""The ledger: sums that do not depend on order, and that any single fault changes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.guard.ledger import NOTHING, entry, total, whole


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
