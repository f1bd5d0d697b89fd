"""Parameters that forward, backward or the loss writes to: through `.data`, which PyTorch does not count, and by other ways."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unisono
from tests.catalogue import trained
from unisono.testing import run_threads

WORKERS = pytest.mark.parametrize("workers", [1, 2, 3])


class Momentum(trained.Net):
    """MoCo as its authors wrote it: forward moves the key encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.key = copy.deepcopy(self.first).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for key, query in zip(self.key.parameters(), self.first.parameters(), strict=True):
            key.data = key.data * 0.9 + query.data * 0.1
        return super().forward(x) + self.key(x).mean()


def clips(model: Any, batch: Any) -> Any:
    """A WGAN's clipping, at a bound that only grown weights meet."""
    model.last.weight.data.clamp_(-0.4, 0.4)
    return trained.loss(model, batch)


def normalizes(model: Any, batch: Any) -> Any:
    model.second.weight.data = F.normalize(model.second.weight.data)
    return trained.loss(model, batch)


def one_element(model: Any, batch: Any) -> Any:
    model.first.bias.data[3] += 1e-4
    return trained.loss(model, batch)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)


@WORKERS
@pytest.mark.parametrize(
    ("net", "loss", "name"),
    [
        (Momentum, trained.loss, "key.weight"),
        (trained.Net, clips, "last.weight"),
        (trained.Net, normalizes, "second.weight"),
        (trained.Net, one_element, "first.bias"),
    ],
    ids=["moco", "clipped", "normalized", "one element"],
)
def test_they_are_named(workers: int, net: Callable[[], nn.Module], loss: Any, name: str) -> None:
    with pytest.raises(
        unisono.ConfigurationError, match=rf"'{name}' is changed through \.data by forward.* in a callback's on_step"
    ):
        run_threads(workers, lambda collective: trained.train(adam, collective, net=net, loss=loss, epochs=8))


def test_between_steps_they_may_be() -> None:
    class Follows(unisono.Callback):
        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            trainer.model.first.bias.data.clamp_(-0.3, 0.3)
            model: Any = trainer.model
            model.key.bias.data = model.key.bias.data * 0.9 + model.first.bias.data * 0.1

    class Still(Momentum):
        def forward(self, x: Tensor) -> Tensor:
            return trained.Net.forward(self, x) + self.key(x).mean()

    found = {trained.in_threads(workers, adam, net=Still, callbacks=[Follows()]) for workers in (1, 2, 3)}
    assert len(found) == 1
