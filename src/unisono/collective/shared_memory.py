"""Workers in processes of one host: small messages over Unix sockets, large tensors read where they lie.

A worker allocates what it sends in anonymous shared memory (``memfd_create``) and hands the file descriptor to each other
worker once, over the socket. From then on a tensor in that memory is sent as a place: region, offset, size. Small tensors
travel in the packet itself.

Nothing has a name: neither the memory nor (beyond the moment of meeting) the sockets. So nothing is left behind however a
worker ends, a small ``/dev/shm`` does not matter, and nobody else can open anything. A worker that dies closes its sockets,
which the others notice at once.

A worker that waits burns no core, and nobody else has to run before it can go on, as Gloo's thread must: between two workers
that compute in between, 4 KB cost 61 microseconds against 906 (``benchmarks/message_latency.py``).
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import secrets
import select
import socket
import struct
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unisono.collective.base import PATIENCE_S, Collective, Expected, Lookout, LostWorker
from unisono.collective.regions import Memory, Region, make_file, mapped
from unisono.errors import WorkerFailure

Introduce = Callable[[bytes], list[bytes]]
"""*collective*. Gives every worker the byte strings of all, in order of rank (some other transport's all-gather)."""

_INLINE_BYTES = 16 * 1024
"""Tensors up to this size travel in the packet: copying them is cheaper than the page faults of new memory."""
_PACKET_BYTES = 128 * 1024
"""A packet holds at most this much (Linux refuses more than its socket buffer, 208 KiB by default)."""
_HEAD = struct.Struct("<QI")  # number of the exchange, tensors
_ENTRY = struct.Struct("<qQQ")  # region (or how it travels), offset, bytes
_INLINE, _ONE_SHOT = -1, -2
_DESCRIPTOR_SPACE = socket.CMSG_SPACE(64 * array.array("i").itemsize)
_LOOK_S = 50e-6
_MEETING_S = 20.0
_CHECK_S = 0.05


class _RegionExchange:
    """An exchange whose packets from the other workers may not all be here yet."""

    def __init__(self, owner: SharedMemory, number: int, kept: list[Tensor], incoming: Sequence[Sequence[Expected]]) -> None:
        self._owner = owner
        self._number = number
        self._kept = kept
        self._incoming = incoming

    def wait(self) -> list[list[Tensor]]:
        owner = self._owner
        return [
            self._kept if peer == owner.rank else owner.receive(peer, self._number, self._incoming[peer])
            for peer in range(owner.size)
        ]


class SharedMemory(Collective):
    """The collective between workers of one host, on the CPU. Made by ``meet``.

    Args:
        rank: This worker's number.
        sockets: A connected ``SOCK_SEQPACKET`` socket for each other worker, None for this one.
        timeout_s: How long this worker waits for another one.
        memory: This worker's memory, if it has been in touch with others before.

    Attributes:
        memory: Where this worker's tensors lie.
    """

    def __init__(
        self,
        rank: int,
        sockets: Sequence[socket.socket | None],
        *,
        timeout_s: float = PATIENCE_S,
        memory: Memory | None = None,
    ) -> None:
        self.rank = rank
        self.size = len(sockets)
        self._sockets = list(sockets)
        self._number = 0
        # With more workers than cores, whoever looks keeps others from working.
        self._look_s = _LOOK_S if self.size <= len(os.sched_getaffinity(0)) else 0.0
        self.memory = Memory() if memory is None else memory
        self._told: list[set[int]] = [set() for _ in sockets]  # regions whose descriptor each worker has
        self._seen: list[dict[int, Tensor]] = [{} for _ in sockets]  # other workers' regions, mapped here
        self._early: list[dict[int, tuple[bytearray, deque[int]]]] = [{} for _ in sockets]
        self.limit(timeout_s, self.lookout)
        _open.add(self)

    @classmethod
    def meet(
        cls,
        rank: int,
        size: int,
        introduce: Introduce,
        *,
        timeout_s: float = PATIENCE_S,
        memory: Memory | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> SharedMemory | str:
        """*collective*. Connects workers that all run on one host; else the same reason on all of them why it cannot be.

        Args:
            memory: As for the class.
            check: Called while this worker waits for another one; raises if that is in vain.
        """
        sockets: list[socket.socket | None] = [None] * size
        with contextlib.ExitStack() as undo:
            undo.callback(_close_all, sockets)
            problem = _connect(rank, sockets, introduce, check)
            problems = [text.decode() for text in introduce(problem.encode()) if text]
            if problems:
                return problems[0]
            undo.pop_all()
        return cls(rank, sockets, timeout_s=timeout_s, memory=memory)

    def limit(self, timeout_s: float, lookout: Lookout) -> None:
        super().limit(timeout_s, lookout)
        seconds = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
        for connection in filter(None, self._sockets):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)

    # ------------------------------------------------------------------ the interface

    @property
    def hosts(self) -> Sequence[Sequence[int]]:
        return [tuple(range(self.size))]

    def start_exchange(
        self, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Expected]], *, name: str = "exchange"
    ) -> _RegionExchange:
        self._number += 1
        for peer, tensors in enumerate(outgoing):
            if peer != self.rank:
                self._send(peer, tensors)
                self.bytes_sent += sum(tensor.nbytes for tensor in tensors)
        return _RegionExchange(self, self._number, list(outgoing[self.rank]), incoming)

    def publish(self, flat: Tensor, bounds: Sequence[tuple[int, int]]) -> None:
        if self.memory.is_common(flat):
            self.barrier()  # what the others wrote is here already, once they have written it
            return
        lo, hi = bounds[self.rank]
        mine = [flat[lo:hi]] if hi > lo else []
        expected = [[(hi - lo, flat.dtype, flat.device)] if hi > lo else [] for lo, hi in bounds]
        for peer, tensors in enumerate(self.exchange([mine] * self.size, expected)):
            if peer != self.rank and tensors:
                flat[slice(*bounds[peer])].copy_(tensors[0])
        self.barrier()  # the others have read this worker's part: it may change now

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        flat = tensor.view(-1)
        expected: list[Expected] = [(flat.numel(), flat.dtype, flat.device)]
        nothing: list[list[Expected]] = [[] for _ in range(self.size)]
        if self.rank == source:
            self.exchange([[flat]] * self.size, nothing)
        else:
            nothing[source] = expected
            flat.copy_(self.exchange([[] for _ in range(self.size)], nothing)[source][0])
        self.barrier()  # the source may change its tensor now

    def barrier(self) -> None:
        nobody: list[list[Tensor]] = [[] for _ in range(self.size)]
        self.exchange(nobody, [[] for _ in range(self.size)])

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type != "cpu" or numel * dtype.itemsize < _INLINE_BYTES:
            return super().allocate(numel, dtype, device)  # it travels in packets anyway
        return self.memory.allocate(numel * dtype.itemsize).view(dtype)

    def common(self, numel: int, dtype: torch.dtype, mine: Tensor | None = None) -> Tensor:
        nbytes = numel * dtype.itemsize
        have = None if mine is None else self.memory.common_descriptor(mine)
        descriptor = self._common_descriptor(have, lambda: make_file(nbytes))
        if mine is None or have is None:
            mine = self.memory.join(nbytes, descriptor).view(dtype)
        self.barrier()  # whoever made it may end now
        return mine

    def share(self, flat: Tensor) -> bool:
        if not self.memory.is_whole(flat):
            return False
        have = self.memory.common_descriptor(flat)
        descriptor = self._common_descriptor(have, lambda: make_file(flat.nbytes, flat))
        if have is None:
            self.memory.show(flat, descriptor)
        self.barrier()
        return True

    def unshare(self, flat: Tensor) -> None:
        self.memory.unshow(flat)

    def _common_descriptor(self, mine: int | None, make: Callable[[], int]) -> int:
        """*collective*. Hands the descriptor of common memory from the first worker that has one to those who have none; if
        nobody has one, worker 0 makes it."""
        holders = [bool(has) for has in self.all_gather(torch.tensor([mine is not None]))]
        source = holders.index(True) if any(holders) else 0
        needy = [peer for peer, has in enumerate(holders) if not has and peer != source]
        self.barrier()  # no packet is under way that could be taken for the next one
        if self.rank == source:
            descriptor = make() if mine is None else mine
            try:
                for peer in needy:
                    with self._contact(peer) as connection:
                        socket.send_fds(connection, [b"common"], [descriptor])
            except LostWorker:
                if mine is None:
                    os.close(descriptor)
                raise
            return descriptor
        if mine is not None:
            return mine
        with self._contact(source) as connection:
            _, descriptors, _, _ = socket.recv_fds(connection, 16, 1)
        if not descriptors:
            raise self._lost(source, "it closed its end")
        return descriptors[0]

    def close(self) -> None:
        for number, connection in enumerate(self._sockets):
            if connection is not None:
                connection.close()
                self._sockets[number] = None

    # ------------------------------------------------------------------ packets

    def _send(self, peer: int, tensors: Sequence[Tensor]) -> None:
        entries: list[bytes] = []
        inline: list[bytes] = []
        descriptors: list[int] = []
        spent: list[Region] = []
        room = _PACKET_BYTES
        for tensor in tensors:
            nbytes = tensor.nbytes
            region, offset = self.memory.place(tensor)
            if nbytes <= min(_INLINE_BYTES, room):
                room -= nbytes
                region, offset = _INLINE, 0
                inline.append(_raw(tensor))
            elif region is None:
                # Memory of its own for a large tensor from elsewhere: it is gone once the receiver is done with it.
                passing = Region.make(nbytes)
                passing.memory.copy_(tensor.reshape(-1).view(torch.uint8))
                spent.append(passing)
                descriptors.append(passing.fd)
                region, offset = _ONE_SHOT, 0
            elif region not in self._told[peer]:
                self._told[peer].add(region)
                descriptors.append(self.memory.descriptor(region))
            entries.append(_ENTRY.pack(region, offset, nbytes))
        packet = b"".join([_HEAD.pack(self._number, len(tensors)), *entries, *inline])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors).tobytes())] if descriptors else []
        with self._contact(peer) as connection:
            while True:
                try:
                    connection.sendmsg([packet], rights, socket.MSG_DONTWAIT)
                    break
                except BlockingIOError:
                    self._make_room(peer, connection)
        for passing in spent:
            os.close(passing.fd)

    def receive(self, peer: int, number: int, expected: Sequence[Expected]) -> list[Tensor]:
        """*local*. The tensors of exchange ``number`` from ``peer``; packets of later exchanges are kept for their turn."""
        early = self._early[peer]
        while number not in early:
            self._read(peer)
        packet, one_shots = early.pop(number)
        return self._unpack(peer, packet, one_shots, expected)

    def _read(self, peer: int) -> None:
        """Reads one packet; exchanges may be waited for in another order than they were started in."""
        with self._contact(peer) as connection:
            received = self._look(connection)
            if received is None:
                self.lookout.wait_for(peer)
                received = connection.recvmsg(2 * _PACKET_BYTES, _DESCRIPTOR_SPACE)
                self.lookout.wait_for(-1)
        packet, ancillary, _, _ = received
        if not packet:
            raise self._lost(peer, "it closed its end")
        descriptors: deque[int] = deque()
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.extend(array.array("i", data))
        number, entries = _entries(packet)
        one_shots: deque[int] = deque()
        for region, _, _ in entries:
            # Packets may be unpacked in another order than they came in, so regions are taken at once.
            if region == _ONE_SHOT:
                one_shots.append(descriptors.popleft())
            elif region != _INLINE and region not in self._seen[peer]:
                self._seen[peer][region] = mapped(descriptors.popleft(), None)
        self._early[peer][number] = (bytearray(packet), one_shots)

    def _look(self, connection: socket.socket) -> Any:
        """The next packet if it arrives at once: to be woken up costs as much as to look again for that long."""
        until = time.perf_counter() + self._look_s
        while True:
            try:
                return connection.recvmsg(2 * _PACKET_BYTES, _DESCRIPTOR_SPACE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if time.perf_counter() >= until:
                    return None

    def _make_room(self, peer: int, blocked: socket.socket) -> None:
        """Waits until ``blocked`` takes another packet, reading meanwhile: two workers that only send would wait for ever."""
        poll = select.poll()
        poll.register(blocked, select.POLLOUT)
        by_descriptor = {s.fileno(): peer for peer, s in enumerate(self._sockets) if s is not None}
        for descriptor in by_descriptor:
            poll.register(descriptor, select.POLLIN | (select.POLLOUT if descriptor == blocked.fileno() else 0))
        self.lookout.wait_for(peer)
        ready = poll.poll(1000 * self.timeout_s)
        if not ready:
            raise self.lookout.silence(self.rank, peer, self.timeout_s)
        self.lookout.wait_for(-1)
        for descriptor, events in ready:
            if events & (select.POLLIN | select.POLLHUP):
                self._read(by_descriptor[descriptor])

    def _unpack(self, peer: int, packet: bytearray, one_shots: deque[int], expected: Sequence[Expected]) -> list[Tensor]:
        _, entries = _entries(packet)
        sizes = [numel * dtype.itemsize for numel, dtype, _ in expected]
        if [nbytes for _, _, nbytes in entries] != sizes:
            raise WorkerFailure(
                f"worker {peer} sent {[nbytes for _, _, nbytes in entries]} bytes to worker {self.rank}, which expected {sizes}: "
                "the workers are not in the same step",
                rank=peer,
            )
        place = _HEAD.size + len(entries) * _ENTRY.size
        received: list[Tensor] = []
        for (region, offset, nbytes), (numel, dtype, device) in zip(entries, expected, strict=True):
            if region == _INLINE:
                tensor = torch.empty(numel, dtype=dtype, device=device)
                if nbytes:
                    tensor.view(torch.uint8).copy_(torch.frombuffer(packet, dtype=torch.uint8, count=nbytes, offset=place))
                place += nbytes
            elif region == _ONE_SHOT:
                tensor = mapped(one_shots.popleft(), nbytes).view(dtype)
            else:
                tensor = self._seen[peer][region][offset : offset + nbytes].view(dtype)
            received.append(tensor)
        return received

    @contextlib.contextmanager
    def _contact(self, peer: int) -> Iterator[socket.socket]:
        connection = self._sockets[peer]
        if connection is None:
            raise self._lost(peer, "this worker has left")
        try:
            yield connection
        except BlockingIOError:  # a wait has reached its limit
            raise self.lookout.silence(self.rank, peer, self.timeout_s) from None
        except OSError as error:
            raise self._lost(peer, str(error)) from error

    def _lost(self, peer: int, why: str) -> LostWorker:
        return LostWorker(
            f"worker {self.rank} lost contact with worker {peer} ({why}); look for that worker's own error", rank=peer
        )


def _connect(rank: int, sockets: list[socket.socket | None], introduce: Introduce, check: Callable[[], None]) -> str:
    """*collective*. Connects this worker with all others; why that could not be, or ""."""
    problem = ""
    with contextlib.ExitStack() as end:
        try:
            listener = end.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            token = f"\0unisono-{secrets.token_hex(16)}"
            listener.bind(token)
            listener.listen(len(sockets))
            listener.settimeout(_CHECK_S)
            mine = f"{host_identity()}{token}"
        except (OSError, AttributeError) as error:
            problem, mine = str(error) or "no sockets", "!"
        hellos = [text.decode() for text in introduce(mine.encode())]
        machines = {hello.partition("\0")[0] for hello in hellos}
        if len(machines) != 1 or "!" in machines:
            return problem or "the workers run on several hosts"
        try:
            _connect_all(rank, [hello[hello.index("\0") :] for hello in hellos], listener, sockets, check)
            os.close(Region.make(mmap.PAGESIZE).fd)  # whether there is such memory at all
        except (OSError, AttributeError) as error:
            problem = str(error) or type(error).__name__
    return problem


def _close_all(sockets: Sequence[socket.socket | None]) -> None:
    for connection in filter(None, sockets):
        connection.close()


def _connect_all(
    rank: int,
    addresses: Sequence[str],
    listener: socket.socket,
    sockets: list[socket.socket | None],
    check: Callable[[], None],
) -> None:
    """Every pair of workers gets a connection: the higher rank calls, and says who it is."""
    for peer in range(rank):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sockets[peer] = connection
        connection.settimeout(_MEETING_S)
        connection.connect(addresses[peer])
        connection.send(struct.pack("<I", rank))
    for _ in range(rank + 1, len(addresses)):
        connection = _accept(listener, check)
        connection.settimeout(_MEETING_S)
        _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        if user != os.getuid():
            connection.close()
            raise PermissionError(f"user {user} tried to take part")
        caller = connection.recv(4)
        if len(caller) < 4:
            raise ConnectionError("a worker that connected has gone again")
        sockets[struct.unpack("<I", caller)[0]] = connection
    for connected in filter(None, sockets):
        connected.settimeout(None)


def _accept(listener: socket.socket, check: Callable[[], None]) -> socket.socket:
    until = time.monotonic() + _MEETING_S
    while True:
        try:
            return listener.accept()[0]
        except TimeoutError:
            check()
            if time.monotonic() > until:
                raise


def host_identity() -> str:
    """*local*. What workers have in common that can share memory: the machine since its last start, the network namespace
    (abstract sockets are seen in their own only), and the user, as a number and in what namespace.

    Raises:
        OSError: The machine cannot be told from others.
    """
    parts = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(os.getuid())]
    for namespace in ("net", "user"):
        with contextlib.suppress(OSError):  # a kernel without namespaces
            parts.append(str(Path(f"/proc/self/ns/{namespace}").readlink()))
    return " ".join(parts)


def _entries(packet: bytes | bytearray) -> tuple[int, list[tuple[int, int, int]]]:
    """Number of the exchange; and region, offset and bytes of each tensor."""
    number, count = _HEAD.unpack_from(packet)
    return number, [_ENTRY.unpack_from(packet, _HEAD.size + place * _ENTRY.size) for place in range(count)]


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


_open: weakref.WeakSet[SharedMemory] = weakref.WeakSet()


def _let_go() -> None:
    """A forked loader process would keep the sockets open after this worker's death."""
    for collective in list(_open):
        collective.close()


os.register_at_fork(after_in_child=_let_go)  # once: what is registered stays for good
