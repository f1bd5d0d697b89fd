"""What the README shows: its script runs as it stands, everywhere that it says, with one digest."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import start_script
from tests.launch.warm import WarmCommand
from unisono.system.fork_server import ForkServer

ROOT = Path(__file__).parent.parent
LAUNCHED = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "UNISONO_THREADS"}


def environment(**more: str) -> dict[str, str]:
    """This process's, less what a launcher would have set."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHED and not name.startswith("SLURM_")}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def digest(folder: Path, *, workers: int) -> str:
    """SHA-256 of the trained weights, after a look at whether as many workers trained them as should have."""
    (run,) = (folder / "runs").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["workers"] == workers
    found = hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
    assert summary["weights_sha256"] == found
    return found


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's script, in a file."""
    code = re.findall(r"```python\n(import torch.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(code) == 1
    path = tmp_path_factory.mktemp("readme") / "digits.py"
    path.write_text(code[0])
    return path


@pytest.fixture(scope="module")
def expected(script: Path) -> str:
    """The digest of the script's weights, run as plain Python."""
    said = run([sys.executable, str(script)], script.parent / "alone")
    found = digest(script.parent / "alone", workers=1)
    assert "accuracy" in said
    assert found in said
    return found


def unisono(arguments: list[str], folder: Path, source: ForkServer | None) -> str:
    """Runs a `unisono` command, forked if there is a source; what it said."""
    if source is None:
        return run([sys.executable, "-m", "unisono.launch", *arguments], folder)
    folder.mkdir()
    command = WarmCommand(source, arguments, folder, environment())
    out, err = command.communicate(timeout=100)
    assert command.returncode == 0, out + err
    return out


def run(command: list[str], folder: Path, **more: str) -> str:
    folder.mkdir()
    done = subprocess.run(command, cwd=folder, env=environment(**more), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_readme_script_gives_one_digest_alone_and_under_every_launcher(
    script: Path, expected: str, warm_commands: ForkServer | None, tmp_path: Path
) -> None:
    unisono(["run", "--workers", "3", str(script)], tmp_path / "unisono", warm_commands)
    assert digest(tmp_path / "unisono", workers=3) == expected

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    run(launcher, tmp_path / "torchrun")
    assert digest(tmp_path / "torchrun", workers=2) == expected


def test_the_readme_script_finds_its_place_under_slurm(
    script: Path, expected: str, warm_commands: ForkServer | None, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    folder = tmp_path / "slurm"
    folder.mkdir()
    tasks = []
    for rank in range(2):
        place = {
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NTASKS": "2",
            "SLURM_STEP_TASKS_PER_NODE": "2",
            "SLURM_STEP_NODELIST": "localhost",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        tasks.append(start_script(warm_commands, script, folder=folder, environment=environment(**place)))
    outputs = [task.communicate(timeout=100)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert digest(folder, workers=2) == expected


def test_the_demo_gives_one_digest_on_one_and_three_workers(warm_commands: ForkServer | None, tmp_path: Path) -> None:
    digests = set()
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        unisono(["demo", "digits", "--workers", str(workers), "--epochs", "1"], folder, warm_commands)
        digests.add(digest(folder, workers=workers))
    assert len(digests) == 1
