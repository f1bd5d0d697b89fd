"""Two workers, one with half a core: the throughput of unisono and of DDP against the sum of what the workers reach alone.

A worker's speed is measured alone, under its own limit, in the same microbatches (unisono) or the same share (DDP) as in the
pair; the ideal is the sum of both speeds. All groups of processes are alive at once and take turns. Root only, or who else may
make a cgroup::

    python benchmarks/straggler.py --save 2026-11-23-straggler
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from cpu_limit import NoCgroup, cpu_limit
from peers import LEARNING_RATE, Made, Peer, Place, ddp, plain
from processes import Group, PeerFailed
from report import HERE, Spread, about
from workloads import WORKLOADS, Batch, Workload

import unisono

CASE = "gpt"
BATCH_SIZE = 48
FIRST_STEPS = 3


def _sequences() -> Batch:
    ids = torch.randint(0, 96, (BATCH_SIZE, 65), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _workload() -> Workload:
    return dataclasses.replace(WORKLOADS[CASE], batch=_sequences, batch_size=BATCH_SIZE)


def make_unisono(_: Workload, place: Place, *, microbatches: int) -> Made:
    """The Trainer with its own batches: it decides who computes how much."""
    workload = _workload()
    model = workload.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    trainer = unisono.Trainer(
        model,
        optimizer,
        lambda model, batch: (workload.loss(model(batch[0]), batch[1]), workload.count(batch[1])),
        batch_size=BATCH_SIZE,
        microbatches=microbatches,
        collective=_collective(place),
        sync=unisono.Exact(share_weights=True),  # as in fit(), where nobody else writes to them
    )
    batches: Iterator[Any] = trainer.batches(torch.utils.data.TensorDataset(*workload.batch()), epochs=10**6)
    return Made(model=model, steps={"step": lambda: trainer.step(next(batches)) and None}, optimizer=optimizer)


def _collective(place: Place) -> Any:
    """That of a launcher's workers on one host; None: alone."""
    if place.workers == 1:
        return None
    from unisono.collective.hierarchical import come_near
    from unisono.collective.torch_distributed import TorchDistributed

    nearest = come_near(TorchDistributed())
    if isinstance(nearest, str):
        raise RuntimeError(nearest)
    return nearest


def make_ddp(_: Workload, place: Place) -> Made:
    return ddp(_workload(), place)


def make_share(_: Workload, place: Place) -> Made:
    """Plain PyTorch on what a worker of DDP has: half of the batch."""
    workload = _workload()
    inputs, targets = (Place(0, 2).share(tensor) for tensor in workload.batch())
    return plain(dataclasses.replace(workload, batch=lambda: (inputs, targets)), place)


def enter(procs: str, slow: int, rank: int) -> None:
    """Puts this process into the cgroup, if it is the slow one."""
    if rank == slow:
        Path(procs).write_text("0")  # whoever writes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to train in a pair, and what a worker of it does alone."""

    name: str
    pair: Peer
    alone: Peer
    alone_samples: int
    """Of a step alone."""


def contenders(microbatches: list[int]) -> list[Contender]:
    found = []
    for count in microbatches:
        peer = Peer(name=f"unisono, M = {count}", make=functools.partial(make_unisono, microbatches=count))
        found.append(Contender(name=peer.name, pair=peer, alone=peer, alone_samples=BATCH_SIZE))
    pair, alone = Peer(name="DDP", make=make_ddp), Peer(name="plain, half of the batch", make=make_share)
    return [*found, Contender(name="DDP", pair=pair, alone=alone, alone_samples=BATCH_SIZE // 2)]


@dataclasses.dataclass(kw_only=True)
class Measured:
    """Samples a second, round by round."""

    pair: list[float] = dataclasses.field(default_factory=list)
    fast: list[float] = dataclasses.field(default_factory=list)
    """Alone, without a limit."""
    slow: list[float] = dataclasses.field(default_factory=list)
    """Alone, limited."""

    @property
    def ideal(self) -> list[float]:
        return [a + b for a, b in zip(self.fast, self.slow, strict=True)]


def measure(procs: Path, who: list[Contender], rounds: int, turn_s: float, settle_s: float) -> dict[str, Measured]:
    """All groups take turns.

    Raises:
        PeerFailed: One broke off.
    """
    found = {one.name: Measured() for one in who}
    with tempfile.TemporaryDirectory() as root, ExitStack() as stack:
        groups: dict[tuple[str, str], Group] = {}
        folders = (Path(root) / str(number) for number in itertools.count())
        for one in who:
            for what, peer, workers, slow in (("pair", one.pair, 2, 1), ("fast", one.alone, 1, -1), ("slow", one.alone, 1, 0)):
                group = Group(peer, CASE, next(folders), workers, functools.partial(enter, str(procs), slow))
                stack.callback(group.close)
                groups[one.name, what] = group
        steps = {key: _settle(group, settle_s if key[1] == "pair" else 0.0, turn_s) for key, group in groups.items()}
        for _ in range(rounds):
            for one in who:
                for what in ("pair", "fast", "slow"):
                    seconds = groups[one.name, what].run(steps[one.name, what])
                    samples = BATCH_SIZE if what == "pair" else one.alone_samples
                    getattr(found[one.name], what).append(samples / seconds)
    return found


def _settle(group: Group, settle_s: float, turn_s: float) -> int:
    """Steps of a turn. A pair trains for a while before: shares follow the speeds that the trainer sees."""
    group.ready()
    group.run(FIRST_STEPS)
    group.hold()
    began = time.monotonic()
    seconds = group.run(FIRST_STEPS)
    while time.monotonic() - began < settle_s:
        seconds = group.run(max(2, round(1.0 / seconds)))
    return max(2, round(turn_s / seconds))


def table(found: dict[str, Measured]) -> str:
    """Markdown; medians over rounds, quartiles in parentheses, ratios round by round."""
    lines = ["| | pair, samples/s | fast alone | slow alone | pair over the sum |", "|---|---|---|---|---|"]
    for name, one in found.items():
        speeds = " | ".join(Spread.of(values).text(1) for values in (one.pair, one.fast, one.slow))
        lines.append(f"| {name} | {speeds} | {Spread.ratio(one.pair, one.ideal).text()} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cores", type=float, default=0.5, help="that the slow worker may use, of each 0.1 s")
    parser.add_argument("--microbatches", nargs="+", type=int, default=[8, 16], metavar="M", help=f"divide {BATCH_SIZE}")
    parser.add_argument("--rounds", type=int, default=7, help="two or more")
    parser.add_argument("--turn", type=float, default=2.0, metavar="SECONDS", help="of a group in a round")
    parser.add_argument("--settle", type=float, default=20.0, metavar="SECONDS", help="that a pair trains before")
    parser.add_argument("--quick", action="store_true", help="does it work here? Two short rounds")
    parser.add_argument("--save", metavar="NAME", help="of the files to write")
    parser.add_argument("--into", metavar="FOLDER", type=Path, default=HERE / "results", help="where --save writes")
    arguments = parser.parse_args()
    rounds, turn_s, settle_s = max(2, arguments.rounds), arguments.turn, arguments.settle
    if arguments.quick:
        rounds, turn_s, settle_s = 2, 0.3, 0.0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without removing the cgroup
    try:
        with cpu_limit(arguments.cores) as procs:
            found = measure(procs, contenders(arguments.microbatches), rounds, turn_s, settle_s)
    except (NoCgroup, PeerFailed) as error:
        raise SystemExit(str(error)) from error
    print(table(found), flush=True)
    if arguments.save:
        facts = {"cores of the slow worker": arguments.cores, **about(rounds)}
        arguments.into.mkdir(parents=True, exist_ok=True)
        header = "\n".join(f"- {key}: {value}" for key, value in facts.items())
        text = f"# A straggler: {CASE}, {BATCH_SIZE} sequences\n\n{header}\n\n{table(found)}\n"
        (arguments.into / f"{arguments.save}.md").write_text(text)
        raw = {name: dataclasses.asdict(one) for name, one in found.items()}
        (arguments.into / f"{arguments.save}.json").write_text(json.dumps({**facts, "samples a second": raw}, indent=1) + "\n")


if __name__ == "__main__":
    main()
