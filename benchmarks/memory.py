"""Memory of W workers of one host, whether each keeps weights and optimizer state for itself or shares them.

Peers run one after the other, alone: proportional set size of a worker's process after a few steps, summed over the workers,
and what it consists of. With ``--save NAME`` a table and the raw numbers go to ``benchmarks/results``::

    python benchmarks/memory.py --workers 4 --case wide
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from peers import PEERS
from processes import Group, Memory, PeerFailed
from report import HERE, MIB, about
from workloads import WORKLOADS

STEPS = 5
DEFAULT = ("DDP", "DDP + ZeRO", "unisono, M = W")


def measure(peer: str, case: str, workers: int) -> Memory:
    """What ``workers`` processes of ``peer`` hold after a few steps of ``case``.

    Raises:
        PeerFailed: The peer cannot run here, or the system does not tell.
    """
    with tempfile.TemporaryDirectory() as root:
        group = Group(PEERS[peer], case, Path(root) / "group", workers)
        try:
            group.ready()
            group.run(STEPS)
            found = group.memory()
        finally:
            group.close()
    if found is None:
        raise PeerFailed("there is no /proc/PID/smaps_rollup on this system: use Linux")
    return found


def launched(case: str, workers: int) -> Memory:
    """What ``workers`` of ``unisono run`` hold after a few steps of ``fit``.

    Raises:
        PeerFailed: It does not run here.
    """
    script = str(HERE / "launched.py")
    command = [sys.executable, "-m", "unisono.launch", "run", "--workers", str(workers), script, case, str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("memory ")]
    if not lines:
        raise PeerFailed(f"unisono run ended with status {done.returncode}: {done.stderr[-500:]}")
    return Memory(**json.loads(lines[0].removeprefix("memory ")))


def table(found: dict[str, Memory]) -> str:
    """A Markdown table; everything in MiB, the first row is what the others are compared with."""
    first = next(iter(found.values())).pss
    lines = ["| peer | PSS, MiB | of the first | private | shared between workers | program code |", "|---|---|---|---|---|---|"]
    for peer, memory in found.items():
        parts = " | ".join(f"{part / MIB:.0f}" for part in (memory.anonymous, memory.shared, memory.files))
        lines.append(f"| {peer} | {memory.pss / MIB:.0f} | {memory.pss / first:.2f} | {parts} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=4, help="divides the case's batch")
    parser.add_argument("--case", choices=list(WORKLOADS), default="wide")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), metavar="PEER", default=DEFAULT)
    parser.add_argument("--save", metavar="NAME", help="of the files to write")
    parser.add_argument("--into", metavar="FOLDER", type=Path, default=HERE / "results", help="where --save writes")
    arguments = parser.parse_args()
    if WORKLOADS[arguments.case].batch_size % arguments.workers:
        parser.error(f"--workers must divide the batch of {WORKLOADS[arguments.case].batch_size} samples")
    facts = {key: value for key, value in about(STEPS).items() if key != "rounds"}
    found: dict[str, Memory] = {}
    for peer in arguments.peers:
        if reason := PEERS[peer].missing:
            print(f"{peer} is left out: {reason}", flush=True)
            continue
        found[peer] = measure(peer, arguments.case, arguments.workers)
    found[f"unisono run --workers {arguments.workers}"] = launched(arguments.case, arguments.workers)
    print(table(found))
    if arguments.save:
        arguments.into.mkdir(parents=True, exist_ok=True)
        header = "\n".join(f"- {key}: {value}" for key, value in facts.items())
        title = f"# Memory of {arguments.workers} workers, {arguments.case}"
        (arguments.into / f"{arguments.save}.md").write_text(f"{title}\n\n{header}\n\n{table(found)}\n")
        raw = {peer: dataclasses.asdict(memory) for peer, memory in found.items()}
        (arguments.into / f"{arguments.save}.json").write_text(json.dumps({**facts, "bytes": raw}, indent=1) + "\n")


if __name__ == "__main__":
    main()
