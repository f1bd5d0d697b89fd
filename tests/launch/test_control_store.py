"""What launchers and workers tell each other, and a store that does not answer."""

from __future__ import annotations

import contextlib
import signal
import threading

import pytest
from torch.distributed import HashStore, PrefixStore

from unisono.errors import WorkerFailure
from unisono.launch.control_store import FINE, ControlStore, Decisions, RemoteStore


def test_what_workers_write_is_read_and_what_launchers_write_is_theirs_to_read() -> None:
    store = HashStore()
    workers, control = PrefixStore("unisono/2", store), ControlStore(store, 2)
    assert [control.is_elastic, control.is_over, control.needs_all] == [False, False, False]
    for key in ("elastic", "over"):
        workers.set(key, "1")
    workers.set("whole", "0")
    assert control.is_elastic
    assert control.is_over
    assert control.needs_all
    control.tell_dead("0.3", "was killed by SIGKILL")
    control.tell_stop(signal.SIGTERM)
    assert (workers.get("dead/0.3"), workers.get("stop")) == (b"was killed by SIGKILL", b"15")


def test_members_on_a_host_that_is_gone_are_dead() -> None:
    store = HashStore()
    workers, control = PrefixStore("unisono/0", store), ControlStore(store, 0)
    control.tell_lost([0, 2])
    workers.set("members", '["0.0", "1.0", "1.12", "2.1"]')
    control.tell_dead("1.12", "was killed by SIGKILL")
    control.tell_lost([0, 2])
    told = {uid: workers.get(f"dead/{uid}") for uid in ("0.0", "1.0", "1.12", "2.1") if workers.check([f"dead/{uid}"])}
    assert told == {"1.0": b"was lost with its host", "1.12": b"was killed by SIGKILL"}


def test_a_run_that_nobody_goes_on_with_is_finished_if_the_last_members_ended_well_or_said_so() -> None:
    store = HashStore()
    workers, control = PrefixStore("unisono/0", store), ControlStore(store, 0)
    assert control.loose_end is None  # no Trainer, no members
    workers.set("members", '["1.0", "1.1", "2.0"]')
    control.tell_dead("1.0", FINE)
    control.tell_dead("2.0", "was killed by SIGKILL")
    assert control.loose_end == "worker 1.1 was lost with its host, worker 2.0 was killed by SIGKILL"
    workers.set("members", '["1.0"]')
    assert control.loose_end is None
    workers.set("members", '["1.1"]')
    workers.set("over", "1")
    assert control.loose_end is None


def test_those_who_stand_still_are_named_until_they_go_on() -> None:
    store = HashStore()
    workers, control = PrefixStore("unisono/0", store), ControlStore(store, 0)
    control.tell_standing(["0.1", "0.2"])
    control.tell_standing(["0.2", "0.3"])
    assert workers.multi_get(["standing/0.1", "standing/0.2", "standing/0.3"]) == [b"0", b"1", b"1"]
    assert not workers.check(["standing/0.0"])


def test_attempts_share_nothing_but_the_count_of_restarts() -> None:
    store = HashStore()
    first, second = ControlStore(store, 0), ControlStore(store, 1)
    first.tell_failed("worker 1 failed")
    assert [first.call_again(), first.call_again(), second.call_again()] == [True, False, True]
    assert first.decisions() == Decisions(failed="worker 1 failed", again=True, stop=None)
    assert second.decisions() == Decisions(failed=None, again=True, stop=None)
    assert [first.take_restart(), second.take_restart()] == [1, 2]


class Silent:
    """A store that lets its first caller wait."""

    def __init__(self) -> None:
        self.answers = threading.Event()

    def set(self, key: str, value: str, /) -> None:
        self.answers.wait()

    def get(self, key: str, /) -> bytes:
        return b"value"

    def check(self, keys: list[str], /) -> bool:
        raise RuntimeError("Connection reset by peer\nand a long trace")

    def add(self, key: str, amount: int, /) -> int:
        return amount

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        return b""


def test_a_store_that_does_not_answer_or_is_gone_is_lost_contact() -> None:
    silent = Silent()
    store = RemoteStore(silent, limit_s=0.05, where="node1:29400")
    assert (store.get("key"), store.add("key", 3)) == (b"value", 3)
    with pytest.raises(WorkerFailure, match=r"node1:29400 was lost \(Connection reset by peer\)"):
        store.check(["key"])
    with pytest.raises(WorkerFailure, match=r"node1:29400 was lost \(no answer for 0.05 s\)"):
        store.set("key", "value")
    silent.answers.set()


@pytest.mark.parametrize("near", [True, False])
def test_a_store_that_can_be_reached_over_a_new_connection_has_more_time(near: bool) -> None:
    silent = Silent()
    store = RemoteStore(silent, limit_s=0.5, where="node1:29400", is_near=lambda: near)
    threading.Timer(1.0, silent.answers.set).start()
    with contextlib.nullcontext() if near else pytest.raises(WorkerFailure, match=r"no answer for 0.5 s"):
        store.set("key", "value")


def test_a_store_that_can_be_reached_and_never_answers_is_lost_contact() -> None:
    silent = Silent()
    store = RemoteStore(silent, limit_s=0.05, where="node1:29400", is_near=lambda: True)
    with pytest.raises(WorkerFailure, match=r"no answer for 0.2 s"):
        store.set("key", "value")
    silent.answers.set()
