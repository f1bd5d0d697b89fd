"""What the cgroups (v1 and v2) around this process allow: CPU quota, throttling, memory. Everything here is *local*.

Each function takes the root under which /proc and /sys/fs/cgroup are looked up, so that tests can show it machines that do not
exist. Every cgroup up to the mount's root limits this process. In a container their paths may be the host's, of which only the
mount's root is visible: files that are not there limit nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_UNLIMITED_BYTES = 2**60  # cgroup v1 writes "no limit" as the largest multiple of the page size


@dataclass(frozen=True, kw_only=True)
class Throttling:
    """How one cgroup was stopped because its CPU quota was used up, since it was made."""

    periods: int
    """Periods of the quota (usually 0.1 s each)."""
    throttled_periods: int
    """Those of them in which it was stopped."""
    throttled_s: float
    """How long it was stopped, in seconds, all cores together."""


def cpu_quota(root: Path = Path("/")) -> float:
    """The least CPU quota, in cores, of any of the cgroups; infinite without one."""
    return min((_quota(folder) for folder in _cgroups(root, "cpu")), default=math.inf)


def throttling(root: Path = Path("/")) -> list[Throttling]:
    """Of each cgroup that counts it, the innermost first."""
    found = []
    for folder in dict.fromkeys(folder.resolve() for folder in _cgroups(root, "cpu")):  # v1 has links: cpu to cpu,cpuacct
        fields = _fields(folder / "cpu.stat")
        if fields:
            # v2 counts microseconds, v1 nanoseconds.
            stopped_s = fields["throttled_usec"] / 1e6 if "throttled_usec" in fields else fields.get("throttled_time", 0) / 1e9
            periods, throttled = fields.get("nr_periods", 0), fields.get("nr_throttled", 0)
            found.append(Throttling(periods=periods, throttled_periods=throttled, throttled_s=stopped_s))
    return found


def memory(root: Path = Path("/")) -> tuple[int | None, int | None]:
    """The least memory limit of any of the cgroups, and the least that is left in any of them, in bytes; None: no limit.

    The cache of files counts as left: it makes room on demand.
    """
    limits: list[int] = []
    left: list[int] = []
    for folder in _cgroups(root, "memory"):
        for limit_name, used_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = (_read(folder / name).strip() for name in (limit_name, used_name))
            if limit.isdecimal() and int(limit) < _UNLIMITED_BYTES:
                limits.append(int(limit))
                if used.isdecimal():
                    cache = _fields(folder / "memory.stat").get(cache_name, 0)
                    left.append(max(0, int(limit) - int(used) + cache))
    return min(limits, default=None), min(left, default=None)


def _quota(folder: Path) -> float:
    """From v2's cpu.max ("QUOTA PERIOD" in microseconds, or "max PERIOD"), or v1's two files (-1: no limit)."""
    v1 = (_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))
    for quota, period in (_read(folder / "cpu.max").partition(" ")[::2], v1):
        if quota.strip().isdecimal() and period.strip().isdecimal() and int(period):
            return int(quota) / int(period)
    return math.inf


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of all cgroups (v2, or v1's for this controller) around this process, the innermost first."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        inside = PurePosixPath(path.lstrip("/"))
        mounts: tuple[str, ...] = ()
        if number == "0" and not controllers:
            mounts = ("",)
        elif controller in controllers.split(","):
            mounts = (controllers, controller)
        for mount in mounts:
            for group in (inside, *inside.parents):
                yield root / "sys/fs/cgroup" / mount / group


def _fields(file: Path) -> dict[str, int]:
    pairs = (line.split() for line in _read(file).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
