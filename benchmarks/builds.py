"""Step times of this build of unisono against those of another checkout, in turns::

    git worktree add ../before COMMIT
    python benchmarks/builds.py ../before --peers "unisono, M = 2" "unisono, M = 8"

Both builds' processes are alive together and take turns, a few steps each; reported are medians and quartiles of the ratio, round
by round: above 1, this build is faster.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROUND_S = 0.3


class Build:
    """The workers of one peer under one checkout.

    Args:
        checkout: Root of the repository.
    """

    def __init__(self, checkout: Path, workload: str, peer: str) -> None:
        places = os.pathsep.join(str((checkout / folder).resolve()) for folder in ("src", "benchmarks"))
        self._server = subprocess.Popen(
            [sys.executable, "-P", str(HERE / "builds.py"), "--serve", workload, peer],
            env={**os.environ, "PYTHONPATH": places},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, steps: int) -> float:
        """Seconds a step."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(steps, file=self._server.stdin, flush=True)
        return float(self._server.stdout.readline())

    def close(self) -> None:
        """Ends the workers."""
        self._server.communicate("")


def serve(workload: str, peer: str) -> None:
    """Runs as many steps as each line of the input says, and prints the seconds that one took."""
    from peers import PEERS
    from processes import Group

    with tempfile.TemporaryDirectory() as folder:
        group = Group(PEERS[peer], workload, Path(folder) / "group")
        try:
            group.ready()
            for line in sys.stdin:
                print(group.run(int(line)), flush=True)
        finally:
            group.close()


def compare(other: Path, workload: str, peer: str, rounds: int) -> None:
    """Prints one line."""
    builds = [Build(HERE.parent, workload, peer), Build(other, workload, peer)]
    try:
        steps = [max(2, round(ROUND_S / build.run(3))) for build in builds for _ in range(2)][1::2]
        ratios: list[float] = []
        times: list[float] = []
        for number in range(rounds):
            turn = (0, 1) if number % 2 == 0 else (1, 0)
            seconds = {which: builds[which].run(steps[which]) for which in turn}
            ratios.append(seconds[1] / seconds[0])
            times.append(seconds[0])
    finally:
        for build in builds:
            build.close()
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"{workload:12} {peer:16} {middle:.3f} ({low:.3f} to {high:.3f})  {1000 * statistics.median(times):.2f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--serve", nargs=2, metavar=("WORKLOAD", "PEER"), help=argparse.SUPPRESS)
    parser.add_argument("--peers", nargs="+", default=["unisono, M = 2", "unisono, M = 8"])
    parser.add_argument("--cases", nargs="+")
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve)
        return
    from workloads import WORKLOADS

    for workload in arguments.cases or WORKLOADS:
        for peer in arguments.peers:
            compare(arguments.other, workload, peer, arguments.rounds)


if __name__ == "__main__":
    main()
