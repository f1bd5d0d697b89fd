"""Three hosts with a worker each: nobody has memory in common with another one, as between GPUs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.campaigns.chaos_faults import LOG, REPOSITORY, SCRIPT, digest, last_members, last_step, named_processes
from tests.launch.conftest import Launcher

KIND = "owners"
STEPS = 40


@pytest.fixture(scope="module")
def _apart_is_possible() -> None:
    told = subprocess.run(["unshare", "--user", "--map-current-user", "true"], capture_output=True, text=True, check=False)
    if told.returncode:
        pytest.skip(f"no namespaces of users here: {told.stderr.strip()}")


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
    launches = [launcher.command(*command, *script, apart=True) for _ in range(3)]

    # Users of different namespaces cannot share memory: see `unisono.collective.shared_memory.host_identity`.
    for number, killed in enumerate((0, 2)):
        while last_step(log.read_text()) < 5 + 15 * number or last_members(log.read_text()) < 3:
            assert all(launch.process.poll() is None for launch in launches), [launch.finish() for launch in launches]
            time.sleep(0.01)
        assert len({Path(f"/proc/{launch.process.pid}/ns/user").readlink() for launch in launches}) == 3
        os.kill(named_processes(log.read_text())[killed], signal.SIGKILL)

    for launch in launches:
        status, out, err = launch.finish()
        assert status == 0, (out, err)
    assert {int(line.split()[-1]) for line in log.read_text().splitlines() if " step " in line} >= {2, 3}
    undisturbed = tmp_path / "undisturbed"
    alone = launcher.command("-m", "unisono.launch", "run", "--workers", "1", str(SCRIPT), str(undisturbed), KIND, str(STEPS))
    assert alone.finish()[0] == 0
    assert digest(run_dir) == digest(undisturbed)
