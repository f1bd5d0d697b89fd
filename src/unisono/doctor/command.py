"""What `unisono doctor` does: alone it starts two workers; as one of several that a launcher started, it is one of them."""

from __future__ import annotations

import sys

from unisono.doctor import local
from unisono.doctor.facts import Examination
from unisono.doctor.findings import Level, worst
from unisono.doctor.machine import read_worker
from unisono.doctor.report import as_json, findings, show
from unisono.world import World, room_for_workers


def doctor(world: World, *, workers: int | None, threads: int | None, run_dir: str, json: bool) -> int:
    """Examines, prints (rank 0 only), and returns the exit status: 1 if there is a problem, else 0. *collective*

    If the workers fail, only worker 0's status says so: it speaks for all.

    Args:
        world: Who takes part.
        workers: How many workers a run will have on this host; None: as `unisono run` would choose. Alone only.
        threads: Threads per worker; None: as the environment says. Alone only.
        run_dir: The run directory, a path or URL.
        json: Print JSON instead of a table.
    """
    if world.size > 1:
        return _take_part(world, run_dir, json=json)
    threads = threads or world.threads
    workers = workers or room_for_workers(threads)
    found = local.examine(run_dir=run_dir, workers=workers, threads=threads)
    if isinstance(found, str):  # what one process can say if the workers failed
        found = Examination(workers=[read_worker(world, planned=workers, threads=threads)], failure=found)
    return _print(found, json=json)


def _take_part(world: World, run_dir: str, *, json: bool) -> int:
    try:
        import torch

        from unisono.doctor.examination import connected, examine

        with connected(world, world.init_method or "env://") as (group, device):
            examination = examine(group, device, world, run_dir=run_dir)
            status = torch.tensor([_print(examination, json=json) if world.is_main else 0])
            # A launcher ends all workers once one has failed: none leaves before everything has been said.
            group.broadcast(status)
            return int(status)
    except Exception as error:  # whatever keeps workers apart is a finding
        failure = f"worker {world.rank} of {world.size} on {world.host}: {type(error).__name__}: {error}"
        if world.is_main:
            mine = read_worker(world, planned=world.local_size, threads=world.threads)
            return _print(Examination(workers=[mine], failure=failure), json=json)
        print(f"unisono doctor: {failure}", file=sys.stderr, flush=True)
        return 0  # else the launcher ends worker 0, which is about to fail too, before it has said so


def _print(examination: Examination, *, json: bool) -> int:
    found = findings(examination)
    if json:
        print(as_json(examination, found), flush=True)
    else:
        from rich.console import Console

        show(Console(), examination, found)
    return 1 if worst(found) == Level.PROBLEM else 0
