"""What all trainers of one worker's process share: the experiment, the record, and what is kept of each step."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Subset

from unisono.training.trainer import Trainer
from unisono.verify.draws import constant_draws
from unisono.verify.job import Change, RunSpec
from unisono.verify.places import Snapshot, roots_of
from unisono.verify.record import StepRecord, TrainerRecord, WorkerRecord, add
from unisono.verify.watch import ScriptWatch, is_users

_MOST_KEPT_BYTES = 2 << 30


@dataclasses.dataclass
class Bench:
    """One for each process."""

    spec: RunSpec
    watch: ScriptWatch
    record: WorkerRecord
    finish: Callable[[], None]
    """Ends the process."""
    kept_bytes: int = 0
    trainer: Trainer | None = None
    """The newest one."""

    @property
    def changes(self) -> frozenset[Change]:
        """The experiment."""
        return self.spec.job.changes

    def begins(self, record: TrainerRecord, model: nn.Module) -> int:
        """A trainer is being made; its number, from 0."""
        if isinstance(model, nn.Module):  # else the trainer will say what is wrong
            record.norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
        self.record.trainers.append(record)
        return len(self.record.trainers) - 1

    def made(self) -> None:
        """The script's first trainer stands; what the script does from now on is no preparation."""
        if self.watch.phase == "script":
            self.watch.phase = "between"

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is going on now."""
        before, self.watch.phase = self.watch.phase, name
        try:
            yield
        finally:
            self.watch.phase = before

    def stepped(self, record: TrainerRecord, step: StepRecord, model: nn.Module, optimizer: Any) -> None:
        """After each step: writes its tensors down if they are wanted."""
        step.event = self.record.events + 1
        record.steps.append(step)
        number = self.record.trainers.index(record)
        if self.spec.job.dump == (number, step.step) or (self.spec.job.keep and self.kept_bytes < _MOST_KEPT_BYTES):
            named = [*model.named_parameters(), *model.named_buffers()]
            tensors = {
                "model": {name: tensor.detach().cpu().clone() for name, tensor in named if not tensor.is_meta},
                "optimizer": optimizer_state(model, optimizer),
            }
            torch.save(tensors, self.spec.folder / f"tensors-{number}-{step.step}-{self.record.rank}.pt")
            self.kept_bytes += sum(tensor.nbytes for part in tensors.values() for tensor in part.values())
        self.happened()

    def happened(self) -> None:
        """After each step and evaluation."""
        self.record.events += 1
        if self.record.events == self.spec.job.events:
            self.finish()

    @contextlib.contextmanager
    def calling(self, loss: Any, model: nn.Module) -> Iterator[None]:
        """Around a call of the user's loss: changes what the experiment changes, and notes what the call changed."""
        changes, record = self.changes, self.record
        if Change.FREEZE_NORM in changes:
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        if Change.CONSTANT_PYTHON_DRAWS in changes:
            random.seed(20)
            np.random.seed(20)
        before = Snapshot(roots_of(loss, model))
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        inst, rand = random._inst, np.random.mtrand._rand
        generators = Snapshot({"script": {"torch": torch.default_generator, "numpy": rand, "random": inst}})
        with self.phase("loss"), constant_draws() if Change.CONSTANT_DRAWS in changes else contextlib.nullcontext():
            yield
        add(record.draws, generators.changed())
        add(record.state, before.restore() if Change.RESTORE_STATE in changes else before.changed())
        moved = [name for name, value in buffers.items() if not torch.equal(model.get_buffer(name), value)]
        add(record.buffers, moved)
        if Change.FREEZE_BUFFERS in changes:
            with torch.no_grad():
                for name in moved:
                    model.get_buffer(name).copy_(buffers[name])


def watch_scheduler(scheduler: Any, watch: ScriptWatch, *, obey: bool = True) -> Callable[..., Any]:
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


def optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """*local*. The optimizer's tensors by the names of their parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]} ({key})": copy.copy(value.detach().cpu())
        for parameter, state in optimizer.state.items()
        if id(parameter) in names
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
