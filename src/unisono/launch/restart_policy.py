"""What becomes of a run that can go on without one of its workers, when workers end: the rules, without processes or clocks.

- A worker that dies is replaced, while restarts are left (`--max-restarts`); without them the others go on.
- An error that comes a second time, from another worker or from the replacement, is the program's and not the machine's: it
  ends the run. So does one that all workers raise.
- Workers that are fewer than the minimum give the run up once they have waited too long for others.
- If the survivors cannot go on without the state of the dead, or there are no survivors, all restart from the last checkpoint:
  the next attempt.
- Once the run is stopping or over, dead workers are not replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from unisono.launch.processes import SupervisedProcess
from unisono.launch.report import Failure, brief, root_cause
from unisono.system.signals import RESTART, STOP_CODES

if TYPE_CHECKING:  # it imports torch, and the command must not wait for that
    from unisono.launch.control_store import ControlStore

REPLACE_S = 0.1
"""How long to wait before a dead worker is replaced, in seconds: the survivors first get the processor to recover with, and if
all are killed one after the other, no replacement starts that would find no members."""
_CAUSE_S = 1.0
"""The same for a worker that lost contact, which may be the first sign of something that ends all of them, in seconds."""
_NEWCOMER_S = 5.0
"""How long after its start a worker may still be on its way to the others, in seconds."""


class Course(Enum):
    """How the run goes on."""

    GO_ON = auto()
    """Workers run; some may have to be replaced."""
    AGAIN = auto()
    """All workers start again, from the last checkpoint."""
    DONE = auto()
    """The run has succeeded."""
    FAILED = auto()
    """The run has failed."""
    OUT = auto()
    """No worker runs on this host any more, nor will one start. Other hosts may go on."""


@dataclass(frozen=True)
class _Vacancy:
    failure: Failure
    due_s: float


class RestartPolicy:
    """The rules, applied to one host's workers. All methods are *local*.

    Args:
        max_restarts: How many restarts the whole run has, of single workers and of all together.
        say: Shows one line to a person.
    """

    def __init__(self, *, max_restarts: int, say: Callable[[str], None]) -> None:
        self._max_restarts = max_restarts
        self._say = say
        self._errors: dict[tuple[str, str], Failure] = {}
        self._is_elastic = False
        self._control: ControlStore
        self._vacancies: dict[int, _Vacancy]
        self._deaths: list[Failure]
        self._all_needed: bool
        self._is_alone: bool
        self.cause: Failure | None = None
        """What ended the run, once it has failed."""

    def begin(self, control: ControlStore, *, is_alone: bool = True) -> None:
        """Begin an attempt.

        Args:
            control: Its part of the store.
            is_alone: Whether no other host can take part.
        """
        self._control = control
        self._is_alone = is_alone
        self._vacancies = {}
        self._deaths = []
        self._all_needed = False

    @property
    def applies(self) -> bool:
        """Whether the run can go on without one of its workers: the first Trainer says so, and it holds for later attempts."""
        self._is_elastic = self._is_elastic or self._control.is_elastic
        return self._is_elastic

    @property
    def has_applied(self) -> bool:
        """Whether `applies` has ever been true."""
        return self._is_elastic

    def look(
        self, ended: Sequence[SupervisedProcess], everyone: Sequence[SupervisedProcess], *, stops: bool, now_s: float
    ) -> Course:
        """Judge what has happened since the last look.

        Args:
            ended: The processes that have ended since then.
            everyone: The latest process of each worker.
            stops: Whether the run was asked to stop.
            now_s: The time, in seconds, of a clock that never goes back.
        """
        for process in ended:
            if process.failure is not None:
                self._note(process, process.failure, stops=stops, now_s=now_s)
        failures = [process.failure for process in everyone if process.failure is not None]
        if self.cause is not None:
            return Course.FAILED
        if self._is_alone and self._are_helpless(everyone, now_s):
            return self._fail(failures)
        if all(process.status is not None for process in everyone):
            return self._end([process.status for process in everyone], failures, stops=stops)
        if self._all_needed:
            return self._again(failures, stops=stops)
        return Course.GO_ON

    def cause_of(self, failures: Iterable[Failure]) -> Failure | None:
        """What ended the run, if these are the failures of this host's workers."""
        return self.cause if self._is_elastic else root_cause(failures)

    def give_up(self, failures: Sequence[Failure]) -> None:
        """Take these, of this host's workers, for the cause: no other host goes on, or it does so without this one."""
        self._fail(failures)

    def due(self, running: int, now_s: float) -> list[int]:
        """The numbers of the workers to replace now.

        Args:
            running: How many workers run.
            now_s: The time, as for `look`.
        """
        due = [rank for rank, vacancy in self._vacancies.items() if vacancy.due_s <= now_s]
        if due and self._control.is_over:
            self._vacancies.clear()
            return []
        return [rank for rank in due if self._may_replace(self._vacancies.pop(rank).failure, running)]

    def _may_replace(self, failure: Failure, running: int) -> bool:
        number = self._control.take_restart()
        if number > self._max_restarts:
            left = f"{running} worker{'s are' if running > 1 else ' is'} left"
            self._say(f"{_who(failure)} {brief(failure)}; {left}, and no restarts (--max-restarts {self._max_restarts})")
            return False
        self._say(f"{_who(failure)} {brief(failure)}; a new one starts (restart {number} of {self._max_restarts})")
        return True

    def _note(self, process: SupervisedProcess, failure: Failure, *, stops: bool, now_s: float) -> None:
        self._deaths.append(failure)
        if process.joins and failure.record is not None and failure.record.kind == "FingerprintMismatch":
            self._say(f"{_who(failure)} was turned away: {failure.record.message}")
        elif failure.record is not None and failure.record.gives_up:
            self.cause = failure
        elif failure.error is not None and (stops or failure.error in self._errors or self._control.is_over):
            self.cause = self._errors.get(failure.error, failure)
        elif stops or self._control.is_over:
            self._say(f"{_who(failure)} {brief(failure)} when the run was about to end")
        else:
            if failure.error is not None:
                self._errors[failure.error] = failure
            self._all_needed = self._all_needed or failure.status == RESTART or self._control.needs_all
            self._vacancies[process.rank] = _Vacancy(failure, now_s + (_CAUSE_S if failure.lost_contact else REPLACE_S))

    def _are_helpless(self, everyone: Sequence[SupervisedProcess], now_s: float) -> bool:
        """Whether a worker has ended because it lost contact, and no other member of its time runs: only newcomers do. (With
        several hosts such members may run elsewhere; if there are none, newcomers find that out.)"""
        return any(
            vacancy.failure.is_secondary and vacancy.due_s <= now_s and not any(_was_there(vacancy.failure, p) for p in everyone)
            for vacancy in self._vacancies.values()
        )

    def _end(self, statuses: Sequence[int | None], failures: Sequence[Failure], *, stops: bool) -> Course:
        """No worker runs any more."""
        if not any(statuses) or self._control.is_over:
            return Course.DONE  # the script had come to its end, whatever struck afterwards
        if stops and any(status == 0 or status in STOP_CODES for status in statuses):
            return Course.FAILED  # as it was asked to, without a cause
        if not (self._is_alone or stops or self._all_needed):
            return Course.GO_ON if self._vacancies else Course.OUT
        by_script = all(failure.error is not None for failure in failures)
        if stops or by_script or any(failure.lost_contact for failure in failures):
            return self._fail(failures)
        return self._again(failures, stops=stops)

    def _again(self, failures: Sequence[Failure], *, stops: bool) -> Course:
        if stops:
            return self._fail(failures)
        if not self._control.call_again():
            return Course.AGAIN  # another host has said so, and counted it
        number = self._control.take_restart()
        if number > self._max_restarts:
            self._say(f"unisono: no restarts left (--max-restarts {self._max_restarts})")
            return self._fail(failures)
        cause = root_cause(self._deaths)
        why = f"{_who(cause)} {brief(cause)}" if cause else "unisono: all workers have left"
        self._say(f"{why}; all workers start again from the last checkpoint (restart {number} of {self._max_restarts})")
        return Course.AGAIN

    def _fail(self, failures: Sequence[Failure]) -> Course:
        # The others have gone on without a worker that was killed: what then ended the last of them is the cause.
        cause = root_cause([failure for failure in failures if failure.error is not None]) or root_cause(failures)
        # The last worker may have died of the loss of another one, which may have died long before.
        self.cause = root_cause(self._deaths) if cause is None or cause.is_secondary else cause
        return Course.FAILED


def _who(failure: Failure) -> str:
    return f"unisono: worker {failure.rank} (pid {failure.pid})"


def _was_there(failure: Failure, process: SupervisedProcess) -> bool:
    """Whether a process runs and took part when another one failed."""
    has_joined = not process.joins or failure.time_s - process.started_s > _NEWCOMER_S
    return process.status is None and has_joined
