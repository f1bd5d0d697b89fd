"""Failure records, and which of several failures is the cause."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch.distributed

from unisono.errors import ConfigurationError, DataError, WorkerFailure
from unisono.launch.report import Failure, FailureRecord, describe, read_record, report, root_cause, write_record


def record(*, secondary: bool = False, time_s: float = 1.0) -> FailureRecord:
    return FailureRecord(kind="ValueError", message="m", traceback="t", secondary=secondary, time_s=time_s)


def failure(rank: int, *, status: int = 1, time_s: float = 1.0, secondary: bool | None = None) -> Failure:
    account = None if secondary is None else record(secondary=secondary, time_s=time_s)
    return Failure(rank=rank, pid=100 + rank, status=status, time_s=time_s, record=account, log=None)


@pytest.mark.parametrize(
    ("failures", "rank"),
    [
        ([failure(0, time_s=2.0, secondary=False), failure(1, time_s=1.0, secondary=False)], 1),
        ([failure(0, time_s=1.0, secondary=True), failure(1, time_s=2.0, secondary=False)], 1),
        ([failure(0, time_s=1.0, secondary=True), failure(1, time_s=2.0, status=-11)], 1),
        ([failure(0, time_s=1.0, secondary=False), failure(1, time_s=1.1, status=-9)], 1),
        ([failure(0, time_s=1.0, secondary=False), failure(1, time_s=1.1, status=-6)], 0),
        ([failure(0, time_s=2.0, secondary=True), failure(1, time_s=1.0, secondary=True)], 1),
    ],
)
def test_the_cause_is_found_among_its_consequences(failures: list[Failure], rank: int) -> None:
    cause = root_cause(failures)
    assert cause is not None
    assert cause.rank == rank


def test_no_failure_has_no_cause() -> None:
    assert root_cause([]) is None


@pytest.mark.parametrize(
    ("error", "secondary"),
    [
        (WorkerFailure("lost contact"), True),
        (torch.distributed.DistNetworkError("gone"), True),
        (RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:4711"), True),
        (ConnectionResetError("[Errno 104] Connection reset by peer"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_lost_contact_is_told_from_a_cause(error: Exception, secondary: bool) -> None:
    assert describe(error).secondary == secondary


def test_a_traceback_begins_in_the_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("def inner():\n    raise ValueError('boom')\ninner()\n")
    with pytest.raises(ValueError, match="boom") as caught:
        runpy.run_path(str(script))
    trace = caught.value.__traceback__
    assert trace is not None
    caught.value.__traceback__ = trace.tb_next  # the frame of this test is no frame of the launcher
    lines = describe(caught.value).traceback.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1] == f'  File "{script}", line 3, in <module>'
    assert lines[-1] == "ValueError: boom"


def test_a_script_that_does_not_compile_shows_the_line(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("if True print(1)\n")
    with pytest.raises(SyntaxError) as caught:
        runpy.run_path(str(script))
    assert f'File "{script}", line 1' in describe(caught.value).traceback


def test_our_own_errors_need_no_traceback_but_a_bad_sample_shows_its_cause() -> None:
    assert describe(ConfigurationError("batch_size=3 is too small")).traceback == ""
    error = DataError("sample 7 cannot be loaded", index=7)
    error.__cause__ = OSError("truncated file")
    assert "OSError: truncated file" in describe(error).traceback


def test_a_failure_of_another_worker_is_reported_as_that_workers() -> None:
    error = WorkerFailure("worker 3 failed", rank=3, host="far", step=12, traceback="Traceback of 3\nKeyError: 'x'")
    account = describe(error)
    seen = Failure(rank=0, pid=1, status=1, time_s=0.0, record=account, log=None)
    assert report(seen, size=8, host="here").splitlines() == [
        "unisono: worker 3 of 8 on far failed in step 12",
        "Traceback of 3",
        "KeyError: 'x'",
    ]


def test_a_record_survives_the_way_to_the_launcher(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    assert read_record(file) is None
    write_record(record(), file)
    assert read_record(file) == record()
    assert list(tmp_path.iterdir()) == [file]


def test_the_last_output_of_a_crashed_worker_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "worker-1.log"
    log.write_text("".join(f"line {number}\n" for number in range(100)))
    crashed = Failure(rank=1, pid=4711, status=-11, time_s=0.0, record=None, log=log)
    lines = report(crashed, size=2, host="here").splitlines()
    assert lines[0] == "unisono: worker 1 of 2 on here (pid 4711) was killed by SIGSEGV"
    assert str(log) in lines[1]
    assert lines[2:] == [f"  line {number}" for number in range(80, 100)]
    assert crashed.exit_code == 128 + 11
