"""The fixed tree: pieces, ranges and folds, against a tree written down naively and evaluated on symbols."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unisono.assignment import assignment
from unisono.tree import Fold, Span, combine, fold_all, is_node, middle, pieces

MOST_MICROBATCHES = 40


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
    """Every node of the tree over microbatches lo to hi - 1, by the same definition."""
    yield lo, hi
    if hi - lo > 1:
        left_size = 1
        while left_size * 2 < hi - lo:
            left_size *= 2
        yield from nodes(lo, lo + left_size)
        yield from nodes(lo + left_size, hi)


def symbols(microbatches: int) -> list[str | None]:
    return [str(microbatch) for microbatch in range(microbatches)]


def folded(values: Sequence[str | None], ranges: Sequence[Span]) -> dict[Span, str | None]:
    """What all workers' folds leave behind."""
    parts: dict[Span, str | None] = {}
    for lo, hi in ranges:
        fold: Fold[str] = Fold(len(values), join)
        for microbatch in range(lo, hi):
            fold.push(microbatch, values[microbatch])
        assert tuple(fold.parts()) == pieces(lo, hi, len(values))
        parts.update(fold.parts())
    return parts


@st.composite
def cut_microbatches(draw: st.DrawFn) -> tuple[list[str | None], list[Span]]:
    """Leaves, some of them absent, and any way of giving contiguous ranges of them to workers."""
    microbatches = draw(st.integers(1, MOST_MICROBATCHES))
    values = [str(microbatch) if draw(st.booleans()) else None for microbatch in range(microbatches)]
    cuts = draw(st.sets(st.integers(1, microbatches - 1))) if microbatches > 1 else set()
    return values, list(pairwise([0, *sorted(cuts), microbatches]))


# ---- the tree itself ----


@pytest.mark.parametrize("microbatches", range(1, MOST_MICROBATCHES + 1))
def test_nodes_are_those_of_the_definition(microbatches: int) -> None:
    spans = {(lo, hi) for lo in range(microbatches) for hi in range(lo + 1, microbatches + 1)}

    assert {span for span in spans if is_node(*span, microbatches)} == set(nodes(0, microbatches))


def test_the_tree_of_six_leaves_is_as_it_was_when_runs_began_to_rely_on_it() -> None:
    assert fold_all(symbols(6), join) == "(((0+1)+(2+3))+(4+5))"


@pytest.mark.parametrize(("lo", "hi", "split"), [(0, 2, 1), (0, 3, 2), (0, 4, 2), (0, 5, 4), (0, 8, 4), (8, 11, 10), (8, 16, 12)])
def test_a_node_splits_after_the_largest_power_of_two_below_its_size(lo: int, hi: int, split: int) -> None:
    assert middle(lo, hi) == split


@pytest.mark.parametrize("microbatches", range(1, MOST_MICROBATCHES + 1))
def test_folding_all_leaves_is_the_tree(microbatches: int) -> None:
    assert fold_all(symbols(microbatches), join) == naive(symbols(microbatches))


def test_the_sum_of_no_leaves_is_absent() -> None:
    assert fold_all([], join) is None
    assert fold_all([None] * 5, join) is None


# ---- pieces ----


@pytest.mark.parametrize("microbatches", range(1, MOST_MICROBATCHES + 1))
def test_pieces_are_the_fewest_nodes_that_cover_a_range(microbatches: int) -> None:
    known = set(nodes(0, microbatches))
    for lo, hi in combinations(range(microbatches + 1), 2):
        found = pieces(lo, hi, microbatches)
        assert [lo, *(end for _, end in found)] == [*(start for start, _ in found), hi], "they cover the range, in order"
        assert set(found) <= known
        inside = {(a, b) for a, b in known if lo <= a and b <= hi}
        assert all(not any(a <= c and d <= b and (a, b) != (c, d) for a, b in inside) for c, d in found), "each is maximal"


@pytest.mark.parametrize("microbatches", range(1, MOST_MICROBATCHES + 1))
def test_every_number_of_workers_finishes_the_same_tree(microbatches: int) -> None:
    values = symbols(microbatches)
    for workers in range(1, microbatches + 1):
        parts = folded(values, assignment(microbatches, workers))
        assert combine(parts, microbatches, join) == naive(values), f"{workers} workers"


@settings(deadline=None)
@given(cut_microbatches())
def test_any_ranges_and_absent_leaves_finish_the_same_tree(cut: tuple[list[str | None], list[Span]]) -> None:
    values, ranges = cut

    assert combine(folded(values, ranges), len(values), join) == naive(values)


@settings(deadline=None)
@given(cut_microbatches())
def test_a_single_node_can_be_finished_alone(cut: tuple[list[str | None], list[Span]]) -> None:
    values, ranges = cut
    parts = folded(values, ranges)
    for lo, hi in nodes(0, len(values)):
        if any(a < lo < b or a < hi < b for a, b in parts) or any((lo, hi) != (a, b) and a <= lo and hi <= b for a, b in parts):
            continue  # a worker has already summed across this node's edge
        assert combine(parts, len(values), join, lo=lo, hi=hi) == naive(values[lo:hi])
