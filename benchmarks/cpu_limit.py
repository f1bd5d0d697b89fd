"""A cgroup, v1 or v2, whose processes together get a share of one core."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PERIOD_US = 100_000
"""As the kernel's default, and Docker's."""
EMPTY_S = 10.0


class NoCgroup(Exception):
    """None can be made here; the text says what was tried, and what to do."""


@contextmanager
def cpu_limit(cores: float, *, root: Path = Path("/")) -> Iterator[Path]:
    """The ``cgroup.procs`` of a new cgroup that may use ``cores`` cores; the cgroup is removed afterwards, also after an error.

    Args:
        cores: As a quota of every 0.1 s.
        root: Where /sys/fs/cgroup is looked up.

    Raises:
        NoCgroup: None can be made.
    """
    group = _make(root / "sys/fs/cgroup", int(cores * PERIOD_US))
    try:
        yield group / "cgroup.procs"
    finally:
        _remove(group)


def _make(mount: Path, quota_us: int) -> Path:
    ways = [
        (mount / name, {"cpu.cfs_period_us": f"{PERIOD_US}", "cpu.cfs_quota_us": f"{quota_us}"})
        for name in ("cpu,cpuacct", "cpu")
    ]
    ways += [(mount, {"cpu.max": f"{quota_us} {PERIOD_US}"})]
    tried = []
    for parent, settings in ways:
        if not (parent / "cgroup.procs").exists():
            tried.append(f"{parent} is no cgroup")
            continue
        group = parent / f"unisono-benchmark-{os.getpid()}"
        try:
            group.mkdir()
            for name, value in settings.items():
                # Not created: a cgroup has the files of its controllers from the start, or never.
                with (group / name).open("r+") as file:
                    file.write(value)
        except OSError as error:
            tried.append(str(error))
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        return group
    raise NoCgroup(
        f"no cgroup with a CPU quota can be made ({'; '.join(tried)}): run this as root on a machine whose /sys/fs/cgroup is "
        "writable and has the cpu controller"
    )


def _remove(group: Path) -> None:
    """Once its processes are gone; they have been told to end."""
    deadline = time.monotonic() + EMPTY_S
    while True:
        try:
            group.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
