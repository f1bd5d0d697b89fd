"""What the contracts are tried on: small models and data in double precision, trained on 1 to 4 threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import unisono
from tests.reference.harness import (
    Outcome,
    Samples,
    Setup,
    assert_same_bits,
    in_unison,
)

WORKERS = (1, 2, 3, 4)
DOUBLE = torch.float64


def vectors(length: int = 40, classes: int = 3) -> Samples:
    generator = torch.Generator().manual_seed(1)
    return Samples(
        torch.randn(length, 6, generator=generator, dtype=DOUBLE), torch.randint(0, classes, (length,), generator=generator)
    )


def summed(model: Any, batch: Any) -> tuple[Tensor, int]:
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, reduction="sum"), len(labels)


def mean(model: Any, batch: Any) -> Tensor:
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 3)).double()


class Moody(nn.Module):
    """Batch norm and dropout: everything that makes two runs differ."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 11)
        self.norm = nn.BatchNorm1d(11)
        self.dropout = nn.Dropout(0.3)
        self.out = nn.Linear(11, 3)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.dropout(torch.tanh(self.norm(self.first(inputs)))))


def setup_of(
    model: Callable[[], nn.Module], *, loss: Callable[[Any, Any], Any] = summed, rate: float = 0.1, momentum: float = 0.9
) -> Callable[[], Setup]:
    def setup() -> Setup:
        torch.manual_seed(2)
        made = model()
        trainable = [parameter for parameter in made.parameters() if parameter.requires_grad]
        return Setup(made, torch.optim.SGD(trainable, lr=rate, momentum=momentum), loss)

    return setup


def trained(
    model: Callable[[], nn.Module] | Callable[[], Setup], data: Any = None, *, workers: int = 1, **settings: Any
) -> Outcome:
    made = {"batch_size": 8, "microbatches": 4} | settings
    setup: Any = setup_of(model) if isinstance(model, type) or model is mlp else model
    return in_unison(workers, setup, data or vectors(), **made)


def assert_equal_on_all_workers(model: Any, data: Any = None, **settings: Any) -> Outcome:
    """Trains on 1 to 4 workers; the common outcome."""
    first = trained(model, data, workers=1, **settings)
    for workers in WORKERS[1:]:
        assert_same_bits(first, trained(model, data, workers=workers, **settings), f"{workers} workers")
    return first


class Trace(unisono.Callback):
    """Does something after each step and keeps what it gives."""

    def __init__(self, look: Callable[[unisono.Trainer, unisono.StepResult], Any]) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        self.seen.append(self.look(trainer, result))


class Recorded(Dataset[Any]):
    """Knows which samples were read."""

    def __init__(self, data: Samples) -> None:
        self.data = data
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return self.data[index]


class Tied(nn.Module):
    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 5, sparse=sparse)
        self.middle = nn.Linear(5, 5)
        self.out = nn.Linear(5, 9, bias=False)
        self.out.weight = self.embedding.weight
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.middle(self.embedding(tokens))))


def tokens(length: int = 40) -> Samples:
    generator = torch.Generator().manual_seed(3)
    return Samples(*(torch.randint(0, 9, (length,), generator=generator) for _ in range(2)))
