"""The trainer that a script gets under ``verify``: the real one, which writes everything down and stops after a few steps.

Nothing here may change a bit unless the job says so.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Subset

from unisono.collective import Collective
from unisono.data.loader import Loader
from unisono.observe.summary import Summary
from unisono.training.observer import Observer
from unisono.training.step import Batch
from unisono.training.trainer import Trainer
from unisono.verify.draws import constant_draws
from unisono.verify.fresh import add, fresh
from unisono.verify.job import Change
from unisono.verify.places import Snapshot, roots_of
from unisono.verify.record import StepRecord, TrainerRecord, WorkerRecord, data_digest, digest, digests, groups
from unisono.verify.watch import Watch, is_users, place, users_frame
from unisono.world import World

_MOST_KEPT_BYTES = 2 << 30


@dataclasses.dataclass
class Bench:
    """What all trainers of one process share."""

    watch: Watch
    record: WorkerRecord
    folder: Path
    meeting: str
    steps: int
    events: int | None
    dump: tuple[int, int] | None
    keep: bool
    """Whether tensors after each step are kept, as far as there is room."""
    teacher: Path | None
    """Folder of the run from whose kept tensors the reference starts each step."""
    held: list[list[dict[str, Any]]]
    """For each trainer, the settings that the optimizer had on one worker."""
    finish: Callable[[], None]
    """Ends the process."""
    inspect: bool = False
    kept_bytes: int = 0
    on_gpu: bool = False
    collective: Collective | None = None
    """Of the newest trainer."""
    began_s: float = dataclasses.field(default_factory=time.perf_counter)

    def begins(self, record: TrainerRecord) -> None:
        """A trainer is being made."""
        if not self.record.trainers:
            self.record.startup_s = time.perf_counter() - self.began_s
        self.record.trainers.append(record)

    @property
    def changes(self) -> frozenset[Change]:
        """The experiment."""
        return frozenset(self.watch.changes)

    def happened(self) -> None:
        """After each step and evaluation."""
        self.record.events += 1
        if self.events is not None and self.record.events >= self.events:
            self.finish()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is going on now."""
        before, self.watch.phase = self.watch.phase, name
        try:
            yield
        finally:
            self.watch.phase = before

    def keep_tensors(self, record: TrainerRecord, model: nn.Module, optimizer: Any, step: int) -> None:
        """*local*. Writes the tensors down, if this step's are wanted."""
        number = self.record.trainers.index(record)
        if self.dump == (number, step) or (self.keep and self.kept_bytes < _MOST_KEPT_BYTES):
            tensors = {"model": _state(model), "optimizer": optimizer_state(model, optimizer)}
            torch.save(tensors, self.folder / f"tensors-{number}-{step}-{self.record.rank}.pt")
            self.kept_bytes += sum(tensor.nbytes for part in tensors.values() for tensor in part.values())


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
        while self._trainer.position.step < bench.steps:
            with bench.phase("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


class ProbeTrainer(Trainer):
    """See the module."""

    bench: ClassVar[Bench]

    def __init__(self, model: nn.Module, optimizer: Any, loss: Any, **settings: Any) -> None:
        bench = self.bench
        self._probe = TrainerRecord(
            call=called_from(sys._getframe(1)),
            loader_workers=(settings.get("loader") or Loader()).num_workers,
            norms=[name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
            if isinstance(model, nn.Module)
            else [],
        )
        bench.begins(self._probe)
        number = len(bench.record.trainers)
        if Change.HOLD_SETTINGS in bench.changes and number <= len(bench.held):
            for group, held in zip(optimizer.param_groups, bench.held[number - 1], strict=False):
                group.update({key: value for key, value in held.items() if isinstance(value, (int, float)) and key in group})
        if Change.NO_LOADER_WORKERS in bench.changes:
            settings["loader"] = _without_workers(settings.get("loader"))
        callbacks = () if Change.NO_CALLBACKS in bench.changes else tuple(settings.get("callbacks") or ())
        self._probe.callbacks = [type(callback).__name__ for callback in settings.get("callbacks") or ()]
        self._probe_edits: dict[str, list[str]] = {}
        settings["callbacks"] = callbacks
        self._probe_loader = settings.get("loader") or Loader()
        self.observer = _FirstSteps(self)
        for callback in callbacks:
            self._watch_callback(callback)
        if settings.get("run_dir") is not None:
            self._probe.run_dir = os.fspath(settings["run_dir"])
            settings["run_dir"] = str(bench.folder / f"run-{number}")
        settings["checkpoint_every"] = None if settings.get("run_dir") is None else 10**9
        settings["strict"] = False
        if settings.get("world") is None and settings.get("collective") is None:
            with bench.phase("trainer"):
                here = World.from_environment()
            fields = {field.name: getattr(here, field.name) for field in dataclasses.fields(World)}
            meeting = "" if here.size == 1 else f"{bench.meeting}-{number}"
            settings["world"] = _Here(**fields, meeting=meeting)
        self._probe_loss = LossProbe(loss, model, bench)
        self._probe.settings = groups(optimizer) if hasattr(optimizer, "param_groups") else []
        watched = bench.watch
        with bench.phase("trainer"):
            super().__init__(model, optimizer, self._probe_loss, **settings)
            if Change.DETERMINISTIC in bench.changes:
                torch.use_deterministic_algorithms(True, warn_only=True)
        if watched.phase == "script":
            watched.phase = "between"
        bench.collective = super().collective
        bench.on_gpu = self.device.type == "cuda"
        self._probe.batch_size, self._probe.microbatches, self._probe.seed = self.batch_size, self.microbatches, self.seed
        if self.scheduler is not None:
            watch_scheduler(self.scheduler, watched)

    # ------------------------------------------------------------------ what the script may ask

    @property
    def collective(self) -> Collective:
        """The workers' collective; a look at its rank is noted."""
        frame = sys._getframe(1)
        if is_users(frame.f_code.co_filename):
            return _Seen(super().collective, self.bench.watch)  # type: ignore[return-value]
        return super().collective

    @property
    def world(self) -> World:
        """Who takes part; a look at it is noted."""
        frame = sys._getframe(1)
        watch = self.bench.watch
        if is_users(frame.f_code.co_filename):
            watch.note("rank", "trainer.world", frame)
            if watch.hides_rank():
                return dataclasses.replace(self._probe_world, rank=0, size=1, local_rank=0, local_size=1)
        return self._probe_world

    @world.setter
    def world(self, value: World) -> None:
        self._probe_world = value

    # ------------------------------------------------------------------ few steps

    def fit(self, dataset: Any, epochs: int, *, loader: Loader | None = None, **settings: Any) -> Summary:
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
        bench, began = self.bench, time.perf_counter()
        record = StepRecord(step=self.position.step + 1, settings=groups(self.optimizer), start=digests(self.model))
        record.samples = [int(index) for part in batch.parts for index in part.indices]
        self._probe_edits = record.edited
        self._probe_loss.begin([part.number for part in batch.parts])
        with bench.phase("step"):
            result = super().step(batch)
        record.data, record.losses = self._probe_loss.data, self._probe_loss.values
        self._probe_loss.end()
        record.loss, record.norm, record.rates = result.loss, result.gradient_norm, list(result.learning_rates)
        record.end = digests(self.model)
        record.optimizer = {name: digest(value) for name, value in optimizer_state(self.model, self.optimizer).items()}
        record.seconds = time.perf_counter() - began
        record.event = bench.record.events + 1
        self._probe.steps.append(record)
        bench.keep_tensors(self._probe, self.model, self.optimizer, record.step)
        bench.happened()
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
        self._loss, self._model, self._bench = loss, model, bench
        self._numbers: list[int] = []
        self._calls = 0
        self.data: dict[str, str] = {}
        self.values: dict[str, list[float]] = {}
        self._raw: dict[str, Any] = {}

    def begin(self, numbers: list[int]) -> None:
        """A step with these microbatches begins."""
        self._numbers, self._calls = numbers, 0
        self.data, self._raw, self.values = {}, {}, {}

    def end(self) -> None:
        """The step is over. (One look at the values a step.)"""
        for number, returned in self._raw.items():
            self.values[number] = numbers_of(returned)
        self._numbers, self._raw = [], {}

    def __call__(self, model: Any, batch: Any) -> Any:
        bench, changes = self._bench, self._bench.changes
        if not self._numbers:
            return self._loss(model, batch)
        number = str(self._numbers[self._calls % len(self._numbers)])
        self._calls += 1
        self.data[number] = data_digest(batch)
        if Change.FREEZE_NORM in changes:
            freeze_norm(self._model)
        if Change.CONSTANT_PYTHON_DRAWS in changes:
            random.seed(20)
            np.random.seed(20)
        before = Snapshot(roots_of(self._loss, self._model))
        buffers = {name: (buffer, buffer.detach().clone()) for name, buffer in self._model.named_buffers()}
        draws = _Draws()
        with bench.phase("loss"), constant_draws() if Change.CONSTANT_DRAWS in changes else contextlib.nullcontext():
            returned = self._loss(model, batch)
        add(bench.record.draws, draws.made())
        add(bench.record.state, before.restore() if Change.RESTORE_STATE in changes else before.changed())
        moved = [name for name, (_, value) in buffers.items() if not torch.equal(_now(self._model, name), value)]
        add(bench.record.buffers, moved)
        if Change.FREEZE_BUFFERS in changes:
            with torch.no_grad():
                for name in moved:
                    _now(self._model, name).copy_(buffers[name][1])
        self._raw[number] = returned
        return returned


class _Draws:
    """Which generators were drawn from since."""

    def __init__(self) -> None:
        self._torch = torch.default_generator.get_state()
        self._numpy = np.random.get_state(legacy=False)
        self._random = random.getstate()

    def made(self) -> list[str]:
        found = []
        if not torch.equal(self._torch, torch.default_generator.get_state()):
            found.append("torch")
        now: Any = np.random.get_state(legacy=False)
        then: Any = self._numpy
        if now["state"]["pos"] != then["state"]["pos"] or not np.array_equal(now["state"]["key"], then["state"]["key"]):
            found.append("numpy")
        if random.getstate() != self._random:
            found.append("random")
        return found


class _Seen:
    """The collective, as the user's code sees it: looks at the rank are noted."""

    def __init__(self, inner: Collective, watch: Watch) -> None:
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


def watch_scheduler(scheduler: Any, watch: Watch, *, obey: bool = True) -> Callable[..., Any]:
    """*local*. Notes steps that the script makes of its own, which happen only with ``obey``; the scheduler's own method."""
    original: Callable[..., Any] = scheduler.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1)
        if is_users(caller.f_code.co_filename):
            watch.note("scheduler", "scheduler.step()", caller)
            if not obey:
                return None
        return original(*args, **kwargs)

    # A class, because a scheduler saves all that its __dict__ holds.
    kind = type(scheduler)
    scheduler.__class__ = type(kind.__name__, (kind,), {"step": step, "__module__": kind.__module__})
    return original


def few(dataset: Any, batch_size: int) -> Any:
    """*local*. The first samples of a dataset that is to be evaluated."""
    most = max(2 * batch_size, 64)
    return dataset if len(dataset) <= most else Subset(dataset, range(most))


def freeze_norm(model: nn.Module) -> None:
    """*local*. Batch normalisation with running statistics."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def called_from(frame: Any) -> dict[str, Any]:
    """*local*. The user's line that led here."""
    user = users_frame(frame)
    return place(user) if user is not None else {"file": "", "line": 0, "code": "", "function": ""}


def numbers_of(returned: Any) -> list[float]:
    """*local*. What a loss returned, as two floats: the value, and the count or -1."""
    value, count = returned if isinstance(returned, (tuple, list)) and len(returned) == 2 else (returned, -1.0)
    return [float(value.detach() if isinstance(value, torch.Tensor) else value), float(count)]


def _without_workers(loader: Loader | None) -> Loader:
    return dataclasses.replace(loader or Loader(), num_workers=0, multiprocessing_context=None)


def _now(model: nn.Module, name: str) -> torch.Tensor:
    return model.get_buffer(name)


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().cpu().clone() for name, tensor in named if not tensor.is_meta}


def optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """*local*. The optimizer's tensors by the names of their parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]} ({key})": copy.copy(value.detach().cpu())
        for parameter, state in optimizer.state.items()
        if id(parameter) in names
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }
