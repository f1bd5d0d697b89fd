"""Facts about this machine and process, read from /proc and /sys/fs/cgroup. Everything here is *local* and imports no torch.

Each function takes the root under which it looks, so that tests can show it machines that do not exist. What cannot be
read is None.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from unisono.system.cgroups import cpu_quota

VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "MKL_NUM_THREADS",
    "NCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
    "OMP_PLACES",
    "OMP_PROC_BIND",
    "UNISONO_THREADS",
)
"""Environment variables that say how many threads there are, where they run, and which network is used."""

_UNLIMITED_BYTES = 2**60  # cgroup v1 writes "no limit" as the largest multiple of the page size


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One host as one worker sees it. Sizes are in bytes."""

    host: str
    """Host name."""
    boot_id: str
    """Which start of which kernel this is; equal for containers of one machine."""
    cores: int
    """CPU cores (hardware threads) that are online."""
    affinity: list[int]
    """Numbers of the cores on which this process may run."""
    quota: float | None
    """CPU cores that the cgroups give; None: no limit."""
    memory: int | None
    """Memory of the machine."""
    memory_limit: int | None
    """The least memory limit among the cgroups; None: no limit."""
    memory_free: int | None
    """What this process can still get, under both."""
    shm_size: int | None
    """Size of /dev/shm; None if it is not there."""
    shm_free: int | None
    """What is free of it."""
    temporary_folder: str
    """Where this process puts temporary files."""
    open_files_limit: int | None
    """How many files this process may have open; None: no limit."""
    open_files_hard: int | None
    """To how many the process itself may raise that; None: no limit."""
    open_files: int
    """How many it has open now."""
    process_memory: int | None
    """Memory that this process has for itself (anonymous resident memory)."""
    variables: dict[str, str]
    """Those of `VARIABLES` that are set."""

    @property
    def usable_cores(self) -> float:
        """Cores that this process can keep busy: the fewest of affinity and quota."""
        return min(float(len(self.affinity)), math.inf if self.quota is None else self.quota)


@dataclass(frozen=True, kw_only=True)
class Counters:
    """Counters that only grow: two of them, some seconds apart, say what happened in between."""

    time_s: float
    """When they were read."""
    busy_s: float
    """Core seconds in which the machine worked (waiting for devices is not work)."""
    stolen_s: float
    """Core seconds in which it wanted to work, but the hypervisor ran somebody else."""
    total_s: float
    """Core seconds in all, idle ones included."""
    periods: int
    """Periods of the CPU quota (usually 0.1 s each)."""
    throttled_periods: int
    """Periods in which this cgroup had to stop because its quota was used up."""
    process_s: float
    """Core seconds that this process has used itself."""


def read_machine(root: Path = Path("/")) -> Machine:
    """What this machine gives to this process. *local*"""
    status = _fields(root / "proc/self/status")
    memory = _fields(root / "proc/meminfo")
    quota = cpu_quota(root)
    limit, left = _cgroup_memory(root)
    available = _kib(memory.get("MemAvailable"))
    free = [value for value in (available, left) if value is not None]
    soft, hard = _open_files(root)
    cores = len(re.findall(r"^cpu\d+ ", _read(root / "proc/stat"), re.MULTILINE)) or os.cpu_count() or 1
    shm = _disk(root / "dev/shm")
    return Machine(
        host=_read(root / "proc/sys/kernel/hostname").strip() or socket.gethostname(),
        boot_id=_read(root / "proc/sys/kernel/random/boot_id").strip(),
        cores=cores,
        affinity=_numbers(status.get("Cpus_allowed_list", "")) or list(range(cores)),
        quota=None if math.isinf(quota) else quota,
        memory=_kib(memory.get("MemTotal")),
        memory_limit=limit,
        memory_free=min(free) if free else None,
        shm_size=shm[0],
        shm_free=shm[1],
        temporary_folder=tempfile.gettempdir(),
        open_files_limit=soft,
        open_files_hard=hard,
        open_files=_count(root / "proc/self/fd"),
        process_memory=_kib(status.get("RssAnon")),
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def read_counters(root: Path = Path("/")) -> Counters:
    """How much processor time has gone where so far. *local*"""
    line = re.search(r"^cpu +(.*)$", _read(root / "proc/stat"), re.MULTILINE)
    # user nice system idle iowait irq softirq steal; guest time, which follows, is part of user time already.
    ticks = [int(text) for text in line[1].split()[:8]] if line else []
    ticks += [0] * (8 - len(ticks))
    per_second = os.sysconf("SC_CLK_TCK")
    periods, throttled = _throttling(root)
    return Counters(
        time_s=time.monotonic(),
        busy_s=(sum(ticks) - ticks[3] - ticks[4] - ticks[7]) / per_second,
        stolen_s=ticks[7] / per_second,
        total_s=sum(ticks) / per_second,
        periods=periods,
        throttled_periods=throttled,
        process_s=time.process_time(),
    )


def _cgroup_memory(root: Path) -> tuple[int | None, int | None]:
    """The least limit around this process, and the least that is left of any: the cache of files makes room on demand."""
    limits: list[int] = []
    left: list[int] = []
    for folder in _cgroups(root, "memory"):
        for limit_name, used_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = _read(folder / limit_name).strip()
            if not limit.isdecimal() or int(limit) >= _UNLIMITED_BYTES:
                continue
            limits.append(int(limit))
            used = _read(folder / used_name).strip()
            cache = re.search(rf"^{cache_name} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
            if used.isdecimal():
                left.append(max(0, int(limit) - int(used) + (int(cache[1]) if cache else 0)))
    return min(limits, default=None), min(left, default=None)


def _throttling(root: Path) -> tuple[int, int]:
    """Periods, and those in which the most throttled cgroup around this process was stopped."""
    found = [(0, 0)]
    for folder in _cgroups(root, "cpu"):
        values = dict(line.split(maxsplit=1) for line in _read(folder / "cpu.stat").splitlines() if " " in line)
        found.append((int(values.get("nr_throttled", 0)), int(values.get("nr_periods", 0))))
    throttled, periods = max(found)
    return periods, throttled


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of all cgroups (v2, or v1's for this controller) around this process, the innermost first."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        # In a container the path may be the host's, of which only the mount's root is visible.
        inside = PurePosixPath(path.lstrip("/"))
        mounts: tuple[str, ...] = ()
        if number == "0" and not controllers:
            mounts = ("",)
        elif controller in controllers.split(","):
            mounts = (controller,) if controller == controllers else (controllers, controller)
        for mount in mounts:
            for group in (inside, *inside.parents):
                yield root / "sys/fs/cgroup" / mount / group


def _open_files(root: Path) -> tuple[int | None, int | None]:
    found = re.search(r"^Max open files +(\S+) +(\S+)", _read(root / "proc/self/limits"), re.MULTILINE)
    texts = found.groups() if found else ("", "")
    soft, hard = (int(text) if text.isdecimal() else None for text in texts)
    return soft, hard


def _numbers(text: str) -> list[int]:
    """From "0-2,5" to 0, 1, 2, 5."""
    numbers: list[int] = []
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _fields(file: Path) -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(":") for line in _read(file).splitlines())}


def _kib(text: str | None) -> int | None:
    number = (text or "").partition(" ")[0]
    return int(number) * 1024 if number.isdecimal() else None


def _disk(folder: Path) -> tuple[int | None, int | None]:
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None, None
    return usage.total, usage.free


def _count(folder: Path) -> int:
    try:
        return sum(1 for _ in folder.iterdir())
    except OSError:
        return 0


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
