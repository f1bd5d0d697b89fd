"""A small run with everything that a checkpoint must hold, and what it leaves behind, for comparison bit by bit."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import unisono
from unisono.checkpoint.format import digest
from unisono.checkpoint.store import Store
from unisono.collective import Collective
from unisono.elastic.link import Link
from unisono.testing import run_threads

SAMPLES, BATCH_SIZE, MICROBATCHES, EPOCHS = 32, 12, 4, 3
STEPS_PER_EPOCH = 3  # the last batch of an epoch has 8 samples, in three of four microbatches
STEPS = EPOCHS * STEPS_PER_EPOCH


class Net(nn.Module):
    """BatchNorm, dropout, tied and frozen weights, and a buffer that no state dict shows."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.25)
        self.tied = nn.Linear(width, width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.last = nn.Linear(width, 3)
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.relu(self.norm(self.first(x))))
        if self.training:
            self.scale.mul_(0.9).add_(x.detach().abs().mean() * 0.1)
        output: Tensor = self.last(self.frozen(self.tied(self.tied(x))) * self.scale)
        return output


class Augmented(Dataset[Any]):
    """Samples with noise from each of the three generators that people use."""

    def __init__(self, samples: int = SAMPLES) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(samples, 5, generator=generator)
        self.targets = torch.randint(0, 3, (samples,), generator=generator)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        noise = 0.1 * torch.randn(5) + float(np.random.rand()) + random.random()
        return self.inputs[index] + noise, self.targets[index]


def loss(model: Any, batch: Any) -> tuple[Tensor, int]:
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets, reduction="sum"), len(targets)


def elastic_trainer(link: Link | None, *, replicate_kib: float | None = None, **settings: Any) -> unisono.Trainer:
    """For workers that may be lost, and for one alone (None) to compare with."""
    torch.manual_seed(7)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sync = None if replicate_kib is None else unisono.Exact(replicate_kib=replicate_kib)
    return unisono.Trainer(
        model, optimizer, loss, batch_size=BATCH_SIZE, microbatches=MICROBATCHES, sync=sync, collective=link, **settings
    )


def make_trainer(collective: Collective | None = None, *, width: int = 7, lr: float = 0.02, **settings: Any) -> unisono.Trainer:
    torch.manual_seed(3)
    model = Net(width)
    groups: list[dict[str, Any]] = [
        {"params": model.first.parameters()},
        {"params": [*model.norm.parameters(), *model.tied.parameters()], "lr": 0.01},
    ]
    groups.append({"params": model.last.parameters(), "weight_decay": 0.2})
    optimizer = torch.optim.AdamW(groups, lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4 * STEPS)
    defaults: dict[str, Any] = {
        "batch_size": BATCH_SIZE,
        "microbatches": MICROBATCHES,
        "max_grad_norm": 1.0,
        "sync": unisono.Exact(replicate_kib=0),  # each parameter has one owner, as in a large model
    }
    return unisono.Trainer(model, optimizer, loss, scheduler=scheduler, collective=collective, **{**defaults, **settings})


@dataclasses.dataclass(frozen=True)
class End:
    """What a run leaves in memory and on disk; all of it must be the same however it came there."""

    tensors: dict[str, bytes]
    """Weights and buffers, hidden ones included."""
    optimizer: dict[str, dict[str, bytes]]
    """By parameter, put together from all workers."""
    groups: str
    scheduler: str
    position: dict[str, int]
    metrics: list[dict[str, Any]]
    """Lines of the log, without times."""
    model_file: str
    """SHA-256 of ``model.safetensors``."""


def train(
    workers: int, run_dir: Any, *, epochs: int = EPOCHS, callbacks: Sequence[Callable[[], unisono.Callback]] = (), **settings: Any
) -> End:
    """Trains in threads, from wherever the run directory stands, and checks that all workers agree."""

    def work(collective: Collective) -> unisono.Trainer:
        trainer = make_trainer(collective, run_dir=run_dir, callbacks=[make() for make in callbacks], **settings)
        trainer.fit(Augmented(), epochs)
        return trainer

    return ending(run_threads(workers, work), run_dir)


def ending(trainers: Sequence[unisono.Trainer], run_dir: Any) -> End:
    everybodys = [_tensors(trainer) for trainer in trainers]
    assert all(tensors == everybodys[0] for tensors in everybodys)
    first = trainers[0]
    state: dict[str, dict[str, bytes]] = {}
    for trainer in trainers:
        mine = _optimizer_state(trainer)
        # By one worker each, or by all.
        assert all(state[name] == mine[name] for name in state.keys() & mine.keys())
        state |= mine
    assert set(state) == {name for name, parameter in first.model.named_parameters() if parameter.requires_grad}
    store = Store(run_dir)
    return End(
        tensors=everybodys[0],
        optimizer=state,
        groups=repr([{k: v for k, v in group.items() if k != "params"} for group in first.optimizer.param_groups]),
        scheduler=repr(sorted(first.scheduler.state_dict().items())),
        position=dataclasses.asdict(first.position),
        metrics=read_lines(store),
        model_file=digest(store.read("model.safetensors")),
    )


def read_lines(store: Store) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in store.read("metrics.jsonl").splitlines()]
    timed = re.compile(r".*_s(_\d+)?|samples_per_second")
    return [{k: v for k, v in line.items() if not timed.fullmatch(k)} for line in lines]


def _tensors(trainer: unisono.Trainer) -> dict[str, bytes]:
    named = [*trainer.model.named_parameters(), *trainer.model.named_buffers()]
    return {name: _bytes(tensor) for name, tensor in named}


def _optimizer_state(trainer: unisono.Trainer) -> dict[str, dict[str, bytes]]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in trainer.model.named_parameters()}
    states = {names[parameter]: state for parameter, state in trainer.optimizer.state.items() if state}
    return {name: {key: _bytes(value) for key, value in state.items()} for name, state in states.items()}


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return str((tensor.dtype, tuple(tensor.shape))).encode() + plain.numpy().tobytes()


class Killed(Exception):
    """What the process of a test dies of."""


class Dies(unisono.Callback):
    """Raises after a step, on all workers or on one."""

    def __init__(self, step: int, rank: int | None = None) -> None:
        self.step, self.rank = step, rank

    def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        if result.step == self.step and self.rank in (None, trainer.collective.rank):
            raise Killed


class EachEpoch(unisono.Callback):
    """Evaluates the loss after each epoch, and keeps what callbacks are told of evaluations."""

    edits_weights = False

    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, float]]] = []

    def on_epoch(self, trainer: unisono.Trainer, epoch: int) -> None:
        trainer.evaluate(Augmented())

    def on_evaluate(self, trainer: unisono.Trainer, results: Mapping[str, float]) -> None:
        self.told.append((trainer.position.step, dict(results)))


def memory_url() -> str:
    return f"memory://{uuid.uuid4().hex}/runs/x"


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of every file, by path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
