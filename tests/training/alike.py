"""Small models that are trained on several numbers of workers, and compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import unisono
from unisono.collective import Collective
from unisono.testing import run_threads
from unisono.training.callbacks import Callback

WORKERS = (2, 3)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


INPUTS, TARGETS = drawn(32, 6), drawn(32, 4, seed=1)
DATA = TensorDataset(INPUTS, TARGETS)


class OneByOne(Dataset[Any]):
    """Read sample by sample, for which generators are seeded (plain tensors need none)."""

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> Any:
        return DATA[index]


def squares(model: Any, batch: Any) -> tuple[Tensor, int]:
    inputs, targets = batch
    return ((model(inputs) - targets) ** 2).sum(), len(inputs)


def trained(
    workers: int,
    make: Callable[[], nn.Module],
    *,
    data: Any = DATA,
    between: Callable[[unisono.Trainer], Any] | None = None,
    callbacks: tuple[Callback, ...] = (),
) -> list[tuple[dict[str, Tensor], list[Any]]]:
    """State after 3 steps, and what ``between`` returned before each, by rank."""

    def work(collective: Collective) -> tuple[dict[str, Tensor], list[Any]]:
        torch.manual_seed(0)
        model = make()
        trainer = unisono.Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            squares,
            batch_size=10,
            microbatches=4,
            collective=collective,
            callbacks=callbacks,
        )
        returned: list[Any] = []
        for batch in trainer.batches(data, epochs=1):
            returned.append(between(trainer) if between else None)
            trainer.step(batch)
            if trainer.position.step == 3:
                break
        return {name: value.clone() for name, value in model.state_dict().items()}, returned

    return run_threads(workers, work)


def check_alike(make: Callable[[], nn.Module], **settings: Any) -> None:
    ((one, returned),) = trained(1, make, **settings)
    for workers in WORKERS:
        for state, others in trained(workers, make, **settings):
            assert others == returned
            for name, value in one.items():
                assert torch.equal(state[name], value), (workers, name)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.norm(self.first(x)))
        return output


class Counting(nn.Module):
    """Follows its inputs in evaluation, too."""

    kept: Tensor

    def __init__(self, rebind: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.rebind = rebind
        self.register_buffer("kept", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        new = (self.kept * 0.9 + x.detach().mean() * 0.1).detach()
        if self.rebind:
            self.kept = new
        else:
            self.kept.copy_(new)
        output: Tensor = self.linear(x) * new
        return output
