"""The command: what a person types, sees, and gets as exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from unisono.launch import cli


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["verify"], "Missing argument 'SCRIPT'"),
        (["verify", "missing.py"], "does not exist"),
        (["verify", "--workers", "two", __file__], "not a list of numbers"),
        (["verify", "--workers", "0", __file__], "not a list of numbers"),
        (["verify", "--steps", "0", __file__], "--steps"),
        (["verify", "--against", "nowhere"], "not the directory of a run"),
    ],
)
def test_mistakes_are_named(args: list[str], words: str) -> None:
    result = CliRunner().invoke(cli.main, args)
    assert result.exit_code == 2
    assert words in result.stderr


def test_the_command_ends_with_one_if_runs_differ_and_its_json_says_why(tmp_path: Path) -> None:
    fault = Path(__file__).parent / "faults" / "rank_branch.py"
    command = [sys.executable, "-m", "unisono.launch", "verify", "--json", "--steps", "2", "--workers", "2", str(fault)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert (done.returncode, done.stderr) == (1, "")
    report = json.loads(done.stdout)
    assert (report["verdict"], report["exit_status"]) == ("different", 1)
    assert [cause["name"] for cause in report["causes"]] == ["rank_dependent"]
    first = report["comparisons"][1]["difference"]
    assert (first["step"], first["stage"], first["tensor"], first["rank"]) == (1, "loss", "0.weight", 1)
    assert first["ulp"] > 0
    assert not list(tmp_path.iterdir())


def test_a_stop_ends_everything_that_was_started_and_leaves_nothing(tmp_path: Path) -> None:
    told, scratch = tmp_path / "told", tmp_path / "scratch"
    scratch.mkdir()
    os.mkfifo(told)
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, time\nwith open({str(told)!r}, 'w') as pipe:\n    pipe.write(str(os.getpid()))\ntime.sleep(600)\n"
    )
    command = [sys.executable, "-m", "unisono.launch", "verify", str(script)]
    verifier = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(scratch)}, stderr=subprocess.DEVNULL)
    try:
        sleeper = psutil.Process(int(told.read_text()))
        started = [sleeper, *psutil.Process(verifier.pid).children(recursive=True)]
        verifier.send_signal(signal.SIGTERM)
        assert verifier.wait(30) == 128 + signal.SIGTERM
    finally:
        verifier.kill()
    _, left = psutil.wait_procs(started, timeout=10)
    assert [process for process in left if process.status() != psutil.STATUS_ZOMBIE] == []
    assert list(scratch.glob("unisono*")) == []  # PyTorch makes a folder of its own at import
