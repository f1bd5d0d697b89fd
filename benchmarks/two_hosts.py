"""Training on two hosts with a slow wire between them: unisono against DDP, time and bytes.

The hosts are network namespaces of this machine, joined by a virtual cable that is limited to 1 Gbit/s in each direction; so
their workers share its cores. Peers take turns, a few steps each, round after round; reported are medians and quartiles over
rounds, the ratio to DDP round by round, and what leaves a host in a step, counted at its network interface. Root only (or
who else may make network namespaces)::

    python benchmarks/two_hosts.py --save 2026-11-23
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from peers import PEERS
from processes import Group
from report import HERE, about
from virtual_hosts import WIRE, NoNamespaces, VirtualHosts, virtual_hosts
from workloads import WORKLOADS

DEFAULT = ("DDP", "unisono, M = W", "unisono, M = 8", "unisono over Gloo, M = 8")
CASES = ("wide", "gpt")
FIRST_STEPS = 3
ROUND_S = 1.0
CLONE_NEWNET = 0x40000000  # sched.h


def enter(namespaces: list[str], rank: int) -> None:
    """Puts this process into a host's network, by rank."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(namespaces[rank]).open() as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.environ["GLOO_SOCKET_IFNAME"] = WIRE


@dataclasses.dataclass
class Measured:
    """One peer's rounds."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    """A step."""
    sent: list[float] = dataclasses.field(default_factory=list)
    """Bytes that left a host in a step, the greater of both."""


def measure(case: str, workers: int, hosts: VirtualHosts, peers: Sequence[str], rounds: int) -> dict[str, Measured]:
    """Trains in all peers, in turns, with ``workers`` workers on each host.

    Raises:
        PeerFailed: A peer broke off.
    """
    namespaces = [str(hosts.namespace(host)) for host in (0, 1) for _ in range(workers)]
    names = [name for name in peers if workers > 1 or "over Gloo" not in name]  # alone on its host: the same as without
    found = {name: Measured() for name in names}
    groups: dict[str, Group] = {}
    with tempfile.TemporaryDirectory() as root:
        try:
            for number, name in enumerate(names):
                place = functools.partial(enter, namespaces)
                groups[name] = Group(PEERS[name], case, Path(root) / str(number), 2 * workers, place)
            steps: dict[str, int] = {}
            for name, group in groups.items():
                group.ready()
                group.run(FIRST_STEPS)
                group.hold()
                steps[name] = max(2, round(ROUND_S / group.run(FIRST_STEPS)))
            for _ in range(rounds):
                for name, group in groups.items():
                    before = [hosts.sent(host) for host in (0, 1)]
                    found[name].seconds.append(group.run(steps[name]))
                    after = [hosts.sent(host) for host in (0, 1)]
                    # One more step than those that are timed.
                    found[name].sent.append(max(b - a for a, b in zip(before, after, strict=True)) / (steps[name] + 1))
        finally:
            for group in groups.values():
                group.close()
    return found


def lines(case: str, workers: int, found: dict[str, Measured]) -> list[str]:
    """A table in Markdown."""
    nbytes = sum(p.numel() * p.itemsize for p in WORKLOADS[case].model().parameters())
    table = [
        f"\n{case}, 2 hosts of {workers}: weights of {nbytes / 1e6:.1f} MB\n",
        "| peer | ms a step (quartiles) | over DDP | MB a step and direction | times the weights |",
        "|---|---|---|---|---|",
    ]
    for name, measured in found.items():
        low, middle, high = (1e3 * value for value in statistics.quantiles(measured.seconds, n=4))
        ratio = statistics.median(a / b for a, b in zip(found["DDP"].seconds, measured.seconds, strict=True))
        sent = statistics.median(measured.sent)
        table.append(f"| {name} | {middle:.1f} ({low:.1f}-{high:.1f}) | {ratio:.2f} | {sent / 1e6:.2f} | {sent / nbytes:.2f} |")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="two or more")
    parser.add_argument("--cases", nargs="+", choices=list(WORKLOADS), default=CASES, metavar="CASE", help=", ".join(WORKLOADS))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="of each host")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=DEFAULT, metavar="PEER", help="DDP among them")
    parser.add_argument("--megabit", type=float, default=1000.0, help="a second, in each direction")
    parser.add_argument("--save", metavar="NAME", help="of the file to add the tables to")
    arguments = parser.parse_args()
    rounds = max(2, arguments.rounds)
    table = [f"# Two hosts, {arguments.megabit:.0f} Mbit/s\n", *(f"- {key}: {value}" for key, value in about(rounds).items())]
    for case in arguments.cases:
        for workers in arguments.workers:
            began = time.monotonic()
            try:
                with virtual_hosts(megabit=arguments.megabit) as hosts:
                    found = measure(case, workers, hosts, arguments.peers, rounds)
            except NoNamespaces as error:
                raise SystemExit(f"network namespaces cannot be made here: {error}") from error
            new = lines(case, workers, found)
            print("\n".join(new), f"\n({time.monotonic() - began:.0f} s)", flush=True)
            table += new
    if arguments.save:
        path = HERE / "results" / f"{arguments.save}-two-hosts.md"
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write("\n".join(table) + "\n\n")


if __name__ == "__main__":
    main()
