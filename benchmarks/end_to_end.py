"""Whole epochs with data loading, from scripts under their launchers: ``unisono run``, ``torchrun``, and plain with two threads.

All train the same model on the same samples with the same global batch (``epochs.py``). In each round every peer is launched
anew, one after the other. The first epoch is not counted; reported are the time of a step in the others, with quartiles
over rounds, and ratios round by round: above 1, the first is faster. With ``--save NAME`` the table and raw numbers go to
``benchmarks/results``::

    python benchmarks/end_to_end.py --save NAME
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from processes import PeerFailed
from report import HERE, Spread, about
from workloads import WORKLOADS

SCRIPT = str(HERE / "epochs.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2", SCRIPT, "ddp")
UNISONO = ("-m", "unisono.launch", "run", "--workers", "2", SCRIPT, "unisono")
DDP, PLAIN, EIGHT, TWO = "torchrun, DDP", "plain, 2 threads", "unisono run, M = 8", "unisono run, M = 2"
PEERS = {
    DDP: (*TORCHRUN,),
    PLAIN: (SCRIPT, "plain"),
    EIGHT: (*UNISONO, "--microbatches", "8"),
    TWO: (*UNISONO, "--microbatches", "2"),
}
"""What follows the interpreter; the case and the length of epochs follow."""

WORKERS = {DDP: 2, PLAIN: 1, EIGHT: 2, TWO: 2}
BATCHES = {"tiny": 300, "middle": 60, "wide": 8, "gpt": 10, "cnn": 10, "recommender": 15}
"""Of an epoch, which takes a few tenths of a second."""
EPOCHS, QUICK_BATCHES = 4, 5
LOSS_TOLERANCE = 0.05
"""Relative, of the last epoch's mean loss. Peers shuffle differently, and BatchNorm sees other batches."""

RATIOS = {
    "M = 8 over DDP": (DDP, EIGHT),
    "M = 8 over plain, 2 threads": (PLAIN, EIGHT),
    "M = 2 over DDP": (DDP, TWO),
    "M = 8 over M = 2": (TWO, EIGHT),
}
"""Speed of the second over the first."""

Seconds = dict[str, list[float]]
"""Of a step, by peer; lists run over rounds."""


def launch(peer: str, case: str, batches: int) -> tuple[float, float]:
    """Seconds of a step, and the mean loss of the last epoch.

    Raises:
        PeerFailed: The command failed, or ran on another number of workers.
    """
    command = [sys.executable, *PEERS[peer], case, "--batches", str(batches), "--epochs", str(EPOCHS)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(2 // WORKERS[peer])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("epochs ")]
    if done.returncode or len(lines) != 1:
        raise PeerFailed(f"{peer} ended with status {done.returncode}: {done.stderr[-500:]}")
    found = json.loads(lines[0].removeprefix("epochs "))
    if found["workers"] != WORKERS[peer] or len(found["seconds"]) != EPOCHS:
        raise PeerFailed(f"{peer} trained {len(found['seconds'])} epochs on {found['workers']} workers")
    return statistics.median(found["seconds"][1:]) / batches, found["loss"]


def measure(case: str, rounds: int, batches: int) -> Seconds:
    """Launches all peers in turns.

    Raises:
        PeerFailed: One failed, or trains something else than the others.
    """
    seconds: Seconds = {peer: [] for peer in PEERS}
    losses: dict[str, float] = {}
    for number in range(rounds):
        for peer in PEERS if number % 2 == 0 else reversed(PEERS):
            step, losses[peer] = launch(peer, case, batches)
            seconds[peer].append(step)
    if max(losses.values()) > min(losses.values()) * (1 + LOSS_TOLERANCE):
        raise PeerFailed(f"the peers do not train the same in the case {case}: losses of the last epoch {losses}")
    return seconds


def table(found: dict[str, Seconds]) -> str:
    """Two Markdown tables, a column for each case: ratios, and milliseconds of a step."""
    head = [f"| | {' | '.join(found)} |", f"|{'---|' * (len(found) + 1)}"]
    ratios = [
        f"| {name} | {' | '.join(Spread.ratio(case[below], case[above]).text() for case in found.values())} |"
        for name, (below, above) in RATIOS.items()
    ]
    times = [f"| {peer}, ms | {' | '.join(Spread.of(case[peer]).text(scale=1e3) for case in found.values())} |" for peer in PEERS]
    return "\n".join([*head, *ratios, "", *head, *times])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="two or more")
    parser.add_argument("--cases", nargs="+", choices=list(WORKLOADS), metavar="CASE", help=", ".join(WORKLOADS))
    parser.add_argument("--quick", action="store_true", help="a look whether it works: tiny, two rounds of short epochs")
    parser.add_argument("--save", metavar="NAME", help="of the files to write")
    parser.add_argument("--into", metavar="FOLDER", type=Path, default=HERE / "results", help="where --save writes")
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else max(2, arguments.rounds)
    facts = about(rounds)
    found: dict[str, Seconds] = {}
    for case in arguments.cases or (["tiny"] if arguments.quick else list(WORKLOADS)):
        began = time.monotonic()
        try:
            found[case] = measure(case, rounds, QUICK_BATCHES if arguments.quick else BATCHES[case])
        except PeerFailed as error:
            raise SystemExit(f"{case}: {error}") from error
        print(f"\n{case} ({time.monotonic() - began:.0f} s)\n\n{table({case: found[case]})}", flush=True)
        if arguments.save:  # after each case: what a later one may break is not lost
            arguments.into.mkdir(parents=True, exist_ok=True)
            header = "\n".join(f"- {key}: {value}" for key, value in facts.items())
            title = "# Whole epochs under launchers"
            text = f"{title}\n\n{header}\n\nMedians over rounds, quartiles in parentheses.\n\n{table(found)}\n"
            (arguments.into / f"{arguments.save}.md").write_text(text)
            (arguments.into / f"{arguments.save}.json").write_text(json.dumps({**facts, "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
