"""The machine that this process has, and its processor time. Everything here is *local* and imports no torch."""

from __future__ import annotations

import math
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

import psutil

from unisono.doctor.facts import BuildFacts, CpuCounters, HostFacts, WorkerFacts
from unisono.system import cgroups
from unisono.world import World

VARIABLES = (
    *("OMP_NUM_THREADS", "OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "MKL_NUM_THREADS"),
    *("CUBLAS_WORKSPACE_CONFIG", "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "UNISONO_THREADS"),
)
"""Environment variables that say how many threads there are, where they run, and which network is used."""


def read_worker(world: World, *, planned: int, threads: int, device: str = "cpu", build: BuildFacts | None = None) -> WorkerFacts:
    """What this process finds out by itself, with the counters at this moment. *local*"""
    counters = read_cpu_counters()
    return WorkerFacts(
        rank=world.rank,
        host=world.host,
        planned=planned,
        threads=threads,
        device=device,
        machine=read_host(),
        build=build,
        before=counters,
        after=counters,
    )


def read_host(root: Path = Path("/")) -> HostFacts:
    """What this machine gives to this process. *local*

    Args:
        root: Where /proc and /sys/fs/cgroup are looked up for the limits of the cgroups.
    """
    process, memory = psutil.Process(), psutil.virtual_memory()
    own = process.memory_info()
    quota = cgroups.cpu_quota(root)
    limit, left = cgroups.memory(root)
    soft, hard = (None if files == psutil.RLIM_INFINITY else files for files in process.rlimit(psutil.RLIMIT_NOFILE))
    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    boot = Path("/proc/sys/kernel/random/boot_id")
    return HostFacts(
        host=socket.gethostname(),
        boot_id=boot.read_text().strip() if boot.exists() else "",
        cores=psutil.cpu_count() or 1,
        affinity=sorted(process.cpu_affinity()),
        quota=None if math.isinf(quota) else quota,
        memory=memory.total,
        memory_limit=limit,
        memory_free=memory.available if left is None else min(memory.available, left),
        shm_size=shm and shm.total,
        shm_free=shm and shm.free,
        temporary_folder=tempfile.gettempdir(),
        open_files_limit=soft,
        open_files_hard=hard,
        open_files=process.num_fds(),
        process_memory=own.rss - own.shared,
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def read_cpu_counters(root: Path = Path("/")) -> CpuCounters:
    """How much processor time has gone where so far. *local*

    Args:
        root: Where /proc and /sys/fs/cgroup are looked up for the throttling of the cgroups.
    """
    times = psutil.cpu_times()  # guest time is part of user time already
    busy_s = times.user + times.nice + times.system + times.irq + times.softirq
    stopped = max(((each.throttled_periods, each.periods) for each in cgroups.throttling(root)), default=(0, 0))
    return CpuCounters(
        time_s=time.monotonic(),
        busy_s=busy_s,
        stolen_s=times.steal,
        total_s=busy_s + times.idle + times.iowait + times.steal,
        periods=stopped[1],
        throttled_periods=stopped[0],  # of the most throttled cgroup
        process_s=time.process_time(),
    )
