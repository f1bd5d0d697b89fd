"""What the workers find out together: facts of each, links between them, clocks, and the run directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch

from unisono.collective.base import Collective
from unisono.collective.shared_memory import SharedMemory
from unisono.collective.torch_distributed import TorchDistributed
from unisono.doctor.build import read_build
from unisono.doctor.facts import Examination, Links, StorageFacts, WorkerFacts, dumps, loads
from unisono.doctor.links import clock_offsets, copy_rate, fitting_bytes, measure_links
from unisono.doctor.machine import read_cpu_counters, read_worker
from unisono.doctor.storage import measured, sees
from unisono.training.setup import prepare_process
from unisono.world import SLURM, World

CONNECT_S = 60.0
"""How long a worker waits for another one: on a cold network disk it takes long to import torch."""

_CPU = torch.device("cpu")


@contextmanager
def connected(world: World, init_method: str) -> Iterator[tuple[Collective, torch.device]]:
    """The workers' connection through torch.distributed, and this worker's device. *collective*

    Args:
        world: Who takes part.
        init_method: Where they meet.

    Raises:
        Exception: They did not find each other, in whatever way the backend says so.
    """
    device = _device(world)
    prepare_process(world, device)  # the settings that a run has
    group = TorchDistributed.connect(
        rank=world.rank, size=world.size, device=device, init_method=init_method, timeout_s=CONNECT_S
    )
    try:
        yield group, device
    finally:
        group.close()


def examine(group: Collective, device: torch.device, world: World, *, run_dir: str, workers: int | None = None) -> Examination:
    """Everything, from facts to storage. *collective*

    Args:
        group: The workers' connection through torch.distributed.
        device: This worker's device.
        world: Who takes part.
        run_dir: The run directory, a path or URL.
        workers: How many workers a run has on each host; None: as many as take part in the examination.

    Returns:
        On worker 0 everything; on the others all but the storage's speed.
    """
    build = read_build(threads=world.threads, device=device)
    mine = read_worker(world, planned=workers or world.local_size, threads=world.threads, device=device.type, build=build)
    nbytes = min(fitting_bytes(world.size, worker.machine.memory_free) for worker in _gather(group, mine))
    links, no_shared_memory = _examine_links(group, device, world, nbytes)
    examination = Examination(
        workers=[mine],
        links=links,
        no_shared_memory=no_shared_memory,
        copy_rate=copy_rate(group, nbytes),
        clock_offsets=clock_offsets(group),
        storage=_examine_storage(group, world, run_dir),
    )
    # The counters once more, now that everything has been done that they are to cover.
    return replace(examination, workers=with_distinct_hosts(_gather(group, replace(mine, after=read_cpu_counters()))))


def with_distinct_hosts(workers: list[WorkerFacts]) -> list[WorkerFacts]:
    """Tells machines of the same name (localhost, or that of their image) apart. *local*"""
    boots: dict[str, set[str]] = {}
    for worker in workers:
        boots.setdefault(worker.host, set()).add(worker.machine.boot_id)
    return [
        replace(worker, host=f"{worker.host} ({worker.machine.boot_id[:8]})") if len(boots[worker.host]) > 1 else worker
        for worker in workers
    ]


def _device(world: World) -> torch.device:
    """As the trainer chooses; but where there are too few GPUs the workers talk on the CPU, and the findings say so."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if world.launcher == SLURM and found == 1:
        return torch.device("cuda", 0)  # Slurm shows each task its own GPU only
    return torch.device("cuda", world.local_rank) if found >= world.local_size else _CPU


def _gather(group: Collective, mine: WorkerFacts) -> list[WorkerFacts]:
    return [loads(WorkerFacts, data) for data in group.all_gather_bytes(dumps(mine))]


def _examine_links(group: Collective, device: torch.device, world: World, nbytes: int) -> tuple[list[Links], str]:
    """The transports as the trainer would choose among them, and why there is no shared memory."""
    links: list[Links] = []
    shared: SharedMemory | str = ""
    if device.type == "cpu" and world.local_size == world.size:
        shared = SharedMemory.meet(world.rank, world.size, group.all_gather_bytes)
    if isinstance(shared, SharedMemory):
        links.append(measure_links(shared, transport="shared memory", device=_CPU, large_bytes=nbytes, in_place=True))
        shared.close()
    if device.type == "cuda":
        links.append(measure_links(group, transport="NCCL", device=device, large_bytes=nbytes))
    links.append(measure_links(group, transport="Gloo", device=_CPU, large_bytes=nbytes))
    return links, shared if isinstance(shared, str) else ""


def _examine_storage(group: Collective, world: World, url: str) -> StorageFacts:
    """Worker 0 measures and leaves a file until the others have said whether they see it."""
    with measured(url) if world.is_main else nullcontext((StorageFacts(url=url), "")) as (facts, written):
        name = group.all_gather_bytes(written.encode())[0].decode()
        blind = bool(name) and not world.is_main and not sees(url, name)
        answers = group.all_gather_bytes(b"blind" if blind else b"")
    return replace(facts, blind=[rank for rank, answer in enumerate(answers) if answer])
