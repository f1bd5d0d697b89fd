"""Step time on one machine: unisono against DistributedDataParallel and plain PyTorch.

Every peer trains the same model on the same global batch with the same optimizer (AdamW, fused), in processes of its own.
Peers take turns, a few steps each, round after round; reported are medians over rounds, quartiles, and the median of
the round-by-round ratio to DDP. With ``--save NAME`` the table, the raw numbers and a picture go to ``benchmarks/results``::

    python benchmarks/one_machine.py --rounds 15 --save 2026-11-23-gloo
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from peers import PEERS, serve
from workloads import WORKLOADS

HERE = Path(__file__).parent
BASELINE = "DDP"
ROUND_SECONDS = 0.5
Times = dict[str, list[float]]


class Group:
    """The processes of one peer."""

    def __init__(self, peer: str, workload: str, folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(PEERS[peer][1]):
            mine, theirs = context.Pipe()
            process = context.Process(target=serve, args=(peer, workload, rank, folder, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()

    def run(self, steps: int) -> float:
        """Seconds a step, of the slowest worker."""
        for pipe in self.pipes:
            pipe.send(steps)
        return max(pipe.recv() for pipe in self.pipes) / steps

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(0)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def measure(workload: str, rounds: int) -> Times:
    """Seconds a step of each peer in each round."""
    times: Times = {peer: [] for peer in PEERS}
    with tempfile.TemporaryDirectory() as root:
        groups: dict[str, Group] = {}
        for number, peer in enumerate(PEERS):
            folder = Path(root) / str(number)
            folder.mkdir()
            groups[peer] = Group(peer, workload, str(folder))
        steps = {peer: max(2, int(ROUND_SECONDS / group.run(3))) for peer, group in groups.items()}
        for group in groups.values():
            group.run(3)
        for _ in range(rounds):
            for peer, group in groups.items():
                times[peer].append(group.run(steps[peer]))
        for group in groups.values():
            group.close()
    return times


def rows(times: Times) -> list[tuple[str, float, float, float, float]]:
    """Peer, median, lower and upper quartile in ms, and median of DDP's time over the peer's, round by round."""
    found = []
    for peer, seconds in times.items():
        low, middle, high = statistics.quantiles(seconds, n=4)
        ratio = statistics.median(base / own for base, own in zip(times[BASELINE], seconds, strict=True))
        found.append((peer, 1e3 * middle, 1e3 * low, 1e3 * high, ratio))
    return found


def table(results: dict[str, Times]) -> str:
    """A Markdown table of all workloads."""
    lines = ["| case | peer | ms a step (quartiles) | speed over DDP |", "|---|---|---|---|"]
    for workload, times in results.items():
        for peer, middle, low, high, ratio in rows(times):
            lines.append(f"| {workload} | {peer} | {middle:.2f} ({low:.2f} to {high:.2f}) | {ratio:.2f} |")
    return "\n".join(lines)


def machine() -> str:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    return (
        f"{platform.machine()}, {os.cpu_count()} cores ({model}), Python {platform.python_version()}, torch {torch.__version__}"
    )


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def save(name: str, results: dict[str, Times], rounds: int) -> None:
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    about: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/one_machine.py", *sys.argv[1:]]),
        "commit": commit(),
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "rounds": rounds,
    }
    facts = "\n".join(f"- {key}: {value}" for key, value in about.items())
    (folder / f"{name}.md").write_text(
        f"# Step time on one machine\n\n{facts}\n\nSpeed over DDP: median of the round-by-round ratio, more is better. "
        f"Absolute times of a shared machine mean little.\n\n{table(results)}\n\n![speed over DDP]({name}.png)\n"
    )
    (folder / f"{name}.json").write_text(json.dumps({**about, "seconds": results}, indent=1) + "\n")
    draw(folder / f"{name}.png", results)


def draw(path: Path, results: dict[str, Times]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    peers = list(PEERS)
    for number, peer in enumerate(peers):
        ratios = [{row[0]: row[4] for row in rows(times)}[peer] for times in results.values()]
        places = [case + (number - len(peers) / 2 + 0.5) * 0.12 for case in range(len(results))]
        bars = axes.bar(places, ratios, width=0.11, label=peer)
        axes.bar_label(bars, fmt="%.2f", fontsize=6)
    axes.axhline(1.0, color="black", linewidth=0.6)
    axes.set_xticks(range(len(results)), list(results))
    axes.set_ylabel("speed over DDP (more is better)")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cases", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--save", metavar="NAME")
    arguments = parser.parse_args()
    results: dict[str, Times] = {}
    for workload in arguments.cases:
        results[workload] = measure(workload, arguments.rounds)
        for peer, middle, low, high, ratio in rows(results[workload]):
            print(f"{workload:12} {peer:24} {middle:8.2f} ms ({low:.2f} to {high:.2f})   {ratio:5.2f} x DDP", flush=True)
    if arguments.save:
        save(arguments.save, results, arguments.rounds)


if __name__ == "__main__":
    main()
