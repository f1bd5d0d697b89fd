"""What an examination finds out, as plain data that travels between workers as JSON. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from unisono.doctor.facts import Counters, Machine
from unisono.doctor.storage import Storage


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU that PyTorch sees."""

    name: str
    """Model."""
    memory: int
    """Bytes."""
    peers: list[int]
    """Numbers of the GPUs whose memory it reaches without the host's help."""
    links: dict[str, str]
    """What lies between it and each other GPU, by number, in the words of `nvidia-smi topo -m` (NV18, PIX, SYS, ...)."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """What a worker's numbers stand on."""

    fingerprint: dict[str, str | int]
    """What the bits of a run depend on, by field."""
    threads: int
    """Threads of PyTorch's kernels, as they are in force."""
    deterministic: bool
    """Whether nondeterministic kernels are forbidden."""
    matmul_precision: str
    """"highest" if products of float32 are computed in float32."""
    cuda: str | None
    """The CUDA (or ROCm) version that PyTorch was built for; None for a CPU build."""
    gpus: list[Gpu]
    """GPUs that PyTorch sees."""
    gpus_present: int
    """NVIDIA GPUs that the system shows, whether PyTorch sees them or not."""


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One worker's facts."""

    rank: int
    """Its number."""
    host: str
    """Its host: the name, with what sets it apart where two machines have the same."""
    planned: int
    """How many workers a run has on this host."""
    threads: int
    """Threads per worker of a run."""
    device: str
    """"cpu" or "cuda"."""
    machine: Machine
    """The host, as this worker sees it."""
    build: Build | None
    """PyTorch; None if the worker did not get so far."""
    before: Counters
    """At the start of the examination."""
    after: Counters
    """At its end."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What lies between two workers, both of which send and receive at the same time."""

    first: int
    """Rank of the one."""
    second: int
    """Rank of the other."""
    small_s: float
    """Seconds for 64 KiB each way."""
    large_rate: float
    """Bytes per second, each way, of a large message."""
    large_bytes: int
    """Bytes in that message."""


@dataclass(frozen=True, kw_only=True)
class Links:
    """What one transport does."""

    transport: str
    """"shared memory", "Gloo", "NCCL", or "TCP": no transport of a run, but what Gloo is measured against."""
    barrier_s: float
    """Seconds for all workers to meet; for TCP, for a byte to go there and back."""
    pairs: list[Pair]
    """Each two workers, in order of rank; those that could not be measured are left out."""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Everything that was found out."""

    workers: list[Worker]
    """By rank. At least one."""
    links: list[Links] = field(default_factory=list)
    """The transport that a run would use comes first."""
    no_shared_memory: str = ""
    """Why workers of one host cannot share memory; empty if they can, or have no need to."""
    streams: Links | None = None
    """Plain TCP between the same workers."""
    copy_rate: float | None = None
    """Bytes per second that each worker copies within its memory, all at once."""
    clock_offsets: list[float] = field(default_factory=list)
    """By how many seconds each worker's clock is ahead of worker 0's."""
    storage: Storage | None = None
    """The run directory."""
    failure: str = ""
    """Why the workers could not do all this."""

    @property
    def hosts(self) -> dict[str, list[Worker]]:
        """The workers of each host."""
        hosts: dict[str, list[Worker]] = {}
        for worker in self.workers:
            hosts.setdefault(worker.host, []).append(worker)
        return hosts


def dumps(record: Worker | Examination) -> str:
    """As JSON. *local*"""
    return json.dumps(asdict(record), allow_nan=False)


def loads_worker(text: str) -> Worker:
    """The worker that `dumps` wrote. *local*"""
    return _worker(json.loads(text))


def loads_examination(text: str) -> Examination:
    """The examination that `dumps` wrote. *local*"""
    plain = json.loads(text)
    return Examination(
        **{
            **plain,
            "workers": [_worker(worker) for worker in plain["workers"]],
            "links": [_links(links) for links in plain["links"]],
            "streams": _links(plain["streams"]) if plain["streams"] else None,
            "storage": Storage(**plain["storage"]) if plain["storage"] else None,
        }
    )


def _links(plain: dict[str, Any]) -> Links:
    return Links(**{**plain, "pairs": [Pair(**pair) for pair in plain["pairs"]]})


def _worker(plain: dict[str, Any]) -> Worker:
    build = plain["build"]
    return Worker(
        **{
            **plain,
            "machine": Machine(**plain["machine"]),
            "build": Build(**{**build, "gpus": [Gpu(**gpu) for gpu in build["gpus"]]}) if build else None,
            "before": Counters(**plain["before"]),
            "after": Counters(**plain["after"]),
        }
    )
