"""The trainer: what a user holds, and the loop that you read from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from unisono.checkpoint.fingerprint import fingerprint
from unisono.collective import Collective
from unisono.data.batch import Batch
from unisono.data.loader import Loader, check_loader
from unisono.errors import ConfigurationError
from unisono.guard.replicas import OnDesync
from unisono.guard.silence import StatusBoard
from unisono.guard.stragglers import HostMonitor
from unisono.observe.summary import Summary
from unisono.observe.timing import StepClock
from unisono.order import OrderLike
from unisono.replica.base import LossFunction, MetricFunction
from unisono.replica.buffers import BufferFold
from unisono.replica.choice import foreign_replica, torch_replica
from unisono.replica.torch_replica import Precision
from unisono.sync import Exact, Sync
from unisono.training import trace
from unisono.training.call_data import CallData
from unisono.training.callbacks import Callback
from unisono.training.evaluation import Evaluator, Validation, outputs_of
from unisono.training.header import Signals
from unisono.training.loop import Loop
from unisono.training.observer import Observer
from unisono.training.participant import Participant
from unisono.training.record import Position
from unisono.training.run import Run
from unisono.training.run_directory import RunDirectory
from unisono.training.screen import Screen
from unisono.training.session import Call, session_class
from unisono.training.settings import OnNonfinite, Settings
from unisono.training.setup import (
    check_arguments,
    check_batch,
    check_helpers,
    check_length,
    check_policies,
    choose_device,
    connect,
    describe_settings,
    enter,
    prepare_process,
)
from unisono.training.state import LocalState
from unisono.training.step import StepResult
from unisono.training.user_state import UserState
from unisono.training.weights import Weights
from unisono.world import World


class Trainer:
    """Trains a model on any number of workers, with one and the same result.

    *Collective*: every worker makes one with equal arguments. Workers are those of the launcher that started this process
    (``unisono run``, ``torchrun``, ``srun``); started alone, this process is the only one. If the run directory holds a
    checkpoint of this run, the trainer continues from it.

    Args:
        model: The bare PyTorch or Keras model (or a ``Replica`` of any other, which has optimizer and loss of its own). If its
            replicas differ at the start, worker 0's values win, with a warning.
        optimizer: Any ``torch.optim.Optimizer`` over the model's parameters whose ``step()`` needs no closure. For a Keras model,
            a Keras optimizer; None takes that with which the model is compiled, and so does the loss.
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
        model: Any,
        optimizer: Any = None,
        loss: LossFunction | None = None,
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
        collective: Collective | Any = None,
    ) -> None:
        check_arguments(batch_size, microbatches, max_grad_norm, precision, checkpoint_every)
        check_policies(on_nonfinite, on_desync, compare_every, timeout_s)
        check_helpers(callbacks, loader, scheduler, optimizer)
        self.batch_size, self.microbatches, self.seed, self.scheduler = batch_size, microbatches, seed, scheduler
        self.callbacks = (*callbacks, *trace.from_environment())
        self._loader = loader or Loader()
        self._screen = Screen(batch_size)

        self._world = enter(world or World.from_environment(), microbatches)
        foreign = foreign_replica(model, optimizer, loss, scheduler=scheduler, precision=precision)
        chosen = foreign.device if foreign else choose_device(device, self._world)
        prepare_process(self._world, chosen)
        machine = HostMonitor(self._world)
        replica = foreign or torch_replica(model, optimizer, loss, scheduler=scheduler, device=chosen, precision=precision)
        self.device, self.model, self.optimizer = replica.device, replica.model, replica.optimizer
        self._session = session = session_class(self._world, collective).open(
            self._world,
            collective,
            lambda: connect(self._world, self.device, timeout_s),
            device=self.device,
            timeout_s=timeout_s,
            microbatches=microbatches,
        )
        board = StatusBoard.make() if session.can_change or session.collective.size > 1 else None
        self._local = LocalState(
            replica=replica,
            weights=Weights(replica, session.transport),
            buffers=BufferFold(replica.buffers, microbatches),
            sync=sync or Exact(),
            clock=StepClock(shown=None if board is None else board.cells),
            carries=run_dir is not None or session.can_change,
            user=UserState(self.callbacks),
        )
        steps = Settings(
            batch_size=batch_size,
            microbatches=microbatches,
            seed=seed,
            max_grad_norm=max_grad_norm,
            on_nonfinite=on_nonfinite,
            on_desync=on_desync,
            compare_every=compare_every,
            timeout_s=timeout_s,
        )
        settings = describe_settings(self, replica, max_grad_norm, precision, self._local.sync, on_nonfinite)
        ground = {**fingerprint(threads=self._world.threads, device=self.device), **replica.fingerprint(self._world.threads)}
        directory = None
        if run_dir is not None:
            directory = RunDirectory(
                run_dir,
                session.transport,
                settings=settings,
                fingerprint=ground,
                keep=keep,
                strict=strict,
                is_over=session.is_past,
            )
        self._run = Run(
            replica=replica, session=session, directory=directory, clock=self.clock, checkpoint_every=checkpoint_every
        )
        self._loop = Loop(
            self._local,
            steps,
            session,
            self._run,
            machine=machine,
            observer=self.observer,
            begin=functools.partial(self._local.user.begin, self),
        )
        self._evaluator, self._validation = Evaluator(self._local, steps, session, self._run), Validation(dataset=None)
        alike = {**settings, "checkpoint_every": checkpoint_every, "run_dir": None if run_dir is None else "given"}
        named = {name if name == "script" else f"fingerprint {name}": value for name, value in ground.items()}
        session.begin(
            Participant(self._local, steps, session, run=self._run, loop=self._loop, screen=self._screen, alike=alike),
            identity={**named, **settings},
            timeout_s=timeout_s,
            board=board,
        )

    @property
    def world(self) -> World:
        """*local*. Who takes part, and which of them this worker is by now."""
        return self._session.place(self._world)

    @property
    def run_dir(self) -> str | None:
        """The run directory, as it was given; None if there is none."""
        return self._run.url

    @property
    def position(self) -> Position:
        """How far the run has come; the same on all workers."""
        return self._run.position

    @property
    def state(self) -> dict[str, Any]:
        """State of your own, read and written as ``trainer.state[...]``, the same on all workers: tensors, numbers, strings,
        None, and dicts and lists of these. It is saved with checkpoints, given to workers that join, compared in every step, and
        reads as it did when steps are taken again. Give initial values with ``setdefault``, and write in callbacks or a loop of
        your own, not in the loss: each worker computes the loss of other samples."""
        return self._local.user.values

    @property
    def clock(self) -> StepClock:
        """Measures where this worker's time goes."""
        return self._local.clock

    # ------------------------------------------------------------------ training

    def fit(
        self,
        dataset: Any,
        epochs: int | None = None,
        *,
        steps: int | None = None,
        order: OrderLike = "shuffle",
        drop_last: bool = False,
        loader: Loader | None = None,
        validation: Any = None,
        metrics: Mapping[str, MetricFunction] | None = None,
        validate_every: int | None = None,
        keep_best: str | None = None,
    ) -> Summary:
        """*collective*. Trains until ``epochs`` epochs (or ``steps`` steps) of the whole run are done, earlier starts included.

        Shows progress; writes checkpoints, metrics and, at the end, ``model.safetensors`` and ``summary.json``. A run that is
        done already is left as it is. SIGINT, SIGTERM and SIGHUP end it after the current step, with a checkpoint.

        Args:
            dataset: Map-style (samples are read by number), iterable (of torch or Hugging Face), or ``unisono.Streams``.
            epochs: Epochs of the whole run; None: as many as ``steps`` take.
            steps: Optimizer steps of the whole run, if it may end in the middle of an epoch.
            order: "shuffle" (by seed and epoch), "sequential", a list of sample indices, a sampler, or a batch sampler.
            drop_last: Leave out the short last batch of an epoch; of streams, the epoch ends with the first that ends.
            loader: How samples are loaded.
            validation: A dataset to ``evaluate`` meanwhile.
            metrics: What is measured there; None: the loss.
            validate_every: Steps between two evaluations; None: at the end of each epoch.
            keep_best: A metric's name: the weights at its highest value are kept as ``best.safetensors`` in the run directory.
                With a minus sign ("-loss"), those at its lowest.

        Raises:
            DataError: A sample cannot be read, or a loss or gradient is not finite; the last step stands.
            Desync: Replicas differ, or the samples of an epoch were not each used once.
            WorkerFailure: Another worker has failed, and this one cannot go on.
            SystemExit: With status 128 + signal number, after a checkpoint, when asked to stop.
        """
        check_loader(loader)
        epochs = check_length(epochs, steps)
        self._validation = Validation(dataset=validation, metrics=metrics, every=validate_every, keep_best=keep_best)
        call = self._enter_call(dataset, order, drop_last, epochs, steps, own_loop=False)
        with self._session.making(call):
            if not call.is_done:
                data = self._loop.data(dataset, order, drop_last=drop_last, epochs=epochs, steps=steps)
                if self._loop.is_done(epochs):
                    self._run.complete(epochs, steps)
                    summary = self._run.summary()
                    self._screen.tell_finished(self._run, summary)
                else:
                    summary = self._train(data, epochs, loader or self._loader)
                call.result = dataclasses.asdict(summary)
        self._validation = Validation(dataset=None)
        self._local.replica.rest()
        return Summary(**call.result)

    def _train(self, data: CallData, epochs: int, loader: Loader) -> Summary:
        # Before the look at the rank: a sampler that counts how often it is read must count alike on all workers.
        with self._screen.planned(*self._loop.planned(data, epochs)), self._local.replica.training() as was_resting:
            if self.collective.rank == 0:
                self._screen.begin(self._run, self.collective.size)
                self._screen.tell_mode(was_resting)
            # Closed also after an error, so that the log is written as far as training came.
            with contextlib.closing(self._loop.batches(data, epochs, loader, own_loop=False)) as batches:
                for batch in batches:
                    self.step(batch)
        summary = self._run.summary()
        self._screen.sum_up(self._run, summary)
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
        self._validation = Validation(dataset=None)
        call = self._enter_call(dataset, order, drop_last, epochs, None, own_loop=True)
        if call.is_done:
            return iter(())
        data = self._loop.data(dataset, order, drop_last=drop_last, epochs=epochs, steps=None)
        return self._own_batches(call, data, epochs, loader or self._loader)

    def step(self, batch: Batch) -> StepResult:
        """*collective*. One optimizer step on a batch from ``batches``.

        Returns:
            Loss, gradient norm and so on; the same on every worker.

        Raises:
            DataError: The loss or gradient is not finite, or the count is zero; nothing was updated.
            SystemExit: After a checkpoint, when asked to stop.
        """
        check_batch(batch)
        self._run.check_turn(batch)
        others, sent = self.collective, self.collective.bytes_sent
        batch, result, told = self._loop.take_together(batch, self.position.step + 1)
        self._run.advance(batch, result)
        if not result.skipped:
            self._local.replica.advance_schedule(result.loss)
        alike = self.collective is others
        sent = self.collective.bytes_sent - (sent if alike else 0)
        block = self._session.group.stragglers.add(told, batch.filled) if alike else None
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
        if self._validation.is_due(self.position.step, ends_epoch=batch.number + 1 == batch.of):
            self._validate(self._validation)
        self._run.begin_checkpoint(batch)
        self._stop_if_asked(told)
        return result

    def _validate(self, validation: Validation) -> None:
        results = self.evaluate(validation.dataset, validation.metrics)
        self._screen.tell_measured(self._run, results)
        with self._local.replica.trained_weights():
            self._run.keep_best(validation.score(results))

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
        call = self._session.enter_call()
        with self._session.making(call), self._local.replica.trained_weights():
            if not call.is_done:
                call.result = self._evaluator.evaluate(dataset, metrics, batch_size, loader or self._loader)
                with self.clock.pause():
                    for callback in self.callbacks:
                        callback.on_evaluate(self, call.result)
        results: dict[str, float] = call.result
        return results

    def predict(
        self,
        dataset: Any,
        function: Callable[[Any, Any], Any] | None = None,
        *,
        batch_size: int | None = None,
        loader: Loader | None = None,
        pad: float | None = None,
    ) -> Any:
        """*collective*. Outputs for a dataset, in its order, on every worker's CPU; the same bits for every number of workers.

        Args:
            function: ``function(model, batch)`` returns a tensor with a row for each sample, or a dict or tuple of these. None:
                ``model(batch)``.
            batch_size: Samples computed at a time; by default the size of a training microbatch.
            loader: How samples are loaded.
            pad: What outputs are filled up with to the longest one of the dataset; None: all must have equal lengths.

        Raises:
            ConfigurationError: The function returns something else.
            DataError: A sample cannot be read.
        """
        call = self._session.enter_call()
        with self._session.making(call), self._local.replica.trained_weights():
            if not call.is_done:
                by = function or (lambda model, batch: model(batch))
                call.result = self._evaluator.predict(dataset, by, batch_size, loader or self._loader, pad)
        return outputs_of(call.result)

    def finish(self) -> None:
        """*collective*. The run ends with the step that has just been taken, however many epochs ``fit`` was given. It is
        finished then: its files are written, and the same command started again changes nothing. For callbacks and loops of your
        own; decide by what is the same on all workers (results of steps and evaluations, ``trainer.state``)."""
        self.position.finished = True

    def save(self) -> None:
        """*collective*. Writes a checkpoint of the current state, and returns when it is complete.

        Raises:
            ConfigurationError: The trainer has no run directory.
            CheckpointError: A checkpoint could not be written; the one before it is whole.
        """
        if not self._run.is_kept:
            raise ConfigurationError("there is no run directory to save to: pass run_dir=... to Trainer")
        call = self._session.enter_call()
        with self._session.making(call), self._local.replica.trained_weights():
            if not call.is_done:
                self._run.save()

    @property
    def collective(self) -> Collective:
        """*local*. The current workers; under ``unisono run`` they may change between and during steps. On a worker that has yet
        to join them it is a stand-in of rank 1, which cannot communicate."""
        return self._session.collective

    # ------------------------------------------------------------------ the parts of a step

    def _own_batches(self, call: Call, data: CallData, epochs: int, loader: Loader) -> Iterator[Batch]:
        with self._session.making(call):
            yield from self._loop.batches(data, epochs, loader, own_loop=True)
        self._local.replica.rest()

    def _enter_call(
        self, dataset: Any, order: OrderLike, drop_last: bool, epochs: int, steps: int | None, *, own_loop: bool
    ) -> Call:
        """*collective*. A call that a worker can enter in the middle. If the others had finished it before this one came, this
        one takes the weights that they have published."""
        self._local.replica.train()
        self._local.user.begin_call(tells=self.collective.rank == 0)
        if self._session.is_outside:
            self._local.weights.want(self._loop.may_share(own_loop))
        arguments = functools.partial(self._loop.arguments, dataset, order, drop_last=drop_last, epochs=epochs, steps=steps)
        call = self._session.enter_call(arguments)
        if call.is_done and (weights := self._run.read_model()) is not None:
            self._local.replica.load_model_state(weights)
        return call

    # ------------------------------------------------------------------ stops

    def _stop_if_asked(self, told: Sequence[Signals]) -> None:
        """*collective*, after a step. All stop if one was asked to, or if all are to leave and nobody waits to take over."""
        stop = max(signals.stop for signals in told)
        if not stop and self._session.everyone_leaves:
            stop = int(signal.SIGTERM)
        if stop:
            self._run.stop()
            self._screen.tell_stopped(self._run, stop)
            raise SystemExit(128 + stop)
