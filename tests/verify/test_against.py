"""A finished run that is reproduced, and what explains it where it cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.verify.test_inquiry import PRELUDE
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
