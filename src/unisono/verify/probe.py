"""The trainer that a script gets under ``verify``: the real one, which writes everything down and stops after a few steps.

Nothing here may change a bit unless the job says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from unisono.collective import Collective
from unisono.data.batch import Batch
from unisono.data.loader import Loader
from unisono.guard.data import content_digest
from unisono.observe.summary import Summary
from unisono.replica.whole_batch import WholeBatchLoss
from unisono.sync import Exact
from unisono.training.observer import Observer
from unisono.training.trainer import Trainer
from unisono.verify.bench import Bench, few, optimizer_state, watch_scheduler
from unisono.verify.fresh import fresh
from unisono.verify.job import Change
from unisono.verify.places import Snapshot
from unisono.verify.record import StepRecord, TrainerRecord, add, data_digest, digests, groups
from unisono.verify.watch import ScriptWatch, is_users
from unisono.world import World


@dataclasses.dataclass(frozen=True)
class _Here(World):
    """Workers that meet at a file, so that no port can be taken."""

    meeting: str = ""

    @property
    def init_method(self) -> str | None:
        return self.meeting or None


class _FirstSteps(Observer):
    """Ends training after the steps that are looked at."""

    def __init__(self, trainer: ProbeTrainer) -> None:
        self._trainer = trainer

    def around_batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        bench = self._trainer.bench
        while self._trainer.position.step < bench.spec.steps:
            with bench.phase("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


class ProbeTrainer(Trainer):
    """See the module."""

    bench: ClassVar[Bench]

    def __init__(self, model: nn.Module, optimizer: Any, loss: Any, **settings: Any) -> None:
        bench, changes = self.bench, self.bench.changes
        self._probe = TrainerRecord(callbacks=[type(callback).__name__ for callback in settings.get("callbacks") or ()])
        number = bench.begins(self._probe, model)
        if Change.HOLD_SETTINGS in changes and number < len(bench.spec.held):
            for group, held in zip(optimizer.param_groups, bench.spec.held[number], strict=False):
                group.update({key: value for key, value in held.items() if isinstance(value, (int, float)) and key in group})
        self._probe.settings = groups(optimizer) if hasattr(optimizer, "param_groups") else []
        self._probe_loader = settings.get("loader") or Loader()
        self._probe.loader_workers = self._probe_loader.num_workers
        if Change.NO_LOADER_WORKERS in changes:
            settings["loader"] = _without_workers(self._probe_loader)
        self._probe_edits: dict[str, list[str]] = {}
        settings["callbacks"] = () if Change.NO_CALLBACKS in changes else tuple(settings.get("callbacks") or ())
        for callback in settings["callbacks"]:
            self._watch_callback(callback)
        if settings.get("run_dir") is not None:
            self._probe.run_dir = os.fspath(settings["run_dir"])
            settings["run_dir"] = str(bench.spec.folder / f"run-{number + 1}")
        settings["checkpoint_every"] = None if settings.get("run_dir") is None else 10**9
        settings["strict"] = False
        # What a microbatch does is recorded as it is computed alone; one pass compares its own bits with that.
        settings["sync"] = settings.get("sync") or Exact()
        if isinstance(settings["sync"], Exact):
            settings["sync"] = dataclasses.replace(settings["sync"], one_pass=False)
        if settings.get("world") is None and settings.get("collective") is None:
            with bench.phase("trainer"):
                here = World.from_environment()
            fields = {field.name: getattr(here, field.name) for field in dataclasses.fields(World)}
            settings["world"] = _Here(
                **fields, meeting="" if here.size == 1 else (bench.spec.folder / f"meeting-{number}").as_uri()
            )
        self.observer = _FirstSteps(self)
        self._probe_loss = LossProbe(loss, model, bench)
        with bench.phase("trainer"):
            super().__init__(model, optimizer, self._probe_loss.watched, **settings)
            if Change.DETERMINISTIC in changes:
                torch.use_deterministic_algorithms(True, warn_only=True)
        bench.made()
        bench.trainer = self
        self._probe.batch_size, self._probe.microbatches = self.batch_size, self.microbatches
        if self.scheduler is not None:
            watch_scheduler(self.scheduler, bench.watch)

    # ------------------------------------------------------------------ what the script may ask

    @property
    def collective(self) -> Collective:
        """The workers' collective; a look at its rank is noted."""
        if is_users(sys._getframe(1).f_code.co_filename):
            return _Seen(super().collective, self.bench.watch)  # type: ignore[return-value]
        return super().collective

    @property
    def world(self) -> World:
        """Who takes part; a look at it is noted."""
        frame, watch, world = sys._getframe(1), self.bench.watch, super().world
        if is_users(frame.f_code.co_filename):
            watch.note("rank", "trainer.world", frame)
            if watch.hides_rank():
                return dataclasses.replace(world, rank=0, size=1, local_rank=0, local_size=1)
        return world

    # ------------------------------------------------------------------ few steps

    def fit(self, dataset: Any, epochs: int | None = None, *, loader: Loader | None = None, **settings: Any) -> Summary:
        """The first steps only."""
        with self._watched_data(dataset, loader) as (dataset, loader):
            return super().fit(dataset, epochs, loader=loader, **settings)

    def batches(self, dataset: Any, epochs: int, *, loader: Loader | None = None, **settings: Any) -> Iterator[Batch]:
        """The first batches only."""
        with self._watched_data(dataset, loader) as (dataset, loader):
            yield from super().batches(dataset, epochs, loader=loader, **settings)

    @contextlib.contextmanager
    def _watched_data(self, dataset: Any, loader: Loader | None) -> Iterator[tuple[Any, Loader]]:
        """Data set and loader as the experiment wants them; notes what reading changes."""
        bench, loader = self.bench, loader or self._probe_loader
        if bench.changes & {Change.NO_LOADER_WORKERS, Change.FRESH_DATA}:
            loader = _without_workers(loader)
        self._probe.loader_workers = max(self._probe.loader_workers, loader.num_workers)
        if Change.FRESH_DATA in bench.changes:
            yield fresh(dataset, bench.record.data_state), loader
            return
        snapshot = Snapshot({"dataset": dataset}) if loader.num_workers == 0 else None
        yield dataset, loader
        if snapshot is not None:
            add(bench.record.data_state, snapshot.changed())

    def step(self, batch: Any) -> Any:
        """One step, written down."""
        record = StepRecord(step=self.position.step + 1, settings=groups(self.optimizer), start=digests(self.model))
        self._probe_edits = record.edited
        with self._probe_loss.recorded(record, [part.number for part in batch.parts]), self.bench.phase("step"):
            result = super().step(batch)
        record.loss, record.norm, record.rates = result.loss, result.gradient_norm, tuple(result.learning_rates)
        record.end = digests(self.model)
        record.optimizer = {name: content_digest(value) for name, value in optimizer_state(self.model, self.optimizer).items()}
        self.bench.stepped(self._probe, record, self.model, self.optimizer)
        return result

    def evaluate(self, dataset: Any, metrics: Any = None, **settings: Any) -> dict[str, float]:
        """On the first samples only."""
        with self.bench.phase("evaluate"):
            results = super().evaluate(few(dataset, self.batch_size), metrics, **settings)
        self._probe.evaluations.append(results)
        self.bench.happened()
        return results

    # ------------------------------------------------------------------

    def _watch_callback(self, callback: Any) -> None:
        """Notes which tensors each of its methods changes."""
        for name in [name for name in dir(callback) if name.startswith("on_")]:
            method = getattr(callback, name)

            def watched(*args: Any, _method: Any = method, _name: str = name, **kwargs: Any) -> Any:
                before, settings = digests(self.model), groups(self.optimizer)
                with self.bench.phase(f"callback {type(callback).__name__}"):
                    result = _method(*args, **kwargs)
                after = digests(self.model)
                changed = [tensor for tensor in after if after[tensor] != before.get(tensor)]
                if groups(self.optimizer) != settings:
                    changed.append("optimizer settings")
                if changed:
                    self._probe_edits[f"{type(callback).__name__}.{_name}"] = changed
                return result

            with contextlib.suppress(AttributeError):  # a class with slots
                setattr(callback, name, watched)


class LossProbe:
    """The user's loss function, watched.

    Args:
        loss: The user's.
        model: Its model.
        bench: The process.
    """

    def __init__(self, loss: Any, model: nn.Module, bench: Bench) -> None:
        self.watched: Any = self
        """What the trainer is given."""
        if isinstance(loss, WholeBatchLoss):
            loss, self.watched = loss.embed, WholeBatchLoss(self, loss.loss)
        self._loss, self._model, self._bench = loss, model, bench
        self._record: StepRecord | None = None
        self._numbers: list[int] = []
        self._returned: list[Any] = []

    @contextlib.contextmanager
    def recorded(self, record: StepRecord, numbers: list[int]) -> Iterator[None]:
        """Around a step with these microbatches."""
        self._record, self._numbers, self._returned = record, numbers, []
        yield
        self._record = None
        # Looked at only now: on a GPU each look waits for the device.
        record.losses = {number: _numbers(returned) for number, returned in zip(numbers, self._returned, strict=False)}

    def __call__(self, model: Any, batch: Any) -> Any:
        if self._record is None:
            return self._loss(model, batch)
        number = self._numbers[len(self._returned) % len(self._numbers)]
        self._record.data[number] = data_digest(batch)
        with self._bench.calling(self._loss, self._model):
            returned = self._loss(model, batch)
        self._returned.append(returned)
        return returned


class _Seen:
    """The collective, as the user's code sees it: looks at the rank are noted."""

    def __init__(self, inner: Collective, watch: ScriptWatch) -> None:
        self._inner, self._watch = inner, watch

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        caller = sys._getframe(1)
        if name in ("rank", "size"):
            self._watch.note("rank", f"trainer.collective.{name}", caller)
            if self._watch.hides_rank():
                return 0 if name == "rank" else 1
        elif callable(value) and not name.startswith("_"):
            self._watch.note("rank", f"trainer.collective.{name}()", caller)
            holder = type("Call", (), {name: staticmethod(value)})
            self._watch.watch_call(holder, name, f"trainer.collective.{name}()")
            return getattr(holder, name)
        return value


def _numbers(returned: Any) -> tuple[float, float]:
    """What a loss returned, as two floats: the value, and the count or -1. Of rows of samples: what they add up to."""
    rows = returned if isinstance(returned, (tuple, list)) else (returned,)
    if any(isinstance(row, torch.Tensor) and row.dim() for row in rows):
        return sum(float(row.detach().double().sum()) for row in rows), -1.0
    value, count = returned if isinstance(returned, (tuple, list)) and len(returned) == 2 else (returned, -1.0)
    return float(value.detach() if isinstance(value, torch.Tensor) else value), float(count)


def _without_workers(loader: Loader) -> Loader:
    return dataclasses.replace(loader, num_workers=0, multiprocessing_context=None)
