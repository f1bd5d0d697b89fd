"""The command: what a person types, sees, and gets as exit status; and a run that is reproduced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner

from tests.verify.test_bad_input import PRELUDE
from unisono.launch import cli
from unisono.verify.against import reproduce
from unisono.verify.servers import ForkServers

SCRIPT = (
    PRELUDE.replace("nn.Linear(3, 1)", "nn.Sequential(nn.Linear(3, 37), nn.Tanh(), nn.Linear(37, 1))")
    + """
class Evaluates(unisono.Callback):  # its results have lines in the log, which are no steps
    edits_weights = False

    def on_epoch(self, trainer, epoch):
        trainer.evaluate(data)


trainer(run_dir="run", checkpoint_every=2, max_grad_norm=float(sys.argv[1]), callbacks=[Evaluates()]).fit(data, 3)
"""
)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["verify"], "Missing argument 'SCRIPT'"),
        (["verify", "missing.py"], "does not exist"),
        (["verify", "--workers", "two", __file__], "no list of numbers"),
        (["verify", "--workers", "0", __file__], "no list of numbers"),
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made with the plainest kernels."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", "0.5"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env={**os.environ, **PLAINEST}, timeout=100)
    return folder


PLAINEST = {"ATEN_CPU_CAPABILITY": "default"}


def test_a_run_is_reproduced_on_the_same_ground(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    for name, value in PLAINEST.items():
        monkeypatch.setenv(name, value)
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    with ForkServers() as servers:  # of this environment
        result = reproduce("run", None, (), steps=5, servers=servers)
        other = reproduce("run", "script.py", ["0.25"], steps=2, servers=servers)
    assert (result.problem, result.verdict, result.difference) == ("", "equal", "")
    assert (result.steps, result.checkpoints) == (5, (2, 4))
    assert (other.verdict, other.settings) == ("different", ("max_grad_norm: 0.5 there, 0.25 here",))
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this processor has only the plainest kernels")
def test_the_field_of_the_fingerprint_that_explains_a_difference_is_named(trained: Path, servers: ForkServers) -> None:
    result = reproduce(str(trained / "run"), str(trained / "script.py"), ["0.5"], steps=5, servers=servers)
    assert any("cpu_capability: DEFAULT there" in text for text in result.fingerprint)
    if result.verdict == "equal":
        pytest.skip("both kinds of kernels round alike here")
    assert "ATEN_CPU_CAPABILITY" in result.explained_by


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
