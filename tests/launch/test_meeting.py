"""Where launchers meet: who is there, and who has left."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from unisono.launch.meeting import Meeting

LIMIT_S = 30.0


@pytest.fixture
def hosts() -> Iterator[tuple[Meeting, Meeting]]:
    """The host that serves the store, and another one."""
    first = Meeting(("127.0.0.1", 0))
    place, _, port = first.address.partition(":")
    second = Meeting((place, int(port)))
    with contextlib.ExitStack() as stack:
        stack.callback(first.shutdown)
        stack.callback(second.shutdown)
        yield first, second


def until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.01)


def test_a_host_is_heard_while_its_launcher_is_busy_and_not_after_it_has_left(hosts: tuple[Meeting, Meeting]) -> None:
    first, second = hosts
    beats = set()

    def hears_new_ones() -> bool:  # while nobody calls a method of the second
        if first.store.check(["hosts/beat/1"]):
            beats.add(first.store.get("hosts/beat/1"))
        return len(beats) == 3

    until(hears_new_ones)
    assert (second.host, first.others()) == (1, [1])
    second.shutdown()
    until(lambda: first.others() == [])


def test_a_host_of_which_nothing_has_been_heard_yet_is_there(hosts: tuple[Meeting, Meeting]) -> None:
    first, _ = hosts
    number = first.store.add("unisono/hosts", 1)
    assert number in first.others()
    first.store.set(f"hosts/beat/{number}", "gone")
    assert number not in first.others()
