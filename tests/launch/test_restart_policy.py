"""The rules by which a run goes on without a worker, starts again, or ends: on processes that nobody started."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import cast

import pytest
from torch.distributed import HashStore, PrefixStore, Store

from unisono.elastic.membership import TooFewWorkers
from unisono.launch.control_store import ControlStore
from unisono.launch.processes import SupervisedProcess
from unisono.launch.report import FailureRecord, describe
from unisono.launch.restart_policy import REPLACE_S, Course, RestartPolicy
from unisono.system.fork_server import Child
from unisono.system.signals import RESTART

KILLED = -signal.SIGKILL
LATE_S = 100.0


class Numbered:
    """All of a process that the rules look at."""

    def __init__(self, pid: int) -> None:
        self.pid = pid


class Run:
    """A run of some workers, and what was said about it."""

    def __init__(self, workers: int, *, max_restarts: int = 3, is_alone: bool = True) -> None:
        self.said: list[str] = []
        self.policy = RestartPolicy(max_restarts=max_restarts, say=self.said.append)
        self._store: Store = HashStore()
        self.attempt = -1
        self._workers = workers
        self._is_alone = is_alone
        self._pid = 100
        self.begin()
        self.set("elastic")

    def begin(self) -> None:
        self.attempt += 1
        self.policy.begin(ControlStore(self._store, self.attempt), is_alone=self._is_alone)
        self.latest = [self.process(rank) for rank in range(self._workers)]

    def set(self, key: str, value: str = "1") -> None:
        PrefixStore(f"unisono/{self.attempt}", self._store).set(key, value)

    def process(self, rank: int, *, joins: bool = False) -> SupervisedProcess:
        self._pid += 1
        child = cast(Child, Numbered(self._pid))
        return SupervisedProcess(rank, f"0.{self._pid}", child, Path("none"), None, joins=joins)

    def end(self, *ends: tuple[int, int | str], stops: bool = False, now_s: float = 0.0) -> Course:
        """Workers end: with a status, with the message of an error, or, after a question mark, for lost contact."""
        ended = []
        for rank, end in ends:
            process = self.latest[rank]
            process.status, process.ended_s = (1 if isinstance(end, str) else end), time.time()
            if isinstance(end, str):
                text, secondary = end.removeprefix("?"), end.startswith("?")
                process.record = FailureRecord(
                    kind="ValueError", message=text, traceback="", secondary=secondary, time_s=process.ended_s
                )
            ended.append(process)
        assert self.policy.applies
        return self.policy.look(ended, self.latest, stops=stops, now_s=now_s)

    def replace(self, now_s: float = REPLACE_S) -> list[int]:
        ranks = self.policy.due(sum(1 for process in self.latest if process.status is None), now_s)
        for rank in ranks:
            self.latest[rank] = self.process(rank, joins=True)
        return ranks

    @property
    def cause(self) -> str | None:
        """How the worker ended that the run has failed of."""
        cause = self.policy.cause
        if cause is None:
            return None
        return cause.record.message if cause.record else str(cause.status)


def test_a_dead_worker_is_replaced_after_a_moment_and_that_is_said() -> None:
    run = Run(3)
    assert run.end((1, KILLED)) is Course.GO_ON
    assert run.replace(now_s=REPLACE_S / 2) == []
    assert run.replace() == [1]
    assert run.said == ["unisono: worker 1 (pid 102) was killed by SIGKILL; a new one starts (restart 1 of 3)"]
    assert run.replace() == []
    assert run.end((0, 0), (1, 0), (2, 0)) is Course.DONE


def test_without_restarts_the_others_go_on_and_a_survived_death_is_no_failure() -> None:
    run = Run(3, max_restarts=1)
    run.end((1, KILLED))
    assert run.replace() == [1]
    run.end((2, -signal.SIGSEGV))
    assert run.replace() == []
    assert run.said[1].endswith("was killed by SIGSEGV; 2 workers are left, and no restarts (--max-restarts 1)")
    run.set("over")
    assert run.end((0, 0), (1, 0)) is Course.DONE
    assert run.cause is None


def test_an_error_that_ends_the_last_worker_is_the_cause_and_not_a_death_that_was_survived() -> None:
    run = Run(2, max_restarts=0)
    assert run.end((1, KILLED)) is Course.GO_ON
    assert run.replace() == []
    assert run.end((0, "no space")) is Course.FAILED
    assert run.cause == "no space"


def test_a_worker_that_left_is_not_replaced() -> None:
    run = Run(2)
    assert run.end((1, 0)) is Course.GO_ON
    assert run.replace(LATE_S) == []
    assert run.end((0, 0)) is Course.DONE


def test_an_error_that_comes_a_second_time_ends_the_run() -> None:
    run = Run(3)
    assert run.end((1, "bad sample 7")) is Course.GO_ON
    assert run.replace() == [1]
    assert run.end((2, "bad sample 8")) is Course.GO_ON
    assert run.replace() == [2]
    assert run.end((0, "bad sample 7")) is Course.FAILED
    assert run.cause == "bad sample 7"


@pytest.mark.parametrize("workers", [1, 3])
def test_errors_of_all_workers_end_the_run(workers: int) -> None:
    run = Run(workers)
    assert run.end(*((rank, f"worker {rank} has no such file") for rank in range(workers))) is Course.FAILED
    assert run.said == []


def test_an_exit_status_that_comes_a_second_time_ends_the_run() -> None:
    run = Run(2)
    run.end((1, 3))
    assert run.replace() == [1]
    assert run.end((1, 3)) is Course.FAILED
    assert run.cause == "3"


def test_when_all_are_killed_all_start_again_which_is_one_restart() -> None:
    run = Run(2, max_restarts=1)
    run.end((0, KILLED))
    assert run.end((1, KILLED), now_s=REPLACE_S / 2) is Course.AGAIN
    assert run.said[0].endswith("was killed by SIGKILL; all workers start again from the last checkpoint (restart 1 of 1)")
    run.begin()
    assert run.policy.applies  # although no Trainer of this attempt has said so yet
    assert run.replace(LATE_S) == []
    assert run.end((0, KILLED), (1, KILLED)) is Course.FAILED


def test_when_those_who_live_cannot_go_on_all_start_again_and_the_first_death_is_the_cause() -> None:
    run = Run(3)
    assert run.end((2, KILLED)) is Course.GO_ON
    assert run.end((1, RESTART)) is Course.AGAIN
    assert run.said[0].startswith("unisono: worker 2 (pid 103) was killed by SIGKILL; all workers start again")


def test_without_restarts_those_who_cannot_go_on_end_the_run_with_the_cause() -> None:
    run = Run(2, max_restarts=0)
    run.end((0, -signal.SIGSEGV))
    assert run.end((1, RESTART)) is Course.FAILED
    assert run.cause == str(-signal.SIGSEGV)
    assert run.said == ["unisono: no restarts left (--max-restarts 0)"]


def test_workers_that_need_each_other_all_start_again_at_once() -> None:
    run = Run(2)
    run.set("whole", "0")
    assert run.end((1, KILLED)) is Course.AGAIN


def test_who_lost_contact_is_replaced_if_the_others_go_on() -> None:
    run = Run(3)
    run.end((1, "?lost contact"))
    assert run.replace() == []
    assert run.end(now_s=LATE_S) is Course.GO_ON
    assert run.replace(LATE_S) == [1]


def test_when_nobody_goes_on_after_lost_contact_the_run_ends_with_the_first_cause() -> None:
    run = Run(2)
    run.end((1, KILLED))
    assert run.replace() == [1]
    assert run.end((0, "?lost contact")) is Course.GO_ON
    assert run.end(now_s=LATE_S) is Course.FAILED

    run = Run(2)
    assert run.end((0, "?lost contact"), (1, "?lost contact, too")) is Course.FAILED
    assert run.cause == "lost contact"


def test_one_without_whom_others_have_gone_on_is_replaced_also_if_none_of_them_is_on_its_host() -> None:
    run = Run(2, is_alone=False)
    run.end((0, 0))
    run.latest[1].record = FailureRecord(kind="Outside", message="", traceback="", secondary=True, time_s=0.0)
    assert run.end((1, 1)) is Course.GO_ON
    assert run.end(now_s=LATE_S) is Course.GO_ON
    assert run.replace(LATE_S) == [1]


def test_one_that_lost_contact_is_replaced_where_those_who_were_there_may_be_on_another_host() -> None:
    run = Run(2, is_alone=False)
    assert run.end((1, KILLED)) is Course.GO_ON
    assert run.replace() == [1]
    assert run.end((0, "?lost contact")) is Course.GO_ON
    assert run.end(now_s=LATE_S) is Course.GO_ON
    assert run.replace(LATE_S) == [0]


def test_while_the_run_stops_nobody_is_replaced_and_deaths_do_not_count_if_others_save() -> None:
    run = Run(3)
    assert run.end((1, KILLED), stops=True) is Course.GO_ON
    assert run.replace(LATE_S) == []
    assert run.end((0, 130), (2, 130), stops=True) is Course.FAILED
    assert run.cause is None
    run = Run(2)
    assert run.end((0, KILLED), (1, RESTART), stops=True) is Course.FAILED


def test_an_error_while_the_run_stops_or_after_its_end_is_a_failure() -> None:
    run = Run(2)
    assert run.end((1, "disk full"), stops=True) is Course.FAILED
    run = Run(2)
    run.set("over")
    assert run.end((1, "no such column")) is Course.FAILED
    assert run.cause == "no such column"


def test_a_death_after_the_end_changes_nothing() -> None:
    run = Run(2)
    run.end((0, -signal.SIGTERM))
    run.set("over")
    assert run.replace() == []  # dead before, but no longer needed
    assert run.end((1, 0)) is Course.DONE
    run = Run(2)
    run.set("over")
    assert run.end((0, KILLED)) is Course.GO_ON
    assert run.end((1, KILLED)) is Course.DONE


def test_workers_that_give_the_run_up_are_the_reason_and_not_who_died_before() -> None:
    run = Run(3)
    run.end((2, KILLED))
    for rank in (0, 1):
        run.latest[rank].record = describe(TooFewWorkers("2 of at least 3 workers are left"))
    assert run.end((0, 1)) is Course.FAILED
    assert run.cause == "2 of at least 3 workers are left"


def test_a_newcomer_that_does_not_fit_is_turned_away_and_the_others_go_on() -> None:
    run = Run(2)
    run.end((1, KILLED))
    run.replace()
    process = run.latest[1]
    process.record = FailureRecord(kind="FingerprintMismatch", message="torch 2", traceback="", secondary=False, time_s=0.0)
    assert run.end((1, 1)) is Course.GO_ON
    assert run.replace(LATE_S) == []
    assert "was turned away: torch 2" in run.said[-1]


def test_a_newcomer_that_is_turned_away_when_the_run_has_ended_does_not_make_it_fail() -> None:
    run = Run(2)
    run.end((1, KILLED))
    run.replace()
    run.set("over")
    process = run.latest[1]
    process.record = FailureRecord(kind="FingerprintMismatch", message="torch 2", traceback="", secondary=False, time_s=0.0)
    assert run.end((1, 1)) is Course.GO_ON
    assert run.end((0, 0)) is Course.DONE
