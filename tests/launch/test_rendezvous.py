"""Where launchers meet: who is there, and who has left."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import pytest

from unisono.launch.rendezvous import BrokenOff, Rendezvous

LIMIT_S = 30.0


@pytest.fixture
def hosts() -> Iterator[tuple[Rendezvous, Rendezvous]]:
    """The host that serves the store, and another one."""
    first = Rendezvous(("127.0.0.1", 0))
    place, _, port = first.address.partition(":")
    second = Rendezvous((place, int(port)))
    with contextlib.ExitStack() as stack:
        stack.callback(first.leave)
        stack.callback(second.leave)
        yield first, second


def until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.01)


def test_a_host_is_heard_while_its_launcher_is_busy_and_not_after_it_has_left(hosts: tuple[Rendezvous, Rendezvous]) -> None:
    first, second = hosts
    beats = set()

    def hears_new_ones() -> bool:  # while nobody calls a method of the second
        if first.store.check(["hosts/beat/1"]):
            beats.add(first.store.get("hosts/beat/1"))
        return len(beats) == 3

    until(hears_new_ones)
    assert (second.host, first.others()) == (1, [1])
    second.leave()
    until(lambda: first.others() == [])


def test_a_host_of_which_nothing_has_been_heard_yet_is_there(hosts: tuple[Rendezvous, Rendezvous]) -> None:
    first, _ = hosts
    number = first.store.add("unisono/hosts", 1)
    assert number in first.others()
    first.store.set(f"hosts/beat/{number}", "gone")
    assert number not in first.others()


def begun(hosts: Sequence[Rendezvous]) -> list[tuple[int, bool]]:
    """The attempt that each of them begins or joins, and whether it joins."""
    with futures.ThreadPoolExecutor() as pool:
        attempts = [begins.result(LIMIT_S) for begins in [pool.submit(host.next_attempt) for host in hosts]]
    return [(attempt.number, attempt.joins) for attempt in attempts]


def test_hosts_meet_again_if_one_is_lost_before_it_has_said_what_the_others_wait_for() -> None:
    with contextlib.ExitStack() as stack:
        first = Rendezvous(("127.0.0.1", 0), hosts=3)
        place, _, port = first.address.partition(":")
        second, third = [Rendezvous((place, int(port)), hosts=3) for _ in range(2)]
        for host in (first, second, third):
            stack.callback(host.leave)
        assert begun([first, second, third]) == [(0, False)] * 3
        with futures.ThreadPoolExecutor() as pool:
            waiting = [pool.submit(host.exchange, "mine") for host in (first, second)]
            third.leave()
            for one in waiting:
                with pytest.raises(BrokenOff):
                    one.result(LIMIT_S)
        fourth = Rendezvous((place, int(port)), hosts=3)
        stack.callback(fourth.leave)
        # The run has not begun: three are still to begin it.
        with futures.ThreadPoolExecutor() as pool:
            again = [pool.submit(host.next_attempt) for host in (first, second)]
            assert begun([fourth]) == [(0, True)]  # it finds out that nobody goes on with that attempt
            assert begun([fourth]) == [(1, False)]
            for one in again:
                one.result(LIMIT_S)
            waiting = [pool.submit(host.exchange, str(host.host)) for host in (first, second, fourth)]
            assert [one.result(LIMIT_S) for one in waiting] == [["0", "1", "3"]] * 3


def test_hosts_that_have_begun_and_are_left_begin_again_without_one_that_is_lost() -> None:
    with contextlib.ExitStack() as stack:
        first = Rendezvous(("127.0.0.1", 0), hosts=2)
        place, _, port = first.address.partition(":")
        second = Rendezvous((place, int(port)), hosts=2)
        stack.callback(first.leave)
        assert begun([first, second]) == [(0, False)] * 2
        with futures.ThreadPoolExecutor() as pool:
            for one in [pool.submit(host.exchange, "mine") for host in (first, second)]:
                one.result(LIMIT_S)
        assert begun([first, second]) == [(1, False)] * 2
        second.leave()
        with pytest.raises(BrokenOff):
            first.exchange("mine")
        assert begun([first]) == [(2, False)]
        assert first.exchange("mine") == ["mine"]
