"""The machine as psutil and the cgroups show it: this one, and machines that do not exist."""

from __future__ import annotations

import math
import os
import resource
import socket
from pathlib import Path

import psutil
import pytest

from unisono.doctor.machine import VARIABLES, read_cpu_counters, read_host

STAT = "cpu  100 0 50 800 40 0 5 5 0 0\ncpu0 50 0 25 400 20 0 3 2 0 0\ncpu1 50 0 25 400 20 0 2 3 0 0\nintr 7\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    """A made-up /proc and /sys."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_this_machine_can_be_read() -> None:
    found = read_host()
    assert (found.host, found.cores) == (socket.gethostname(), os.sysconf("SC_NPROCESSORS_ONLN"))
    assert found.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert sorted(os.sched_getaffinity(0)) == found.affinity
    assert 0 < found.memory_free <= found.memory
    assert 0 < found.process_memory < found.memory
    limits = tuple(None if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    assert (found.open_files_limit, found.open_files_hard) == limits
    assert (found.open_files_limit or math.inf) > found.open_files > 2
    assert (found.shm_size is None) == (not Path("/dev/shm").exists())
    assert read_cpu_counters().total_s > 0


def test_a_process_may_be_bound_to_some_of_the_cores() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        found = read_host(Path("/nowhere"))
    finally:
        os.sched_setaffinity(0, before)
    assert (found.affinity, found.usable_cores) == ([min(before)], 1.0)


def test_without_cgroups_there_are_no_limits(tmp_path: Path) -> None:
    found = read_host(tree(tmp_path, {"proc/self/cgroup": "0::/\n"}))
    assert (found.quota, found.memory_limit) == (None, None)
    assert found.usable_cores == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    "files",
    [
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            "sys/fs/cgroup/outer/cpu.max": "50000 100000\n",
            "sys/fs/cgroup/outer/memory.max": "500000\n",
            "sys/fs/cgroup/outer/memory.current": "450000\n",
            "sys/fs/cgroup/outer/memory.stat": "anon 1\ninactive_file 100000\n",
            "sys/fs/cgroup/outer/inner/cpu.max": "max 100000\n",
            "sys/fs/cgroup/outer/inner/memory.max": "max\n",
            "sys/fs/cgroup/outer/inner/memory.current": "400000\n",
        },
        {
            "proc/self/cgroup": "5:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "500000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "400000\n",
            "sys/fs/cgroup/memory/memory.stat": "inactive_file 7\ntotal_inactive_file 50000\n",
        },
    ],
    ids=["version 2", "version 1"],
)
def test_the_least_limit_of_the_cgroups_counts(tmp_path: Path, files: dict[str, str]) -> None:
    found = read_host(tree(tmp_path, files))
    assert (found.quota, found.usable_cores) == (0.5, 0.5)
    # The cache of files makes room when memory is wanted.
    assert (found.memory_limit, found.memory_free) == (500_000, 150_000)


def test_the_largest_number_of_version_1_means_no_limit(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "5:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
    assert read_host(tree(tmp_path, files)).memory_limit is None


def test_counters_divide_processor_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tree(tmp_path, {"proc/stat": STAT}) / "proc"))
    found = read_cpu_counters(tmp_path)
    second = os.sysconf("SC_CLK_TCK")
    assert found.busy_s * second == pytest.approx(155)
    assert found.stolen_s * second == pytest.approx(5)
    assert found.total_s * second == pytest.approx(1000)
    assert (found.periods, found.throttled_periods) == (0, 0)


@pytest.mark.parametrize(
    ("cgroup", "folder"), [("0::/job\n", ""), ("3:cpu,cpuacct:/job\n", "cpu,cpuacct/"), ("3:cpu,cpuacct:/job\n", "cpu/")]
)
def test_throttling_is_that_of_the_most_throttled_cgroup(tmp_path: Path, cgroup: str, folder: str) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": cgroup,
            f"sys/fs/cgroup/{folder}cpu.stat": "nr_periods 0\nnr_throttled 0\n",
            f"sys/fs/cgroup/{folder}job/cpu.stat": "usage_usec 5\nnr_periods 200\nnr_throttled 30\nthrottled_usec 9\n",
        },
    )
    found = read_cpu_counters(root)
    assert (found.periods, found.throttled_periods) == (200, 30)


def test_variables_that_are_set_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    assert read_host(tmp_path).variables == {"OMP_PROC_BIND": "true"}
