"""Pieces on their way between hosts of several workers, so that a host sends each sum once.

Inside a host, pieces go to the owner of the segment or, for an owner on another host, to its relay on this one. The relay
adds up the pieces of its host's workers along the tree as far as they go: to the host's own pieces, the maximal nodes in the
range of microbatches of all its workers. These alone cross the wire, to the owner. It is the same tree, so it is the same
sum.

A relay writes to its own pieces where it may: nobody else reads them in the segments of its clients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unisono.collective import Collective, Expected, Pending
from unisono.collective.hosts import HostMap
from unisono.layout import allocate
from unisono.sync.finish import node_sums
from unisono.sync.fold import real
from unisono.tree import Span, pieces

Part = tuple[int, int]
"""Elements ``lo <= i < hi`` of a block."""


class TwoLevels:
    """Brings the pieces of all workers to those who finish the tree. *Collective* as a whole.

    Args:
        hosts: The workers by host, several of them on one.
        spans: Each worker's pieces.
        microbatches: M.
        own_changes: Whether nobody else reads own pieces in the elements that this worker or its clients update.

    Attributes:
        arriving: What comes here from each worker: its own pieces from one of this host, the pieces of its host from a
            relay, nothing from others.
    """

    def __init__(
        self, collective: Collective, hosts: HostMap, spans: Sequence[Sequence[Span]], microbatches: int, *, own_changes: bool
    ) -> None:
        self.collective = collective
        self.hosts = hosts
        self._microbatches = microbatches
        self._owner = hosts.near.index(collective.rank) if own_changes else None
        self.reassign(spans)
        self._filled = 0
        self._inside: _Journey | None = None
        self._scratch: dict[tuple[str, Part, int], Tensor] = {}

    def reassign(self, spans: Sequence[Sequence[Span]]) -> None:
        """*local*. From the next step on these are the pieces of each worker."""
        hosts = self.hosts
        self._near = tuple(tuple(spans[peer]) for peer in hosts.near)
        of_host = {host: pieces(spans[host[0]][0][0], spans[host[-1]][-1][1], self._microbatches) for host in hosts.groups}
        self._whole = of_host[hosts.near]
        self.arriving: list[Sequence[Span]] = [
            spans[worker] if worker in hosts.near else of_host[hosts.of(worker)] if worker in hosts.relays else ()
            for worker in range(self.collective.size)
        ]

    def begin(self, filled: int) -> None:
        """*local*. A step in which microbatches ``0 <= m < filled`` hold samples; forgets what is left of another one."""
        self._filled = filled
        self._inside = None

    def start(
        self, flats: Sequence[Tensor], wanted: Sequence[Part], kind: tuple[torch.dtype, torch.device], name: str
    ) -> Pending:
        """*collective*. Sends pieces inside the host, and what was started before on to other hosts. Memory must be left alone
        until all workers have waited for what is sent.

        Args:
            flats: The block's elements in each of this worker's pieces that is present.
            wanted: The elements that each worker updates.
            kind: The block's dtype and device.
            name: Of the exchange.
        """
        journey = _Journey(self, flats, wanted, kind, name)
        self.forward()
        self._inside = journey
        return journey

    def forward(self) -> None:
        """*collective*. Waits for the pieces of this host's workers, and sends host pieces on their way."""
        if self._inside is not None:
            self._inside.forward()
            self._inside = None

    def present(self, worker: int) -> int:
        """*local*. How many of the pieces that come from ``worker`` hold samples."""
        return sum(span[0] < self._filled for span in self.arriving[worker])

    def fold(self, memory: list[Tensor], name: str, part: Part) -> list[Tensor]:
        """*local*. The host's pieces that hold samples, from those of its workers, in some elements."""
        plan = node_sums(self._near, self._microbatches, self._filled, self._owner, self._whole)
        for left, right, out in plan.additions:
            if out == len(memory):
                memory.append(self._room((name, part, out), memory[left]))
            torch.add(real(memory[left]), real(memory[right]), out=real(memory[out]))
        return [memory[number] for number in plan.nodes if number is not None]

    def _room(self, key: tuple[str, Part, int], like: Tensor) -> Tensor:
        if key not in self._scratch:
            self._scratch[key] = allocate(like.numel(), like.dtype, like.device)
        return self._scratch[key]


class _Journey:
    """One block's pieces, or a bucket's: first inside the host, then between hosts."""

    def __init__(
        self,
        levels: TwoLevels,
        flats: Sequence[Tensor],
        wanted: Sequence[Part],
        kind: tuple[torch.dtype, torch.device],
        name: str,
    ) -> None:
        self._levels = levels
        self._flats = flats
        self._wanted = wanted
        self._kind = kind
        self._name = name
        rank, near = levels.collective.rank, levels.hosts.near
        outgoing: list[list[Tensor]] = [[] for _ in wanted]
        incoming: list[list[Expected]] = [[] for _ in wanted]
        for peer in near:
            if peer != rank:
                outgoing[peer] = [flat[lo:hi] for lo, hi in self._parts(peer) for flat in flats]
                incoming[peer] = [(hi - lo, *kind) for lo, hi in self._parts(rank) for _ in range(levels.present(peer))]
        self._inside = levels.collective.start_exchange(outgoing, incoming, name=f"{name}, inside")
        self._local: list[list[Tensor]] = []
        self._across: Pending | None = None

    def forward(self) -> None:
        levels, wanted = self._levels, self._wanted
        hosts, rank = levels.hosts, levels.collective.rank
        self._local = self._inside.wait()
        folded = {part: self._folded(part) for part in dict.fromkeys(wanted[client] for client in hosts.clients)}
        lo, hi = wanted[rank]
        self._across = levels.collective.start_exchange(
            [folded[wanted[peer]] if peer in hosts.clients else [] for peer in range(len(wanted))],
            [
                [(hi - lo, *self._kind)] * levels.present(peer) if peer in hosts.relays and hi > lo else []
                for peer in range(len(wanted))
            ],
            name=f"{self._name}, across",
        )

    def wait(self) -> list[list[Tensor]]:
        self._levels.forward()  # does nothing if this has been sent on already
        assert self._across is not None
        received = self._across.wait()
        rank = self._levels.collective.rank
        for peer in self._levels.hosts.near:
            received[peer] = [] if peer == rank else self._of(peer, self._wanted[rank])
        return received

    def _parts(self, worker: int) -> list[Part]:
        """The elements that ``worker`` needs of the pieces of its host: its own, and those of its clients."""
        users = [worker, *self._levels.hosts.clients_of(worker)]
        return list(dict.fromkeys(part for part in (self._wanted[user] for user in users) if part[1] > part[0]))

    def _of(self, peer: int, part: Part) -> list[Tensor]:
        """The pieces of ``peer``, a worker of this host, in these elements."""
        rank = self._levels.collective.rank
        if part[1] <= part[0]:
            return []
        if peer == rank:
            return [flat[part[0] : part[1]] for flat in self._flats]
        count = self._levels.present(peer)
        start = count * self._parts(rank).index(part)
        return self._local[peer][start : start + count]

    def _folded(self, part: Part) -> list[Tensor]:
        if part[1] <= part[0]:
            return []
        memory = [tensor for peer in self._levels.hosts.near for tensor in self._of(peer, part)]
        return self._levels.fold(memory, self._name, part)
