"""Small trainings with other people's optimizers, as if each worker's part of the model were large."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

import unisono
from tests.fault_injection import Death, Lives, run_lives
from tests.training.hard_problem import digest
from unisono.collective import Collective
from unisono.elastic.link import Link
from unisono.testing import run_threads

MakeOptimizer = Callable[[nn.Module], Optimizer]


def drawn() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(46, 6, generator=generator), torch.randint(0, 3, (46,), generator=generator))


class Net(nn.Module):
    """Matrices and vectors, as Muon and its like divide them; each worker of three has some of both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.second = nn.Linear(16, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return found


def loss(model: Any, batch: Any) -> tuple[Tensor, int]:
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets, reduction="sum"), len(targets)


def train(
    make: MakeOptimizer,
    collective: Collective | Link | None = None,
    *,
    epochs: int = 2,
    net: Callable[[], nn.Module] = Net,
    **settings: Any,
) -> str:
    """One digest of the weights after training, on one worker of ``collective``."""
    torch.manual_seed(3)
    model = net()
    defaults: dict[str, Any] = {
        "batch_size": 12,
        "microbatches": 4,
        "sync": unisono.Exact(replicate_kib=0),
        "loss": loss,
    }
    trainer = unisono.Trainer(model, make(model), collective=collective, **{**defaults, **settings})
    trainer.fit(drawn(), epochs)
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    return digest(torch.cat([value.reshape(-1).view(torch.uint8) for value in model.state_dict().values()]))


def in_threads(workers: int, make: MakeOptimizer, **settings: Any) -> str:
    """The digest that all workers agree on."""
    with _quietly():
        found = set(run_threads(workers, lambda collective: train(make, collective, **settings)))
    assert len(found) == 1
    return found.pop()


def in_lives(workers: int, make: MakeOptimizer, deaths: dict[int, Death], *, joiners: int = 0, **settings: Any) -> Lives:
    with _quietly():
        return run_lives(workers, lambda link: train(make, link, **settings), deaths, joiners=joiners)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what other libraries warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
