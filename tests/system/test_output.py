"""Streams that go away, and what is said on them nevertheless."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from rich.live import Live

from unisono.observe.progress import standard_output as console
from unisono.system.output import is_terminal, say, standard_output


@pytest.fixture
def unread() -> Iterator[IO[str]]:
    """A pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        yield stream


def lines(text: str) -> list[str]:
    return text.splitlines()


def test_what_nobody_reads_is_dropped_and_said_once(
    unread: IO[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", unread)
    stream = standard_output()
    for _ in range(3):
        stream.write("step\n")
        stream.flush()
    say("and another")
    console().print("and a third")
    unread.write("the script's own")  # Python's last flush must not fail either: the status would be 120
    unread.flush()
    assert lines(capsys.readouterr().err) == [
        "unisono: standard output cannot be written to (Broken pipe): the run goes on without showing it"
    ]


def test_a_full_disk_ends_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        say("first")
        say("second")
    assert "No space left" in capsys.readouterr().err


def test_without_standard_error_nothing_is_said_about_it(unread: IO[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", unread)
    monkeypatch.setattr(sys, "stderr", unread)
    say("one")
    say("two", error=True)
    assert os.path.samestat(os.fstat(unread.fileno()), Path(os.devnull).stat())


@pytest.mark.parametrize("state", ["never there", "closed"])
def test_a_stream_that_is_not_there_takes_everything(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = None if state == "never there" else io.StringIO()
    if stream is not None:
        stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    assert not is_terminal(stream)
    assert not standard_output().isatty()
    assert not console().is_interactive
    say("words")
    console().print("more words")


def test_a_reader_that_is_late_gets_what_is_said_later(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        for _ in range(100):
            say("x" * 4095)
        taken = os.read(read, 1 << 20)
        say("and this")
        assert set(taken) == set(b"x\n")
        assert os.read(read, 1 << 20).endswith(b"and this\n")
    os.close(read)
    assert capsys.readouterr().err == ""


def test_letters_that_the_stream_does_not_know_are_spelt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    say("run-\udcff-größe")
    assert raw.getvalue() == b"run-\\udcff-gr\\xf6\\xdfe\n"


def test_a_display_does_not_write_to_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with Live("bar", console=console(), auto_refresh=False):
        console().print("above the bar")
        print("the script's own")
    assert "above the bar" in capsys.readouterr().out
