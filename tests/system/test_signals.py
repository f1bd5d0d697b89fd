"""Stop requests: recorded first, obeyed later, never inescapable."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from unisono.system.signals import StopRequest


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_only_recorded(signum: signal.Signals) -> None:
    with StopRequest() as stop:
        assert stop.requested is None
        signal.raise_signal(signum)
        assert stop.requested is signum


def test_signals_close_together_are_one_event() -> None:
    with StopRequest(same_event_s=60.0) as stop:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(signum)
        assert stop.requested is signal.SIGINT


def test_a_later_second_sigint_gets_out_at_once() -> None:
    with StopRequest(same_event_s=0.0) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested is signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_previous_handlers_come_back_also_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="in between"), StopRequest():
        assert signal.getsignal(signal.SIGINT) is not before[0]
        raise ValueError("in between")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_in_another_thread_it_does_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def enter() -> None:
        with StopRequest() as stop:
            seen.extend([stop.requested, signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [None, before]


@pytest.fixture
def on_a_terminal() -> Iterator[None]:
    """The tests may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("on_a_terminal")
def test_a_closed_terminal_counts_as_sigterm() -> None:
    with StopRequest(same_event_s=0.0) as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.requested is signal.SIGTERM
        signal.raise_signal(signal.SIGHUP)


def test_under_nohup_a_closed_terminal_counts_as_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.requested is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def status_of_child(do: Callable[[], None]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forks beside threads; this child only signals itself
        pid = os.fork()
    if pid == 0:
        try:
            do()
        finally:
            os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.usefixtures("on_a_terminal")
def test_a_forked_child_ignores_what_a_terminal_sends_and_ends_at_sigterm() -> None:
    with StopRequest(same_event_s=0.0) as stop:

        def interrupted() -> None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGHUP)
            os._exit(0 if stop.requested is None else 1)

        assert status_of_child(interrupted) == 0
        assert status_of_child(lambda: signal.raise_signal(signal.SIGTERM)) == 128 + signal.SIGTERM
        assert stop.requested is None


WARNINGS = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]


@pytest.mark.parametrize("signum", WARNINGS)
def test_what_clusters_send_before_time_is_up_counts_as_sigterm(signum: signal.Signals) -> None:
    with StopRequest() as stop:
        signal.raise_signal(signum)
        assert stop.requested is signal.SIGTERM
    assert signal.getsignal(signum) == signal.SIG_DFL


def test_such_a_signal_that_the_process_uses_itself_is_left_alone(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda signum, frame: seen.append(signum))
    try:
        with (tmp_path / "stacks").open("w+") as stacks:
            faulthandler.register(signal.SIGUSR2, file=stacks)  # in C: Python does not know of it
            with StopRequest() as stop:
                signal.raise_signal(signal.SIGUSR1)
                signal.raise_signal(signal.SIGUSR2)
                assert stop.requested is None
            assert seen == [signal.SIGUSR1]
            assert "most recent call first" in (tmp_path / "stacks").read_text()
    finally:
        faulthandler.unregister(signal.SIGUSR2)
        signal.signal(signal.SIGUSR1, before)
