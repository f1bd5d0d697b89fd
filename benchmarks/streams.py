"""What plain TCP gives between each two workers, beside Gloo, which runs over it: is the network slow, or what Gloo makes of it?

Each pair in turn sends and receives at the same time, as `unisono doctor` measures its links. On each host::

    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29500 benchmarks/streams.py
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import statistics
import struct
import threading
import time
from contextlib import suppress

import torch

from unisono.collective.base import Collective
from unisono.doctor.examination import connected
from unisono.doctor.facts import Links, Pair
from unisono.doctor.links import SMALL_BYTES, fitting_bytes, gather, large_message, measure_links, partner, turns
from unisono.doctor.machine import read_host
from unisono.world import World

_TIMEOUT_S = 5.0
_PROBE_BYTES = 1024 * 1024
_SMALL, _LARGE = 20, 5
_NUMBER = struct.Struct("<Q")
_TOKEN_BYTES = 16
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a network interface


def own_address(world: World) -> str:
    """The address at which the other workers reach this one, as Gloo would choose it. *local*

    Raises:
        OSError: There is no way to the host on which the workers meet, or no such network interface.
    """
    if world.local_size == world.size or world.master_addr is None:
        return "127.0.0.1"
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if interface:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            request = struct.pack("256s", interface.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(any_socket, _SIOCGIFADDR, request)[20:24])
    family, _, _, _, target = socket.getaddrinfo(world.master_addr, world.master_port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as route:
        route.connect(target)  # sends nothing, but chooses the way
        return str(route.getsockname()[0])


def measure_streams(collective: Collective, address: str | None, *, large_bytes: int) -> Links:
    """Round trip, 64 KiB and a large message over a socket of its own between each two workers. *collective*

    Args:
        collective: By which the workers tell each other their addresses.
        address: Where this worker can be reached; None if it cannot: then its pairs are left out.
        large_bytes: How large the large message may be.

    Returns:
        The same on all workers; in place of the barrier stands the slowest round trip. Pairs between which no connection
        comes about are left out.
    """
    listener, token = _listen(address), secrets.token_bytes(_TOKEN_BYTES)
    place = None if listener is None else [*listener.getsockname()[:2], token.hex()]
    places = [json.loads(text) for text in collective.all_gather_bytes(json.dumps(place).encode())]
    seen: list[tuple[float, Pair]] = []
    for turn in range(turns(collective.size)):
        peer = partner(collective.rank, turn, collective.size)
        if peer is not None and listener is not None and places[peer] is not None:
            # What a firewall keeps apart is left out.
            with suppress(OSError), _connect(collective.rank, peer, listener, token, places[peer]) as connection:
                seen.append(_measure(connection, collective.rank, peer, large_bytes))
        collective.barrier()  # else the next partner might knock before this one
    if listener is not None:
        listener.close()
    round_trip_s = max((round_trip_s for round_trip_s, _ in seen), default=0.0)
    return gather(collective, Links(transport="TCP", barrier_s=round_trip_s, pairs=[pair for _, pair in seen]))


def _listen(address: str | None) -> socket.socket | None:
    if address is None:
        return None
    try:
        listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    except OSError:
        return None
    listener.settimeout(_TIMEOUT_S)
    return listener


def _connect(rank: int, peer: int, listener: socket.socket, token: bytes, place: tuple[str, int, str]) -> socket.socket:
    """The higher rank calls, and shows that it knows whom."""
    if rank > peer:
        connection = socket.create_connection(place[:2], timeout=_TIMEOUT_S)
        connection.sendall(bytes.fromhex(place[2]))
    else:
        connection, _ = listener.accept()
        connection.settimeout(_TIMEOUT_S)
        greeting = bytearray(_TOKEN_BYTES)
        _receive(connection, memoryview(greeting))
        if not secrets.compare_digest(bytes(greeting), token):
            connection.close()
            raise ConnectionError("a stranger called")
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _measure(connection: socket.socket, rank: int, peer: int, large_bytes: int) -> tuple[float, Pair]:
    stream = _Stream(connection, large_bytes)
    round_trip_s = statistics.median(stream.round_trip(leads=rank < peer) for _ in range(_SMALL))
    small_s = statistics.median(stream.both_ways(SMALL_BYTES) for _ in range(_SMALL))
    stream.both_ways(_PROBE_BYTES)
    probe_s = stream.both_ways(_PROBE_BYTES)
    nbytes = stream.agree(large_message(large_bytes, probe_s))
    large_s = statistics.median(stream.both_ways(nbytes) for _ in range(_LARGE))
    first, second = sorted((rank, peer))
    return round_trip_s, Pair(first=first, second=second, small_s=small_s, large_rate=nbytes / large_s, large_bytes=nbytes)


class _Stream:
    """A connection over which both sides send and receive at the same time."""

    def __init__(self, connection: socket.socket, large_bytes: int) -> None:
        self._connection = connection
        self._out = memoryview(bytearray(large_bytes))
        self._in = memoryview(bytearray(large_bytes))

    def round_trip(self, *, leads: bool) -> float:
        """Seconds for a byte there and back; whoever does not lead sends it back."""
        began = time.perf_counter()
        if leads:
            self._connection.sendall(b"?")
        _receive(self._connection, self._in[:1])
        if not leads:
            self._connection.sendall(b"!")
        return time.perf_counter() - began

    def both_ways(self, nbytes: int) -> float:
        """Seconds for so many bytes each way."""
        sent = threading.Thread(target=self._send, args=(nbytes,))
        began = time.perf_counter()
        sent.start()
        try:
            _receive(self._connection, self._in[:nbytes])
        finally:
            sent.join()
        return max(time.perf_counter() - began, 1e-9)

    def agree(self, number: int) -> int:
        """The lesser of both sides' numbers."""
        self._connection.sendall(_NUMBER.pack(number))
        _receive(self._connection, self._in[: _NUMBER.size])
        return min(number, int(_NUMBER.unpack(self._in[: _NUMBER.size])[0]))

    def _send(self, nbytes: int) -> None:
        with suppress(OSError):  # the receiving side says so
            self._connection.sendall(self._out[:nbytes])


def _receive(connection: socket.socket, target: memoryview) -> None:
    while target:
        count = connection.recv_into(target)
        if not count:
            raise ConnectionError("the other worker has closed the connection")
        target = target[count:]


def main() -> None:
    world = World.from_environment()
    with connected(world, world.init_method or "env://") as (group, _):
        memory_free = torch.tensor([read_host().memory_free])
        nbytes = min(fitting_bytes(world.size, int(free)) for free in group.all_gather(memory_free))
        try:
            address = own_address(world)
        except OSError:
            address = None
        plain = measure_streams(group, address, large_bytes=nbytes)
        gloo = measure_links(group, transport="Gloo", device=torch.device("cpu"), large_bytes=nbytes)
        if world.is_main:
            _show(plain, gloo)


def _show(plain: Links, gloo: Links) -> None:
    rates = {(pair.first, pair.second): pair for pair in plain.pairs}
    print("workers    64 KiB, us: TCP    Gloo    GB/s each way: TCP    Gloo    share")
    for pair in gloo.pairs:
        name = f"{pair.first} - {pair.second}"
        if tcp := rates.get((pair.first, pair.second)):
            small, large = (tcp.small_s * 1e6, pair.small_s * 1e6), (tcp.large_rate / 1e9, pair.large_rate / 1e9)
            print(f"{name:<7}{small[0]:19.0f}{small[1]:8.0f}{large[0]:22.2f}{large[1]:8.2f}{large[1] / large[0]:9.0%}")
        else:
            print(f"{name:<7}    no plain TCP connection: a firewall, or the wrong interface (GLOO_SOCKET_IFNAME)?")


if __name__ == "__main__":
    main()
