"""What happens after SIGKILL of a worker: unisono, torchrun with a checkpoint after each step, and torchft, in one table.

All train the same model on the same samples with the same number of workers. In each round every system has one run, in which
random workers (also the first) are killed at random moments, one after the other. Each run becomes a file in ``--pieces``; runs
that are there are not made again, so that a long measurement may be made of short ones::

    python benchmarks/recovery.py --save 2026-11-23-recovery                 # everything, an hour on 2 cores
    python benchmarks/recovery.py --goodput --save 2026-11-23-goodput        # a kill every 15 s, every 60 s
    python benchmarks/recovery.py --pieces FOLDER --next 1                   # only the next run that is missing
    python benchmarks/recovery.py --quick                                    # does it work here?
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recovery_report import document
from recovery_runs import BATCH_SIZE, EDGE_STEPS, RunFailed, kills, steady, steps_of
from recovery_systems import SYSTEMS
from report import HERE, about

DEFAULT = ("unisono", "torchrun", "torchft", "torchft, 1 s")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One run that is to be made."""

    kind: str
    """"kills" or "goodput"."""
    system: str
    workers: int
    round: int
    """Also the seed of what is killed, and when."""
    number: int
    """Kills; 0 is the undisturbed run."""
    steps: int = 0
    edge: int = EDGE_STEPS
    """Steps before the first kill and after the last."""
    interval: float = 0.0
    """Seconds between kills."""
    calm: float = 0.0
    """Seconds before the first one."""

    @property
    def name(self) -> str:
        what = self.kind if self.number else "undisturbed"
        interval = f"-{self.interval:g}s" if self.interval else ""
        return f"{what}-{self.workers}{interval}-{self.round}-{self.system.replace(', ', '-').replace(' ', '-')}.json"

    def measure(self) -> dict[str, Any]:
        """What came of it; ``failed`` says why nothing did."""
        system = SYSTEMS[self.system]
        try:
            if self.kind == "goodput":
                found = steady(system, self.workers, self.interval, self.number, self.calm, self.round)
            else:
                found = kills(system, self.workers, self.number, self.round, self.steps, self.edge)
        except (RunFailed, ValueError) as error:
            found = {"failed": " ".join(str(error).split())[:1000]}
        return {**dataclasses.asdict(self), "date": datetime.datetime.now().isoformat(timespec="seconds"), **found}


def plans(systems: Sequence[str], workers: Sequence[int], rounds: int, number: int) -> list[Plan]:
    """The undisturbed runs, then round after round; systems take turns."""
    return [
        Plan(
            kind="kills", system=name, workers=w, round=turn, number=number if turn else 0, steps=steps_of(SYSTEMS[name], number)
        )
        for w in workers
        for turn in range(rounds + 1)
        for name in systems
    ]


def goodput_plans(
    systems: Sequence[str], workers: Sequence[int], intervals: Sequence[float], number: int, calm: float
) -> list[Plan]:
    """Systems take turns."""
    return [
        Plan(kind="goodput", system=name, workers=w, round=1, number=number, interval=interval, calm=calm)
        for w in workers
        for interval in intervals
        for name in systems
    ]


def make(todo: Sequence[Plan], folder: Path, at_most: int | None) -> list[dict[str, Any]]:
    """Makes the runs that are missing, some of them if ``at_most`` says so; all that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [plan for plan in todo if not (folder / plan.name).exists()]
    for plan in missing[:at_most]:
        began = time.monotonic()
        found = plan.measure()
        (folder / plan.name).write_text(json.dumps(found, indent=1) + "\n")
        print(f"{plan.name}: {_brief(found)} ({time.monotonic() - began:.0f} s)", flush=True)
    left = len(missing[at_most:]) if at_most is not None else 0
    print(f"{len(todo) - left} of {len(todo)} runs are there", flush=True)
    return [json.loads((folder / plan.name).read_text()) for plan in todo if (folder / plan.name).exists()]


def _brief(found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"broke off: {found['failed'][:300]}"
    if found["kind"] == "goodput":
        return f"goodput {found['goodput']:.1%}"
    return (
        "recovery " + ", ".join(f"{one['recovery']:.2f} s" for one in found["recoveries"]) + f"; m {1e3 * found['usual']:.0f} ms"
    )


def save(folder: Path, name: str, pieces: Sequence[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Writes ``name.md`` and ``name.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(document(facts, pieces))
    runs = ",\n".join(json.dumps(piece) for piece in pieces)
    (folder / f"{name}.json").write_text(f'{json.dumps(facts, indent=1)[:-2]},\n "runs": [\n{runs}\n]}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=DEFAULT, metavar="SYSTEM", help=", ".join(SYSTEMS))
    parser.add_argument("--workers", nargs="+", type=int, help=f"divide {BATCH_SIZE}; default: 3 5, for goodput 3")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each system with each number of workers")
    parser.add_argument("--kills", type=int, help="in each run; default: 3, for goodput 6")
    parser.add_argument("--goodput", action="store_true", help="kill at fixed intervals instead")
    parser.add_argument("--intervals", nargs="+", type=float, default=[15.0, 60.0], metavar="SECONDS", help="for goodput")
    parser.add_argument("--calm", type=float, default=15.0, metavar="SECONDS", help="for goodput: before the first kill")
    parser.add_argument("--quick", action="store_true", help="one short run of torchrun with one kill")
    parser.add_argument("--pieces", type=Path, metavar="FOLDER", help="keep each run here, and make none that is there")
    parser.add_argument("--next", type=int, metavar="N", help="only the next N runs that are missing")
    parser.add_argument("--save", metavar="NAME", help="of the files to write")
    parser.add_argument("--into", metavar="FOLDER", type=Path, default=HERE / "results", help="where --save writes")
    arguments = parser.parse_args()
    workers = arguments.workers or ([3] if arguments.goodput else [3, 5])
    if any(w < 2 or BATCH_SIZE % w for w in workers):
        parser.error(f"--workers must be 2 or more and divide the batch of {BATCH_SIZE} samples")
    systems = []
    for name in ("torchrun",) if arguments.quick else arguments.systems:
        if reason := SYSTEMS[name].missing:
            print(f"{name} is left out: {reason}", flush=True)
        else:
            systems.append(name)
    if arguments.goodput:
        todo = goodput_plans(systems, workers, arguments.intervals, arguments.kills or 6, arguments.calm)
    else:
        todo = plans(systems, workers, arguments.rounds, arguments.kills or 3)
    if arguments.quick:
        todo = [Plan(kind="kills", system=systems[0], workers=2, round=1, number=1, steps=50, edge=12)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending what was started
    with tempfile.TemporaryDirectory(prefix="pieces-") as scratch:
        pieces = make(todo, arguments.pieces or Path(scratch), arguments.next)
    facts = {key: value for key, value in about(arguments.rounds).items() if not (arguments.goodput and key == "rounds")}
    print(document(facts, pieces))
    if arguments.save:
        save(arguments.into, arguments.save, pieces, facts)


if __name__ == "__main__":
    main()
