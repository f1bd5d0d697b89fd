"""Workers on several hosts, several on a host: shared memory inside a host, torch.distributed between hosts.

What goes to one worker of another host goes there directly. What goes to all of them goes to one, its sender's relay
there, who passes it on through shared memory: it crosses the wire once, and a worker sends one message to a host instead of
one to each of its workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unisono.collective.base import Collective, Expected, Lookout, Pending
from unisono.collective.hosts import HostMap
from unisono.collective.regions import Memory
from unisono.collective.shared_memory import SharedMemory, host_identity
from unisono.collective.torch_distributed import TorchDistributed
from unisono.errors import WorkerFailure


class _HierarchicalExchange:
    """An exchange in two parts, one on each transport."""

    def __init__(self, near: Sequence[int], local: Pending, wide: Pending) -> None:
        self._near = near
        self._local = local
        self._wide = wide

    def wait(self) -> list[list[Tensor]]:
        local = self._local.wait()
        received = self._wide.wait()
        for peer, tensors in zip(self._near, local, strict=True):
            received[peer] = tensors
        return received


class _Near(Lookout):
    """The lookout of all workers, told of those of this host by their numbers there.

    Args:
        lookout: Knows all workers.
        near: The ranks of this host's.
    """

    def __init__(self, lookout: Lookout, near: Sequence[int]) -> None:
        self._lookout = lookout
        self._near = near

    def wait_for(self, peer: int) -> None:
        self._lookout.wait_for(self._near[peer] if peer >= 0 else peer)

    def silence(self, rank: int, peer: int, timeout_s: float) -> WorkerFailure:
        return self._lookout.silence(self._near[rank], self._near[peer], timeout_s)


class Hierarchical(Collective):
    """The collective of workers on several hosts, on the CPU. Made by ``come_near``.

    Args:
        wide: Connects all workers.
        local: Connects those of this worker's host, in order of rank.
        groups: The ranks of each host, contiguous.
    """

    def __init__(self, wide: TorchDistributed, local: SharedMemory, groups: Sequence[Sequence[int]]) -> None:
        self.rank = wide.rank
        self.size = wide.size
        self._wide = wide
        self._local = local
        self._hosts = HostMap(groups, wide.rank)
        self._common: set[int] = set()  # addresses of memory that the workers of this host share

    def limit(self, timeout_s: float, lookout: Lookout) -> None:
        super().limit(timeout_s, lookout)
        self._wide.limit(timeout_s, lookout)
        self._local.limit(timeout_s, _Near(lookout, self._hosts.near))

    @property
    def hosts(self) -> Sequence[Sequence[int]]:
        return self._hosts.groups

    def start_exchange(
        self, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Expected]], *, name: str = "exchange"
    ) -> _HierarchicalExchange:
        near = self._hosts.near
        local = self._local.start_exchange([outgoing[peer] for peer in near], [incoming[peer] for peer in near], name=name)
        wide = self._wide.start_exchange(
            [() if peer in near else tensors for peer, tensors in enumerate(outgoing)],
            [() if peer in near else expected for peer, expected in enumerate(incoming)],
            name=name,
        )
        self._count()
        return _HierarchicalExchange(near, local, wide)

    def all_gather_lists(self, tensors: Sequence[Tensor], expected: Sequence[Sequence[Expected]]) -> list[list[Tensor]]:
        hosts, everybody = self._hosts, range(self.size)
        arrived = self._wide.exchange(
            [tensors if peer in hosts.relays else () for peer in everybody],
            [expected[peer] if peer in hosts.clients else () for peer in everybody],
            name="all gather",
        )
        brought = [[peer, *hosts.clients_of(peer)] for peer in hosts.near]
        passed = self._local.exchange(
            [[*tensors, *(tensor for client in hosts.clients for tensor in arrived[client])]] * len(hosts.near),
            [[what for worker in workers for what in expected[worker]] for workers in brought],
        )
        self._count()
        gathered: dict[int, list[Tensor]] = {}
        for workers, stream in zip(brought, map(iter, passed), strict=True):
            for worker in workers:
                gathered[worker] = [next(stream) for _ in expected[worker]]
        return [gathered[peer] for peer in everybody]

    def publish(self, flat: Tensor, bounds: Sequence[tuple[int, int]]) -> None:
        hosts = self._hosts
        if all(_is_all([bounds[worker] for worker in host], bounds) for host in hosts.groups):
            # Each host has all of it among its workers. What came from another one could overwrite memory that a worker of
            # this host has still to update.
            self._local.publish(flat, [bounds[peer] for peer in hosts.near])
            self._count()
            return
        parts = [flat[lo:hi] for lo, hi in bounds]
        self._wide.transfer([(peer, parts[self.rank]) for peer in hosts.relays], [(peer, parts[peer]) for peer in hosts.clients])
        if flat.data_ptr() not in self._common:
            brought = [
                [parts[worker] for worker in [peer, *hosts.clients_of(peer)] if parts[worker].numel()] for peer in hosts.near
            ]
            passed = self._local.exchange(
                [brought[self._local.rank]] * len(hosts.near),
                [[(part.numel(), part.dtype, part.device) for part in theirs] for theirs in brought],
            )
            for peer, tensors in enumerate(passed):
                if peer != self._local.rank:
                    for part, tensor in zip(brought[peer], tensors, strict=True):
                        part.copy_(tensor)
        self._local.barrier()  # everything is here, and the others have read what this worker brought
        self._count()

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        hosts = self._hosts
        data = tensor.view(-1).view(torch.uint8)
        if self.rank == source:
            self._wide.transfer([(peer, data) for peer in hosts.relays], [])
        elif source in hosts.clients:
            self._wide.transfer([], [(source, data)])
        self._local.broadcast(tensor, hosts.near.index(hosts.relay(source, hosts.near)))
        self._count()

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._local.allocate(numel, dtype, device)

    def common(self, numel: int, dtype: torch.dtype, mine: Tensor | None = None) -> Tensor | None:
        return self._local.common(numel, dtype, mine)

    def share(self, flat: Tensor) -> bool:
        shared = self._local.share(flat)
        if shared:
            self._common.add(flat.data_ptr())
        return shared

    def unshare(self, flat: Tensor) -> None:
        self._local.unshare(flat)
        self._common.discard(flat.data_ptr())

    def close(self) -> None:
        self._local.close()
        self._wide.close()

    def _count(self) -> None:
        self.bytes_sent = self._local.bytes_sent + self._wide.bytes_sent


def _is_all(parts: Sequence[tuple[int, int]], bounds: Sequence[tuple[int, int]]) -> bool:
    """Whether these parts leave out nothing of what lies in any of ``bounds``."""
    end = min(lo for lo, _ in bounds)
    for lo, hi in sorted(parts):
        if lo > end:
            return False
        end = max(end, hi)
    return end == max(hi for _, hi in bounds)


def come_near(
    wide: TorchDistributed,
    *,
    host: str | None = None,
    memory: Memory | None = None,
    check: Callable[[], None] = lambda: None,
) -> Collective | str:
    """*collective*. The fastest transport on the CPU between the workers of ``wide``: shared memory on one host, both on
    several of which some have several workers, ``wide`` itself where each has one.

    Args:
        host: What this worker's host is called; workers that say the same must be able to share memory. None: what the
            operating system says.
        memory: This worker's memory, if it has been in touch with others before.
        check: Called while this worker waits for another one of its host; raises if that is in vain.

    Returns:
        The transport, or the same reason on all workers why workers of a host cannot share memory.
    """
    try:
        mine = host_identity() if host is None else host
    except OSError:
        mine = ""
    names = [text.decode() for text in wide.all_gather_bytes(mine.encode())]
    if not all(names):
        return f"worker {names.index('')} cannot tell which machine it is on, since /proc cannot be read"
    by_name: dict[str, list[int]] = {}
    for rank, name in enumerate(names):
        by_name.setdefault(name, []).append(rank)
    groups = list(by_name.values())
    if len(groups) == wide.size:
        return wide
    for ranks in groups:
        if ranks[-1] - ranks[0] >= len(ranks):
            return (
                f"the workers of one host have the numbers {', '.join(map(str, ranks))}; number those of a host one after another"
            )
    near = by_name[names[wide.rank]]

    def introduce(data: bytes) -> list[bytes]:
        everybodys = wide.all_gather_bytes(data)
        return [everybodys[rank] for rank in near]

    local = SharedMemory.meet(near.index(wide.rank), len(near), introduce, memory=memory, check=check)
    problems = [text.decode() for text in wide.all_gather_bytes(local.encode() if isinstance(local, str) else b"") if text]
    if isinstance(local, str) or problems:
        if not isinstance(local, str):
            local.close()
        return problems[0]
    return local if len(groups) == 1 else Hierarchical(wide, local, groups)
