"""Three hosts with a worker each: nobody has memory in common with another one, as between GPUs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.campaigns import chaos
from tests.campaigns.chaos_faults import LOG, REPOSITORY, SCRIPT, digest, last_members, last_step, named_processes
from tests.launch.conftest import Launcher
from unisono.collective.shared_memory import host_identity

KIND = "owners"
STEPS = 40


def apart(line: list[str]) -> list[str]:
    """As on a machine of its own: users of different namespaces cannot share memory."""
    return ["unshare", "--user", "--map-current-user", *line]


@pytest.fixture(scope="module")
def _apart_is_possible() -> None:
    look = "from unisono.collective.shared_memory import host_identity; print(host_identity())"
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    told = subprocess.run(apart([sys.executable, "-c", look]), env=env, capture_output=True, text=True, check=False)
    if told.returncode:
        pytest.skip(f"no namespaces of users here: {told.stderr.strip()}")
    assert told.stdout.strip() != host_identity()


@pytest.mark.usefixtures("_apart_is_possible")
def test_a_worker_that_had_a_host_to_itself_is_replaced_and_changes_no_bit(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        place = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)]))
    log, run_dir = tmp_path / "log", tmp_path / "run"
    log.touch()
    monkeypatch.setenv(LOG, str(log))
    command = ("-m", "unisono.launch", "run", "--meet", place, "--hosts", "3", "--workers", "1", "--wait", "60")
    script = (str(SCRIPT), str(run_dir), KIND, str(STEPS))
    launches = [launcher.command(*command, *script, through=apart) for _ in range(3)]

    for number, killed in enumerate((0, 2)):
        while last_step(log.read_text()) < 5 + 15 * number or last_members(log.read_text()) < 3:
            assert all(launch.process.poll() is None for launch in launches), [launch.finish() for launch in launches]
            time.sleep(0.01)
        os.kill(named_processes(log.read_text())[killed], signal.SIGKILL)

    for launch in launches:
        status, out, err = launch.finish()
        assert status == 0, (out, err)
    assert {int(line.split()[-1]) for line in log.read_text().splitlines() if " step " in line} >= {2, 3}
    assert digest(run_dir) == chaos.undisturbed(tmp_path, KIND, STEPS)
