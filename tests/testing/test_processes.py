"""Workers in processes: what they find, what comes back, and that nothing is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launch.conftest import assert_gone
from unisono.collective import Collective
from unisono.errors import WorkerFailure


def surroundings(collective: Collective, word: str) -> tuple[Any, ...]:
    return collective.rank, collective.size, word, str(Path.cwd()), os.environ.get("A_WORD"), os.getpid()


def test_workers_have_the_folder_and_the_variables_of_now(
    run_workers: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("A_WORD", "of now")

    *found, pids = zip(*run_workers(3, surroundings, "given"), strict=True)

    assert found == [(0, 1, 2), (3,) * 3, ("given",) * 3, (str(tmp_path),) * 3, ("of now",) * 3]
    assert len({*pids, os.getpid()}) == 4


def fails(collective: Collective) -> None:
    if collective.rank:
        raise KeyError("the second worker's own")


def test_the_traceback_of_a_worker_comes_out(run_workers: Callable[..., Any]) -> None:
    with pytest.raises(WorkerFailure, match=r"worker 1: Traceback[^$]*in fails[^$]*the second worker's own"):
        run_workers(2, fails)


def dies(collective: Collective) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_named(run_workers: Callable[..., Any]) -> None:
    with pytest.raises(WorkerFailure, match=r"^worker 0: died without a word$"):
        run_workers(1, dies)


def stays(collective: Collective, folder: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    note = Path(folder) / "unfinished"
    note.write_text(f"{os.getpid()} {child.pid}")
    note.rename(Path(folder) / "pids")
    threading.Event().wait()


def test_a_worker_that_stays_too_long_is_ended_with_what_it_has_started(run_workers: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(WorkerFailure, match=r"^worker 0: did not end in time$"):
        run_workers(1, stays, str(tmp_path), timeout_s=5.0)

    left = [psutil.Process(int(pid)) for pid in (tmp_path / "pids").read_text().split() if psutil.pid_exists(int(pid))]
    assert psutil.wait_procs(left, timeout=5.0)[1] == []


KILLED = """
import sys
from tests.testing.test_processes import stays
from unisono.testing import run_workers

run_workers(1, stays, sys.argv[1])
"""


def test_no_worker_outlives_a_test_process_that_is_killed(tmp_path: Path) -> None:
    watched = psutil.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[2])
    while not (tmp_path / "pids").exists():
        assert watched.poll() is None
        threading.Event().wait(0.02)
    processes = [*watched.children(recursive=True), *map(psutil.Process, map(int, (tmp_path / "pids").read_text().split()))]
    watched.kill()
    watched.wait()

    assert_gone(processes)
