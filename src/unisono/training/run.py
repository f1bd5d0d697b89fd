"""A run as far as it has come, and how that is kept in its run directory: checkpoints, log, weights and summary."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from unisono.checkpoint.format import digest, encode
from unisono.collective import Collective
from unisono.data.batch import Batch
from unisono.errors import CheckpointError, ConfigurationError, Desync, FingerprintMismatch
from unisono.guard.ledger import LOWER_HALVES, NOTHING, samples_of, whole
from unisono.guard.stragglers import TimingBlock
from unisono.observe.summary import Summary
from unisono.observe.timing import StepClock
from unisono.replica.base import Replica
from unisono.training.call_data import CallData
from unisono.training.header import Signals
from unisono.training.record import Position, Record, evaluation_line, log_line, straggler_line
from unisono.training.run_directory import BEST_FILE, RunDirectory
from unisono.training.same_data import EpochData, check_resumed
from unisono.training.session import Session
from unisono.training.step import StepResult
from unisono.training.worker_group import WorkerGroup
from unisono.tree import Span

logger = logging.getLogger("unisono")


class Run:
    """See the module. All workers have the same, but for ``record``.

    Args:
        replica: Of the model that is trained.
        session: The workers, who write together.
        directory: Where it is kept; None: nowhere.
        clock: Where this worker's time goes.
        checkpoint_every: Steps between checkpoints; None: at the end of each epoch.

    Attributes:
        position: How far it has come.
        record: What this worker has noted since it started.
        data: Samples, order and ``drop_last`` of the data that it trains on, once that is known.
        seeded: Whether all workers began with equal weights, each by itself; None: unknown.
        resumed: ``data`` as the checkpoint had it, until steps are taken or it is known to be what it should.
    """

    def __init__(
        self,
        *,
        replica: Replica,
        session: Session,
        directory: RunDirectory | None,
        clock: StepClock,
        checkpoint_every: int | None,
    ) -> None:
        self.position = Position()
        self.record = Record()
        self.data: dict[str, Any] | None = None
        self.resumed: dict[str, Any] | None = None
        self.seeded: bool | None = None
        self._replica = replica
        self._session = session
        self._directory = directory
        self._clock = clock
        self._checkpoint_every = checkpoint_every
        self._unsaved_since: int | None = None
        self._saved_finished = False  # what the newest checkpoint says
        self._logs = False  # since the first step of this start
        self._evaluations = 0  # since the last step
        self._epoch_data: EpochData | None = None  # while steps are taken
        self._identity: dict[str, Any] | None = None  # of the data in which the run has stopped, or which this worker has joined

    @property
    def is_kept(self) -> bool:
        """Whether there is a run directory."""
        return self._directory is not None

    @property
    def url(self) -> str | None:
        """The run directory, as it was given; None if there is none."""
        return None if self._directory is None else self._directory.url

    @property
    def is_main(self) -> bool:
        """Whether this worker writes what only one of them writes."""
        return self._session.collective.rank == 0

    # ------------------------------------------------------------------ steps

    def check_turn(self, batch: Batch) -> None:
        """*local*.

        Raises:
            ConfigurationError: It is another batch's turn.
        """
        position = self.position
        if (batch.epoch, batch.number) != (position.epoch, position.batch):
            raise ConfigurationError(
                f"batch {batch.number} of epoch {batch.epoch} comes out of turn: the next one is batch {position.batch} of "
                f"epoch {position.epoch}. Step each batch once, in order"
            )

    def advance(self, batch: Batch, result: StepResult) -> None:
        """*local*. A step has been taken.

        Raises:
            Desync: It ends an epoch in which not each sample was used once.
        """
        position = self.position
        position.step += 1
        position.samples += batch.samples
        position.skipped += result.skipped
        used, more = position.ledger, batch.ledger
        position.ledger = None if used is None or more is None else used + more & LOWER_HALVES
        last = batch.number + 1 == batch.of
        if last:
            self._check_epoch(batch)
            position.ledger = NOTHING
        position.epoch, position.batch = (batch.epoch + 1, 0) if last else (batch.epoch, batch.number + 1)

    def _check_epoch(self, batch: Batch) -> None:
        """Each sample of the epoch was used exactly once: the ledger proves it wherever the order is one of ours."""
        ledger, data = self.position.ledger, self.data
        if ledger is None or data is None or data["order"] == "given" or data["drop_last"]:
            return
        if ledger != whole(data["samples"]):
            raise Desync(
                f"epoch {batch.epoch + 1} used {samples_of(ledger)} samples of {data['samples']}, or not each of them once. "
                "The steps were not undone; start again from a checkpoint before this epoch, and check the script with "
                "unisono verify",
                step=self.position.step,
            )

    def note(self, result: StepResult, *, bytes_sent: int, block: TimingBlock | None, moved: Sequence[Span] | None) -> None:
        """*local*. Counts a step, and writes its line into the log.

        Args:
            bytes_sent: By this worker, in this step.
            block: What stragglers are looked for in, if the step has completed it.
            moved: Everybody's microbatches from now on, if they have changed.
        """
        lo, hi = self._session.group.reduction.ranges[self._session.collective.rank]
        seconds = self.record.add(result, self._clock, bytes_sent, hi - lo)
        self._logs, self._evaluations = True, 0
        if self._directory is not None and self._keeps_log:
            self._directory.note(log_line(result, self.position, self._clock, seconds, block, moved))
            for straggler in self._session.group.stragglers.found if block is not None else ():
                self._directory.note(straggler_line(result.step, straggler))

    @property
    def _keeps_log(self) -> bool:
        """Where workers can be lost, each has the lines that are not written yet."""
        return self.is_main or self._session.can_change

    def note_event(self, event: Mapping[str, Any]) -> None:
        """*local*. Writes an event into the log."""
        if self._directory is not None and self.is_main:
            self._directory.note(event)

    def flush_log(self) -> None:
        """*local*. What has been noted is in the file."""
        if self._directory is not None:
            self._directory.log.flush()

    def begin_log(self, *, epochs: int | None, steps: int | None) -> None:
        """*local*. Steps will follow.

        Args:
            epochs: Of the whole run.
            steps: Of the whole run, as far as can be said.
        """
        if self._directory is not None:
            self._directory.begin(self.position.step, epochs=epochs, steps=steps)

    def end_log(self) -> None:
        """*local*. No steps follow for now; what cannot be written is left, since an error on its way is more important."""
        with contextlib.suppress(CheckpointError):
            self.flush_log()
        with contextlib.suppress(CheckpointError):
            if self._directory is not None:
                self._directory.rest()

    # ------------------------------------------------------------------ checkpoints

    def signals(self, stop: int) -> Signals:
        """*local*. What the others are told with the next step."""
        return self._directory.signals(stop) if self._directory is not None else Signals(stop=stop)

    def agree_on_directory(self, collective: Collective) -> bool:
        """*collective*. Worker 0's run directory is that of all: one whose name comes from the clock is another on each.

        Returns:
            Whether they were given different ones.
        """
        if self._directory is None:
            return False
        urls = [url.decode() for url in collective.all_gather_bytes(self._directory.url.encode())]
        self._directory.move(urls[0])
        return len(set(urls)) > 1

    def move(self, url: str) -> None:
        """*local*. The others, which this worker is to join, write there."""
        if self._directory is not None and url:
            self._directory.move(url)

    def resume(self, group: WorkerGroup) -> None:
        """*collective*. Takes everything from the newest checkpoint that is whole, if there is one."""
        if self._directory is None:
            return
        checkpoint = self._directory.open()
        if self.is_main:
            for note in self._directory.notes:
                warnings.warn(note, stacklevel=4)
        if checkpoint is None:
            return
        group.state.restore(checkpoint)
        self.position = Position(**checkpoint.info["position"])
        self._saved_finished = self.position.finished
        self.data = self.resumed = checkpoint.info["data"]
        # Checkpoints of earlier versions have neither.
        self._identity, self.seeded = checkpoint.info.get("identity"), checkpoint.info.get("seeded")
        if self._identity is not None and not self._directory.is_at_home(checkpoint):
            self._identity["samples"] = []  # another build may compute other bits: it was warned of
        last = checkpoint.info["last"]
        self.record.last = StepResult(**{**last, "learning_rates": tuple(last["learning_rates"])}) if last else None
        logger.info("resumed from step %d of %s", self.position.step, self.url)

    def prepare(self) -> None:
        """*collective*. Steps will follow: whether they can be kept.

        Raises:
            CheckpointError: The run directory cannot be made or written to.
            ConfigurationError: Another process trains there.
        """
        if self._directory is not None:
            self._directory.prepare()

    def goes_over(self, data: dict[str, Any], *, done: bool) -> None:
        """*local*. Steps will be taken over these data, unless the run is ``done``.

        Raises:
            ConfigurationError: The run has stopped in the middle of an epoch over others.
        """
        if done:
            if data == self.resumed:
                self.resumed = self._identity = None  # the next call may be about other data
            return
        if self.position.batch and self.data not in (None, data):
            raise ConfigurationError(
                f"the run stopped in the middle of epoch {self.position.epoch + 1} on other data ({self.data}) than "
                f"those given now ({data}): give it the same data, or choose another run_dir"
            )
        if self.resumed not in (None, data):
            self._identity = None  # others, and this is said here
        if self.resumed not in (None, data) and self.is_main:
            warnings.warn(
                f"the run was trained on other data so far ({self.resumed}) than those given now ({data}): its weights depend "
                "on both, so the same command in a new run_dir gives other weights",
                stacklevel=5,
            )
        self.resumed, self.data = None, data

    def recall(self, data: CallData) -> None:
        """*local*. Before anything else is asked of the order of ``data``: the epoch before the one that this run goes on
        with, if it has stopped between two."""
        if self._identity is not None and self.position.epoch and not self.position.batch:
            data.digest(self.position.epoch - 1)

    def goes_into(self, data: EpochData, *, joins: bool) -> None:
        """*local*. Steps follow over these data, from this position on.

        Args:
            joins: Whether this worker has just joined others who are among these steps.

        Raises:
            ConfigurationError: The run has stopped in the middle of an epoch that was another one.
            FingerprintMismatch: The others are in another one.
        """
        there, self._identity, self._epoch_data = self._identity, None, data
        epoch, batch = self.position.epoch, self.position.batch
        if joins:
            if there is not None and (found := data.differs(there, epoch, batch)):
                raise FingerprintMismatch(
                    f"this worker (process {os.getpid()}) cannot join in the middle of training: {found}. The run goes on "
                    "without it",
                    fields=["data"],
                )
        else:
            check_resumed(data, there, epoch, batch, tells=self.is_main)

    def _identify(self) -> dict[str, Any] | None:
        """What the data of the next batch are known by, for those who go on from here."""
        position = self.position
        return None if self._epoch_data is None else self._epoch_data.identify(position.epoch, position.batch)

    def complete_checkpoint(self, told: Sequence[Signals]) -> None:
        """*collective*, after each step. Completes the checkpoint under way if all have written their parts of it."""
        if self._directory is not None and self._directory.is_written(told):
            self._session.perform("complete the checkpoint", self._directory.finish)

    def begin_checkpoint(self, batch: Batch) -> None:
        """*collective*, after each step. Begins a checkpoint if it is due."""
        if self._directory is not None and self._is_due(batch):
            self._session.perform("begin a checkpoint", self._copy_state)

    def _is_due(self, batch: Batch) -> bool:
        if self._unsaved_since is not None and self.position.step > self._unsaved_since:
            return True  # the one under way was given up when the workers changed
        if self._checkpoint_every is not None:
            return self.position.step % self._checkpoint_every == 0
        return batch.number + 1 == batch.of

    def save(self) -> None:
        """*collective*. Writes a checkpoint of now, and returns when it is complete."""
        directory = self._directory
        assert directory is not None

        def act() -> None:
            self._copy_state()
            directory.finish()

        self._session.perform("write a checkpoint", act)

    def _copy_state(self) -> None:
        """The current state; it is written while training goes on, and complete a few steps later."""
        assert self._directory is not None
        self._session.group.guard.check_all(self.position.step)
        main = self.is_main
        self._directory.save(
            self.position.step,
            part=self._session.group.state.own(),
            model=self._replica.model_state() if main else None,
            trainer=self._session.group.state.common() if main else None,
            info={
                "position": dataclasses.asdict(self.position),
                "data": self.data,
                "identity": self._identify() if main else None,
                "seeded": self.seeded,
                "workers": self._session.collective.size,
                "last": dataclasses.asdict(self.record.last) if self.record.last else None,
            },
        )
        # Here, and not around the act, which may end with what another worker has done: that copy is given up.
        self._unsaved_since = None
        self._saved_finished = self.position.finished

    def _settle(self, directory: RunDirectory) -> None:
        """The newest checkpoint is complete, and it is the one of now."""
        directory.finish()
        if directory.saved_step != self.position.step or self._saved_finished != self.position.finished:
            self._copy_state()
            directory.finish()

    # ------------------------------------------------------------------ the end

    def finish(self) -> None:
        """*collective*. All batches are done: the last checkpoint, the weights and the summary."""
        self._close(finished=True)

    def complete(self, epochs: int, steps: int | None) -> None:
        """*collective*. A run may have stopped after its last step, before its files were written. (One that went on further has
        others.)"""
        position = self.position
        if (position.epoch, position.batch) == (epochs, 0) or position.step == steps or position.finished:
            self.finish()

    def keep_best(self, score: float | None) -> None:
        """*collective*. Keeps the weights of now as ``best.safetensors`` if this is the highest score so far."""
        if score is None or not score > (-math.inf if self.position.best is None else self.position.best):
            return
        directory = self._directory
        if directory is None:
            raise ConfigurationError(
                "keep_best writes best.safetensors, and there is no run directory: pass run_dir=... to Trainer"
            )

        def act() -> None:
            directory.publish(self._replica.final_state() if self.is_main else None, BEST_FILE)

        self._session.perform("keep the best weights", act)
        self.position.best = score

    def stop(self) -> None:
        """*collective*. It ends here for now: a checkpoint and the summary, from which it goes on."""
        self._close(finished=False)

    def _close(self, *, finished: bool) -> None:
        directory = self._directory
        if directory is None:
            return

        def act() -> None:
            self._settle(directory)
            if finished:
                directory.publish(self._replica.final_state() if self.is_main else None)
            # Last, and told to all: whoever knows that the act is done knows that everything is written.
            directory.write_summary(self._summary(finished=finished))

        self._session.perform("write the run's files", act)

    def summary(self) -> Summary:
        """*collective*. Of the run that is finished."""
        return self._session.perform("sum up the run", lambda: self._summary(finished=True))

    def _summary(self, *, finished: bool) -> Summary:
        directory, collective = self._directory, self._session.collective
        rates = self.record.rates(collective)
        weights = self._replica.final_state() if self.is_main else None
        mine = digest(encode(weights)).encode() if weights is not None else b""
        sha256 = collective.all_gather_bytes(mine)[0].decode()
        earlier = directory.read_summary() if directory is not None else None
        if earlier is not None and (earlier.steps, earlier.weights_sha256) != (self.position.step, sha256):
            earlier = None
        if earlier is not None and self.record.steps == 0:
            # This start has trained nothing: what the one before it measured stands.
            return dataclasses.replace(earlier, finished=finished)
        return Summary(
            steps=self.position.step,
            epochs=self.position.epoch,
            samples=self.position.samples,
            workers=collective.size,
            weights_sha256=sha256,
            loss=self.record.last.loss if self.record.last else float("nan"),
            metrics=earlier.metrics if earlier is not None else {},
            finished=finished,
            parameters=sum(slot.numel for slot in self._replica.layout.slots),
            run_dir=self.url or "",
            **rates,
        )

    def write_metrics(self, results: dict[str, float], *, again: bool) -> None:
        """*collective*. Puts what was measured into the log, and into the summary if that is of the model as it is now.

        Args:
            again: Whether it may have been put there already, by a worker that is lost.
        """
        if self._directory is None:
            return
        # Before this start's first step the log may still end in lines that are to go.
        line = evaluation_line(self.position.step, results) if self._logs else None
        self._directory.write_evaluation(self.position.step, results, line, number=self._evaluations if again else None)

    def count_evaluation(self) -> None:
        """*local*. All know what was measured."""
        self._evaluations += 1

    # ------------------------------------------------------------------ others come and go

    @property
    def unsaved_since(self) -> int | None:
        """*local*. The step since which a checkpoint is due that was begun and may not be completed; None: there is none."""
        if self._unsaved_since is None and self._directory is not None and self._directory.pending:
            return self.position.step
        return self._unsaved_since

    def rebuild(self, collective: Collective, *, unsaved_since: int | None) -> None:
        """*local*, alike on all workers. These write together from now on.

        Args:
            unsaved_since: As above, for all of them: what was under way is given up.
        """
        self._unsaved_since = unsaved_since
        if self._directory is not None:
            self._directory.rebuild(collective)
            if collective.rank == 0:
                self._directory.take_over_log(self.position.step)

    def describe(self) -> dict[str, Any]:
        """*local*. What a worker that joins must know."""
        return {
            "position": dataclasses.asdict(self.position),
            "data": self.data,
            "identity": self._identify(),
            "seeded": self.seeded,
            "last": self.record.last,
            "unsaved_since": self._unsaved_since,
            "logs": self._logs,
            "evaluations": self._evaluations,
        }

    def adopt(self, description: Mapping[str, Any]) -> None:
        """*local*. Takes over what another worker has described."""
        self.position = Position(**description["position"])
        self.data = description["data"]
        self._identity, self.seeded = description["identity"], description["seeded"]
        self.record.last = description["last"]
        self._unsaved_since = description["unsaved_since"]
        self._logs, self._evaluations = description["logs"], description["evaluations"]

    def read_model(self) -> dict[str, Any] | None:
        """*local*. The weights of a run that is finished, if they were written."""
        return self._directory.read_model() if self._directory is not None else None
