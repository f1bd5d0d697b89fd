"""Measurements between workers, as threads of one process."""

from __future__ import annotations

import itertools

import pytest
import torch

from unisono.collective.base import Collective
from unisono.doctor.facts import Links, Pair
from unisono.doctor.links import (
    LARGE_BYTES,
    clock_offsets,
    copy_rate,
    fitting_bytes,
    measure_links,
    merge,
    partner,
    turns,
)
from unisono.testing import run_threads

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", range(2, 18))
def test_in_a_tournament_everybody_meets_everybody_once(size: int) -> None:
    met = []
    for turn in range(turns(size)):
        pairs = {rank: partner(rank, turn, size) for rank in range(size)}
        assert all(other is None or (other != rank and pairs[other] == rank) for rank, other in pairs.items())
        met += [(rank, other) for rank, other in pairs.items() if other is not None and rank < other]
    assert sorted(met) == list(itertools.combinations(range(size), 2))
    assert len(met) == len(set(met))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("in_place", [False, True])
def test_every_pair_is_measured_and_all_workers_know_all_of_it(size: int, in_place: bool) -> None:
    def work(collective: Collective) -> Links:
        return measure_links(collective, transport="threads", device=CPU, large_bytes=2**21, in_place=in_place)

    first, *others = run_threads(size, work)
    assert all(other == first for other in others)
    assert [(pair.first, pair.second) for pair in first.pairs] == list(itertools.combinations(range(size), 2))
    assert all(pair.large_rate > 0 and pair.small_s > 0 and 2**20 <= pair.large_bytes <= 2**21 for pair in first.pairs)


def test_the_slower_side_of_a_pair_counts() -> None:
    sides = [Pair(first=0, second=1, small_s=s, large_rate=r, large_bytes=9) for s, r in ((1.0, 5.0), (2.0, 6.0))]
    assert merge(sides) == [Pair(first=0, second=1, small_s=2.0, large_rate=5.0, large_bytes=9)]


def test_messages_shrink_with_memory_and_with_the_number_of_workers() -> None:
    assert fitting_bytes(2, 2**40) == fitting_bytes(8, 64 * 2**30) == LARGE_BYTES
    assert fitting_bytes(2, 2**30) == 2**25
    assert fitting_bytes(65, 2**40) == LARGE_BYTES // 8
    assert fitting_bytes(2, 0) == 2**20


def test_the_clock_of_each_worker_is_compared_with_that_of_worker_0() -> None:
    wrong = [0.0, 5.0, -90.0]

    def work(collective: Collective) -> list[float]:
        ticks = itertools.count(1_700_000_000)
        return clock_offsets(collective, clock=lambda: next(ticks) * 1e-3 + wrong[collective.rank])

    for offsets in run_threads(3, work):
        assert offsets == pytest.approx(wrong, abs=0.01)


def test_the_slowest_copier_sets_the_rate() -> None:
    first, second = run_threads(2, lambda collective: copy_rate(collective, 2**20))
    assert first == second > 1e6
