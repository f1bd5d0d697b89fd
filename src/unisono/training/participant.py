"""A trainer as its session sees it: what is made anew for other workers, where the run begins, and what is told to newcomers."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from unisono.checkpoint.message import from_bytes, to_bytes
from unisono.collective import Collective
from unisono.training.loop import Loop
from unisono.training.record import Position
from unisono.training.run import Run
from unisono.training.screen import Screen
from unisono.training.session import Session, StepKey
from unisono.training.settings import Settings
from unisono.training.setup import check_alike, unify_replicas
from unisono.training.state import LocalState, settle_state
from unisono.training.worker_group import WorkerGroup


@dataclasses.dataclass(frozen=True)
class Visible:
    """What user code may read of a trainer at some moment."""

    position: Position
    state: dict[str, Any]
    """``trainer.state``."""
    schedule: Any
    """Where the schedule is."""


class Participant:
    """See the module.

    Args:
        local: What this worker trains with.
        settings: What steps are computed by.
        session: The workers.
        run: How far the run has come.
        loop: Goes over the batches.
        screen: What a person sees.
        alike: What all workers must have been given alike.
    """

    def __init__(
        self,
        local: LocalState,
        settings: Settings,
        session: Session,
        *,
        run: Run,
        loop: Loop,
        screen: Screen,
        alike: Mapping[str, Any],
    ) -> None:
        self.local = local
        self._settings, self._session = settings, session
        self._run, self._loop, self._screen = run, loop, screen
        self._alike = alike
        self._group: WorkerGroup | None = None

    def rebuild(self, collective: Collective) -> WorkerGroup:
        """*collective*. Everything that depends on who takes part, for these workers; what one of them has found out about the
        model, all know."""
        known = {
            "tracked": self.local.buffers.tracked.hex(),
            "learned": {} if self._group is None else self._group.reduction.state_dict(),
            "unsaved": self._run.unsaved_since,
            "streams": self.local.positions.describe(),
        }
        told = [from_bytes(message) for message in collective.all_gather_bytes(to_bytes(known))]
        self.local.positions.adopt(*(one["streams"] for one in told))
        learned = [one["learned"] for one in told]
        self._group = WorkerGroup(self.local, self._settings, collective, session=self._session, learned=learned)
        # Of different lengths, if the workers' models differ: start() says so.
        tracked = bytes(map(max, itertools.zip_longest(*(bytes.fromhex(one["tracked"]) for one in told), fillvalue=0)))
        self.local.buffers.track(tracked[: len(self.local.buffers.tracked)])
        self._loop.rebuild()
        unsaved = [one["unsaved"] for one in told if one["unsaved"] is not None]
        self._run.rebuild(collective, unsaved_since=max(unsaved, default=None))
        return self._group

    def start(self) -> int:
        """*collective*. Brings all workers to where the run begins, or goes on; the number of steps behind it."""
        assert self._group is not None
        collective = self._group.collective
        check_alike(collective, self._alike)
        self._run.seeded = unify_replicas(self.local.replica, collective)
        updates = [self._group.reduction.updated_by(rank) for rank in range(collective.size)]
        settle_state(self.local.replica, updates, collective)
        if not self._session.is_outside:
            if self._run.agree_on_directory(collective) and collective.rank == 0:
                self._screen.tell(
                    f"the workers were given different run directories (named after the time?): all use "
                    f"worker 0's, {self._run.url}"
                )
            self._run.resume(self._group)
            self._tell_whole(self._group)
        return self._run.position.step

    def _tell_whole(self, group: WorkerGroup) -> None:
        may_be_several = group.collective.size > 1 or self._session.can_change
        if group.reduction.updates_whole and may_be_several and group.collective.rank == 0:
            name = self._alike.get("optimizer", "the optimizer")
            self._screen.tell(
                f"{name} is not known to update each parameter on its own, so every worker updates the whole model: exact, but "
                "with all of the optimizer's state and work on each of them. If you know that it does, pass "
                "sync=Exact(shard_update=True)"
            )

    @property
    def run_dir(self) -> str:
        """*local*. Where the run is kept; "": nowhere."""
        return self._run.url or ""

    def move(self, run_dir: str) -> None:
        """*local*. The others, which this worker is to join, keep the run there."""
        self._run.move(run_dir)

    def redo(self, key: StepKey, flags: int) -> None:
        """*collective*. Takes a step again that has been taken before."""
        self._loop.redo(key, flags)

    def visible(self) -> Visible:
        """*local*. What user code may read of the trainer while the next step is computed."""
        return Visible(dataclasses.replace(self._run.position), self.local.user.snapshot(), self.local.replica.schedule_state())

    @contextlib.contextmanager
    def showing(self, visible: Visible) -> Iterator[None]:
        """*local*. While the body runs user code reads this, as it did then."""
        run, replica = self._run, self.local.replica
        now, schedule = run.position, replica.schedule_state()
        run.position = dataclasses.replace(visible.position)
        replica.set_schedule_state(visible.schedule)
        try:
            with self.local.user.showing(visible.state):
                yield
        finally:
            run.position = now
            replica.set_schedule_state(schedule)

    def describe(self) -> dict[str, Any]:
        """*local*. How far the run has come, for a worker that joins it."""
        return {**self._run.describe(), "user": self.local.user.describe(), "modes": self.local.replica.changed_modes()}

    def adopt(self, description: Mapping[str, Any]) -> None:
        """*local*. Takes over what another worker's ``describe`` has returned."""
        self._run.adopt(description)
        self.local.user.adopt(description["user"])
        self.local.replica.change_modes(description["modes"])
        self.local.clock.at(self._run.position.step + 1)

    def announce(self, texts: Sequence[str], event: Mapping[str, Any]) -> None:
        """*local*, on worker 0. Tells the person that the workers have changed, and writes ``event`` into the log."""
        self._screen.begin(self._run, self._session.collective.size)
        for text in texts:
            self._screen.tell(text)
        self._run.note_event(event)
