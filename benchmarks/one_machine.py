"""Training on one machine: unisono against other ways to train the same model on the same global batch.

Every peer trains with the same optimizer (AdamW, fused), in processes of its own that are alive together. Peers take turns,
a few steps each, round after round; reported are medians and quartiles over rounds, the ratios to DDP and to plain PyTorch
with two threads, round by round, the share of the limit (``limit.py``, measured in the same rounds), and the memory of all
of a peer's processes. Before the rounds all train a few steps in earnest, and their losses are compared. With
``--save NAME`` tables, raw numbers and a picture go to ``benchmarks/results``::

    python benchmarks/one_machine.py --save 2026-11-23
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from limit import LIMIT, moved_bytes
from peers import DEFAULT, PEERS
from processes import Group, PeerFailed
from report import HERE, Case, about, limit_line, rows, save
from torch import nn
from workloads import WORKLOADS, Workload

ROUND_S, QUICK_ROUND_S = 0.3, 0.05
FIRST_STEPS = 3
QUICK_PEERS = ("DDP", "unisono, M = 2")
LOSS_TOLERANCE, BATCH_NORM_TOLERANCE = 0.001, 0.05
"""Relative. Peers differ by rounding; BatchNorm sees the whole batch, a half or a microbatch."""


def measure(workload: Workload, peers: list[str], rounds: int, round_s: float) -> Case:
    """Trains ``workload`` in all ``peers``, in turns.

    Raises:
        PeerFailed: A peer broke off after its start, or trains something else than the others.
    """
    case = Case(moved_bytes=moved_bytes(sum(p.numel() * p.itemsize for p in workload.model().parameters()), LIMIT.workers))
    with tempfile.TemporaryDirectory() as root:
        groups = {
            peer.name: Group(peer, workload.name, Path(root) / str(number))
            for number, peer in enumerate([*(PEERS[name] for name in peers), LIMIT])
        }
        try:
            limit = groups.pop(LIMIT.name)
            limit.ready()
            limit.run(FIRST_STEPS)
            _start(groups, case, workload)
            steps = _warm(groups, case, workload, round_s)
            shares = {what: max(2, round(round_s / limit.run(FIRST_STEPS, what))) for what in ("compute", "memory")}
            for _ in range(rounds):
                case.compute.append(limit.run(shares["compute"], "compute"))
                case.moving.append(limit.run(shares["memory"], "memory"))
                for peer, group in groups.items():
                    case.seconds.setdefault(peer, []).append(group.run(steps[peer]))
            case.memory = {peer: group.memory() for peer, group in groups.items()}
        finally:
            for group in [*groups.values(), limit]:
                group.close()
    return case


def _start(groups: dict[str, Group], case: Case, workload: Workload) -> None:
    """Waits for all peers, leaves out those that cannot start here, compares the losses of the others, and has them hold."""
    count = workload.count(workload.batch()[1])
    for peer, group in list(groups.items()):
        try:
            group.ready()
            group.run(FIRST_STEPS)
        except PeerFailed as error:
            case.left_out[peer] = str(error)
            groups.pop(peer).close()
            continue
        case.losses[peer] = group.loss() / count
        group.hold()
    if not case.losses:
        raise PeerFailed("no peer could start; the reasons:\n" + "\n".join(case.left_out.values()))
    normalized = any(isinstance(module, nn.BatchNorm2d) for module in workload.model().modules())
    low, high = min(case.losses.values()), max(case.losses.values())
    if high > low * (1 + (BATCH_NORM_TOLERANCE if normalized else LOSS_TOLERANCE)):
        raise PeerFailed(f"the peers do not train the same in the case {workload.name}: losses after a few steps {case.losses}")


def _warm(groups: dict[str, Group], case: Case, workload: Workload, round_s: float) -> dict[str, int]:
    """Steps of a turn of each peer, by the time of a few; holding, they must leave the loss as it was."""
    steps = {peer: max(2, round(round_s / group.run(FIRST_STEPS))) for peer, group in groups.items()}
    for peer, group in groups.items():
        loss = group.loss() / workload.count(workload.batch()[1])
        if abs(loss - case.losses[peer]) > LOSS_TOLERANCE * loss:
            raise PeerFailed(f"{peer} went on learning in the case {workload.name}: loss {case.losses[peer]}, then {loss}")
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="two or more")
    parser.add_argument("--cases", nargs="+", choices=list(WORKLOADS), metavar="CASE", help=", ".join(WORKLOADS))
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), metavar="PEER", help="; ".join(f'"{name}"' for name in PEERS))
    parser.add_argument("--quick", action="store_true", help="a look whether it works: tiny, two peers, two rounds")
    parser.add_argument("--save", metavar="NAME", help="of the files to write")
    parser.add_argument("--into", metavar="FOLDER", type=Path, default=HERE / "results", help="where --save writes")
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else max(2, arguments.rounds)
    wanted = arguments.peers or (QUICK_PEERS if arguments.quick else DEFAULT)
    missing = {name: reason for name in wanted if (reason := PEERS[name].missing)}
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}", flush=True)
    facts = about(rounds)
    cases: dict[str, Case] = {}
    for name in arguments.cases or (["tiny"] if arguments.quick else list(WORKLOADS)):
        began = time.monotonic()
        present = [peer for peer in wanted if peer not in missing]
        try:
            cases[name] = measure(WORKLOADS[name], present, rounds, QUICK_ROUND_S if arguments.quick else ROUND_S)
        except PeerFailed as error:
            raise SystemExit(f"{name}: {error}") from error
        show(name, cases[name], time.monotonic() - began)
        cases[name].left_out.update(missing)
        if arguments.save:  # after each case: what a later one may break is not lost
            save(arguments.into, arguments.save, facts, cases)


def show(name: str, case: Case, seconds: float) -> None:
    """Prints what was measured of one case."""
    print(f"\n{name} ({seconds:.0f} s): {limit_line(case)}", flush=True)
    print(f"  {'':26} {'ms a step':>26} {'over DDP':>20} {'over 2 threads':>20} {'of limit':>9} {'PSS, MiB':>9}")
    for peer, time_, over_ddp, over_plain, share, pss in rows(case):
        print(f"  {peer:26} {time_:>26} {over_ddp:>20} {over_plain:>20} {share:>9} {pss:>9}", flush=True)
    for peer, reason in case.left_out.items():
        print(f"  {peer} is left out: {reason}", flush=True)


if __name__ == "__main__":
    main()
