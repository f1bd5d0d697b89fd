"""Machines that do not exist, and what the doctor would have found on them."""

from __future__ import annotations

from typing import Any

from unisono.doctor.facts import BuildFacts, CpuCounters, Examination, Gpu, HostFacts, Links, Pair, StorageFacts, WorkerFacts

GIB = 2**30


def machine(**changes: Any) -> HostFacts:
    facts: dict[str, Any] = {
        "host": "alpha",
        "boot_id": "boot-1",
        "cores": 8,
        "affinity": list(range(8)),
        "quota": None,
        "memory": 64 * GIB,
        "memory_limit": None,
        "memory_free": 60 * GIB,
        "shm_size": 32 * GIB,
        "shm_free": 32 * GIB,
        "temporary_folder": "/tmp",
        "open_files_limit": 65536,
        "open_files_hard": 65536,
        "open_files": 10,
        "process_memory": 150_000_000,
        "variables": {},
    }
    return HostFacts(**(facts | changes))


def counters(**changes: Any) -> CpuCounters:
    names = ("time_s", "busy_s", "stolen_s", "total_s", "periods", "throttled_periods", "process_s")
    return CpuCounters(**(dict.fromkeys(names, 0) | changes))


def build(**changes: Any) -> BuildFacts:
    facts: dict[str, Any] = {
        "fingerprint": {
            "torch": "2.13.0",
            "mkl": "2024.2",
            "cpu_capability": "AVX512",
            "numpy": "2.4.6",
            "python": "CPython 3.11",
        },
        "threads": 1,
        "deterministic": False,
        "matmul_precision": "highest",
        "cuda": None,
        "gpus": [],
        "gpus_present": 0,
    }
    return BuildFacts(**(facts | changes))


def gpus(number: int, *, reach: bool = True) -> list[Gpu]:
    def others(one: int) -> list[int]:
        return [other for other in range(number) if other != one]

    return [
        Gpu(name="H100", memory=80 * GIB, peers=others(one) if reach else [], links={str(other): "NV18" for other in others(one)})
        for one in range(number)
    ]


def worker(rank: int = 0, **changes: Any) -> WorkerFacts:
    facts: dict[str, Any] = {
        "rank": rank,
        "host": "alpha",
        "planned": 2,
        "threads": 1,
        "device": "cpu",
        "machine": machine(),
        "build": build(),
        "before": counters(),
        "after": counters(time_s=2.0, busy_s=3.0, total_s=16.0, process_s=1.5),
    }
    return WorkerFacts(**(facts | changes))


def pair(first: int, second: int, *, rate: float = 5e9, small_s: float = 50e-6) -> Pair:
    return Pair(first=first, second=second, small_s=small_s, large_rate=rate, large_bytes=64 * 2**20)


def links(transport: str, pairs: list[Pair], *, barrier_s: float = 30e-6) -> Links:
    return Links(transport=transport, barrier_s=barrier_s, pairs=pairs)


def examination(**changes: Any) -> Examination:
    """Two workers of one host, and all is well."""
    facts: dict[str, Any] = {
        "workers": [worker(0), worker(1)],
        "links": [links("shared memory", [pair(0, 1)]), links("Gloo", [pair(0, 1, rate=1.5e9)])],
        "copy_rate": 6e9,
        "clock_offsets": [0.0, 0.0],
        "storage": StorageFacts(url="runs", small_s=0.001, rate=1e9, free=100 * GIB),
    }
    return Examination(**(facts | changes))


def two_hosts(**changes: Any) -> Examination:
    """A worker on each of two hosts, and all is well."""
    workers = [worker(0, planned=1), worker(1, planned=1, host="beta", machine=machine(host="beta", boot_id="boot-2"))]
    return examination(**({"workers": workers, "links": [links("Gloo", [pair(0, 1, rate=1.5e9)])]} | changes))
