"""Which ranges of microbatches workers get, against all ranges that there are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unisono.assignment import _count, assignment, assignment_by_time
from unisono.tree import Span, pieces

MOST_MICROBATCHES = 40


# ---- assignment ----


@pytest.mark.parametrize("microbatches", range(1, MOST_MICROBATCHES + 1))
def test_ranges_cover_all_leaves_and_nobody_has_more_than_an_even_share(microbatches: int) -> None:
    for workers in range(1, microbatches + 1):
        ranges = assignment(microbatches, workers)
        assert len(ranges) == workers
        assert [0, *(hi for _, hi in ranges)] == [*(lo for lo, _ in ranges), microbatches]
        assert all(hi > lo for lo, hi in ranges)
        assert max(hi - lo for lo, hi in ranges) == -(-microbatches // workers)


@pytest.mark.parametrize("microbatches", range(1, 13))
def test_no_other_even_ranges_have_fewer_pieces(microbatches: int) -> None:
    for workers in range(1, microbatches + 1):
        most = -(-microbatches // workers)
        fewest = min(
            sum(len(pieces(lo, hi, microbatches)) for lo, hi in pairwise([0, *cuts, microbatches]))
            for cuts in combinations(range(1, microbatches), workers - 1)
            if all(hi - lo <= most for lo, hi in pairwise([0, *cuts, microbatches]))
        )
        assert sum(len(pieces(lo, hi, microbatches)) for lo, hi in assignment(microbatches, workers)) == fewest


@pytest.mark.parametrize(("microbatches", "workers"), [(8, 2), (8, 4), (8, 8), (16, 2), (32, 8), (24, 3)])
def test_aligned_ranges_are_one_piece_each(microbatches: int, workers: int) -> None:
    assert all(len(pieces(lo, hi, microbatches)) == 1 for lo, hi in assignment(microbatches, workers))


@pytest.mark.parametrize("workers", [-1, 0, 5])
def test_fewer_leaves_than_workers_or_no_worker_is_an_error(workers: int) -> None:
    with pytest.raises(ValueError, match=f"{workers} workers cannot share 4 microbatches"):
        assignment(4, workers)


# ---- hosts ----


def host_pieces(ranges: Sequence[Span], hosts: Sequence[int], microbatches: int) -> int:
    """The pieces of hosts, each of them its workers' ranges taken together."""
    found, first = 0, 0
    for members in hosts:
        found += len(pieces(ranges[first][0], ranges[first + members - 1][1], microbatches))
        first += members
    return found


@pytest.mark.parametrize("microbatches", range(2, 11))
def test_no_other_ranges_have_fewer_pieces_of_hosts(microbatches: int) -> None:
    for workers in range(2, microbatches + 1):
        most = -(-microbatches // workers)
        cuts = [(0, *middles, microbatches) for middles in combinations(range(1, microbatches), workers - 1)]
        fair = [list(pairwise(cut)) for cut in cuts if all(b - a <= most for a, b in pairwise(cut))]
        for borders in range(1, workers):
            hosts = (borders, workers - borders)
            found = assignment(microbatches, workers, hosts)
            assert list(found) in fair
            assert host_pieces(found, hosts, microbatches) == min(host_pieces(ranges, hosts, microbatches) for ranges in fair)


def test_hosts_of_two_and_one_workers_get_six_and_two_of_eight_leaves() -> None:
    assert assignment(8, 3, (2, 1)) == ((0, 3), (3, 6), (6, 8))
    assert assignment(8, 3, (1, 2)) == ((0, 2), (2, 5), (5, 8))


def test_hosts_have_as_many_workers_as_there_are() -> None:
    with pytest.raises(ValueError, match="do not have 3 workers"):
        assignment(8, 3, (2, 2))


# ---- speed ----


@st.composite
def speeds(draw: st.DrawFn, most_leaves: int = 9) -> tuple[int, list[float]]:
    """A number of microbatches, and for each worker its seconds a microbatch, ties included."""
    microbatches = draw(st.integers(1, most_leaves))
    workers = draw(st.integers(1, min(microbatches, 4)))
    return microbatches, draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.1, 2.0, 7.0]), min_size=workers, max_size=workers))


def all_ranges(microbatches: int, workers: int) -> list[tuple[Span, ...]]:
    return [tuple(pairwise([0, *cuts, microbatches])) for cuts in combinations(range(1, microbatches), workers - 1)]


def slowest(ranges: Sequence[Span], seconds: Sequence[float]) -> float:
    return max((hi - lo) * one for (lo, hi), one in zip(ranges, seconds, strict=True))


@settings(deadline=None)
@given(speeds(), st.randoms(use_true_random=False), st.sampled_from([0.0, 0.25]))
def test_no_other_ranges_are_faster_or_as_fast_with_fewer_pieces_or_nearer(
    case: tuple[int, list[float]], random: Random, tolerance: float
) -> None:
    microbatches, seconds = case
    every = all_ranges(microbatches, len(seconds))
    before = random.choice(every)

    found = assignment_by_time(
        microbatches, len(seconds), lambda worker, count: seconds[worker] * count, previous=before, tolerance=tolerance
    )

    limit = min(slowest(ranges, seconds) for ranges in every) * (1 + tolerance)
    assert found in every
    assert slowest(found, seconds) <= limit

    def rest(ranges: tuple[Span, ...]) -> tuple[int, int]:
        borders = zip(ranges, before, strict=True)
        return sum(len(pieces(*span, microbatches)) for span in ranges), sum(abs(now[0] - then[0]) for now, then in borders)

    assert rest(found) == min(rest(ranges) for ranges in every if slowest(ranges, seconds) <= limit)


@settings(deadline=None)
@given(speeds(most_leaves=40), st.data())
def test_hosts_change_who_gets_which_leaves_but_not_the_time(case: tuple[int, list[float]], data: st.DataObject) -> None:
    microbatches, seconds = case
    borders = sorted(data.draw(st.sets(st.integers(1, len(seconds) - 1)) if len(seconds) > 1 else st.just(set())))
    hosts = tuple(hi - lo for lo, hi in pairwise([0, *borders, len(seconds)]))

    def time(worker: int, count: int) -> float:
        return seconds[worker] * count

    plain = assignment_by_time(microbatches, len(seconds), time)
    found = assignment_by_time(microbatches, len(seconds), time, hosts)

    assert [0, *(hi for _, hi in found)] == [*(lo for lo, _ in found), microbatches]
    assert all(lo < hi for lo, hi in found)
    assert slowest(found, seconds) == slowest(plain, seconds)
    assert host_pieces(found, hosts, microbatches) <= host_pieces(plain, hosts, microbatches)


def test_a_worker_at_half_speed_gets_half_as_much() -> None:
    def half(worker: int, count: int) -> float:
        return count * (2 if worker == 1 else 1)

    assert assignment_by_time(24, 2, half) == ((0, 16), (16, 24))
    # Both 6 + 2 and 5 + 3 take as long; with 6 + 2 there is a piece less to send.
    assert assignment_by_time(8, 2, half) == ((0, 6), (6, 8))


@pytest.mark.parametrize(("microbatches", "workers"), [(8, 3), (32, 5), (64, 7), (24, 3)])
def test_workers_of_one_speed_have_even_ranges(microbatches: int, workers: int) -> None:
    assert assignment_by_time(microbatches, workers, lambda _, count: float(count)) == assignment(microbatches, workers)


def test_time_need_not_grow_evenly_with_the_leaves() -> None:
    """Worker 0 is fast until it has more than three."""
    assert assignment_by_time(8, 2, lambda worker, count: count + (10 if worker == 0 and count > 3 else 0)) == ((0, 3), (3, 8))


def test_the_slowest_of_all_keeps_one_leaf() -> None:
    assert assignment_by_time(8, 2, lambda worker, count: count * (1000 if worker else 1)) == ((0, 7), (7, 8))


@pytest.mark.parametrize("microbatches", range(1, MOST_MICROBATCHES + 1))
def test_pieces_are_counted_without_making_them(microbatches: int) -> None:
    for lo, hi in combinations(range(microbatches + 1), 2):
        assert _count(lo, hi, microbatches) == len(pieces(lo, hi, microbatches))
