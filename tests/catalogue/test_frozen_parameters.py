"""Parameters that are not trained, and that code between two steps moves: BYOL's and MoCo's target networks, frozen features."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unisono
from tests.catalogue.unbroken import Found, check_all, weights
from tests.fault_injection import run_lives
from unisono.testing import run_threads

EPOCHS = 5


class Byol(nn.Module):
    """An online network, and a target of the same shape that follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.register_buffer("momentum", torch.tensor(0.5), persistent=False)


class Follow(unisono.Callback):
    def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        model = trainer.model
        with torch.no_grad():
            for target, online in zip(model.target.parameters(), model.online.parameters(), strict=True):
                target.lerp_(online, 1 - float(model.momentum))
            model.momentum.mul_(0.97)


def loss(model: Any, batch: Sequence[Tensor]) -> tuple[Tensor, int]:
    (inputs,) = batch
    return F.mse_loss(model.online(inputs), model.target(inputs + 0.1), reduction="sum"), len(inputs)


def data() -> torch.utils.data.TensorDataset:
    return torch.utils.data.TensorDataset(torch.randn(24, 4, generator=torch.Generator().manual_seed(1)))


def trainer_of(workers: Any, run_dir: str | None = None, callbacks: Sequence[Any] = (), **settings: Any) -> unisono.Trainer:
    torch.manual_seed(3)
    model = Byol()
    return unisono.Trainer(
        model,
        torch.optim.AdamW(model.online.parameters(), lr=0.05),
        loss,
        batch_size=8,
        microbatches=4,
        run_dir=run_dir,
        checkpoint_every=2,
        callbacks=[Follow(), *callbacks],
        collective=workers,
        **settings,
    )


@pytest.mark.parametrize("replicate_kib", [0.0, 4096.0], ids=["owners", "everywhere"])
def test_a_target_that_follows_the_model_is_the_same_through_all(replicate_kib: float) -> None:
    def train(workers: Any, run_dir: str | None, callbacks: Sequence[Any]) -> Found:
        trainer = trainer_of(workers, run_dir, callbacks, sync=unisono.Exact(replicate_kib=replicate_kib))
        trainer.fit(data(), EPOCHS)
        return weights(trainer)

    check_all(train, stop=8)


def test_frozen_parameters_that_a_newcomer_has_drawn_otherwise_are_given_to_it() -> None:
    def work(link: Any) -> Found:
        trainer = trainer_of(link)
        if not link.membership.is_founder:
            with torch.no_grad():
                for parameter in trainer.model.target.parameters():
                    parameter.normal_()
        trainer.fit(data(), 8)
        return weights(trainer)

    lives = run_lives(2, work, {}, joiners=1)
    assert lives.calls[2] > 10, "it did not come in time"
    assert lives.results[2] == lives.results[0]


def test_a_frozen_parameter_that_one_worker_changes_is_named() -> None:
    class Strays(unisono.Callback):
        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            if trainer.collective.rank == 1 and result.step == 2:
                with torch.no_grad():
                    trainer.model.target[0].bias.add_(1.0)

    def work(collective: Any) -> None:
        trainer_of(collective, callbacks=[Strays()], compare_every=1).fit(data(), 2)

    with pytest.raises(unisono.Desync, match=r"frozen parameter 'target\.0\.bias'"):
        run_threads(2, work)
