"""Where the launchers of a run meet, and the store that one of them serves.

PyTorch's c10d rendezvous does not fit: as soon as another host arrives it restarts all workers, it waits up to 0.3 s (at random)
before each rendezvous, and it guesses from names which host serves the store. In this one

- the launcher that can listen at the agreed address serves the store, and is host 0; the others connect to it;
- host 0 decides which hosts begin an attempt: the first begins once enough have arrived, a later one with those still alive;
- a host that arrives later joins the running attempt with its workers, and no worker is restarted.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import psutil
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from unisono.errors import ConfigurationError, WorkerFailure
from unisono.launch.control_store import ControlStore, RemoteStore

_LOOPBACK = "127.0.0.1"
_STORE_TIMEOUT = timedelta(seconds=60)
_ANSWER_S = 10.0
"""How long the store may take to answer a launcher on another host, in seconds."""
_BEAT_S = 0.5
"""Time between two heartbeats of a host, in seconds."""
_SILENCE_S = 10.0
"""How long a host may be silent before it counts as gone, in seconds."""
_REUNION_S = 10.0
"""How long host 0 waits for the other living hosts before an attempt after the first, in seconds."""
_POLL_S = 0.1


class Stopped(Exception):
    """A person asked to stop while the hosts were still to meet."""


class BrokenOff(Exception):
    """An attempt ended before all of its workers had started: the hosts have to meet again."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A period of the run from a start of all workers to the next; the first has the number 0."""

    number: int
    hosts: tuple[int, ...]
    """Those that begin it, in order of rank."""
    joins: bool
    """Whether this host joins an attempt that had begun before it came."""
    port: int
    """Where workers find a store of their own, at the address of host 0."""


class Rendezvous:
    """This host's place in the run. Apart from `next_attempt` and `exchange` all methods are *local*.

    Args:
        place: Where the store is served: a name or address of one of the hosts, and a port. None: on this host alone.
        hosts: How many hosts begin the run together.
        wait_s: How long to wait for the host that serves the store, and for the others, in seconds.
        stops: Whether a person has asked to stop.

    Raises:
        ConfigurationError: The address cannot be used.
        WorkerFailure: Nobody serves the store.
        Stopped: A person asked to stop.
    """

    def __init__(
        self, place: tuple[str, int] | None = None, *, hosts: int = 1, wait_s: float = 300.0, stops: Callable[[], bool] = bool
    ) -> None:
        self.run_id = uuid.uuid4().hex
        """A name that no other run has."""
        self.place, port = place or (_LOOPBACK, 0)
        """The host that serves the store: a name, or an address."""
        self._hosts = hosts
        self._wait_s = wait_s
        self._stops = stops
        self._server = _serve_if_possible(self.place, port)
        self._port = self._server.port if self._server else port
        self._local = self.place if self._server else self._find_server()
        self._workers_store: TCPStore | None = None
        self._beats: dict[int, tuple[bytes, float]] = {}
        self.store: Store = self._client()
        """For the thread that made this object."""
        if not self.serves:
            remote = RemoteStore(self.store, limit_s=_ANSWER_S, where=self.address, is_near=self._can_connect)
            self.store = cast(Store, remote)
        self.host = 0 if self.serves else self.store.add("unisono/hosts", 1)
        """Number of this host."""
        self.attempt: Attempt | None = None
        """The attempt that `next_attempt` began or joined last."""
        self._has_begun = False
        self._leaves = threading.Event()
        self._heart: threading.Thread | None = None
        if not self.serves:
            self._heart = threading.Thread(target=self._beat, args=(self._client(),), daemon=True, name="unisono-beat")
            self._heart.start()

    @property
    def serves(self) -> bool:
        """Whether the store is served here."""
        return self._server is not None

    @property
    def address(self) -> str:
        """HOST:PORT of the store."""
        return f"{self.place}:{self._port}"

    @property
    def interface(self) -> str | None:
        """Name of the network interface by which this host reaches the others; None if that cannot be told."""
        address = socket.gethostbyname(self._local)
        found = (name for name, ours in psutil.net_if_addrs().items() if address in [one.address for one in ours])
        return next(found, "lo" if address.startswith("127.") else None)

    def _client(self) -> TCPStore:
        """A new client of the store: one object serves one thread at a time, and an operation that waits holds up all others."""
        return TCPStore(self.place, self._port, is_master=False, timeout=_STORE_TIMEOUT)

    def next_attempt(self) -> Attempt:
        """Begin an attempt, or join one. *collective*: every host that takes part calls it.

        Raises:
            WorkerFailure: Too few hosts came, or contact with the store was lost.
            Stopped: A person asked to stop.
        """
        number = 0 if self.attempt is None else self.attempt.number + 1
        if self.serves:
            # Each attempt has a store of its own for its workers: keys that an earlier one left behind must not mislead them.
            self._workers_store = _serve(self.place, 0)
            self.store.set(f"hosts/{number}/port", str(self._workers_store.port))
            hosts = self._gather(number)
            self.store.set(f"hosts/{number}/members", ",".join(map(str, hosts)))
            self.store.set("hosts/attempt", str(number))
        else:
            if self.attempt is None and self.store.check(["hosts/attempt"]):
                number = int(self.store.get("hosts/attempt"))
            else:
                self._arrive(number)
            hosts = self._hear_who_begins(number)
        port = int(self.store.get(f"hosts/{number}/port"))
        self.attempt = Attempt(number=number, hosts=tuple(hosts), joins=self.host not in hosts, port=port)
        return self.attempt

    def exchange(self, mine: str) -> list[str]:
        """Exchange a text with the other hosts. *collective*: every host that begins the attempt calls it.

        Returns:
            The text of each host, in order of rank.

        Raises:
            BrokenOff: One of them was lost before it could say it.
        """
        assert self.attempt is not None
        said = f"hosts/{self.attempt.number}/said"
        control = ControlStore(self.store, self.attempt.number)
        self.store.set(f"{said}/{self.host}", mine)
        while missing := [host for host in self.attempt.hosts if not self.store.check([f"{said}/{host}"])]:
            if self.serves and not set(missing) <= {0, *self.others()}:
                control.call_again()
            if control.decisions().again:
                raise BrokenOff
            self.pause()
        self._has_begun = True
        return [self.store.get(f"{said}/{host}").decode() for host in self.attempt.hosts]

    def _gather(self, attempt: int) -> list[int]:
        """Host 0: the hosts that begin this attempt."""
        deadline_s = time.monotonic() + (_REUNION_S if self._has_begun else self._wait_s)
        while True:
            arrived = self.store.add(f"hosts/{attempt}/arrived", 0)
            hosts = {0} | {int(self.store.get(f"hosts/{attempt}/arrival/{number}")) for number in range(1, arrived + 1)}
            others = set(self.others())
            hosts &= {0, *others}
            late = time.monotonic() > deadline_s
            if (others <= hosts or late) if self._has_begun else len(hosts) >= self._hosts:
                return sorted(hosts)
            if late:
                raise WorkerFailure(
                    f"{len(hosts)} of {self._hosts} hosts came within {self._wait_s:g} s (--wait): start `unisono run --meet "
                    f"{self.address}` on the others, or ask for fewer --hosts"
                )
            self.pause()

    def _arrive(self, attempt: int) -> None:
        number = self.store.add(f"hosts/{attempt}/arriving", 1)
        self.store.set(f"hosts/{attempt}/arrival/{number}", str(self.host))
        self.store.add(f"hosts/{attempt}/arrived", 1)

    def _hear_who_begins(self, attempt: int) -> list[int]:
        deadline_s = time.monotonic() + self._wait_s
        while not self.store.check([f"hosts/{attempt}/members"]):
            if time.monotonic() > deadline_s:
                raise WorkerFailure(f"the run at {self.address} did not begin within {self._wait_s:g} s (--wait)")
            self.pause()
        return [int(host) for host in self.store.get(f"hosts/{attempt}/members").decode().split(",")]

    def _beat(self, store: TCPStore) -> None:
        """Send heartbeats to host 0 until this host leaves: in a thread of its own, because the launcher may be busy for long.
        Its first worker waits until PyTorch is imported, which takes half a minute from a slow disk."""
        key = f"hosts/beat/{self.host}"
        with contextlib.suppress(RuntimeError):  # the store is gone, as its next user will find
            store.set(key, str(time.monotonic()))
            while not self._leaves.wait(_BEAT_S):
                store.set(key, str(time.monotonic()))
            store.set(key, "gone")  # through the same client as the heartbeats, so that none comes after it

    def others(self) -> list[int]:
        """Host 0: the numbers of the other hosts that are alive."""
        now_s = time.monotonic()
        there = []
        for host in range(1, self.store.add("unisono/hosts", 0) + 1):
            beat = self.store.get(f"hosts/beat/{host}") if self.store.check([f"hosts/beat/{host}"]) else b""
            last, seen_s = self._beats.get(host, (None, now_s))
            self._beats[host] = (beat, seen_s if beat == last else now_s)
            if beat != b"gone" and now_s - self._beats[host][1] < _SILENCE_S:
                there.append(host)
        return there

    def _can_connect(self) -> bool:
        """Whether the store takes new connections at this moment."""
        try:
            socket.create_connection((self.place, self._port), timeout=1.0).close()
        except OSError:
            return False
        return True

    def _find_server(self) -> str:
        """Our own address on the way to the store."""
        deadline_s = time.monotonic() + self._wait_s
        while True:
            try:
                with socket.create_connection((self.place, self._port), timeout=2.0) as connection:
                    return str(connection.getsockname()[0])
            except OSError as error:
                if time.monotonic() > deadline_s:
                    raise WorkerFailure(
                        f"no host serves the run at {self.address} after {self._wait_s:g} s (--wait; last answer: {error}): "
                        "start `unisono run` with the same --meet on the host that has this address, and check that it can "
                        "be reached"
                    ) from None
            self.pause()

    def pause(self) -> None:
        """Wait a moment, unless a person asked to stop."""
        if self._stops():
            raise Stopped
        time.sleep(_POLL_S)

    def leave(self) -> None:
        """Leave the run; host 0 waits until the others have seen its end."""
        self._leaves.set()
        if self._heart is not None:
            self._heart.join(_ANSWER_S)
        deadline_s = time.monotonic() + _SILENCE_S
        while self.serves and self.others() and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)


def _serve_if_possible(host: str, port: int) -> TCPStore | None:
    try:
        return _serve(socket.gethostbyname(host), port)
    except socket.gaierror as error:
        raise ConfigurationError(f"this host cannot resolve {host!r} ({error.strerror}): correct --meet") from None
    except OSError as error:
        # Another host's address, or the launcher that serves is on this very host.
        if error.errno not in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
            raise ConfigurationError(f"cannot listen at {host}:{port} ({error.strerror}): choose another --meet") from None
        return None


def _serve(host: str, port: int) -> TCPStore:
    """Serve a store at this address and nowhere else: PyTorch by itself would listen at every address of the machine."""
    listener = socket.create_server((host, port))
    port = listener.getsockname()[1]
    descriptor = listener.detach()  # the store closes it
    return TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=_STORE_TIMEOUT, master_listen_fd=descriptor)
