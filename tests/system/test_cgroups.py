"""Cgroups of both versions, on machines that do not exist. What doctor and guard make of them is tested there, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from unisono.system.cgroups import Throttling, cpu_quota, memory, throttling


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, float("inf")),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, float("inf")),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 2.5),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "150000 100000"}, 1.5),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000",
                "sys/fs/cgroup/a/cpu.max": "50000 100000",
                "sys/fs/cgroup/cpu.max": "300000 100000",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/docker/abc\n0::/",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            3.0,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/abc",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000",
            },
            float("inf"),
        ),
    ],
)
def test_the_tightest_cgroup_quota_counts(tmp_path: Path, files: dict[str, str], cores: float) -> None:
    assert cpu_quota(write(tmp_path, files)) == cores


def test_every_cgroup_tells_once_how_it_was_throttled(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a\n4:cpu,cpuacct:/old",
            "sys/fs/cgroup/a/cpu.stat": "usage_usec 5\nnr_periods 200\nnr_throttled 30\nthrottled_usec 2500000",
            "sys/fs/cgroup/cpu,cpuacct/old/cpu.stat": "nr_periods 7\nnr_throttled 2\nthrottled_time 1000000000",
        },
    )
    (tmp_path / "sys/fs/cgroup/cpu").symlink_to("cpu,cpuacct")
    assert throttling(tmp_path) == [
        Throttling(periods=200, throttled_periods=30, throttled_s=2.5),
        Throttling(periods=7, throttled_periods=2, throttled_s=1.0),
    ]


def test_the_tightest_memory_limit_counts_and_the_cache_of_files_is_left(tmp_path: Path) -> None:
    assert memory(tmp_path) == (None, None)
    files = {
        "proc/self/cgroup": "0::/a/b",
        "sys/fs/cgroup/a/memory.max": "500000",
        "sys/fs/cgroup/a/memory.current": "450000",
        "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 100000",
        "sys/fs/cgroup/a/b/memory.max": "max",
    }
    assert memory(write(tmp_path, files)) == (500_000, 150_000)
