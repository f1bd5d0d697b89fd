"""What a worker writes down when it fails, which failure is the cause of the others, and how a person sees it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from unisono.errors import DataError, UnisonoError, WorkerFailure
from unisono.system.process import ending
from unisono.system.signals import RESTART

ERROR_FILE = "UNISONO_ERROR_FILE"
"""Environment variable: where a worker leaves its failure record."""

_TAIL_LINES = 20
_BRIEF = 200
_LOST_CONTACT = ("connection closed by peer", "connection reset by peer", "connection refused", "broken pipe")


@dataclass(frozen=True, kw_only=True)
class FailureRecord:
    """One worker's own account of why it ended. It travels to the launcher as a JSON file."""

    kind: str
    """Name of the exception's class."""
    message: str
    """The exception's text."""
    traceback: str
    """The original traceback; empty where the message alone tells what to do."""
    secondary: bool
    """Whether this worker only noticed that another one was lost."""
    time_s: float
    """When it happened, in seconds since the epoch."""
    rank: int | None = None
    """The worker that failed, where the exception says that it was another one."""
    host: str | None = None
    """Its host, where the exception says so."""
    step: int | None = None
    """Optimizer step in which it failed, if the exception says so."""
    gives_up: bool = False
    """Whether the workers have given the run up: nothing that struck one of them before is the reason."""


def describe(error: BaseException) -> FailureRecord:
    """The record of an exception that ended the script. *local*"""
    failure = error if isinstance(error, WorkerFailure) else None
    step = getattr(error, "step", None)
    return FailureRecord(
        kind=type(error).__name__,
        message=str(error),
        traceback=_traceback(error),
        secondary=_is_lost_contact(error) if failure is None else not failure.gives_up,
        time_s=time.time(),
        rank=failure.rank if failure and failure.traceback else None,
        host=failure.host if failure and failure.traceback else None,
        step=step if isinstance(step, int) else None,
        gives_up=failure is not None and failure.gives_up,
    )


def _traceback(error: BaseException) -> str:
    if isinstance(error, WorkerFailure):
        return error.traceback or ""
    # Our own errors say what to do, and where they were raised helps nobody. Only a sample that could not be loaded
    # needs the traceback of the user's code that failed.
    if isinstance(error, SystemExit | UnisonoError) and not (isinstance(error, DataError) and error.__cause__):
        return ""
    text = traceback.TracebackException(type(error), error, _from_script(error.__traceback__))
    return "".join(text.format())


def _from_script(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames that started the script: they only bury the place that matters."""
    ours = str(Path(__file__).parent) + os.sep
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith((ours, "<frozen runpy>")):
        trace = trace.tb_next
    return trace


def _is_lost_contact(error: BaseException) -> bool:
    """Whether torch.distributed says that another worker is gone: its own kinds of error, and Gloo's plain ones."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and isinstance(error, getattr(distributed, "DistError", ())):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | ConnectionError) and any(words in text for words in _LOST_CONTACT)


def write_record(record: FailureRecord, file: Path) -> None:
    """Leave the record where the launcher looks, whole or not at all. *local*"""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(asdict(record)))
    part.replace(file)


def read_record(file: Path) -> FailureRecord | None:
    """The record, or None if the worker left none. *local*"""
    with contextlib.suppress(FileNotFoundError):
        return FailureRecord(**json.loads(file.read_text()))
    return None


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One worker's failure, as the launcher sees it."""

    rank: int
    pid: int
    status: int | None
    """Exit status, -N if signal N killed it, None if it was still ending."""
    time_s: float
    """When it failed, in seconds since the epoch: by its own record, else when the launcher saw it dead."""
    record: FailureRecord | None
    """What it wrote down, if it could."""
    log: Path | None
    """Its output, unless that went to the terminal."""

    @property
    def is_secondary(self) -> bool:
        """Whether it comes of the loss of another worker."""
        return self.record.secondary if self.record else self.status == RESTART

    @property
    def lost_contact(self) -> bool:
        """Whether it has written down that it lost contact with another worker."""
        return self.record is not None and self.record.secondary

    @property
    def error(self) -> tuple[str, str] | None:
        """What tells an error of the script from other ones, if it was the script that failed: kind and message."""
        if self.is_secondary or self.status is None:
            return None
        if self.record is not None:
            return self.record.kind, self.record.message
        return ("exit", str(self.status)) if self.status > 0 else None

    @property
    def exit_code(self) -> int:
        """What a shell would show: the script's status, 128 + N for signal N, 1 for an exception."""
        if self.record is not None or self.status is None:
            return 1
        return 128 - self.status if self.status < 0 else self.status


def root_cause(failures: Iterable[Failure]) -> Failure | None:
    """The failure that made the others fail; None if there is none. *local*

    Not one that only lost contact, while there is another. SIGKILL before any other: it comes from outside (a person,
    or the kernel out of memory) and is never the consequence of another worker's failure, but it is the one kind that
    the launcher dates too late, by up to a tenth of a second. Then the earliest.
    """

    def order(failure: Failure) -> tuple[bool, bool, float]:
        return failure.is_secondary, failure.status != -signal.SIGKILL, failure.time_s

    return min(failures, key=order, default=None)


def report(failure: Failure, *, size: int, host: str) -> str:
    """The one text that a person sees about a failed run: who, where, when, and the original traceback. *local*

    Args:
        failure: The root cause.
        size: How many workers there were.
        host: The host on which they ran.
    """
    record = failure.record
    if record is None:
        who = f"unisono: worker {failure.rank} of {size} on {host}"
        if failure.status == RESTART:
            return (
                f"{who} could not continue without the state of a lost worker. Start the run again: it resumes from its last "
                "checkpoint"
            )
        return "\n".join([f"{who} (pid {failure.pid}) {ending(failure.status or 0)}", *_tail(failure.log)])
    rank = failure.rank if record.rank is None else record.rank
    who = f"unisono: worker {rank} of {size} on {record.host or host}"
    step = "" if record.step is None else f" in step {record.step}"
    if record.kind == "SystemExit":
        text = f"{who} ended: {record.message}"
    elif record.traceback:
        text = f"{who} failed{step}\n{record.traceback.rstrip()}"
    else:
        text = f"{who} failed{step}: {record.kind}: {record.message}"
    return f"{text}\nunisono: its output is in {failure.log}" if has_output(failure.log) else text


def brief(failure: Failure) -> str:
    """How a worker failed, in a few words that go on a sentence: "was killed by SIGKILL". *local*"""
    record = failure.record
    if record is None:
        return ending(failure.status or 0, hint=False)
    message = record.message.strip().partition("\n")[0]
    if len(message) > _BRIEF:
        message = message[:_BRIEF] + "..."
    return f"failed: {record.kind}: {message}" if message else f"failed: {record.kind}"


def has_output(log: Path | None) -> bool:
    """Whether a worker wrote anything to its log. *local*"""
    return log is not None and log.exists() and log.stat().st_size > 0


def _tail(log: Path | None) -> Iterator[str]:
    if log is None or not has_output(log):
        return
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 64 * 1024))
        lines = file.read().decode(errors="replace").splitlines()
    yield f"unisono: its last output, all of which is in {log}:"
    yield from (f"  {line}" for line in lines[-_TAIL_LINES:])
