"""Process groups are ended, gently where they let us, and with the launcher if that is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from tests.launch.conftest import assert_gone
from unisono.system.reaper import end_groups, end_processes

STAYS = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
GOES = "import signal; print(flush=True); signal.pause()"
PARENT = "import signal, subprocess, sys; print(subprocess.Popen(['sleep', '100']).pid, flush=True); signal.pause()"
LAUNCHER = """
import signal, subprocess, sys
from unisono.system.reaper import Reaper
with Reaper() as reaper:
    kept, left = [subprocess.Popen(["sleep", "100"], start_new_session=True) for _ in range(2)]
    reaper.add(kept.pid)
    reaper.add(left.pid)
    reaper.remove(left.pid)
    print(kept.pid, left.pid, flush=True)
    signal.pause()
"""


class Groups:
    """Processes that each lead a group, and have said so."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[str]] = []

    def start(self, code: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        self.started.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline()


@pytest.fixture
def groups() -> Iterator[Groups]:
    groups = Groups()
    yield groups
    for process in groups.started:
        process.kill()
        process.communicate()


def test_a_group_that_ignores_sigterm_is_killed_after_the_grace_and_others_are_not_waited_for(groups: Groups) -> None:
    (goes, _), (stays, _) = groups.start(GOES), groups.start(STAYS)
    began_s = time.monotonic()
    end_groups([stays.pid, goes.pid], grace_s=0.3)
    assert time.monotonic() - began_s >= 0.3
    assert (goes.wait(5.0), stays.wait(5.0)) == (-signal.SIGTERM, -signal.SIGKILL)
    end_groups([stays.pid, goes.pid], grace_s=60.0)  # they have ended: nothing happens


def test_processes_are_ended_with_everything_that_they_started(groups: Groups) -> None:
    parent, told = groups.start(PARENT)
    child = psutil.Process(int(told))
    end_processes([parent.pid])
    assert parent.wait(5.0) == -signal.SIGKILL
    assert_gone([child])


def test_when_the_launcher_is_killed_its_groups_end_but_not_those_that_are_removed(groups: Groups) -> None:
    launcher, told = groups.start(LAUNCHER)
    kept, left = (psutil.Process(int(pid)) for pid in told.split())
    launcher.kill()
    assert_gone([kept])
    assert left.is_running()
    left.kill()
