"""What an examination finds out, as plain data that travels between workers as JSON. Sizes are in bytes. No torch."""

from __future__ import annotations

import json
import types
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """One host as one worker sees it."""

    host: str  # host name
    boot_id: str  # which start of which kernel this is; the same in all containers of one machine
    cores: int  # hardware threads that are online
    affinity: list[int]  # numbers of the cores on which this process may run
    quota: float | None  # CPU cores that the cgroups give; None: no limit
    memory: int  # memory of the machine
    memory_limit: int | None  # the least memory limit among the cgroups; None: no limit
    memory_free: int  # what this process can still get, under both
    shm_size: int | None  # size of /dev/shm; None if there is none
    shm_free: int | None  # what is free of it
    temporary_folder: str  # where this process puts temporary files
    open_files_limit: int | None  # how many files this process may have open; None: no limit
    open_files_hard: int | None  # to how many the process itself may raise that; None: no limit
    open_files: int  # how many it has open now
    process_memory: int  # resident memory that this process shares with no other
    variables: dict[str, str]  # those of `machine.VARIABLES` that are set

    @property
    def usable_cores(self) -> float:
        """Cores that this process can keep busy: the fewest of affinity and quota."""
        return len(self.affinity) if self.quota is None else min(len(self.affinity), self.quota)


@dataclass(frozen=True, kw_only=True)
class CpuCounters:
    """Counters that only grow: two readings, some seconds apart, say what happened in between. Times are core seconds."""

    time_s: float  # when they were read
    busy_s: float  # the machine worked (waiting for devices is not work)
    stolen_s: float  # it wanted to work, but the hypervisor ran somebody else
    total_s: float  # all of it, idle time included
    periods: int  # periods of the CPU quota (usually 0.1 s each)
    throttled_periods: int  # those in which this cgroup had to stop because its quota was used up
    process_s: float  # what this process has used itself


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU that PyTorch sees."""

    name: str  # model
    memory: int
    peers: list[int]  # numbers of the GPUs whose memory it reaches without the host's help
    links: dict[str, str]  # what connects it to each other GPU, by number, in the words of `nvidia-smi topo -m` (NV18, PIX, ...)


@dataclass(frozen=True, kw_only=True)
class BuildFacts:
    """PyTorch as it is installed, and the settings in force."""

    fingerprint: dict[str, str | int]  # what the bits of a run depend on, by field
    threads: int  # threads of PyTorch's kernels, as they are in force
    deterministic: bool  # whether nondeterministic kernels are forbidden
    matmul_precision: str  # "highest" if products of float32 are computed in float32
    cuda: str | None  # the CUDA (or ROCm) version that PyTorch was built for; None for a CPU build
    gpus: list[Gpu]  # GPUs that PyTorch sees
    gpus_present: int  # NVIDIA GPUs that the system shows, whether PyTorch sees them or not


@dataclass(frozen=True, kw_only=True)
class WorkerFacts:
    """What one worker has found out by itself."""

    rank: int
    host: str  # the host's name, with what sets it apart where two machines have the same
    planned: int  # how many workers a run has on this host
    threads: int  # threads per worker of a run
    device: str  # "cpu" or "cuda"
    machine: HostFacts
    build: BuildFacts | None  # None if the worker did not get as far as importing torch
    before: CpuCounters  # at the start of the examination
    after: CpuCounters  # at its end


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What connects two workers, both of which send and receive at the same time."""

    first: int  # rank
    second: int  # rank, greater than `first`
    small_s: float  # seconds for 64 KiB each way
    large_rate: float  # bytes per second, each way, of a large message
    large_bytes: int  # bytes in that message


@dataclass(frozen=True, kw_only=True)
class Links:
    """What one transport does."""

    transport: str  # "shared memory", "Gloo" or "NCCL"
    barrier_s: float  # seconds for all workers to meet
    pairs: list[Pair]  # each two workers, in order of rank


@dataclass(frozen=True, kw_only=True)
class StorageFacts:
    """What was found out about a run directory."""

    url: str  # the directory as the user gave it
    error: str = ""  # why it cannot be used; empty if it can
    small_s: float | None = None  # seconds to write a small file so that it survives a crash
    rate: float | None = None  # bytes per second of a large file, written in the same way
    free: int | None = None  # None on file systems that do not tell
    blind: list[int] = field(default_factory=list)  # ranks of the workers that do not see what worker 0 has written


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Everything that was found out."""

    workers: list[WorkerFacts]  # by rank; at least one
    links: list[Links] = field(default_factory=list)  # the transport that a run would use comes first
    no_shared_memory: str = ""  # why workers of one host cannot share memory; empty if they can, or have no need to
    copy_rate: float | None = None  # bytes per second that each worker copies within its memory, all at once
    clock_offsets: list[float] = field(default_factory=list)  # by how many seconds each worker's clock is ahead of worker 0's
    storage: StorageFacts | None = None  # the run directory
    failure: str = ""  # why the workers could not do all this

    @property
    def hosts(self) -> dict[str, list[WorkerFacts]]:
        """The workers of each host."""
        hosts: dict[str, list[WorkerFacts]] = {}
        for worker in self.workers:
            hosts.setdefault(worker.host, []).append(worker)
        return hosts


def dumps(facts: WorkerFacts | Links | Examination) -> bytes:
    """As JSON. *local*"""
    return json.dumps(asdict(facts), allow_nan=False).encode()


def loads(kind: type[T], data: bytes) -> T:
    """The facts of this kind that `dumps` wrote. *local*"""
    facts: T = _decode(kind, json.loads(data))
    return facts


def _decode(kind: Any, value: Any) -> Any:
    if isinstance(kind, types.UnionType) and value is not None:
        kind = get_args(kind)[0]  # X | None
    if get_origin(kind) is list:
        return [_decode(get_args(kind)[0], item) for item in value]
    if isinstance(value, dict) and is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _decode(hints[name], item) for name, item in value.items()})  # type: ignore[operator]
    return value
