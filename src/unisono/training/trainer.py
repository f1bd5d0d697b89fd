"""The trainer: what a user holds, and the loop that you read from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from unisono.checkpoint.fingerprint import fingerprint
from unisono.collective import Collective, InProcess, Meeting
from unisono.data.batch import Batch
from unisono.data.loader import Loader, check_loader, dataset_length
from unisono.elastic.call_log import CallLog
from unisono.elastic.link import Link
from unisono.elastic.recovery_plan import Part, Taken
from unisono.elastic.session import ElasticSession
from unisono.errors import ConfigurationError
from unisono.guard.replicas import OnDesync
from unisono.guard.silence import Board
from unisono.guard.stragglers import Machine
from unisono.observe.summary import Summary, show_summary
from unisono.observe.timing import StepClock
from unisono.order import Order, OrderLike
from unisono.replica.base import LossFunction, MetricFunction, Replica
from unisono.replica.buffers import BufferFold
from unisono.replica.choose import replica_for
from unisono.replica.torch_replica import Precision
from unisono.sync import Exact, Sync
from unisono.system.output import say
from unisono.training import trace
from unisono.training.callbacks import Callback
from unisono.training.evaluation import evaluate, seed_after_evaluation
from unisono.training.loop import Loop
from unisono.training.observer import Observer
from unisono.training.record import Position
from unisono.training.run import Run
from unisono.training.run_directory import RunDirectory
from unisono.training.screen import Screen
from unisono.training.settings import OnNonfinite, Settings
from unisono.training.setup import (
    check_alike,
    check_arguments,
    check_helpers,
    check_identity,
    check_policies,
    choose_device,
    describe_settings,
    enter,
    meet,
    prepare_process,
    tell_arguments,
    unify_replicas,
)
from unisono.training.state import LocalState, settle_state
from unisono.training.step import StepResult
from unisono.training.weights import Weights
from unisono.world import World


class Trainer:
    """Trains a model on any number of workers, with one and the same result.

    *Collective*: every worker makes one with equal arguments. Workers are those of the launcher that started this process
    (``unisono run``, ``torchrun``, ``srun``); started alone, this process is the only one. If the run directory holds a
    checkpoint of this run, the trainer continues from it.

    Args:
        model: The bare model (or a ``Replica`` of one of another framework: then optimizer and loss are None). If its replicas
            differ at the start, worker 0's values win, with a warning.
        optimizer: Any ``torch.optim`` optimizer that updates each parameter on its own, over the model's parameters.
        loss: ``loss(model, batch)`` returns the microbatch's loss *sum* and the *count* to divide by, once, over the global
            batch; or one scalar, which is a mean over samples.
        batch_size: Samples of one optimizer step, over all workers.
        microbatches: M, the fixed parts of a global batch, at least the number of workers. Part of the result: runs with
            another M sum in another order.
        seed: Of the sample order, augmentation and dropout. (The model's initial weights are yours: seed before making it.)
        run_dir: Where checkpoints, metrics and weights go: a path or any fsspec address. None: nothing is written. A checkpoint
            of this run there wins over the given weights and optimizer state.
        scheduler: An LR scheduler over ``optimizer``; stepped once per optimizer step, by the trainer alone
            (``ReduceLROnPlateau`` with that step's loss, so that its patience counts steps).
        max_grad_norm: Clip the L2 norm of the whole gradient to this.
        precision: "fp32" or "bf16" (autocast; weights and sums stay as they are).
        sync: How gradients are summed and weights shared; None: ``Exact()``.
        checkpoint_every: Steps between checkpoints; None: at the end of each epoch.
        keep: Newest checkpoints to keep.
        device: This worker's device; None: its GPU if there is one, else the CPU.
        strict: Another fingerprint at resume (PyTorch build, threads, ...) is an error, not a warning.
        on_nonfinite: What a loss or gradient that is not finite does: "error" ends training; "skip" leaves that step out, on all
            workers alike (no update, no step of the scheduler, buffers as before).
        on_desync: What replicas that differ do: "error" ends training; "heal" lets the odd ones take the state of the others,
            where more than half agree.
        compare_every: Replicas are compared as a whole once in this many steps; None: as often as 0.15 % of the time allows, at
            least once in 64 steps.
        timeout_s: Seconds (at least 1) that workers wait for one of them before it is left behind (``unisono run``) or the run
            ends; the worker is named. Must exceed the longest time that one may keep the others waiting: worker 0 writing a
            file, any worker loading its first batch.
        callbacks: Told about steps and epochs, on every worker.
        loader: How samples are loaded, unless a call says otherwise.
        world: Who takes part; None: what the launcher's environment says.
        collective: The other workers, instead of those of ``world`` (see ``unisono.testing``).

    Raises:
        ConfigurationError: Settings, model, optimizer or run directory cannot work together.
        CheckpointError: All checkpoints of the run are damaged.
        FingerprintMismatch: ``strict``, and the checkpoint was written by a different machine or build; or this worker does not
            belong to the run that it wants to join.
    """

    observer = Observer()
    """What a tool's subclass puts here sees the batches (``unisono verify``)."""

    def __init__(
        self,
        model: nn.Module | Replica,
        optimizer: Optimizer | None,
        loss: LossFunction | None,
        *,
        batch_size: int,
        microbatches: int = 8,
        seed: int = 0,
        run_dir: str | os.PathLike[str] | None = None,
        scheduler: Any = None,
        max_grad_norm: float | None = None,
        precision: Precision = "fp32",
        sync: Sync | None = None,
        checkpoint_every: int | None = None,
        keep: int = 3,
        device: torch.device | str | None = None,
        strict: bool = False,
        on_nonfinite: OnNonfinite = "error",
        on_desync: OnDesync = "error",
        compare_every: int | None = None,
        timeout_s: float = 300.0,
        callbacks: Sequence[Callback] = (),
        loader: Loader | None = None,
        world: World | None = None,
        collective: Collective | Link | None = None,
    ) -> None:
        check_arguments(batch_size, microbatches, max_grad_norm, precision, checkpoint_every)
        check_policies(on_nonfinite, on_desync, compare_every, timeout_s)
        check_helpers(callbacks, loader, scheduler, optimizer)
        self.batch_size, self.microbatches, self.seed = batch_size, microbatches, seed
        self.optimizer, self.scheduler = optimizer, scheduler
        self.callbacks = (*callbacks, *trace.from_environment())
        self._loader = loader or Loader()
        self._timeout_s = timeout_s
        self._screen = Screen(batch_size)

        self.world = enter(world or World.from_environment(), microbatches)
        chosen = model.device if isinstance(model, Replica) else choose_device(device, self.world)
        prepare_process(self.world, chosen)
        machine = Machine(self.world)
        replica = replica_for(model, optimizer, loss, scheduler=scheduler, device=chosen, precision=precision)
        self.device, self.model = replica.device, replica.model
        self._link, met = meet(self.world, self.device, collective, timeout_s=timeout_s, microbatches=microbatches)
        self._history = CallLog(self._link, joins=self._link is not None and self._link.generation is None)
        board = None if met.size == 1 and self._link is None else Board.make()
        self._own = LocalState(
            replica=replica,
            weights=Weights(replica, met),
            buffers=BufferFold(replica.buffers, microbatches),
            sync=sync or Exact(),
            clock=StepClock(shown=None if board is None else board.cells),
        )
        self._loop = Loop(
            self._own,
            batch_size=batch_size,
            microbatches=microbatches,
            seed=seed,
            device=self.device,
            timeout_s=timeout_s,
            edits_weights=lambda: any(callback.edits_weights for callback in self.callbacks),
            machine=machine,
            link=self._link,
            history=self._history,
            between=self._let_come_and_go,
            observer=self.observer,
        )
        self._taken: Taken | None = None
        self._team = self._loop.team = ElasticSession(
            self._own,
            Settings(
                microbatches=microbatches,
                seed=seed,
                max_grad_norm=max_grad_norm,
                on_nonfinite=on_nonfinite,
                on_desync=on_desync,
                compare_every=compare_every,
                timeout_s=timeout_s,
            ),
            part=Part(
                batch=self._loop.batch_at,
                regrouped=self._regrouped,
                unsaved=lambda: self._run.pending,
                describe=self._describe,
                adopt=self._adopt,
            ),
            board=board,
            link=self._link,
        )
        settings = describe_settings(self, replica, max_grad_norm, precision, self._own.sync, on_nonfinite)
        ground = fingerprint(threads=self.world.threads, device=self.device)
        if self._link is not None:
            check_identity(self._link, settings, ground, joins=self._history.outside)
        directory = None
        if run_dir is not None:
            is_over = self._link.is_past if self._link is not None else lambda: False
            directory = RunDirectory(
                run_dir, met, settings=settings, fingerprint=ground, keep=keep, strict=strict, is_over=is_over
            )
        self._run = self._loop.run = Run(
            replica=replica, team=self._team, directory=directory, clock=self.clock, checkpoint_every=checkpoint_every
        )
        alike = {**settings, "checkpoint_every": checkpoint_every, "run_dir": None if run_dir is None else "given"}
        self._team.found(met, lambda: self._begin(alike))
        self._place_in_world()

    def _begin(self, alike: Mapping[str, Any]) -> int:
        """*collective*. Brings all workers to where the run begins, or goes on.

        Args:
            alike: What all workers must have been given alike.

        Returns:
            Steps that are behind the run.
        """
        others = self._team.collective
        check_alike(others, alike)
        if self._link is not None and not self._history.outside:
            tell_arguments(self._link, others)
        unify_replicas(self._own.replica, others)
        updates = [self._team.crew.reduction.updated_by(rank) for rank in range(others.size)]
        settle_state(self._own.replica, updates, others)
        if not self._history.outside:
            self._run.resume()
        return self.position.step

    @property
    def run_dir(self) -> str | None:
        """The run directory, as it was given; None if there is none."""
        return self._run.url

    @property
    def position(self) -> Position:
        """How far the run has come; the same on all workers."""
        return self._run.position

    @property
    def clock(self) -> StepClock:
        """Measures where this worker's time goes."""
        return self._own.clock

    # ------------------------------------------------------------------ training

    def fit(
        self,
        dataset: Any,
        epochs: int,
        *,
        order: OrderLike = "shuffle",
        drop_last: bool = False,
        loader: Loader | None = None,
    ) -> Summary:
        """*collective*. Trains until ``epochs`` epochs of the whole run are done, earlier starts included.

        Shows progress; writes checkpoints, metrics and, at the end, ``model.safetensors`` and ``summary.json``. A run that is
        done already is left as it is. SIGINT, SIGTERM and SIGHUP end it after the current step, with a
        checkpoint.

        Args:
            dataset: Map-style: ``len(dataset)`` samples, read by number.
            epochs: Epochs of the whole run.
            order: "shuffle" (by seed and epoch), "sequential", a list of sample indices, a sampler, or a batch sampler.
            drop_last: Leave out the short last batch of an epoch.
            loader: How samples are loaded.

        Raises:
            DataError: A sample cannot be read, or a loss or gradient is not finite; the last step stands.
            Desync: Replicas differ, or the samples of an epoch were not each used once.
            WorkerFailure: A worker was lost, and the others cannot go on without it.
            SystemExit: With status 128 + signal number, after a checkpoint, when asked to stop.
        """
        check_loader(loader)
        earlier = self._catch_up(dataset, order, drop_last, epochs, own_loop=False)
        if earlier:
            return Summary(**earlier[0])
        with self._history.call():
            samples = self._loop.order(dataset, order, drop_last=drop_last, epochs=epochs)
            if self._loop.is_done(epochs):
                self._run.complete(epochs)
                summary = self._say_finished()
            else:
                summary = self._train(dataset, samples, epochs, loader or self._loader)
        self._history.done(dataclasses.asdict(summary), main=self.collective.rank == 0)
        return summary

    def _train(self, dataset: Any, samples: Order, epochs: int, loader: Loader) -> Summary:
        # Before the look at the rank: a sampler that counts how often it is read must count alike on all workers.
        total_steps = self._loop.planned(samples, epochs)
        with self._screen.planned(total_steps, epochs):
            if self.collective.rank == 0:
                self._screen.begin(self._run, self.collective.size)
            # Closed also after an error, so that the log is written as far as training came.
            with contextlib.closing(self._loop.batches(dataset, samples, epochs, loader, own_loop=False)) as batches:
                for batch in batches:
                    self.step(batch)
        summary = self._run.summary()
        if self.collective.rank == 0 and self._run.url is not None:
            show_summary(summary, self._run.url)
        return summary

    def batches(
        self,
        dataset: Any,
        epochs: int,
        *,
        order: OrderLike = "shuffle",
        drop_last: bool = False,
        loader: Loader | None = None,
    ) -> Iterator[Batch]:
        """*collective*. The batches that are still to be trained, for those who own their loop; arguments as for ``fit``.

        Pass each to ``step``. Leaving early is fine: the next call goes on after the last batch that was stepped; call
        ``save()`` if there is none. When the last batch is done the run is finished and its files are written.
        """
        check_loader(loader)
        if self._catch_up(dataset, order, drop_last, epochs, own_loop=True):
            return iter(())
        samples = self._loop.order(dataset, order, drop_last=drop_last, epochs=epochs)
        return self._own_batches(dataset, samples, epochs, loader or self._loader)

    def step(self, batch: Batch) -> StepResult:
        """*collective*. One optimizer step on a batch from ``batches``.

        If a worker is lost meanwhile, and the launcher is ``unisono run``, the others do the step again without it.

        Returns:
            Loss, gradient norm and so on; the same on every worker.

        Raises:
            DataError: The loss or gradient is not finite, or the count is zero; nothing was updated.
            SystemExit: After a checkpoint, when asked to stop.
        """
        self._check_batch(batch)
        self._team.await_more()
        others, sent = self.collective, self.collective.bytes_sent
        taken = self._team.step(batch, self.position.step + 1, self._loop.signals)
        result, told = taken.result, taken.told
        self._run.advance(batch, result)
        if not result.skipped:
            self._own.replica.advance_schedule(result.loss)
        alike = self.collective is others
        sent = self.collective.bytes_sent - (sent if alike else 0)
        block = self._team.crew.stragglers.add(told, batch.filled) if alike else None
        moved = self._loop.balance(block) if block is not None else None
        self._run.note(result, bytes_sent=sent, block=block, moved=moved)
        if self.collective.rank == 0:
            self._screen.step(result, self.clock)
        for callback in self.callbacks:
            callback.on_step(self, result)
        self._run.complete_checkpoint(told)
        if batch.number + 1 == batch.of:
            for callback in self.callbacks:
                callback.on_epoch(self, batch.epoch)
        self._run.begin_checkpoint(batch)
        self._stop_if_asked(taken)
        self._taken = taken
        return result

    def evaluate(
        self,
        dataset: Any,
        metrics: Mapping[str, MetricFunction] | None = None,
        *,
        batch_size: int | None = None,
        loader: Loader | None = None,
    ) -> dict[str, float]:
        """*collective*. Metrics over a dataset, each sample counted once; the same for every number of workers. What
        forward did to the model's buffers is undone afterwards.

        Args:
            metrics: Name -> ``metric(model, batch)``, which returns the microbatch's sum and count (or one scalar, a mean).
                None: the loss, as "loss".
            batch_size: Samples computed at a time; by default the size of a training microbatch.
            loader: How samples are loaded.
        """
        if self._history.outside:
            recalled: dict[str, float] = self._history.wait()
            return recalled
        size = batch_size or -(-self.batch_size // self.microbatches)

        tries = 0

        def act() -> dict[str, float]:
            nonlocal tries
            tries += 1
            check_alike(self.collective, {"samples": dataset_length(dataset), "batch_size": size})
            results = evaluate(
                self._own.replica,
                self.collective,
                dataset,
                {"loss": self._own.replica.loss} if metrics is None else metrics,
                microbatch_size=size,
                loader=loader or self._loader,
                timeout_s=self._timeout_s,
                seed=self.seed,
            )
            self._run.write_metrics(results, again=tries > 1)
            return results

        with self._history.call(), self.clock.pause():
            results = self._team.act(act)
            seed_after_evaluation(self.seed, self._own.replica)
            self._run.count_evaluation()
            for callback in self.callbacks:
                callback.on_evaluate(self, results)
        self._history.done(results, main=self.collective.rank == 0)
        return results

    def save(self) -> None:
        """*collective*. Writes a checkpoint of the current state, and returns when it is complete.

        Raises:
            ConfigurationError: The trainer has no run directory.
            CheckpointError: A checkpoint could not be written; the one before it is whole.
        """
        if not self._run.is_kept:
            raise ConfigurationError("there is no run directory to save to: pass run_dir=... to Trainer")
        if self._history.outside:
            self._history.wait()
            return
        self._run.save()
        self._history.done(None, main=self.collective.rank == 0)

    @property
    def collective(self) -> Collective:
        """*local*. The current workers; under ``unisono run`` they change when one is lost, leaves or joins. A worker that has
        yet to join is none of them: its rank is 1, so that it speaks for nobody."""
        return InProcess(Meeting(2), 1) if self._history.outside else self._team.collective

    # ------------------------------------------------------------------ the parts of a step

    def _own_batches(self, dataset: Any, samples: Order, epochs: int, loader: Loader) -> Iterator[Batch]:
        with self._history.call():
            yield from self._loop.batches(dataset, samples, epochs, loader, own_loop=True)
        self._history.done(None, main=self.collective.rank == 0)

    # ------------------------------------------------------------------ end of a run

    def _say_finished(self) -> Summary:
        summary = self._run.summary()
        if self.collective.rank == 0:
            where = f"the run in {self._run.url}" if self._run.is_kept else "this run"
            say(f"{where} is finished ({self.position.epoch} epochs, {self.position.step} steps): nothing to do")
            if self._run.url is not None:
                show_summary(summary, self._run.url)
        return summary

    # ------------------------------------------------------------------ checks

    def _check_batch(self, batch: Any) -> None:
        if not isinstance(batch, Batch):
            raise ConfigurationError(
                f"step() takes the batches that trainer.batches(...) yields, not a {type(batch).__name__}: samples must be "
                "divided into microbatches by the trainer"
            )
        self._run.check_turn(batch)

    # ------------------------------------------------------------------ others come and go

    def _place_in_world(self) -> None:
        """Says in ``world`` which worker this is by now."""
        if self._link is None:
            return
        if self._link.generation is None:
            self.world = dataclasses.replace(self.world, rank=1, size=2)  # it speaks for nobody until it has joined
            return
        members, rank = self._link.generation.members, self._link.generation.rank
        near = [number for number, member in enumerate(members) if member.machine == members[rank].machine]
        self.world = dataclasses.replace(
            self.world, rank=rank, size=len(members), local_rank=near.index(rank), local_size=len(near)
        )

    def _stop_if_asked(self, taken: Taken) -> None:
        """*collective*, after a step. All stop if one was asked to, or if all are to leave and nobody waits to take over."""
        stop = max(signal.stop for signal in taken.told)
        if not stop and len(taken.leavers) == len(taken.told) and not taken.admits:
            stop = int(signal.SIGTERM)
        if stop:
            self._stop_all(stop)

    def _let_come_and_go(self) -> None:
        """*collective*, when the next batch is asked for, so that whoever comes has missed nothing of what a user's own loop does
        after the step: those leave who were told to, and others may come."""
        taken, self._taken = self._taken, None
        if taken is None:
            return
        # If all are to leave, they stay until those who wait to join have what they hold.
        leavers = () if len(taken.leavers) == len(taken.told) else taken.leavers
        if leavers or taken.admits:
            self._run.flush_log()
            self._team.change(leavers, admit=taken.admits)

    def _stop_all(self, stop: int) -> None:
        note = f"stopped by {signal.Signals(stop).name} after step {self.position.step}"
        self._run.stop()
        if not self._run.is_kept:
            note += "; nothing is saved, since the Trainer has no run_dir"
        else:
            note += f"; checkpoint written to {self._run.url}. Start the same command again to go on, on any number of workers"
        if self.collective.rank == 0:
            self._screen.tell(note)
        raise SystemExit(128 + stop)

    def _regrouped(self, reason: str, unsaved: bool) -> None:
        assert self._link is not None
        assert self._link.generation is not None
        self._place_in_world()
        self._loop.regroup()
        main = self._team.collective.rank == 0
        self._run.regroup(unsaved=unsaved)
        self._history.publish(main=main)
        if not main:
            return
        self._link.speak()
        workers = self._team.collective.size
        self._screen.begin(self._run, workers)
        if self._team.silence is not None:
            self._screen.tell(self._team.silence)
        on = f"worker{'s go' if workers > 1 else ' goes'} on after step {self._team.committed}"
        if workers < self._link.minimum:
            on = f"worker{'s wait' if workers > 1 else ' waits'} up to {self._link.wait_s:g} s for others (--workers, --wait)"
        self._screen.tell(f"{reason}: {workers} {on}")
        self._run.note_generation(self._link.generation.number, reason)

    def _catch_up(self, dataset: Any, order: OrderLike, drop_last: bool, epochs: int, *, own_loop: bool) -> list[Any]:
        """What the others had from this call, if they had finished it before this worker came; else it takes part from now."""
        if not self._history.outside:
            return []
        self._own.weights.want(self._loop.may_share(own_loop))
        call = self._loop.call(dataset, order, drop_last=drop_last, epochs=epochs)
        earlier = self._history.enter(self._team.join, call)
        if earlier and (weights := self._run.read_model()) is not None:
            self._own.replica.load_model_state(weights)
        return earlier

    def _describe(self) -> dict[str, Any]:
        return {"run": self._run.describe(), "history": self._history.describe()}

    def _adopt(self, description: dict[str, Any]) -> None:
        self._run.adopt(description["run"])
        self._history.adopt(description["history"])
        self.clock.at(self.position.step + 1)
