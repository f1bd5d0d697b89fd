"""Members that do not answer, and who ends them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
from torch.distributed import HashStore

from unisono.collective import LostWorker
from unisono.elastic.membership import Member, Membership
from unisono.system.process import Process, state_of


@pytest.fixture
def silent() -> Iterator[subprocess.Popen[bytes]]:
    """A process of this machine."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def member(uid: str, pid: int = 0) -> Member:
    """One of this machine, or of another one."""
    process = Process(place=Process.this().place if pid else "elsewhere", pid=pid, started=state_of(pid)[1] if pid else 0)
    return Member(uid=uid, host="here", process=process)


def membership(store: HashStore, *members: Member) -> Membership:
    """That of the first of them, in a generation with the others."""
    uids = [one.uid for one in members]
    for one in members:
        store.set(f"1/here/{one.uid}", one.to_json())
    mine = Membership(store, members[0], uids, timeout_s=0.0, pause=lambda seconds: None)
    store.set("1/plan", json.dumps(uids))
    mine.meet()
    return mine


def test_one_that_another_host_has_given_up_is_ended_by_those_of_its_own(silent: subprocess.Popen[bytes]) -> None:
    store = HashStore()
    mine = membership(store, member("mine"), member("silent", silent.pid), member("elsewhere"))
    store.set("2/here/elsewhere", member("elsewhere").to_json())
    store.set("2/plan", json.dumps(["elsewhere", "mine"]))
    assert mine.meet().size == 2
    assert silent.poll() == -9


def test_one_that_stands_still_when_a_generation_begins_is_silent_after_the_time_limit() -> None:
    store = HashStore()
    first, second = member("first"), member("second")
    mine = Membership(store, first, ["first", "second"], timeout_s=0.2)
    store.set("1/here/second", second.to_json())  # and not a word after that
    generation = mine.meet()
    with pytest.raises(LostWorker, match=r"worker 1 did not answer within 0.2 s when generation 1 began") as caught:
        generation.introduce(b"data")
    assert (caught.value.silent, caught.value.rank) == (True, 1)


def test_one_that_leaves_is_not_ended(silent: subprocess.Popen[bytes]) -> None:
    mine = membership(HashStore(), member("mine"), member("leaves", silent.pid))
    assert mine.meet(leavers=["leaves"]).size == 1
    assert silent.poll() is None


def test_one_that_is_silent_elsewhere_is_named_to_its_launcher() -> None:
    store = HashStore()
    mine = membership(store, member("mine"), member("silent"))
    assert mine.meet().size == 1
    assert store.check(["outside/silent"])


def test_one_that_was_let_in_and_did_not_come_is_let_in_again_only_if_it_asks_again() -> None:
    store = HashStore()
    mine = membership(store, member("mine"))
    for number, uid in enumerate(["stands still", "another"]):
        store.set(f"applicant/{number}", uid)
    assert mine.applicants(at_once=True) == ["stands still", "another"]
    mine.admit(["stands still"], leavers=[])
    assert mine.applicants(at_once=True) == ["another"]
    store.set("applicant/2", "stands still")
    assert mine.applicants(at_once=True) == ["another", "stands still"]


def waiting(store: HashStore) -> Membership:
    """That of a worker that waits to join two others, of which one stands still."""
    store.set("members", '["first", "second"]')
    store.set("standing/first", "1")
    return Membership(store, member("waits"), [], timeout_s=0.0)


def test_when_all_members_stand_still_those_who_wait_have_them_ended_by_their_launchers() -> None:
    store = HashStore()
    mine = waiting(store)
    mine.check_members()
    assert not store.check(["outside/first"])  # the other one would notice
    store.set("standing/second", "1")
    mine.check_members()
    mine.check_members()
    assert store.check(["outside/first", "outside/second"])


def test_members_that_stand_still_for_less_than_the_limit_are_left_alone() -> None:
    store = HashStore()
    mine = waiting(store)
    store.set("standing/second", "1")
    mine.check_members()
    assert not store.check(["outside/first"])  # seen for the first time, however long this worker has waited
    store.set("standing/first", "0")
    mine.check_members()
    store.set("standing/first", "1")
    mine.check_members()
    assert not store.check(["outside/first"])


def test_a_member_that_has_died_does_not_keep_the_others_from_being_given_up() -> None:
    store = HashStore()
    mine = waiting(store)
    store.set("dead/second", "was killed by SIGKILL")
    mine.check_members()
    mine.check_members()
    assert store.check(["outside/first"])
    assert not store.check(["outside/second"])
