"""Measurements between workers: threads of one process, and real processes for plain TCP."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from unisono.collective.base import Collective
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
from unisono.doctor.records import Links, Pair
from unisono.doctor.streams import measure_streams, own_address
from unisono.testing import run_threads
from unisono.world import World

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
    assert fitting_bytes(2, None) == fitting_bytes(8, 64 * 2**30) == LARGE_BYTES
    assert fitting_bytes(2, 2**30) == 2**25
    assert fitting_bytes(65, None) == LARGE_BYTES // 8
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


def _streams(collective: Collective) -> Links:
    # Worker 2 cannot be reached.
    address = None if collective.rank == 2 else "127.0.0.1"
    return measure_streams(collective, address, large_bytes=2**21)


def test_plain_tcp_is_measured_between_those_who_can_reach_each_other(run_workers: Callable[..., Any]) -> None:
    first, *others = run_workers(4, _streams)
    assert all(other == first for other in others)
    assert [(pair.first, pair.second) for pair in first.pairs] == [(0, 1), (0, 3), (1, 3)]
    assert 0 < first.barrier_s < 1
    assert all(pair.large_rate > 1e6 for pair in first.pairs)


def test_a_worker_is_reached_at_the_address_of_its_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert own_address(World(size=2, local_size=2, master_addr="example.invalid", master_port=1)) == "127.0.0.1"
    spread = World(size=2, local_size=1, master_addr="127.0.0.1", master_port=1)
    assert own_address(spread) == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert own_address(spread) == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nonsense")
    with pytest.raises(OSError, match="No such device"):
        own_address(spread)
