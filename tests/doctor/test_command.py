"""The command itself: alone, and as several workers under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from unisono.doctor import local
from unisono.doctor.command import doctor
from unisono.doctor.facts import Examination, loads
from unisono.world import World, usable_cores

LIMIT_S = 90


def run(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "200", "TMPDIR": str(folder), **variables}
    for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "UNISONO_THREADS"):
        if name not in variables:
            env.pop(name, None)
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def torchrun(folder: Path, workers: int, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers))
    return run(folder, *launcher, "-m", "unisono.doctor", *options, **variables)


def by_name(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in document["findings"]}


def test_alone_it_looks_at_everything_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(tmp_path, "-m", "unisono.launch", "doctor", "--json")
    document = json.loads(done.stdout)
    assert done.returncode == (document["level"] == "problem"), done.stderr
    found = by_name(document)
    assert {
        "cores",
        "threads",
        "memory",
        "/dev/shm",
        "temporary folder",
        "open files",
        "throttling",
        "PyTorch",
        "determinism",
        "GPUs",
    } <= set(found)
    assert {"shared memory", "Gloo", "clocks", "run directory"} <= set(found)
    facts = document["facts"]
    assert [worker["planned"] for worker in facts["workers"]] == [usable_cores()] * 2
    assert [links["transport"] for links in facts["links"]] == ["shared memory", "Gloo"]
    assert facts["storage"]["rate"] > 0
    assert list(tmp_path.iterdir()) == []

    # The same facts as a table, for more workers than there are cores.
    examined = loads(Examination, json.dumps(facts).encode())
    many = usable_cores() + 3
    monkeypatch.setattr(local, "examine", lambda **plan: planned(examined, **plan))
    monkeypatch.setenv("COLUMNS", "200")
    assert doctor(World(), workers=many, threads=None, run_dir="runs", json=False) == 1
    shown = capsys.readouterr().out
    assert f"{many} workers x 1 thread keep {many} busy" in shown
    assert f"--workers {usable_cores()}" in shown
    assert "1 problem" in shown.splitlines()[-1]


def planned(examined: Examination, *, run_dir: str, workers: int, threads: int) -> Examination:
    """What the two workers would have found out for another plan."""
    assert run_dir == "runs"
    return replace(examined, workers=[replace(worker, planned=workers, threads=threads) for worker in examined.workers])


def test_too_many_workers_end_with_status_1_whatever_the_workers_find(tmp_path: Path) -> None:
    many = usable_cores() + 3
    done = run(tmp_path, "-m", "unisono.doctor", "--workers", str(many), PYTHONPATH=broken_torch(tmp_path))
    assert done.returncode == 1
    assert f"{many} workers x 1 thread keep {many} busy" in done.stdout


def broken_torch(folder: Path) -> str:
    """A module path on which PyTorch cannot be imported."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise ImportError('libmkl is not there')")
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def test_workers_that_cannot_start_are_a_problem_in_their_own_words(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "unisono.doctor", "--json", PYTHONPATH=broken_torch(tmp_path))
    assert done.returncode == 1
    found = by_name(json.loads(done.stdout))
    assert "ended with exit status 1: ImportError: libmkl is not there" in found["workers"]["fact"]
    assert "cores" in found


def test_workers_under_torchrun_take_part_and_rank_0_shows_the_whole_matrix(tmp_path: Path) -> None:
    done = torchrun(tmp_path, 3, "--run-dir", str(tmp_path / "runs"))
    assert done.stdout.count("shared memory: GB/s each way / microseconds for 64 KiB") == 1
    table = done.stdout.partition("microseconds for 64 KiB\n")[2].splitlines()
    assert table[0].split() == ["worker", "0", "1", "2"]
    assert [line.count(" / ") for line in table[1:4]] == [2, 2, 2]
    assert (done.returncode == 0) == (usable_cores() >= 3), done.stdout
    assert f"{tmp_path / 'runs'}: " in done.stdout
    assert not (tmp_path / "runs").exists()


def test_workers_that_do_not_meet_are_a_problem_under_torchrun(tmp_path: Path) -> None:
    done = torchrun(tmp_path, 2, "--json", GLOO_SOCKET_IFNAME="nonsense")
    assert done.returncode != 0
    document = json.loads(done.stdout)  # rank 0 alone speaks
    assert [worker["rank"] for worker in document["facts"]["workers"]] == [0]
    assert "nonsense" in by_name(document)["workers"]["fact"]


@pytest.mark.parametrize(
    ("options", "variables", "words"),
    [
        (("--workers", "0"), {}, "--workers"),
        ((), {"OMP_NUM_THREADS": "many"}, "OMP_NUM_THREADS='many'"),
        ((), {"RANK": "0"}, "WORLD_SIZE is not set"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, options: tuple[str, ...], variables: dict[str, str], words: str) -> None:
    done = run(tmp_path, "-m", "unisono.doctor", *options, **variables)
    assert done.returncode == 2
    assert words in done.stderr


def test_under_a_launcher_the_launcher_says_how_many_workers(tmp_path: Path) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    done = run(tmp_path, "-m", "unisono.doctor", "--workers", "2", MASTER_ADDR="localhost", MASTER_PORT="1", **place)
    assert done.returncode == 2
    assert "torchrun has started 2 workers already" in done.stderr


def test_help_does_not_wait_for_torch(tmp_path: Path) -> None:
    code = "import sys, unisono.doctor.command, unisono.launch.cli as cli; cli.main(['doctor', '--help'], standalone_mode=False)"
    done = run(tmp_path, "-c", f"{code}; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr
    assert "--run-dir" in done.stdout
