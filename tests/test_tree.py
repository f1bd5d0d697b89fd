"""The fixed tree: pieces, ranges and folds, against a tree written down naively and evaluated on symbols."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unisono.tree import Fold, Span, _count, assignment, assignment_by_time, combine, fold_all, is_node, middle, pieces

MOST_LEAVES = 40


def join(left: str, right: str) -> str:
    """A sum that remembers in which order it was made."""
    return f"({left}+{right})"


def naive(values: Sequence[str | None]) -> str | None:
    """The tree by its definition: the largest power of two below the size goes to the left."""
    if len(values) == 1:
        return values[0]
    left_size = 1
    while left_size * 2 < len(values):
        left_size *= 2
    left, right = naive(values[:left_size]), naive(values[left_size:])
    return join(left, right) if left and right else left or right


def nodes(lo: int, hi: int) -> Iterator[Span]:
    """Every node of the tree over leaves lo to hi - 1, by the same definition."""
    yield lo, hi
    if hi - lo > 1:
        left_size = 1
        while left_size * 2 < hi - lo:
            left_size *= 2
        yield from nodes(lo, lo + left_size)
        yield from nodes(lo + left_size, hi)


def symbols(leaves: int) -> list[str | None]:
    return [str(leaf) for leaf in range(leaves)]


def folded(values: Sequence[str | None], ranges: Sequence[Span]) -> dict[Span, str | None]:
    """What all workers' folds leave behind."""
    parts: dict[Span, str | None] = {}
    for lo, hi in ranges:
        fold: Fold[str] = Fold(len(values), join)
        for leaf in range(lo, hi):
            fold.push(leaf, values[leaf])
        assert tuple(fold.parts()) == pieces(lo, hi, len(values))
        parts.update(fold.parts())
    return parts


@st.composite
def cut_leaves(draw: st.DrawFn) -> tuple[list[str | None], list[Span]]:
    """Leaves, some of them absent, and any way of giving contiguous ranges of them to workers."""
    leaves = draw(st.integers(1, MOST_LEAVES))
    values = [str(leaf) if draw(st.booleans()) else None for leaf in range(leaves)]
    cuts = draw(st.sets(st.integers(1, leaves - 1))) if leaves > 1 else set()
    return values, list(pairwise([0, *sorted(cuts), leaves]))


# ---- the tree itself ----


@pytest.mark.parametrize("leaves", range(1, MOST_LEAVES + 1))
def test_nodes_are_those_of_the_definition(leaves: int) -> None:
    spans = {(lo, hi) for lo in range(leaves) for hi in range(lo + 1, leaves + 1)}

    assert {span for span in spans if is_node(*span, leaves)} == set(nodes(0, leaves))


def test_the_tree_of_six_leaves_is_as_it_was_when_runs_began_to_rely_on_it() -> None:
    assert fold_all(symbols(6), join) == "(((0+1)+(2+3))+(4+5))"


@pytest.mark.parametrize(("lo", "hi", "split"), [(0, 2, 1), (0, 3, 2), (0, 4, 2), (0, 5, 4), (0, 8, 4), (8, 11, 10), (8, 16, 12)])
def test_a_node_splits_after_the_largest_power_of_two_below_its_size(lo: int, hi: int, split: int) -> None:
    assert middle(lo, hi) == split


@pytest.mark.parametrize("leaves", range(1, MOST_LEAVES + 1))
def test_folding_all_leaves_is_the_tree(leaves: int) -> None:
    assert fold_all(symbols(leaves), join) == naive(symbols(leaves))


def test_the_sum_of_no_leaves_is_absent() -> None:
    assert fold_all([], join) is None
    assert fold_all([None] * 5, join) is None


# ---- pieces ----


@pytest.mark.parametrize("leaves", range(1, MOST_LEAVES + 1))
def test_pieces_are_the_fewest_nodes_that_cover_a_range(leaves: int) -> None:
    known = set(nodes(0, leaves))
    for lo, hi in combinations(range(leaves + 1), 2):
        found = pieces(lo, hi, leaves)
        assert [lo, *(end for _, end in found)] == [*(start for start, _ in found), hi], "they cover the range, in order"
        assert set(found) <= known
        inside = {(a, b) for a, b in known if lo <= a and b <= hi}
        assert all(not any(a <= c and d <= b and (a, b) != (c, d) for a, b in inside) for c, d in found), "each is maximal"


@pytest.mark.parametrize("leaves", range(1, MOST_LEAVES + 1))
def test_every_number_of_workers_finishes_the_same_tree(leaves: int) -> None:
    values = symbols(leaves)
    for workers in range(1, leaves + 1):
        parts = folded(values, assignment(leaves, workers))
        assert combine(parts, leaves, join) == naive(values), f"{workers} workers"


@settings(deadline=None)
@given(cut_leaves())
def test_any_ranges_and_absent_leaves_finish_the_same_tree(cut: tuple[list[str | None], list[Span]]) -> None:
    values, ranges = cut

    assert combine(folded(values, ranges), len(values), join) == naive(values)


@settings(deadline=None)
@given(cut_leaves())
def test_a_single_node_can_be_finished_alone(cut: tuple[list[str | None], list[Span]]) -> None:
    values, ranges = cut
    parts = folded(values, ranges)
    for lo, hi in nodes(0, len(values)):
        if any(a < lo < b or a < hi < b for a, b in parts) or any((lo, hi) != (a, b) and a <= lo and hi <= b for a, b in parts):
            continue  # a worker has already summed across this node's edge
        assert combine(parts, len(values), join, lo=lo, hi=hi) == naive(values[lo:hi])


# ---- assignment ----


@pytest.mark.parametrize("leaves", range(1, MOST_LEAVES + 1))
def test_ranges_cover_all_leaves_and_nobody_has_more_than_an_even_share(leaves: int) -> None:
    for workers in range(1, leaves + 1):
        ranges = assignment(leaves, workers)
        assert len(ranges) == workers
        assert [0, *(hi for _, hi in ranges)] == [*(lo for lo, _ in ranges), leaves]
        assert all(hi > lo for lo, hi in ranges)
        assert max(hi - lo for lo, hi in ranges) == -(-leaves // workers)


@pytest.mark.parametrize("leaves", range(1, 13))
def test_no_other_even_ranges_have_fewer_pieces(leaves: int) -> None:
    for workers in range(1, leaves + 1):
        most = -(-leaves // workers)
        fewest = min(
            sum(len(pieces(lo, hi, leaves)) for lo, hi in pairwise([0, *cuts, leaves]))
            for cuts in combinations(range(1, leaves), workers - 1)
            if all(hi - lo <= most for lo, hi in pairwise([0, *cuts, leaves]))
        )
        assert sum(len(pieces(lo, hi, leaves)) for lo, hi in assignment(leaves, workers)) == fewest


@pytest.mark.parametrize(("leaves", "workers"), [(8, 2), (8, 4), (8, 8), (16, 2), (32, 8), (24, 3)])
def test_aligned_ranges_are_one_piece_each(leaves: int, workers: int) -> None:
    assert all(len(pieces(lo, hi, leaves)) == 1 for lo, hi in assignment(leaves, workers))


@pytest.mark.parametrize("workers", [-1, 0, 5])
def test_fewer_leaves_than_workers_or_no_worker_is_an_error(workers: int) -> None:
    with pytest.raises(ValueError, match=f"{workers} workers cannot share 4 leaves"):
        assignment(4, workers)


# ---- hosts ----


def host_pieces(ranges: Sequence[Span], hosts: Sequence[int], leaves: int) -> int:
    """The pieces of hosts, each of them its workers' ranges taken together."""
    found, first = 0, 0
    for members in hosts:
        found += len(pieces(ranges[first][0], ranges[first + members - 1][1], leaves))
        first += members
    return found


@pytest.mark.parametrize("leaves", range(2, 11))
def test_no_other_ranges_have_fewer_pieces_of_hosts(leaves: int) -> None:
    for workers in range(2, leaves + 1):
        most = -(-leaves // workers)
        cuts = [(0, *middles, leaves) for middles in combinations(range(1, leaves), workers - 1)]
        fair = [list(pairwise(cut)) for cut in cuts if all(b - a <= most for a, b in pairwise(cut))]
        for borders in range(1, workers):
            hosts = (borders, workers - borders)
            found = assignment(leaves, workers, hosts)
            assert list(found) in fair
            assert host_pieces(found, hosts, leaves) == min(host_pieces(ranges, hosts, leaves) for ranges in fair)


def test_hosts_of_two_and_one_workers_get_six_and_two_of_eight_leaves() -> None:
    assert assignment(8, 3, (2, 1)) == ((0, 3), (3, 6), (6, 8))
    assert assignment(8, 3, (1, 2)) == ((0, 2), (2, 5), (5, 8))


def test_hosts_have_as_many_workers_as_there_are() -> None:
    with pytest.raises(ValueError, match="do not have 3 workers"):
        assignment(8, 3, (2, 2))


# ---- speed ----


@st.composite
def speeds(draw: st.DrawFn, most_leaves: int = 9) -> tuple[int, list[float]]:
    """A number of leaves, and for each worker its seconds a leaf, ties included."""
    leaves = draw(st.integers(1, most_leaves))
    workers = draw(st.integers(1, min(leaves, 4)))
    return leaves, draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.1, 2.0, 7.0]), min_size=workers, max_size=workers))


def all_ranges(leaves: int, workers: int) -> list[tuple[Span, ...]]:
    return [tuple(pairwise([0, *cuts, leaves])) for cuts in combinations(range(1, leaves), workers - 1)]


def slowest(ranges: Sequence[Span], seconds: Sequence[float]) -> float:
    return max((hi - lo) * one for (lo, hi), one in zip(ranges, seconds, strict=True))


@settings(deadline=None)
@given(speeds(), st.randoms(use_true_random=False), st.sampled_from([0.0, 0.25]))
def test_no_other_ranges_are_faster_or_as_fast_with_fewer_pieces_or_nearer(
    case: tuple[int, list[float]], random: Random, tolerance: float
) -> None:
    leaves, seconds = case
    every = all_ranges(leaves, len(seconds))
    before = random.choice(every)

    found = assignment_by_time(
        leaves, len(seconds), lambda worker, count: seconds[worker] * count, previous=before, tolerance=tolerance
    )

    limit = min(slowest(ranges, seconds) for ranges in every) * (1 + tolerance)
    assert found in every
    assert slowest(found, seconds) <= limit

    def rest(ranges: tuple[Span, ...]) -> tuple[int, int]:
        borders = zip(ranges, before, strict=True)
        return sum(len(pieces(*span, leaves)) for span in ranges), sum(abs(now[0] - then[0]) for now, then in borders)

    assert rest(found) == min(rest(ranges) for ranges in every if slowest(ranges, seconds) <= limit)


@settings(deadline=None)
@given(speeds(most_leaves=40), st.data())
def test_hosts_change_who_gets_which_leaves_but_not_the_time(case: tuple[int, list[float]], data: st.DataObject) -> None:
    leaves, seconds = case
    borders = sorted(data.draw(st.sets(st.integers(1, len(seconds) - 1)) if len(seconds) > 1 else st.just(set())))
    hosts = tuple(hi - lo for lo, hi in pairwise([0, *borders, len(seconds)]))

    def time(worker: int, count: int) -> float:
        return seconds[worker] * count

    plain = assignment_by_time(leaves, len(seconds), time)
    found = assignment_by_time(leaves, len(seconds), time, hosts)

    assert [0, *(hi for _, hi in found)] == [*(lo for lo, _ in found), leaves]
    assert all(lo < hi for lo, hi in found)
    assert slowest(found, seconds) == slowest(plain, seconds)
    assert host_pieces(found, hosts, leaves) <= host_pieces(plain, hosts, leaves)


def test_a_worker_at_half_speed_gets_half_as_much() -> None:
    def half(worker: int, count: int) -> float:
        return count * (2 if worker == 1 else 1)

    assert assignment_by_time(24, 2, half) == ((0, 16), (16, 24))
    # Both 6 + 2 and 5 + 3 take as long; with 6 + 2 there is a piece less to send.
    assert assignment_by_time(8, 2, half) == ((0, 6), (6, 8))


@pytest.mark.parametrize(("leaves", "workers"), [(8, 3), (32, 5), (64, 7), (24, 3)])
def test_workers_of_one_speed_have_even_ranges(leaves: int, workers: int) -> None:
    assert assignment_by_time(leaves, workers, lambda _, count: float(count)) == assignment(leaves, workers)


def test_time_need_not_grow_evenly_with_the_leaves() -> None:
    """Worker 0 is fast until it has more than three."""
    assert assignment_by_time(8, 2, lambda worker, count: count + (10 if worker == 0 and count > 3 else 0)) == ((0, 3), (3, 8))


def test_the_slowest_of_all_keeps_one_leaf() -> None:
    assert assignment_by_time(8, 2, lambda worker, count: count * (1000 if worker else 1)) == ((0, 7), (7, 8))


@pytest.mark.parametrize("leaves", range(1, MOST_LEAVES + 1))
def test_pieces_are_counted_without_making_them(leaves: int) -> None:
    for lo, hi in combinations(range(leaves + 1), 2):
        assert _count(lo, hi, leaves) == len(pieces(lo, hi, leaves))
