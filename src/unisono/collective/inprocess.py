"""Workers in one process: a single one, or threads that take turns.

Threads pass a baton: exactly one runs at any time and hands over only while it waits in a collective, so that process-wide
state (random number generators, thread counts, flags) is as much its own as it would be in a process of its own. Nothing is
copied: a worker sees the memory of the others.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unisono.collective.base import Collective, Expected, LostWorker
from unisono.errors import WorkerFailure


class Meeting:
    """What the threads of one world share: the baton, and what each has brought to each collective call.

    Args:
        size: Number of workers.
        timeout_s: How long a worker waits for the others before it gives up.
        baton: Whose holder runs; None: one of its own.
    """

    def __init__(self, size: int, *, timeout_s: float = 60.0, baton: threading.Condition | None = None) -> None:
        self.size = size
        self.timeout_s = timeout_s
        self.baton = baton or threading.Condition()
        self._calls: dict[int, list[Any]] = {}
        self._left: dict[int, int] = {}
        self._gone: int | None = None

    def meet(self, rank: int, call: int, brought: Any) -> list[Any]:
        """*collective*. Waits until every worker has brought something to its call number ``call``; all of it, by rank."""
        if self.size == 1:
            return [brought]
        table = self.bring(rank, call, brought)
        here = self.baton.wait_for(lambda: self._gone is not None or self.has_all(rank, call), timeout=self.timeout_s)
        if not self.has_all(rank, call):
            raise LostWorker(
                f"worker {self._gone} ended while worker {rank} was waiting for it"
                if here
                else f"worker {rank} waited {self.timeout_s} s for worker {table.index(None)}, which did not arrive",
                rank=self._gone if here else table.index(None),
            )
        self._left[call] = self._left.get(call, 0) + 1
        if self._left[call] == self.size:
            del self._calls[call], self._left[call]
        return [entry[0] for entry in table]

    def bring(self, rank: int, call: int, brought: Any) -> list[Any]:
        """*local*. Brings something to a call without waiting for the others: what has been brought so far."""
        table = self._calls.setdefault(call, [None] * self.size)
        table[rank] = (brought,)
        self.baton.notify_all()
        return table

    def has_all(self, rank: int, call: int) -> bool:
        """*local*. Whether everything that the workers bring to a call has reached worker ``rank``."""
        return all(self._calls[call])

    def leave(self, rank: int) -> None:
        """*local*. Wakes the others, who cannot meet any more."""
        with self.baton:
            if self._gone is None:
                self._gone = rank
            self.baton.notify_all()


def _described(tensors: Sequence[Tensor]) -> list[Expected]:
    return [(tensor.numel(), tensor.dtype, tensor.device) for tensor in tensors]


class _Arrived:
    def __init__(self, tensors: list[list[Tensor]]) -> None:
        self._tensors = tensors

    def wait(self) -> list[list[Tensor]]:
        return self._tensors


class InProcess(Collective):
    """The collective of one worker of a ``Meeting``, whose time limit holds; without arguments, of a worker that is alone."""

    apart = False

    def __init__(self, meeting: Meeting | None = None, rank: int = 0) -> None:
        self._meeting = meeting or Meeting(1)
        self.rank = rank
        self.size = self._meeting.size
        self._call = 0

    @property
    def hosts(self) -> Sequence[Sequence[int]]:
        return [tuple(range(self.size))]

    def _meet(self, brought: Any) -> list[Any]:
        self._call += 1
        return self._meeting.meet(self.rank, self._call, brought)

    def start_exchange(
        self, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Expected]], *, name: str = "exchange"
    ) -> _Arrived:
        self.bytes_sent += sum(t.nbytes for peer, tensors in enumerate(outgoing) if peer != self.rank for t in tensors)
        arrived = [list(sent[self.rank]) for sent in self._meet(outgoing)]
        for peer, (tensors, expected) in enumerate(zip(arrived, incoming, strict=True)):
            if peer != self.rank and _described(tensors) != list(expected):
                raise WorkerFailure(
                    f"worker {peer} sent {_described(tensors)} to worker {self.rank}, which expected "
                    f"{list(expected)}: the workers are not in the same step",
                    rank=peer,
                )
        return _Arrived(arrived)

    def publish(self, flat: Tensor, bounds: Sequence[tuple[int, int]]) -> None:
        if self.size == 1:
            return
        lo, hi = bounds[self.rank]
        self.bytes_sent += (hi - lo) * flat.element_size() * (self.size - 1)
        for peer, other in enumerate(self._meet(flat)):
            if peer != self.rank:
                lo, hi = bounds[peer]
                flat[lo:hi].copy_(other[lo:hi])
        # The others read this worker's segment: it may change only after all have.
        self._meet(None)

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        if self.size == 1:
            return
        if self.rank == source:
            self.bytes_sent += tensor.nbytes * (self.size - 1)
        others = self._meet(tensor)
        if self.rank != source:
            tensor.copy_(others[source])
        self._meet(None)

    def common(self, numel: int, dtype: torch.dtype, mine: Tensor | None = None) -> Tensor:
        have = self._meet(mine)
        made = self._meet(torch.zeros(numel, dtype=dtype) if self.rank == 0 and all(one is None for one in have) else None)
        found: Tensor = next(one for one in [*have, *made] if one is not None)
        return found

    def close(self) -> None:
        self._meeting.leave(self.rank)
