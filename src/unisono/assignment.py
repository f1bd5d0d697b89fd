"""Who computes which microbatches: contiguous ranges of them for the workers, with as few pieces of the fixed tree as possible.

Which ranges they are changes no bit of any result, only its time and the bytes on the wire. Pure Python; everything
here is *local*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from heapq import heapify, heapreplace
from itertools import accumulate, pairwise

from unisono.errors import ConfigurationError
from unisono.tree import Span


@lru_cache(maxsize=64)
def assignment(microbatches: int, workers: int, hosts: tuple[int, ...] = ()) -> tuple[Span, ...]:
    """Contiguous ranges of microbatches for ``workers`` workers: none has more than ``ceil(microbatches / workers)``, each has
    at least one, and the total number of pieces, hence of bytes on the wire, is the least possible.

    Args:
        hosts: The number of workers of each host, in order, if it matters: then the pieces of hosts (those of its workers'
            ranges taken together, which are what crosses the wire) are the fewest first, and the pieces of the workers of
            each host second.

    Raises:
        ValueError: unless ``1 <= workers <= microbatches``, and the hosts have that many workers.
    """
    _check(microbatches, workers, hosts)
    most = -(-microbatches // workers)
    if microbatches % workers == 0:
        return tuple((rank * most, (rank + 1) * most) for rank in range(workers))
    return _within(microbatches, [most] * workers, hosts or (workers,))


def assignment_by_time(
    microbatches: int,
    workers: int,
    seconds: Callable[[int, int], float],
    hosts: tuple[int, ...] = (),
    *,
    previous: Sequence[Span] = (),
    tolerance: float = 0.0,
) -> tuple[Span, ...]:
    """Contiguous ranges of microbatches, in order of workers and at least one each, of which the slowest takes the least
    possible time; among those the ones with the fewest pieces, and among those the ones nearest to ``previous``.

    No worker gets an empty range: one that computes nothing could never show that it has become fast again.

    Args:
        seconds: ``seconds(worker, count)``: how long a worker takes for ``count`` microbatches; never less for more of them.
        hosts: As for ``assignment``.
        previous: The ranges of now: as few microbatches as possible change hands.
        tolerance: The slowest may take this much longer than it could, as a share, if that makes fewer pieces.

    Raises:
        ValueError: unless ``1 <= workers <= microbatches``, and the hosts have that many workers.
    """
    _check(microbatches, workers, hosts)
    # The worker that would be done first with one more gets it: then no other division ends sooner.
    counts = [1] * workers
    waiting = [(seconds(worker, 2), worker) for worker in range(workers)]
    heapify(waiting)
    for _ in range(microbatches - workers):
        worker = waiting[0][1]
        counts[worker] += 1
        heapreplace(waiting, (seconds(worker, counts[worker] + 1), worker))
    limit = max(seconds(worker, count) for worker, count in enumerate(counts)) * (1 + tolerance)
    for worker in range(workers):
        while counts[worker] <= microbatches - workers and seconds(worker, counts[worker] + 1) <= limit:
            counts[worker] += 1
    return _within(microbatches, counts, hosts or (workers,), [lo for lo, _ in previous])


def checked_ranges(ranges: Sequence[Span], workers: int, microbatches: int) -> tuple[Span, ...]:
    """The ranges, if they share all microbatches out to the workers.

    Raises:
        ConfigurationError: They do not.
    """
    edges = [0, *(hi for _, hi in ranges)]
    whole = len(ranges) == workers and edges[-1] == microbatches
    if not whole or list(ranges) != list(pairwise(edges)) or any(hi <= lo for lo, hi in ranges):
        raise ConfigurationError(
            f"ranges {list(ranges)} do not divide {microbatches} microbatches among {workers} workers: "
            "give each worker at least one, contiguous and in order of rank"
        )
    return tuple((lo, hi) for lo, hi in ranges)


def _check(microbatches: int, workers: int, hosts: tuple[int, ...]) -> None:
    if not 1 <= workers <= microbatches:
        raise ValueError(f"{workers} workers cannot share {microbatches} microbatches: need 1 <= workers <= microbatches")
    if hosts and sum(hosts) != workers:
        raise ValueError(f"hosts of {hosts} workers do not have {workers} workers together")


def _within(microbatches: int, most: Sequence[int], hosts: tuple[int, ...], near: Sequence[int] = ()) -> tuple[Span, ...]:
    """Ranges of at least one microbatch and at most these, host by host: with the fewest pieces, then nearest to the starts
    ``near``."""
    firsts = list(accumulate(hosts, initial=0))[:-1]
    limits = [(members, sum(most[first : first + members])) for first, members in zip(firsts, hosts, strict=True)]
    spans = _divide(0, microbatches, limits, microbatches, [near[first] for first in firsts] if near else ())
    found: list[Span] = []
    for (lo, hi), first, members in zip(spans, firsts, hosts, strict=True):
        own = slice(first, first + members)
        found += _divide(lo, hi, [(1, limit) for limit in most[own]], microbatches, near[own])
    return tuple(found)


def _divide(first: int, last: int, limits: Sequence[tuple[int, int]], microbatches: int, near: Sequence[int] = ()) -> list[Span]:
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
                ((_count(lo, hi, microbatches) + costs[hi][0], moved + costs[hi][1]), hi)
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


def _count(lo: int, hi: int, microbatches: int) -> int:
    """``len(pieces(lo, hi, microbatches))`` without making them."""
    if hi < microbatches:
        top = (lo ^ hi).bit_length() - 1
        split = hi >> top << top
        return (split - lo).bit_count() + (hi - split).bit_count()
    count = 0
    while lo < hi:  # the tree's end cuts the last node off
        count += 1
        lo += lo & -lo or hi
    return count
