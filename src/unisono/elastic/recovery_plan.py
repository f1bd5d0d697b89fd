"""What the workers of a team say to each other and to the rest of the trainer, and what follows from it. *Local.*"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from unisono.data.batch import Batch
from unisono.elastic.membership import StateLost
from unisono.training.header import Signals
from unisono.training.step import StepResult

NEW = -1
"""Acts of a worker that has not been there before."""


class Parted(Exception):
    """Another worker has come to the script's next trainer: all have done everything that there was to do with this one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taken:
    """A step that has been taken."""

    result: StepResult
    told: Sequence[Signals]
    """What every worker signalled, by rank."""
    leavers: Sequence[str] = ()
    """uids of workers that leave after it."""
    admits: bool = False
    """Whether others wait to join."""
    groups: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Hyperparameters of the optimizer after it, by parameter group, where workers may be lost."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a worker says of itself when a generation begins."""

    trainer: int
    """Which of the script's trainers it is at, from 1."""
    acts: int
    parted: int
    """The last act of which it knows that all have its result."""
    reached: int
    """The last step that it has completed."""
    committed: int
    """The last step of the run, as far as it knows."""
    tracked: str
    """Buffers that some forward has changed, as hexadecimal flags."""
    dense: Sequence[str]
    """Parameters whose gradients were to have few rows, and had not."""
    unsaved: bool
    """Whether a checkpoint was under way."""
    changing: bool
    """Whether the act under way is to let others come or leave."""
    has_all: bool
    """Whether it has all of the state itself."""
    has_part: bool
    """Whether it holds the state in common with the others of its host."""
    may_share: bool
    """Whether it is where workers may have the weights in common: one may have come there, or left, before the others."""

    def is_like(self, other: Report) -> bool:
        """Whether this worker has all of the same state."""
        return self.has_all and (self.acts, self.reached) == (other.acts, other.reached)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoveryPlan:
    """What follows from the reports of all workers of a generation; the same on each of them."""

    reports: Sequence[Report]
    """By rank."""
    source: int
    """Rank of a worker whose state the others can go on from: the furthest, and of these one that has all of it, if any, or
    else a part."""
    acts: int
    """Acts that are done once all have what the source has."""
    meeting_was_act: bool
    """Whether the last of these was to meet those who come."""

    @classmethod
    def of(cls, reports: Sequence[Report], *, trainer: int) -> RecoveryPlan:
        """Args:
            trainer: Which of the script's trainers this worker is at.

        Raises:
            Parted: Another worker has come to the next one.
            StateLost: None of these workers has any state.
        """
        if any(report.trainer > trainer for report in reports):
            raise Parted("another worker has come to the next trainer already")
        acts = max(report.acts for report in reports)
        if acts == NEW:
            raise StateLost("all workers that held the run's state were lost")
        places = [(report.acts, report.has_all, report.has_part, report.reached) for report in reports]
        source = places.index(max(places))
        meeting_was_act = reports[source].changing and any(report.acts == NEW for report in reports)
        return cls(reports=reports, source=source, acts=acts + meeting_was_act, meeting_was_act=meeting_was_act)

    @property
    def ahead(self) -> Report:
        """The source's."""
        return self.reports[self.source]

    @property
    def behind(self) -> set[int]:
        """Ranks of those who lack the result of the last act, or of a step that was being done again."""
        mine = (self.ahead.acts, self.ahead.reached)
        return {rank for rank, report in enumerate(self.reports) if (report.acts, report.reached) < mine}

    @property
    def unlike(self) -> list[int]:
        """Ranks of those who do not have all of the state that the source has."""
        return [rank for rank, report in enumerate(self.reports) if not report.is_like(self.ahead)]

    @property
    def parted(self) -> int:
        """The last act of which someone knows that all have its result."""
        return max(report.parted for report in self.reports)

    @property
    def committed(self) -> int:
        """The last step of the run."""
        return max(report.committed for report in self.reports)

    @property
    def tracked(self) -> bytes:
        """Buffers that some forward has changed, as flags."""
        flags = [bytes.fromhex(report.tracked) for report in self.reports]
        return bytes(map(max, *flags)) if len(flags) > 1 else flags[0]

    @property
    def dense(self) -> list[str]:
        """Parameters whose gradients were to have few rows, and had not."""
        return sorted({name for report in self.reports for name in report.dense})

    @property
    def unsaved(self) -> bool:
        """Whether a checkpoint was under way."""
        return any(report.unsaved for report in self.reports)

    @property
    def may_share(self) -> bool:
        """Whether all are where workers may have the weights in common."""
        return all(report.may_share for report in self.reports)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What the rest of the trainer does when the team changes. All *local*."""

    batch: Callable[[int, int], Batch]
    """This worker's share of a batch, by epoch and number, with the ranges of now."""
    regrouped: Callable[[str, bool], None]
    """A generation has begun; why, for a person, and whether a checkpoint was under way."""
    unsaved: Callable[[], bool]
    """Whether a checkpoint is under way."""
    describe: Callable[[], Any]
    """What a worker that joins must know beside the model's state."""
    adopt: Callable[[Any], None]
    """Takes over what another worker has described."""
