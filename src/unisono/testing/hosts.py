"""Two hosts on one machine: network namespaces, joined by a virtual cable. Linux only, and for a user who may make them.

Nothing here has a name, so nothing can be left behind: a namespace lives as long as a process in it, and the process that
holds it ends when whoever made it closes its pipe, or dies.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

WIRE = "wire"
"""Name of each host's network interface."""
ADDRESSES = ("10.97.0.1", "10.97.0.2")


class NoNamespaces(Exception):
    """This process may not make network namespaces; the message says why."""


class TwoHosts:
    """Two network namespaces that can reach each other and nobody else."""

    def __init__(self, holders: Sequence[int]) -> None:
        self._holders = tuple(holders)

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """The command line that runs ``command`` on a host."""
        return ["nsenter", f"--net={self.namespace(host)}", *command]

    def namespace(self, host: int) -> Path:
        """The file of a host's network namespace."""
        return Path(f"/proc/{self._holders[host]}/ns/net")

    def sent(self, host: int) -> int:
        """Bytes that have left a host through the wire so far, those of all protocols."""
        for line in Path(f"/proc/{self._holders[host]}/net/dev").read_text().splitlines():
            name, _, counts = line.partition(":")
            if name.strip() == WIRE:
                return int(counts.split()[8])
        raise NoNamespaces(f"no interface {WIRE!r}")

    def run(self, host: int, *command: str) -> None:
        """Runs a short command to its end.

        Raises:
            NoNamespaces: It failed.
        """
        _run(self.command(host, command))


@contextlib.contextmanager
def two_hosts(*, megabit: float | None = None) -> Iterator[TwoHosts]:
    """Two hosts, for as long as the body runs.

    Args:
        megabit: Limits the wire in each direction to so many megabits a second.

    Raises:
        NoNamespaces: They cannot be made here.
    """
    missing = [name for name in ("unshare", "nsenter", "ip", *(["tc"] if megabit else [])) if shutil.which(name) is None]
    if missing:
        raise NoNamespaces(f"{' and '.join(missing)} not installed")
    with contextlib.ExitStack() as stack:
        holders = [stack.enter_context(_namespace()) for _ in ADDRESSES]
        hosts = TwoHosts(holders)
        hosts.run(0, "ip", "link", "add", WIRE, "type", "veth", "peer", "name", WIRE, "netns", str(holders[1]))
        for host, address in enumerate(ADDRESSES):
            hosts.run(host, "ip", "address", "add", f"{address}/24", "dev", WIRE)
            hosts.run(host, "ip", "link", "set", WIRE, "up")
            hosts.run(host, "ip", "link", "set", "lo", "up")
            if megabit:
                limit = ["tbf", "rate", f"{megabit}mbit", "burst", "256kb", "latency", "100ms"]
                hosts.run(host, "tc", "qdisc", "add", "dev", WIRE, "root", *limit)
        yield hosts


@contextlib.contextmanager
def _namespace() -> Iterator[int]:
    """The number of a process in a network namespace of its own."""
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo ready; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with holder:  # closes the pipes, and waits for the end
        assert holder.stdout is not None
        assert holder.stderr is not None
        if holder.stdout.readline() != b"ready\n":
            raise NoNamespaces(holder.stderr.read().decode().strip())
        yield holder.pid


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoNamespaces(f"{' '.join(command)}: {done.stderr.strip()}")
