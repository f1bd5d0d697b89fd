"""What messages between workers cost, through the transports that a run uses. Everything here is *collective*.

Each worker talks to each other one in turn, in the rounds of a tournament: in a round, all pairs talk at the same time,
as they do in a run, and W workers need only W - 1 rounds (one more if W is odd).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from unisono.collective.base import Collective, Expected
from unisono.doctor.facts import Links, Pair, dumps, loads
from unisono.layout import allocate

SMALL_BYTES = 64 * 1024
LARGE_BYTES = 64 * 1024 * 1024
_PROBE_BYTES = 1024 * 1024
_LARGE_S = 0.25  # a slow network gets as many bytes as it moves in this time
_BARRIERS, _SMALL, _LARGE = 50, 20, 5
_CLOCK_ROUNDS = 20
_CPU = torch.device("cpu")


def partner(rank: int, turn: int, size: int) -> int | None:
    """With whom a worker talks in this round of a tournament in which everybody meets everybody once. *local*

    Args:
        rank: The worker.
        turn: Number of the round, from 0 to `turns(size) - 1`.
        size: How many workers there are.

    Returns:
        The other worker's rank, or None if this one pauses.
    """
    last = size - 1 + size % 2
    # All numbers below `last` sit on a circle; i meets (turn - i), and the one that would meet itself meets `last`.
    other = turn * ((last + 1) // 2) % last if rank == last else (turn - rank) % last
    if other == rank:
        other = last
    return other if other < size else None


def turns(size: int) -> int:
    """How many rounds it takes until everybody has met everybody. *local*"""
    return size - 1 + size % 2


def fitting_bytes(size: int, memory_free: int) -> int:
    """How large the large message may be, with this many workers and this much memory. *local*"""
    # A transport keeps a landing place for each other worker.
    return max(_PROBE_BYTES, min(LARGE_BYTES, 8 * LARGE_BYTES // max(1, size - 1), memory_free // (16 * size)))


def large_message(nbytes: int, probe_s: float) -> int:
    """How large it shall be, at most `nbytes`, where 1 MiB took this long. *local*"""
    return min(nbytes, max(_PROBE_BYTES, int(_PROBE_BYTES * _LARGE_S / probe_s)))


def measure_links(
    collective: Collective, *, transport: str, device: torch.device, large_bytes: int, in_place: bool = False
) -> Links:
    """Barrier, 64 KiB and a large message between each two workers. *collective*

    Args:
        collective: The transport.
        transport: Its name.
        device: Where the messages lie.
        large_bytes: How large the large message may be.
        in_place: Whether the transport hands out the sender's own memory. Then a message has arrived once it is copied.

    Returns:
        The same on all workers.
    """
    meter = _Meter(collective, device, large_bytes, in_place)
    barrier_s = median_s(collective.barrier, times=_BARRIERS, finish=meter.finish)
    pairs = [pair for turn in range(turns(collective.size)) if (pair := meter.pair(turn)) is not None]
    return gather(collective, Links(transport=transport, barrier_s=barrier_s, pairs=pairs))


def gather(collective: Collective, mine: Links) -> Links:
    """What all workers saw of a transport: of each figure the slowest. *collective*"""
    seen = [loads(Links, data) for data in collective.all_gather_bytes(dumps(mine))]
    barrier_s = max(links.barrier_s for links in seen)
    return Links(transport=mine.transport, barrier_s=barrier_s, pairs=merge(pair for links in seen for pair in links.pairs))


def merge(seen: Iterable[Pair]) -> list[Pair]:
    """One entry for each two workers, with the slower of what both saw. *local*"""
    sides: dict[tuple[int, int], list[Pair]] = {}
    for pair in seen:
        sides.setdefault((pair.first, pair.second), []).append(pair)
    return [
        Pair(
            first=first,
            second=second,
            small_s=max(pair.small_s for pair in both),
            large_rate=min(pair.large_rate for pair in both),
            large_bytes=min(pair.large_bytes for pair in both),
        )
        for (first, second), both in sorted(sides.items())
    ]


class _Meter:
    """One worker's buffers and stopwatch."""

    def __init__(self, collective: Collective, device: torch.device, large_bytes: int, in_place: bool) -> None:
        self._collective = collective
        self._device = device
        self._large = collective.allocate(large_bytes, torch.uint8, device).zero_()
        self._landing = allocate(large_bytes, torch.uint8, device).zero_() if in_place else None

    def finish(self) -> None:
        """A GPU takes orders and answers at once; its clock stops when it has carried them out."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def pair(self, turn: int) -> Pair | None:
        """Every worker calls this: a transport may let nobody go before all have said that they send nothing."""
        rank = self._collective.rank
        peer = partner(rank, turn, self._collective.size)
        small_s = self._time(peer, SMALL_BYTES, _SMALL)
        wanted = torch.tensor([large_message(self._large.numel(), self._time(peer, _PROBE_BYTES, 1))])
        theirs = self._exchange(peer, wanted, (1, wanted.dtype, wanted.device))
        nbytes = min(int(wanted), self._large.numel() if theirs is None else int(theirs))
        large_s = self._time(peer, nbytes, _LARGE)
        if peer is None:
            return None
        first, second = sorted((rank, peer))
        return Pair(first=first, second=second, small_s=small_s, large_rate=nbytes / large_s, large_bytes=nbytes)

    def _time(self, peer: int | None, nbytes: int, times: int) -> float:
        message = self._large[:nbytes]

        def call() -> None:
            received = self._exchange(peer, message, (nbytes, torch.uint8, self._device))
            if received is not None and self._landing is not None:
                self._landing[:nbytes].copy_(received)

        return median_s(call, times=times, finish=self.finish)

    def _exchange(self, peer: int | None, message: Tensor, expected: Expected) -> Tensor | None:
        outgoing: list[list[Tensor]] = [[] for _ in range(self._collective.size)]
        incoming: list[list[Expected]] = [[] for _ in range(self._collective.size)]
        if peer is not None:
            outgoing[peer], incoming[peer] = [message], [expected]
        received = self._collective.exchange(outgoing, incoming, name="doctor")
        return None if peer is None else received[peer][0]


def copy_rate(collective: Collective, nbytes: int) -> float:
    """Bytes per second that the slowest worker copies within its own memory, with one thread, while all do so. *collective*"""
    source, target = (allocate(nbytes, torch.uint8, _CPU).zero_() for _ in range(2))
    collective.barrier()
    seconds = torch.tensor([median_s(lambda: target.copy_(source), times=5)], dtype=torch.float64)
    return nbytes / max(float(other) for other in collective.all_gather(seconds))


def clock_offsets(collective: Collective, clock: Callable[[], float] = time.time) -> list[float]:
    """By how many seconds each worker's clock is ahead of worker 0's. *collective*

    As NTP does it: messages both ways, of which the quickest count; what both ways have in common is the way, and half
    of what they differ by is the clocks.
    """
    ages = [float("inf")] * collective.size
    for _ in range(_CLOCK_ROUNDS):
        sent = collective.all_gather(torch.tensor([clock()], dtype=torch.float64))
        now_s = clock()
        ages = [min(age, now_s - float(then)) for age, then in zip(ages, sent, strict=True)]
    rows = collective.all_gather(torch.tensor(ages, dtype=torch.float64))
    return [(float(rows[rank][0]) - float(rows[0][rank])) / 2 for rank in range(collective.size)]


def median_s(call: Callable[[], object], *, times: int, finish: Callable[[], None] = lambda: None) -> float:
    """Median seconds of a call, after one that does not count: it pays for new memory and connections. *local*"""
    seconds: list[float] = []
    for _ in range(times + 1):
        began = time.perf_counter()
        call()
        finish()
        seconds.append(time.perf_counter() - began)
    return max(statistics.median(seconds[1:]), 1e-9)
