"""Jobs run beside the owner, one at a time, and none of their errors is lost."""

from __future__ import annotations

import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from unisono.checkpoint.writer import BackgroundWriter
from unisono.errors import CheckpointError


@pytest.fixture
def writer() -> Iterator[BackgroundWriter[str]]:
    writer: BackgroundWriter[str] = BackgroundWriter()
    yield writer
    writer.close()


def fail(error: BaseException) -> str:
    raise error


def test_the_owner_goes_on_while_a_job_runs(writer: BackgroundWriter[str]) -> None:
    release = threading.Event()
    writer.submit(5, lambda: "written" if release.wait(30) else "late")
    assert writer.done() == []
    release.set()
    assert writer.wait() == [(5, "written")]
    assert writer.done() == []


def test_one_job_is_in_flight_at_most(writer: BackgroundWriter[str]) -> None:
    running, most = 0, 0
    ended: list[int] = []

    def job(step: int) -> str:
        nonlocal running, most
        running += 1
        most = max(most, running)
        running -= 1
        ended.append(step)
        return "x"

    for step in range(20):
        writer.submit(step, partial(job, step))
        # submit returned, so all before this one have finished
        assert ended[:step] == list(range(step))
    assert [step for step, _ in writer.wait()] == list(range(20))
    assert most == 1


def test_a_job_is_let_go_when_it_is_done(writer: BackgroundWriter[str]) -> None:
    class Snapshot:
        def write(self) -> str:
            return "written"

    snapshot = Snapshot()
    gone = weakref.ref(snapshot)
    writer.submit(1, snapshot.write)
    del snapshot
    assert writer.wait() == [(1, "written")]
    assert gone() is None


def test_a_failed_job_is_raised_once(writer: BackgroundWriter[str]) -> None:
    writer.submit(1, lambda: "fine")
    writer.submit(2, lambda: fail(OSError("bad disk")))
    with pytest.raises(CheckpointError, match=r"step 2 .* OSError: bad disk") as caught:
        writer.wait()
    assert isinstance(caught.value.__cause__, OSError)
    assert writer.wait() == [(1, "fine")]


def test_a_checkpoint_error_keeps_its_own_message(writer: BackgroundWriter[str]) -> None:
    error = CheckpointError("the disk is full", file="x")
    writer.submit(2, lambda: fail(error))
    with pytest.raises(CheckpointError) as caught:
        writer.wait()
    assert caught.value is error


def test_a_job_that_exits_does_not_leave_the_owner_waiting(writer: BackgroundWriter[str]) -> None:
    writer.submit(2, lambda: fail(SystemExit(3)))
    with pytest.raises(CheckpointError, match="SystemExit"):
        writer.wait()
    writer.submit(3, lambda: "again")
    assert writer.wait() == [(3, "again")]


def test_closing_finishes_the_job_and_ends_the_thread() -> None:
    before = set(threading.enumerate())
    writer: BackgroundWriter[str] = BackgroundWriter()
    writer.submit(1, lambda: "last")
    writer.close()
    writer.close()
    assert writer.done() == [(1, "last")]
    assert not set(threading.enumerate()) - before
    with pytest.raises(RuntimeError, match="closed"):
        writer.submit(2, lambda: "never")


def test_a_stuck_job_does_not_keep_a_failing_process_alive() -> None:
    script = (
        "import threading; from unisono.checkpoint.writer import BackgroundWriter\n"
        "started = threading.Event()\n"
        "BackgroundWriter().submit(1, lambda: (started.set(), threading.Event().wait()))\n"
        "started.wait(); raise SystemExit(7)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 7


def test_a_process_that_ends_finishes_what_it_is_writing(tmp_path: Path) -> None:
    script = (
        "import sys, threading, time; from pathlib import Path; from unisono.checkpoint.writer import BackgroundWriter\n"
        "writer = BackgroundWriter()\n"
        "writer.submit(1, lambda: (time.sleep(0.5), Path(sys.argv[1]).write_text('whole')))\n"
    )
    file = tmp_path / "file"
    assert subprocess.run([sys.executable, "-c", script, str(file)], timeout=60, check=False).returncode == 0
    assert file.read_text() == "whole"
