"""Optimizers that mix parameters, draw random numbers, or are not known: the same weights on any number of workers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import unisono
from tests.catalogue.optimizers import NAMES, REFUSED, WRAPPERS, other
from tests.catalogue.trained import Net, drawn, in_threads, loss
from unisono.collective import Collective
from unisono.errors import ConfigurationError
from unisono.replica.optimizer import updates_apart
from unisono.testing import run_threads


@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_that_cannot_be_used_says_why(name: str) -> None:
    with pytest.raises(Exception, match=REFUSED[name]):
        in_threads(2, other(name), epochs=1)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(REFUSED)))
def test_an_optimizer_of_others_gives_the_same_weights_on_any_number_of_workers(name: str) -> None:
    assert len({in_threads(workers, other(name), epochs=1) for workers in (1, 2, 3)}) == 1


@pytest.mark.parametrize("make", WRAPPERS)
def test_an_optimizer_that_holds_another_gives_the_same_weights(make: Callable[[nn.Module], Optimizer]) -> None:
    assert len({in_threads(workers, make) for workers in (1, 2, 3)}) == 1


class DrawsFromAll(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(random.random() + float(np.random.rand())).mul_(torch.rand(parameter.shape))
        return super().step(closure)


class ClipsByItself(torch.optim.SGD):
    """Couples its parameters at large gradients only."""

    def step(self, closure: Any = None) -> Any:
        torch.nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 0.05)
        return super().step(closure)


@pytest.mark.parametrize("kind", [DrawsFromAll, ClipsByItself])
@pytest.mark.parametrize("workers", [2, 3, 4])
def test_a_subclass_of_a_known_optimizer_is_not_known(kind: type[Optimizer], workers: int) -> None:
    def make(model: nn.Module) -> Optimizer:
        return kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]

    assert in_threads(workers, make) == in_threads(1, make)


def _clipping_hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.05)


@pytest.mark.parametrize("workers", [2, 3])
def test_a_hook_on_the_step_may_mix_parameters(workers: int) -> None:
    def make(model: nn.Module) -> Optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.register_step_pre_hook(_clipping_hook)
        return optimizer

    assert in_threads(workers, make) == in_threads(1, make)


def test_a_hook_that_comes_later_is_refused() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = unisono.Trainer(model, optimizer, loss, batch_size=12, microbatches=4)
    optimizer.register_step_pre_hook(_clipping_hook)
    with pytest.raises(ConfigurationError, match=r"hook was registered .* after the Trainer was made"):
        for batch in trainer.batches(drawn(), 1):
            trainer.step(batch)


class TwoKinds(nn.Module):
    """float32 first, then float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.last = nn.Linear(16, 3).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(torch.tanh(self.first(x)).double())
        return found


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_adafactor_takes_one_epsilon_for_parameters_of_several_dtypes(workers: int) -> None:
    def make(model: nn.Module) -> Optimizer:
        return torch.optim.Adafactor(model.parameters(), lr=0.1)

    assert in_threads(workers, make, net=TwoKinds) == in_threads(1, make, net=TwoKinds)
    assert not updates_apart(make(TwoKinds()))
    assert updates_apart(make(Net()))


def test_what_torch_has_itself_is_updated_in_parts_with_a_scheduler_too() -> None:
    for kind in (torch.optim.AdamW, torch.optim.SGD, torch.optim.ASGD, torch.optim.Rprop, torch.optim.Adafactor):
        optimizer = kind(Net().parameters(), lr=0.1)
        LambdaLR(optimizer, lambda step: 1.0)
        assert updates_apart(optimizer)
        optimizer.step = lambda *args: None  # type: ignore[method-assign]
        assert not updates_apart(optimizer)


class Plain(torch.optim.SGD):
    pass


def _parts(make: Callable[[nn.Module], Optimizer], **settings: Any) -> list[int]:
    """How many parameters have state on each of two workers after a step."""

    def work(collective: Collective) -> int:
        torch.manual_seed(0)
        model = Net()
        optimizer = make(model)
        sync = unisono.Exact(**{"replicate_kib": 0, **settings})
        trainer = unisono.Trainer(model, optimizer, loss, batch_size=12, microbatches=4, collective=collective, sync=sync)
        for batch in trainer.batches(drawn(), 1):
            trainer.step(batch)
        return len(optimizer.state)

    return run_threads(2, work)


def test_who_updates_what_is_the_users_to_say(capsys: pytest.CaptureFixture[str]) -> None:
    def known(model: nn.Module) -> Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def unknown(model: nn.Module) -> Optimizer:
        return Plain(model.parameters(), lr=0.1, momentum=0.9)

    assert sum(_parts(known)) == 6
    assert _parts(known, shard_update=False) == [6, 6]
    assert sum(_parts(unknown, shard_update=True)) == 6
    assert _parts(unknown, replicate_kib=100) == [6, 6]
    assert capsys.readouterr().out == ""
    assert _parts(unknown) == [6, 6]
    assert capsys.readouterr().out.count("Plain is not known to update each parameter on its own, so every worker") == 1
    with pytest.raises(ConfigurationError, match="shard_update must be"):
        unisono.Exact(shard_update=2)  # type: ignore[arg-type]


def test_infinity_in_a_parameter_group_is_described_and_saved(tmp_path: Path) -> None:
    settings = {"lr": 1e-2, "growth_rate": math.inf}
    found = {in_threads(workers, other("prodigy", **settings), run_dir=tmp_path / str(workers)) for workers in (1, 2, 3)}
    assert len(found) == 1


class FindsItsRate(torch.optim.SGD):
    """As Adafactor of transformers with a relative step: lr is None for all to see."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = 0.1
        found = super().step(closure)
        for group in self.param_groups:
            group["lr"] = None
        return found


def test_a_learning_rate_may_be_none() -> None:
    def make(model: nn.Module) -> Optimizer:
        optimizer = FindsItsRate(model.parameters(), lr=0.1)
        optimizer.param_groups[0]["lr"] = None
        return optimizer

    assert in_threads(1, make) == in_threads(2, make)
