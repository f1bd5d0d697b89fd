"""Which process something is, and how one ended."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
from collections.abc import Iterator

import pytest

from unisono.system.process import Process, ending, state_of


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "100"]) as process:
        yield process
        process.kill()


def of(process: subprocess.Popen[bytes]) -> Process:
    return dataclasses.replace(Process.this(), pid=process.pid, started=state_of(process.pid)[1])


def test_a_process_lives_here_until_it_is_killed_even_if_it_is_stopped(sleeper: subprocess.Popen[bytes]) -> None:
    process = of(sleeper)
    assert process.lives_here
    sleeper.send_signal(signal.SIGSTOP)
    assert process.kill()
    assert process.is_dead
    assert not process.lives_here


def test_a_later_process_of_the_same_number_is_another_one(sleeper: subprocess.Popen[bytes]) -> None:
    earlier = dataclasses.replace(of(sleeper), started=1)
    assert earlier.is_dead
    assert earlier.kill()  # there is nothing left to do
    assert sleeper.poll() is None


def test_of_a_process_on_another_machine_nothing_is_known(sleeper: subprocess.Popen[bytes]) -> None:
    elsewhere = dataclasses.replace(of(sleeper), place="another boot pid:[1]")
    assert (elsewhere.is_dead, elsewhere.lives_here, elsewhere.kill()) == (False, False, False)
    assert sleeper.poll() is None


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "ended with exit status 0"),
        (3, "ended with exit status 3"),
        (-signal.SIGSEGV, "was killed by SIGSEGV"),
        (-40, "was killed by signal 40"),
        (-signal.SIGKILL, "was killed by SIGKILL: by someone, or by the kernel because memory ran out"),
    ],
)
def test_how_a_process_ended_is_said(status: int, words: str) -> None:
    assert ending(status).startswith(words)
    assert ending(status, hint=False) == words.partition(":")[0]
