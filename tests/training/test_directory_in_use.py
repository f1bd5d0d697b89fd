"""A run directory is one run's, one process's at a time, and is there before the first step."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.small_run import Augmented, make_trainer, train
from tests.training.test_bad_input import everybodys_errors
from unisono.errors import ConfigurationError
from unisono.system.process import Process, state_of
from unisono.testing import run_threads


def test_a_loop_of_ones_own_that_is_left_early_leaves_its_last_checkpoint_whole(tmp_path: Path) -> None:
    trainer = make_trainer(run_dir=tmp_path, checkpoint_every=2)
    for batch in trainer.batches(Augmented(), 2):
        if trainer.step(batch).step == 4:
            break
    del trainer
    assert make_trainer(run_dir=tmp_path).position.step == 4


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives as long as nobody ends it."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_two_processes_do_not_train_in_one_directory(tmp_path: Path, stranger: subprocess.Popen[bytes]) -> None:
    train(1, tmp_path, epochs=1)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["process"] is None, "it has ended"
    owner = Process(place=Process.this().place, pid=stranger.pid, started=state_of(stranger.pid)[1])

    def claim() -> None:
        (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "process": dataclasses.asdict(owner)}))

    waiting = make_trainer(run_dir=tmp_path)
    claim()
    pieces = f"is in use: process {stranger.pid} trains there since"
    with pytest.raises(ConfigurationError, match=pieces):
        waiting.fit(Augmented(), 2)
    errors = everybodys_errors(2, lambda c: make_trainer(c, run_dir=tmp_path))
    assert [type(error) for error in errors] == [ConfigurationError] * 2
    assert all(pieces in str(error) for error in errors)
    stranger.kill()
    stranger.wait()
    train(2, tmp_path, epochs=2)


def test_a_directory_that_cannot_be_made_is_refused_by_all_before_the_first_step() -> None:
    errors = everybodys_errors(3, lambda c: make_trainer(c, run_dir="/proc/nowhere/run").fit(Augmented(), 1))
    text = (
        "cannot write to /proc/nowhere/run: No such file or directory. Check that /proc/nowhere/run is there and that this user"
    )
    assert [str(error) for error in errors] == [f"{text} may use it."] * 3


def test_without_a_run_directory_the_digest_of_the_weights_is_told_all_the_same(tmp_path: Path) -> None:
    kept = make_trainer(run_dir=tmp_path).fit(Augmented(), 1)
    told = run_threads(2, lambda collective: make_trainer(collective).fit(Augmented(), 1).weights_sha256)
    assert told == [kept.weights_sha256] * 2
