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
import ctypes
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

from unisono.collective.base import PATIENCE_S, Collective, Expected, Lookout
from unisono.errors import WorkerFailure

Introduce = Callable[[bytes], list[bytes]]
"""*collective*. Gives every worker the byte strings of all, in order of rank (some other transport's all-gather)."""

_INLINE_BYTES = 16 * 1024
"""Tensors up to this size travel in the packet: copying them is cheaper than the page faults of new memory."""
_PACKET_BYTES = 128 * 1024
"""A packet holds at most this much (Linux refuses more than its socket buffer, 208 KiB by default)."""
_REGION_BYTES = _INLINE_BYTES
"""Smaller allocations stay private: they travel in packets anyway."""
_HEAD = struct.Struct("<QI")  # number of the exchange, tensors
_ENTRY = struct.Struct("<qQQ")  # region (or how it travels), offset, bytes
_INLINE, _ONE_SHOT = -1, -2
_DESCRIPTOR_SPACE = socket.CMSG_SPACE(64 * array.array("i").itemsize)
_LOOK_S = 50e-6
_MAP_FIXED = 0x10  # mman.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


class _Region:
    """A stretch of shared memory, mapped by this process. Its pages are made when they are first touched: of a gradient, this
    worker's own part never is."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self.fd = fd
        self.nbytes = nbytes
        self._map = mmap.mmap(fd, nbytes)
        self.memory = torch.frombuffer(self._map, dtype=torch.uint8)

    @classmethod
    def make(cls, nbytes: int) -> _Region:
        fd = os.memfd_create("unisono", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, nbytes)
            return cls(fd, nbytes)
        except BaseException:
            os.close(fd)
            raise

    def show(self, fd: int) -> None:
        """From now on this region's addresses show the memory of ``fd``, which has the same size."""
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
        address = self.memory.data_ptr()
        if _libc.mmap(address, self.nbytes, protection, flags, fd, 0) != address:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class _Exchange:
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
    """

    def __init__(self, rank: int, sockets: Sequence[socket.socket | None], *, timeout_s: float = PATIENCE_S) -> None:
        self.rank = rank
        self.size = len(sockets)
        self._sockets = list(sockets)
        self._number = 0
        # With more workers than cores, whoever looks keeps others from working.
        self._look_s = _LOOK_S if self.size <= len(os.sched_getaffinity(0)) else 0.0
        self._regions: dict[int, _Region] = {}
        self._starts: list[tuple[int, int, int]] = []  # (address, bytes, region) of own memory
        self._shared: set[int] = set()  # addresses of own regions that show the host's common memory
        self._told: list[set[int]] = [set() for _ in sockets]  # regions whose descriptor each worker has
        self._seen: list[dict[int, Tensor]] = [{} for _ in sockets]  # other workers' regions, mapped here
        self._early: list[dict[int, tuple[bytearray, deque[int]]]] = [{} for _ in sockets]
        self.limit(timeout_s, self.lookout)
        # A forked loader process would keep the sockets open after this worker's death.
        myself = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _let_go(myself))

    @classmethod
    def meet(cls, rank: int, size: int, introduce: Introduce, *, timeout_s: float = PATIENCE_S) -> SharedMemory | str:
        """*collective*. Connects workers that all run on one host; else the same reason on all of them why it cannot be."""
        sockets: list[socket.socket | None] = [None] * size
        problem = ""
        listener: socket.socket | None = None
        try:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            token = f"\0unisono-{secrets.token_hex(16)}"
            listener.bind(token)
            listener.listen(size)
            listener.settimeout(20)
            mine = f"{host_identity()}{token}"
        except (OSError, AttributeError) as error:
            problem, mine = str(error) or "no sockets", "!"
        hellos = [text.decode() for text in introduce(mine.encode())]
        machines = {hello.partition("\0")[0] for hello in hellos}
        if len(machines) != 1 or "!" in machines:
            problem = problem or "the workers run on several hosts"
        elif listener is not None:
            try:
                _connect_all(rank, [hello[hello.index("\0") :] for hello in hellos], listener, sockets)
                os.close(_Region.make(mmap.PAGESIZE).fd)  # whether there is such memory at all
            except (OSError, AttributeError) as error:
                problem = str(error) or type(error).__name__
        if listener is not None:
            listener.close()
        problems = [text.decode() for text in introduce(problem.encode()) if text]
        if problems:
            for connection in filter(None, sockets):
                connection.close()
            return problems[0]
        return cls(rank, sockets, timeout_s=timeout_s)

    def limit(self, timeout_s: float, lookout: Lookout) -> None:
        super().limit(timeout_s, lookout)
        seconds = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
        for connection in filter(None, self._sockets):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)

    # ------------------------------------------------------------------ the interface

    def start_exchange(
        self, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Expected]], *, name: str = "exchange"
    ) -> _Exchange:
        self._number += 1
        for peer, tensors in enumerate(outgoing):
            if peer != self.rank:
                self._send(peer, tensors)
                self.bytes_sent += sum(tensor.nbytes for tensor in tensors)
        return _Exchange(self, self._number, list(outgoing[self.rank]), incoming)

    def publish(self, flat: Tensor, bounds: Sequence[tuple[int, int]]) -> None:
        if flat.data_ptr() in self._shared:
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
        nbytes = numel * dtype.itemsize
        if device.type != "cpu" or nbytes < _REGION_BYTES:
            return super().allocate(numel, dtype, device)
        region = _Region.make(nbytes)
        number = len(self._regions)
        self._regions[number] = region
        self._starts.append((region.memory.data_ptr(), nbytes, number))
        return region.memory.view(dtype)

    def share(self, flat: Tensor) -> bool:
        number, offset = self._place(flat)
        if number is None or offset or self._regions[number].nbytes != flat.nbytes:
            return False
        region = self._regions[number]
        self.barrier()  # no packet is under way that could be taken for the next one
        if self.rank == 0:
            common = _Region.make(region.nbytes)
            common.memory.copy_(region.memory)
            fd = common.fd
            for peer in range(1, self.size):
                with self._contact(peer) as connection:
                    socket.send_fds(connection, [b"share"], [fd])
        else:
            with self._contact(0) as connection:
                _, descriptors, _, _ = socket.recv_fds(connection, 16, 1)
            if not descriptors:
                raise self._lost(0, "it closed its end")
            fd = descriptors[0]
        region.show(fd)
        os.close(fd)
        os.ftruncate(region.fd, 0)  # the memory that nobody sees now
        self._shared.add(flat.data_ptr())
        return True

    def unshare(self, flat: Tensor) -> None:
        if flat.data_ptr() not in self._shared:
            return
        region = self._regions[self._place(flat)[0] or 0]
        os.ftruncate(region.fd, region.nbytes)
        mine = mmap.mmap(region.fd, region.nbytes)
        torch.frombuffer(mine, dtype=torch.uint8).copy_(region.memory)
        region.show(region.fd)
        self._shared.discard(flat.data_ptr())

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
        spent: list[_Region] = []
        room = _PACKET_BYTES
        for tensor in tensors:
            nbytes = tensor.nbytes
            region, offset = self._place(tensor)
            if nbytes <= min(_INLINE_BYTES, room):
                room -= nbytes
                region, offset = _INLINE, 0
                inline.append(_raw(tensor))
            elif region is None:
                # Memory of its own for a large tensor from elsewhere: it is gone once the receiver is done with it.
                passing = _Region.make(nbytes)
                passing.memory.copy_(tensor.reshape(-1).view(torch.uint8))
                spent.append(passing)
                descriptors.append(passing.fd)
                region, offset = _ONE_SHOT, 0
            elif region not in self._told[peer]:
                self._told[peer].add(region)
                descriptors.append(self._regions[region].fd)
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
                self._seen[peer][region] = _mapped(descriptors.popleft(), None)
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
                tensor = _mapped(one_shots.popleft(), nbytes).view(dtype)
            else:
                tensor = self._seen[peer][region][offset : offset + nbytes].view(dtype)
            received.append(tensor)
        return received

    def _place(self, tensor: Tensor) -> tuple[int | None, int]:
        address = tensor.data_ptr()
        for start, nbytes, region in self._starts:
            if start <= address < start + nbytes:
                return region, address - start
        return None, 0

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

    def _lost(self, peer: int, why: str) -> WorkerFailure:
        return WorkerFailure(
            f"worker {self.rank} lost contact with worker {peer} ({why}); look for that worker's own error", rank=peer
        )


def _connect_all(rank: int, addresses: Sequence[str], listener: socket.socket, sockets: list[socket.socket | None]) -> None:
    """Every pair of workers gets a connection: the higher rank calls, and says who it is."""
    for peer in range(rank):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sockets[peer] = connection
        connection.settimeout(20)
        connection.connect(addresses[peer])
        connection.send(struct.pack("<I", rank))
    for _ in range(rank + 1, len(addresses)):
        connection, _ = listener.accept()
        connection.settimeout(20)
        _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        if user != os.getuid():
            connection.close()
            raise PermissionError(f"user {user} tried to take part")
        sockets[struct.unpack("<I", connection.recv(4))[0]] = connection
    for connected in filter(None, sockets):
        connected.settimeout(None)


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


def _mapped(fd: int, nbytes: int | None) -> Tensor:
    try:
        return torch.frombuffer(mmap.mmap(fd, nbytes or os.fstat(fd).st_size), dtype=torch.uint8)
    finally:
        os.close(fd)


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _let_go(reference: weakref.ref[SharedMemory]) -> None:
    collective = reference()
    if collective is not None:
        collective.close()
