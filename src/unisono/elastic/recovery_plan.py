"""What the workers of a new generation tell each other, and what follows from it. *Local.*"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from unisono.elastic.held_state import NEW
from unisono.elastic.membership import StateLost


class TrainerFinished(Exception):
    """Another worker has come to the script's next trainer: nothing is left to do with this one."""


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
