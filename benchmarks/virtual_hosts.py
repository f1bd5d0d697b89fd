"""Several hosts on one machine: network namespaces, joined by virtual cables. Linux only, and for a user who may create them.

The namespaces have no names, so nothing can be left behind: a namespace exists as long as a process in it, and the process that
holds it ends when its creator closes its pipe, or dies.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

WIRE = "wire"
"""Name of each host's network interface."""
_SWITCH = "switch"


class NoNamespaces(Exception):
    """This process cannot create network namespaces; the message says why."""


def address(host: int) -> str:
    """The IPv4 address of a host, by number from 0."""
    return f"10.97.0.{host + 1}"


class VirtualHosts:
    """Network namespaces that can reach only each other.

    Args:
        holders: The process that holds each host's network namespace.
        machines: Each host's process namespace; empty if the hosts share one.
    """

    def __init__(self, holders: Sequence[int], machines: Sequence[ProcessNamespace] = ()) -> None:
        self._holders = tuple(holders)
        self._machines = tuple(machines)

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """The command line that runs ``command`` on a host. If hosts have process namespaces, the command is a child of it, does
        not get its signals, and starts in the root folder."""
        within = self._machines[host].options if self._machines else []
        return ["nsenter", f"--net={self.namespace(host)}", *within, *command]

    def processes(self, host: int) -> dict[int, int]:
        """The processes of a host with a process namespace: their PIDs there, and here."""
        return self._machines[host].processes()

    def lose(self, host: int) -> None:
        """Ends all processes of a host with a process namespace at once, like a power cut. Others can be started there again."""
        self._machines[host].restart()

    def set_link(self, host: int, state: str) -> None:
        """Unplugs a host's network cable ("down"), or plugs it in ("up")."""
        self.run(host, "ip", "link", "set", WIRE, state)

    def namespace(self, host: int) -> Path:
        """The file of a host's network namespace."""
        return Path(f"/proc/{self._holders[host]}/ns/net")

    def sent(self, host: int) -> int:
        """Bytes that a host has sent so far, of all protocols."""
        for line in Path(f"/proc/{self._holders[host]}/net/dev").read_text().splitlines():
            name, _, counts = line.partition(":")
            if name.strip() == WIRE:
                return int(counts.split()[8])
        raise NoNamespaces(f"no interface {WIRE!r}")

    def run(self, host: int, *command: str) -> None:
        """Runs a short command to its end, in the host's network namespace.

        Raises:
            NoNamespaces: It failed.
        """
        _run(["nsenter", f"--net={self.namespace(host)}", *command])


class ProcessNamespace:
    """A process namespace: processes in it see only each other, and all end with it. A context manager; all *local*.

    Args:
        network: The file of the network namespace that they are in.
    """

    _OWN = (1, 2)
    """The PIDs that hold it: a shell, which reaps orphans, and the command that it waits for."""

    def __init__(self, network: Path) -> None:
        self._network = network
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> ProcessNamespace:
        kept = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", "echo ready; cat; :"]
        self._holder = self._stack.enter_context(_held(["nsenter", f"--net={self._network}", *kept]))
        self._namespace = Path(f"/proc/{self._holder.pid}/ns/pid_for_children").readlink()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def options(self) -> list[str]:
        """The options of nsenter that enter it."""
        namespaces = f"/proc/{self._holder.pid}/ns"
        return [f"--pid={namespaces}/pid_for_children", f"--mount={namespaces}/mnt"]

    def processes(self) -> dict[int, int]:
        """PIDs of the processes in it, except for those that hold it: inside, and as seen from here."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it has ended
                if entry.name.isdecimal() and (entry / "ns/pid").readlink() == self._namespace:
                    status = (entry / "status").read_text()
                    inside = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1]
                    found[int(inside)] = int(entry.name)
        return {inside: here for inside, here in found.items() if inside not in self._OWN}

    def restart(self) -> None:
        """Ends everything in it at once, and creates a new one."""
        self._holder.kill()
        while self.processes():
            time.sleep(0.001)
        self._stack.close()
        self.__enter__()


@contextlib.contextmanager
def virtual_hosts(count: int = 2, *, megabit: float | None = None, machines: bool = False) -> Iterator[VirtualHosts]:
    """Hosts joined by a switch, for as long as the body runs.

    Args:
        count: How many.
        megabit: Bandwidth of each host's cable in each direction, in Mbit/s; None: unlimited.
        machines: Whether each host has a process namespace: like real hosts, they cannot see each other's processes.

    Raises:
        NoNamespaces: They cannot be created here.
    """
    missing = [name for name in ("unshare", "nsenter", "ip", *(["tc"] if megabit else [])) if shutil.which(name) is None]
    if missing:
        raise NoNamespaces(f"{' and '.join(missing)} not installed")
    with contextlib.ExitStack() as stack:
        kept = ["unshare", "--net", "sh", "-c", "echo ready; exec cat"]
        switch = stack.enter_context(_held(kept)).pid
        holders = [stack.enter_context(_held(kept)).pid for _ in range(count)]
        networks = [Path(f"/proc/{holder}/ns/net") for holder in holders] if machines else []
        hosts = VirtualHosts(holders, [stack.enter_context(ProcessNamespace(network)) for network in networks])
        at_switch = ["nsenter", f"--net=/proc/{switch}/ns/net", "ip", "link"]
        _run([*at_switch, "add", _SWITCH, "type", "bridge"])
        _run([*at_switch, "set", _SWITCH, "up"])
        for host in range(count):
            port = f"port{host}"
            hosts.run(host, "ip", "link", "add", WIRE, "type", "veth", "peer", "name", port, "netns", str(switch))
            _run([*at_switch, "set", port, "master", _SWITCH])
            _run([*at_switch, "set", port, "up"])
            hosts.run(host, "ip", "address", "add", f"{address(host)}/24", "dev", WIRE)
            hosts.run(host, "ip", "link", "set", WIRE, "up")
            hosts.run(host, "ip", "link", "set", "lo", "up")
            if megabit:
                limit = ["tbf", "rate", f"{megabit}mbit", "burst", "256kb", "latency", "100ms"]
                hosts.run(host, "tc", "qdisc", "add", "dev", WIRE, "root", *limit)
        yield hosts


@contextlib.contextmanager
def _held(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds a namespace: it prints "ready", and ends with its input."""
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with holder:  # closes the pipes, and waits for the end
        assert holder.stdout is not None
        assert holder.stderr is not None
        if holder.stdout.readline() != b"ready\n":
            raise NoNamespaces(holder.stderr.read().decode().strip())
        yield holder


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoNamespaces(f"{' '.join(command)}: {done.stderr.strip()}")
