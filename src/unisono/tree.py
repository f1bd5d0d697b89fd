"""The fixed binary tree over microbatches: the one order in which unisono sums anything.

``tree(lo, hi)`` is a leaf when it holds one microbatch, else ``tree(lo, mid) + tree(mid, hi)`` with ``mid - lo`` the
largest power of two below ``hi - lo``. The tree depends on the number of microbatches M alone, so any sum taken along it
is the same for every number of workers. A worker computes a contiguous range of leaves; the maximal complete subtrees in
that range are its *pieces*, and pieces of all workers are all that is needed to finish the tree.

An absent leaf (an empty microbatch, an unused parameter) is ``None``: the sum of a node with an absent child is the other
child, untouched.

Pure Python; knows neither tensors nor processes. Everything here is *local*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from heapq import heapify, heapreplace
from itertools import accumulate
from typing import Generic, TypeVar

T = TypeVar("T")
Span = tuple[int, int]
"""Leaves ``lo <= m < hi`` as ``(lo, hi)``."""


def middle(lo: int, hi: int) -> int:
    """Where the node ``(lo, hi)`` of two or more leaves splits: ``lo`` plus the largest power of two below its size."""
    return lo + (1 << ((hi - lo - 1).bit_length() - 1))


def is_node(lo: int, hi: int, leaves: int) -> bool:
    """Whether ``(lo, hi)`` is a node of the tree over ``leaves`` leaves.

    The nodes are the aligned blocks of a power of two leaves, cut off at the tree's end.
    """
    width = 1 << (hi - lo - 1).bit_length()
    return lo % width == 0 and (hi == lo + width or hi == leaves)


def pieces(lo: int, hi: int, leaves: int) -> tuple[Span, ...]:
    """The maximal nodes of the tree over ``leaves`` leaves that cover exactly the range ``(lo, hi)``, in order."""
    found: list[Span] = []

    def walk(node_lo: int, node_hi: int) -> None:
        if hi <= node_lo or node_hi <= lo:
            return
        if lo <= node_lo and node_hi <= hi:
            found.append((node_lo, node_hi))
            return
        mid = middle(node_lo, node_hi)
        walk(node_lo, mid)
        walk(mid, node_hi)

    walk(0, leaves)
    return tuple(found)


@lru_cache(maxsize=64)
def assignment(leaves: int, workers: int, hosts: tuple[int, ...] = ()) -> tuple[Span, ...]:
    """Contiguous ranges of leaves for ``workers`` workers: nobody has more than ``ceil(leaves / workers)``, everybody at
    least one, and the total number of pieces, hence of bytes on the wire, is the least possible.

    Args:
        hosts: The number of workers of each host, in order, if it matters: then the pieces of hosts (those of its workers'
            ranges taken together, which are what crosses the wire) are the fewest first, and the pieces of the workers of
            each host second.

    Raises:
        ValueError: unless ``1 <= workers <= leaves``, and the hosts have that many workers.
    """
    _check(leaves, workers, hosts)
    most = -(-leaves // workers)
    if leaves % workers == 0:
        return tuple((rank * most, (rank + 1) * most) for rank in range(workers))
    return _within(leaves, [most] * workers, hosts or (workers,))


def assignment_by_time(
    leaves: int,
    workers: int,
    seconds: Callable[[int, int], float],
    hosts: tuple[int, ...] = (),
    *,
    previous: Sequence[Span] = (),
    tolerance: float = 0.0,
) -> tuple[Span, ...]:
    """Contiguous ranges of leaves, in order of workers and at least one leaf each, of which the slowest takes the least possible
    time; among those the ones with the fewest pieces, and among those the ones nearest to ``previous``.

    Nobody gets an empty range: a worker that computes nothing could never show that it has become fast again.

    Args:
        seconds: ``seconds(worker, count)``: how long a worker takes for ``count`` leaves; never less for more of them.
        hosts: As for ``assignment``.
        previous: Ranges that it is good to stay near to: as little as possible changes hands.
        tolerance: The slowest may take this much longer than it could, as a share, if that makes fewer pieces.

    Raises:
        ValueError: unless ``1 <= workers <= leaves``, and the hosts have that many workers.
    """
    _check(leaves, workers, hosts)
    # Whoever would be done first with one leaf more gets it: then no other sharing ends sooner.
    counts = [1] * workers
    waiting = [(seconds(worker, 2), worker) for worker in range(workers)]
    heapify(waiting)
    for _ in range(leaves - workers):
        worker = waiting[0][1]
        counts[worker] += 1
        heapreplace(waiting, (seconds(worker, counts[worker] + 1), worker))
    limit = max(seconds(worker, count) for worker, count in enumerate(counts)) * (1 + tolerance)
    for worker in range(workers):
        while counts[worker] <= leaves - workers and seconds(worker, counts[worker] + 1) <= limit:
            counts[worker] += 1
    return _within(leaves, counts, hosts or (workers,), [lo for lo, _ in previous])


def _check(leaves: int, workers: int, hosts: tuple[int, ...]) -> None:
    if not 1 <= workers <= leaves:
        raise ValueError(f"{workers} workers cannot share {leaves} leaves: need 1 <= workers <= leaves")
    if hosts and sum(hosts) != workers:
        raise ValueError(f"hosts of {hosts} workers do not have {workers} workers together")


def _within(leaves: int, most: Sequence[int], hosts: tuple[int, ...], near: Sequence[int] = ()) -> tuple[Span, ...]:
    """Ranges of at least one leaf and at most these, host by host with the fewest pieces, then nearest to the starts ``near``."""
    firsts = list(accumulate(hosts, initial=0))[:-1]
    limits = [(members, sum(most[first : first + members])) for first, members in zip(firsts, hosts, strict=True)]
    spans = _divide(0, leaves, limits, leaves, [near[first] for first in firsts] if near else ())
    found: list[Span] = []
    for (lo, hi), first, members in zip(spans, firsts, hosts, strict=True):
        own = slice(first, first + members)
        found += _divide(lo, hi, [(1, limit) for limit in most[own]], leaves, near[own])
    return tuple(found)


def _divide(first: int, last: int, limits: Sequence[tuple[int, int]], leaves: int, near: Sequence[int] = ()) -> list[Span]:
    """Cuts the range ``(first, last)`` into one range for each ``(least, most)`` of ``limits``: with the fewest pieces in all,
    and then with their starts nearest to ``near``, if given."""
    rooms = list(accumulate((most for _, most in limits), initial=0))
    needs = list(accumulate((least for least, _ in limits), initial=0))
    # Dynamic programme from the right: the cost of the ranges from ``lo`` on, for the limits seen so far.
    costs: dict[int, tuple[int, int]] = {last: (0, 0)}
    ends: list[dict[int, int]] = []
    for place in reversed(range(len(limits))):
        least, most = limits[place]
        lowest = max(first + needs[place], last - (rooms[-1] - rooms[place]))
        highest = min(first + rooms[place], last - (needs[-1] - needs[place]))
        best: dict[int, tuple[tuple[int, int], int]] = {}
        for lo in range(lowest, highest + 1):
            moved = abs(lo - near[place]) if near else 0
            candidates = [
                ((_count(lo, hi, leaves) + costs[hi][0], moved + costs[hi][1]), hi)
                for hi in range(min(lo + most, last), lo + least - 1, -1)
                if hi in costs
            ]
            if candidates:
                best[lo] = min(candidates, key=lambda candidate: candidate[0])
        costs = {lo: cost for lo, (cost, _) in best.items()}
        ends.append({lo: hi for lo, (_, hi) in best.items()})
    spans: list[Span] = []
    for by_start in reversed(ends):
        spans.append((first, by_start[first]))
        first = by_start[first]
    return spans


def _count(lo: int, hi: int, leaves: int) -> int:
    """``len(pieces(lo, hi, leaves))`` without making them."""
    if hi < leaves:
        top = (lo ^ hi).bit_length() - 1
        split = hi >> top << top
        return (split - lo).bit_count() + (hi - split).bit_count()
    count = 0
    while lo < hi:  # the tree's end cuts the last node off
        count += 1
        lo += lo & -lo or hi
    return count


def combine(
    parts: Mapping[Span, T | None], leaves: int, add: Callable[[T, T], T], *, lo: int = 0, hi: int | None = None
) -> T | None:
    """Finishes the tree from pieces that cover it: ``add(left, right)`` at every node whose children are both present.

    Args:
        parts: Node -> its sum, or None where every leaf below it is absent.
        leaves: Number of leaves of the whole tree.
        add: The sum of two neighbours; may reuse the memory of either.

    Returns:
        The sum of the node ``(lo, hi)``, by default of all leaves; None if all are absent.
    """
    hi = leaves if hi is None else hi
    if (lo, hi) in parts:
        return parts[lo, hi]
    mid = middle(lo, hi)
    left = combine(parts, leaves, add, lo=lo, hi=mid)
    right = combine(parts, leaves, add, lo=mid, hi=hi)
    if left is None or right is None:
        return right if left is None else left
    return add(left, right)


class Fold(Generic[T]):
    """Sums leaves that arrive in order along the tree, holding at most one value per level.

    Args:
        leaves: Number of leaves of the whole tree.
        add: ``add(left, right)``; the fold drops both operands and keeps the result.
    """

    def __init__(self, leaves: int, add: Callable[[T, T], T]) -> None:
        self._leaves = leaves
        self._add = add
        self._stack: list[tuple[Span, T | None]] = []

    def push(self, leaf: int, value: T | None) -> None:
        """Takes the next leaf (None if absent) and merges every node that it completes."""
        span: Span = (leaf, leaf + 1)
        while self._stack and self._merges(self._stack[-1][0], span):
            (lo, _), left = self._stack.pop()
            span = (lo, span[1])
            value = self._join(left, value)
        self._stack.append((span, value))

    def parts(self) -> dict[Span, T | None]:
        """The pieces folded so far, by node."""
        return dict(self._stack)

    def _merges(self, left: Span, right: Span) -> bool:
        return left[1] == right[0] and is_node(left[0], right[1], self._leaves) and middle(left[0], right[1]) == right[0]

    def _join(self, left: T | None, right: T | None) -> T | None:
        if left is None or right is None:
            return right if left is None else left
        return self._add(left, right)


def fold_all(values: Sequence[T | None], add: Callable[[T, T], T]) -> T | None:
    """The tree sum of one value per leaf."""
    return _fold_range(values, add, 0, len(values)) if values else None


def _fold_range(values: Sequence[T | None], add: Callable[[T, T], T], lo: int, hi: int) -> T | None:
    if hi - lo == 1:
        return values[lo]
    mid = middle(lo, hi)
    left, right = _fold_range(values, add, lo, mid), _fold_range(values, add, mid, hi)
    if left is None or right is None:
        return right if left is None else left
    return add(left, right)
