"""Kills a process that writes checkpoints at every call which changes the disk, and looks at what is left each time.

Run as `python crash_campaign.py FOLDER SCENARIO`; prints the number of instants. One process forks once for each
instant, so that torch is imported once.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from unisono.checkpoint.checkpoints import Checkpoints
from unisono.checkpoint.store import Store

DISK_CALLS = ("fsync", "ftruncate", "mkdir", "open", "remove", "rename", "replace", "rmdir", "unlink")


def write(root: Path, step: int, workers: int, *, keep: int = 1, generation: int = 0) -> None:
    checkpoints = Checkpoints(Store(root), keep=keep)
    files = dict(checkpoints.write_tensors(step, "model", model(step)))
    for rank in range(workers):
        files |= checkpoints.write_part(step, f"worker-{rank}", part(step, rank, workers, generation))
    checkpoints.commit(step, files, {"workers": workers, "generation": generation})


def model(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((3,), float(step))}


def part(step: int, rank: int, workers: int, generation: int) -> dict[str, Any]:
    return {"exp_avg": torch.full((2,), float(step + rank)), "who": (rank, workers, generation)}


def assert_whole(root: Path, allowed: set[tuple[int, int, int]]) -> tuple[int, int, int]:
    """The newest checkpoint is undamaged, one of `allowed` (step, workers, generation), and not mixed from two."""
    checkpoints = Checkpoints(Store(root), keep=1)
    newest = checkpoints.newest()
    assert newest is not None, "nothing is left"
    assert checkpoints.damaged == [], checkpoints.damaged
    for manifest in (root / "checkpoints").glob("*/checkpoint.json"):
        complete = checkpoints.open(int(manifest.parent.name.removeprefix("step-")))
        assert complete.damage() == [], "half removed, but still complete"
    step, workers, generation = newest.step, newest.info["workers"], newest.info["generation"]
    assert (step, workers, generation) in allowed, (step, workers, generation)
    assert newest.part_names("worker-") == [f"worker-{rank}" for rank in range(workers)]
    assert newest.tensors("model")["weight"].equal(model(step)["weight"])
    for rank in range(workers):
        found, expected = newest.part(f"worker-{rank}"), part(step, rank, workers, generation)
        assert found["who"] == expected["who"], (found, expected)
        assert found["exp_avg"].equal(expected["exp_avg"])
    return step, workers, generation


def crash_at(instant: int, scenario: Callable[[], None]) -> bool:
    """Runs `scenario` in a child that dies right before disk call number `instant`; False if it came to its end."""
    child = os.fork()
    if child == 0:
        calls = 0

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > instant:
                    os._exit(77)
                return real(*args, **options)

            return call

        for name in DISK_CALLS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            scenario()
        except BaseException as error:
            print(f"the scenario failed: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 77), f"child ended with {status}"
    return status == 77


def main(root: Path, name: str) -> None:
    # (what was there, what is written, which checkpoints may be the newest after a crash, and the one at the end)
    start, writing, allowed, last = {
        "next step": (
            [(1, 2, 0)],
            lambda run: write(run, 2, 3),
            {(1, 2, 0), (2, 3, 0)},
            (2, 3, 0),
        ),
        "the same step again, fewer workers": (
            [(2, 3, 0)],
            lambda run: write(run, 2, 2, generation=1),
            {(2, 3, 0), (2, 2, 1)},
            (2, 2, 1),
        ),
        "the same step again, more workers": (
            [(1, 1, 0), (2, 1, 0)],
            lambda run: write(run, 2, 2, generation=1),
            {(2, 1, 0), (2, 2, 1)},
            (2, 2, 1),
        ),
        "the same step twice again": (
            [(2, 2, 0), (2, 2, 1)],
            lambda run: write(run, 2, 2, generation=2),
            {(2, 2, 1), (2, 2, 2)},
            (2, 2, 2),
        ),
        "several steps": (
            [(1, 2, 0)],
            lambda run: [write(run, step, 1, keep=2) for step in (2, 3, 4)],
            {(1, 2, 0), (2, 1, 0), (3, 1, 0), (4, 1, 0)},
            (4, 1, 0),
        ),
    }[name]
    before = root / "before"
    for step, workers, generation in start:
        write(before, step, workers, generation=generation)
    instant, running, reached = 0, True, []
    while running:
        run = root / f"run-{instant}"
        shutil.copytree(before, run)
        running = crash_at(instant, lambda run=run: writing(run))
        reached.append(assert_whole(run, allowed))
        # The next start cleans up, writes all again, and ends with exactly the files of the last checkpoint.
        Store(run).clean()
        writing(run)
        assert assert_whole(run, {last}) == last
        assert_no_strays(run, last[0])
        shutil.rmtree(run)
        instant += 1
    ages = [(step, generation) for step, _, generation in reached]
    assert ages == sorted(ages), reached
    assert reached[-1] == last
    print(instant)


def assert_no_strays(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step}"
    manifest = json.loads((folder / "checkpoint.json").read_text())
    expected = {entry["file"] for entry in manifest["files"].values()} | {"checkpoint.json"}
    assert {child.name for child in folder.iterdir()} == expected


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
