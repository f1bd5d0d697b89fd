"""The machine as /proc and /sys/fs/cgroup show it, on machines that do not exist."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.doctor.made_up import tree
from unisono.doctor.facts import VARIABLES, read_counters, read_machine

STAT = "cpu  100 0 50 800 40 0 5 5 0 0\ncpu0 50 0 25 400 20 0 3 2 0 0\ncpu1 50 0 25 400 20 0 2 3 0 0\nintr 7\n"
MEMINFO = "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    700 kB\n"


def test_a_plain_machine_has_no_limits(tmp_path: Path) -> None:
    found = read_machine(
        tree(
            tmp_path,
            {
                "proc/stat": STAT,
                "proc/meminfo": MEMINFO,
                "proc/self/status": "Name:\tpython\nRssAnon:\t     150 kB\nCpus_allowed_list:\t0-1\n",
                "proc/self/limits": "Limit  Soft Limit  Hard Limit  Units\nMax open files       1024        unlimited   files\n",
                "proc/self/cgroup": "0::/\n",
                "proc/self/fd/0": "",
                "proc/self/fd/1": "",
                "proc/sys/kernel/hostname": "alpha\n",
                "proc/sys/kernel/random/boot_id": "boot-1\n",
            },
        )
    )
    assert (found.host, found.boot_id) == ("alpha", "boot-1")
    assert (found.cores, found.affinity, found.quota, found.usable_cores) == (2, [0, 1], None, 2.0)
    assert (found.memory, found.memory_limit, found.memory_free) == (1_024_000, None, 716_800)
    assert (found.open_files_limit, found.open_files_hard, found.open_files) == (1024, None, 2)
    assert found.process_memory == 153_600
    assert (found.shm_size, found.shm_free) == (None, None)


def test_affinity_lists_have_ranges_and_gaps(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/self/status": "Cpus_allowed_list:\t0-2,5,8-9\n"})
    assert read_machine(root).affinity == [0, 1, 2, 5, 8, 9]


def test_the_least_limit_of_the_cgroups_of_version_2_counts(tmp_path: Path) -> None:
    found = read_machine(
        tree(
            tmp_path,
            {
                "proc/stat": STAT,
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/outer/inner\n",
                "sys/fs/cgroup/outer/cpu.max": "150000 100000\n",
                "sys/fs/cgroup/outer/memory.max": "500000\n",
                "sys/fs/cgroup/outer/memory.current": "450000\n",
                "sys/fs/cgroup/outer/memory.stat": "anon 1\ninactive_file 100000\n",
                "sys/fs/cgroup/outer/inner/cpu.max": "max 100000\n",
                "sys/fs/cgroup/outer/inner/memory.max": "max\n",
                "sys/fs/cgroup/outer/inner/memory.current": "400000\n",
            },
        )
    )
    assert (found.quota, found.usable_cores) == (1.5, 1.5)
    # The cache of files makes room when memory is wanted.
    assert (found.memory_limit, found.memory_free) == (500_000, 150_000)


def test_the_cgroups_of_version_1_limit_too(tmp_path: Path) -> None:
    found = read_machine(
        tree(
            tmp_path,
            {
                "proc/stat": STAT,
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "5:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "400000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "300000\n",
                "sys/fs/cgroup/memory/memory.stat": "inactive_file 7\ntotal_inactive_file 50000\n",
            },
        )
    )
    assert (found.quota, found.memory_limit, found.memory_free) == (0.5, 400_000, 150_000)


def test_the_largest_number_of_version_1_means_no_limit(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "5:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
    assert read_machine(tree(tmp_path, files)).memory_limit is None


def test_a_machine_that_says_nothing_is_taken_as_it_is(tmp_path: Path) -> None:
    found = read_machine(tmp_path)
    assert found.cores == os.cpu_count()
    assert (found.memory, found.memory_free, found.open_files_limit, found.process_memory) == (None, None, None, None)


def test_counters_divide_processor_time(tmp_path: Path) -> None:
    found = read_counters(tree(tmp_path, {"proc/stat": STAT}))
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
    found = read_counters(root)
    assert (found.periods, found.throttled_periods) == (200, 30)


def test_variables_that_are_set_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    assert read_machine(tmp_path).variables == {"OMP_PROC_BIND": "true"}


def test_this_machine_can_be_read() -> None:
    found = read_machine()
    assert sorted(os.sched_getaffinity(0)) == found.affinity
    assert 0 < (found.memory_free or 0) <= (found.memory or 0)
    assert (found.open_files_limit or 1) > found.open_files > 2
    assert read_counters().total_s > 0
