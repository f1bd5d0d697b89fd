"""The benchmarks' cgroup: made, obeyed, removed; or an explanation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LOOK = "from unisono.system.cgroups import cpu_quota; print(cpu_quota())"


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import cpu_limit

    return cpu_limit


def test_without_a_writable_cgroup_it_says_what_was_tried_and_what_to_do(limit: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(limit.NoCgroup, match=r"cpu is no cgroup.*run this as root"), limit.cpu_limit(0.5, root=tmp_path):
        pass


def test_a_cgroup_that_refuses_the_quota_is_not_left_behind(limit: ModuleType, tmp_path: Path) -> None:
    mount = tmp_path / "sys/fs/cgroup"
    mount.mkdir(parents=True)
    (mount / "cgroup.procs").touch()
    with pytest.raises(limit.NoCgroup, match=r"cpu\.max"), limit.cpu_limit(0.5, root=tmp_path):
        pass
    assert [path.name for path in mount.iterdir()] == ["cgroup.procs"]


def test_a_process_in_it_has_its_quota_and_the_cgroup_is_gone_after_an_error(limit: ModuleType) -> None:
    try:
        with limit.cpu_limit(0.25) as procs:
            enter = f"open({str(procs)!r}, 'w').write('0')\n"
            done = subprocess.run([sys.executable, "-c", enter + LOOK], capture_output=True, text=True, timeout=30)
            assert done.returncode == 0, done.stderr
            assert float(done.stdout) == 0.25
            raise KeyError("the benchmark breaks off")
    except limit.NoCgroup as reason:
        pytest.skip(str(reason))
    except KeyError:
        assert not procs.parent.exists()
