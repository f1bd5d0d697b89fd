"""What the workers of a new generation tell each other, and what follows from it. *Local.*"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from unisono.elastic.membership import StateLost

NEW = -1
"""Operations of a worker that has not been in the run before."""


class TrainerFinished(Exception):
    """Another worker has come to the script's next trainer: nothing is left to do with this one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an operation has come to, the same on all workers."""

    result: Any = None
    workers: int = 0
    """How many workers took part in it, if it was a step."""
    leavers: Sequence[str] = ()
    """uids of the workers that leave after it, if it was a step."""
    admits: bool = False
    """Whether others wait to join."""
    groups: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """The optimizer's hyperparameters after it, by parameter group, if it was a step."""

    @property
    def everyone_leaves(self) -> bool:
        """Whether all workers leave after it."""
        return 0 < self.workers == len(self.leavers)


@dataclasses.dataclass(kw_only=True)
class Progress:
    """How far a worker has come. What it says of itself is true at every moment."""

    operations: int = NEW
    """Operations that are done."""
    confirmed: int = 0
    """The last operation of which this worker knows that all have its result, where that matters."""
    reached: int = 0
    """The last step that the state which this worker holds has behind it."""
    committed: int = 0
    """The last step of the run. It is ahead of ``reached`` only while steps are taken again."""
    outcome: Outcome = dataclasses.field(default_factory=Outcome)
    """Of the last operation."""
    has_all: bool = False
    """Whether this worker has all of the state itself; else the workers of its host share it."""

    @property
    def is_new(self) -> bool:
        """Whether this worker has not been in the run before."""
        return self.operations == NEW

    def done(self, operation: int, outcome: Outcome) -> None:
        """That many operations are done, the last with this outcome."""
        self.operations, self.outcome = operation, outcome


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerReport:
    """What a worker says of itself when a generation begins."""

    trainer: int
    """Which of the script's trainers it is at, from 1."""
    operations: int
    confirmed: int
    reached: int
    committed: int
    changing: bool
    """Whether the operation under way is to let others join or leave."""
    has_all: bool
    has_part: bool
    """Whether it shares the state with the others of its host."""
    may_share: bool
    """Whether it is in a loop in which workers may share the weights: one may have entered or left it before the others."""

    @property
    def is_new(self) -> bool:
        """Whether it has not been in the run before."""
        return self.operations == NEW

    @property
    def place(self) -> tuple[int, int]:
        """What it has done; larger is further."""
        return self.operations, self.reached


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoveryPlan:
    """What follows from the reports of all workers of a generation; the same on each of them."""

    reports: Sequence[WorkerReport]
    """By rank."""
    source: int
    """Rank of a worker whose state the others can go on from: the one that has come furthest, and of these one that has all of
    it, if any, or else a part."""
    operations: int
    """Operations that are done once all have what the source has."""
    meeting_counts: bool
    """Whether the last of these was to meet those who join."""

    @classmethod
    def of(cls, reports: Sequence[WorkerReport], *, trainer: int) -> RecoveryPlan:
        """The plan.

        Args:
            trainer: Which of the script's trainers this worker is at.

        Raises:
            TrainerFinished: Another worker has come to the next one.
            StateLost: None of these workers has any state.
        """
        if any(report.trainer > trainer for report in reports):
            raise TrainerFinished
        operations = max(report.operations for report in reports)
        if operations == NEW:
            raise StateLost("all workers that held the run's state were lost")
        places = [(report.operations, report.has_all, report.has_part, report.reached) for report in reports]
        source = places.index(max(places))
        counts = reports[source].changing and any(report.is_new for report in reports)
        return cls(reports=reports, source=source, operations=operations + counts, meeting_counts=counts)

    @property
    def ahead(self) -> WorkerReport:
        """The source's."""
        return self.reports[self.source]

    @property
    def behind(self) -> set[int]:
        """Ranks of those who lack the result of the last operation, or of a step that was being taken again."""
        return {rank for rank, report in enumerate(self.reports) if report.place < self.ahead.place}

    @property
    def unlike(self) -> list[int]:
        """Ranks of those who do not have all of the state that the source has."""
        return [rank for rank, report in enumerate(self.reports) if not (report.has_all and report.place == self.ahead.place)]

    @property
    def confirmed(self) -> int:
        """The last operation of which someone knows that all have its result."""
        return max(report.confirmed for report in self.reports)

    @property
    def committed(self) -> int:
        """The last step of the run."""
        return max(report.committed for report in self.reports)

    @property
    def may_share(self) -> bool:
        """Whether all are in a loop in which workers may share the weights."""
        return all(report.may_share for report in self.reports)
