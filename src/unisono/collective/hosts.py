"""Which worker stands in for which, between hosts of several workers. Everything here is *local*."""

from __future__ import annotations

from collections.abc import Sequence

from unisono.collective.base import Collective

Host = tuple[int, ...]
"""The ranks of one host's workers, in order."""


class HostMap:
    """The workers by host, as one of them sees them.

    What concerns a worker passes between its host and another one through its *relay* there alone, so that it crosses the
    wire once. The relay has the same place on its host, modulo the number of workers there: so every worker is a relay of
    about equally many.

    Args:
        groups: The ranks of each host.
        rank: This worker.

    Attributes:
        groups: The ranks of each host.
        near: This worker's own host.
        clients: The workers of other hosts whose relay this one is, in order of rank.
        relays: This worker's relay on each other host.
    """

    def __init__(self, groups: Sequence[Sequence[int]], rank: int) -> None:
        self.groups: tuple[Host, ...] = tuple(map(tuple, groups))
        self._host_of = {worker: host for host in self.groups for worker in host}
        self.near = self._host_of[rank]
        self.clients = self.clients_of(rank)
        self.relays = [self.relay(rank, host) for host in self.groups if host != self.near]

    @property
    def two_levels(self) -> bool:
        """Whether there are several hosts, one of them with several workers."""
        return 1 < len(self.groups) < len(self._host_of)

    def of(self, worker: int) -> Host:
        """The host of a worker."""
        return self._host_of[worker]

    def relay(self, worker: int, host: Host) -> int:
        """Who stands in for ``worker`` on ``host``: on its own host, itself."""
        return worker if worker in host else host[self.of(worker).index(worker) % len(host)]

    def clients_of(self, relay: int) -> list[int]:
        """The workers of other hosts for whom ``relay`` stands in."""
        host = self.of(relay)
        return [worker for worker in self._host_of if worker not in host and self.relay(worker, host) == relay]


def host_sizes(collective: Collective) -> tuple[int, ...]:
    """*local*. The number of workers of each host, where ranges of hosts matter, since pieces travel in two levels; else
    nothing."""
    hosts = HostMap(collective.hosts, collective.rank)
    return tuple(map(len, hosts.groups)) if hosts.two_levels else ()
