"""What the workers find out together: facts of each, links between them, clocks, and the run directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch

from unisono.collective.base import Collective
from unisono.collective.shared_memory import SharedMemory
from unisono.collective.torch_distributed import TorchDistributed
from unisono.doctor import storage
from unisono.doctor.build import read_build
from unisono.doctor.facts import read_counters, read_machine
from unisono.doctor.links import clock_offsets, copy_rate, fitting_bytes, measure_links
from unisono.doctor.records import Examination, Links, Worker, dumps, loads_worker
from unisono.doctor.streams import measure_streams, own_address
from unisono.errors import UnisonoError
from unisono.training.setup import prepare_process
from unisono.world import SLURM, World

CONNECT_S = 60.0
"""How long a worker waits for another one: on a cold network disk it takes long to import torch."""

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would look like. The same on all workers."""

    run_dir: str
    """The run directory, a path or URL."""
    workers: int | None = None
    """Workers on each host; None: as many as take part in the examination."""


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


def examine(group: Collective, device: torch.device, world: World, plan: Plan) -> Examination:
    """Everything, from facts to storage. *collective*

    Args:
        group: The workers' connection through torch.distributed.
        device: This worker's device.
        world: Who takes part.
        plan: What a run would look like.

    Returns:
        On worker 0 everything; on the others all but the storage's speed.
    """
    before = read_counters()
    mine = Worker(
        rank=world.rank,
        host=world.host,
        planned=plan.workers or world.local_size,
        threads=world.threads,
        device=device.type,
        machine=read_machine(),
        build=read_build(threads=world.threads, device=device),
        before=before,
        after=before,
    )
    nbytes = min(fitting_bytes(world.size, worker.machine.memory_free) for worker in _gather(group, mine))
    links, no_shared_memory = _examine_links(group, device, world, nbytes)
    examination = Examination(
        workers=[mine],
        links=links,
        no_shared_memory=no_shared_memory,
        streams=measure_streams(group, _address(world), large_bytes=nbytes),
        copy_rate=copy_rate(group, nbytes),
        clock_offsets=clock_offsets(group),
        storage=_examine_storage(group, world, plan.run_dir),
    )
    # The counters once more, now that all has been done which they are to cover.
    return replace(examination, workers=with_distinct_hosts(_gather(group, replace(mine, after=read_counters()))))


def with_distinct_hosts(workers: list[Worker]) -> list[Worker]:
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


def _gather(group: Collective, mine: Worker) -> list[Worker]:
    return [loads_worker(text.decode()) for text in group.all_gather_bytes(dumps(mine).encode())]


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


def _address(world: World) -> str | None:
    try:
        return own_address(world)
    except OSError:
        return None


def _examine_storage(group: Collective, world: World, url: str) -> storage.Storage:
    """Worker 0 measures. Then it writes a file, and the others say whether they see it."""
    found = storage.measure(url) if world.is_main else storage.Storage(url=url)
    with ExitStack() as stack:
        name = ""
        if world.is_main and not found.error:
            try:
                store, name = stack.enter_context(storage.probing(url))
                store.write(name, b"?")
            except (UnisonoError, OSError) as error:
                found, name = replace(found, error=storage.reason(error)), ""
        name = group.all_gather_bytes(name.encode())[0].decode()
        blind = bool(name) and not world.is_main and not storage.sees(url, name)
        answers = group.all_gather_bytes(b"blind" if blind else b"")
    return replace(found, blind=[rank for rank, answer in enumerate(answers) if answer])
