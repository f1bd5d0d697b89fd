"""Legal but unusual PyTorch models train alike on any number of workers, or are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import unisono
from tests.training.alike import DATA, TARGETS, Normed, check_alike, trained
from unisono.collective import Collective
from unisono.errors import ConfigurationError
from unisono.sync import Exact
from unisono.testing import run_threads


def test_weights_that_forward_changes_are_refused_by_name() -> None:
    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 4, max_norm=1.0)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.embedding(x).mean(dim=1)
            return output

    words = torch.randint(0, 20, (32, 3), generator=torch.Generator().manual_seed(2))
    with pytest.raises(ConfigurationError, match=r"parameter 'embedding.weight' is changed in place.*max_norm"):
        trained(1, Bounded, data=TensorDataset(words, TARGETS))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_model_trains_alike() -> None:
    check_alike(lambda: torch.jit.script(Normed()), between=lambda trainer: trainer.evaluate(DATA) is None)


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = torch.arange(1.0, 5.0)
        output: Tensor = self.linear(x) * self.cache
        return output


def test_what_a_model_caches_in_evaluation_can_be_used_in_training() -> None:
    check_alike(Caching, between=lambda trainer: trainer.evaluate(DATA) is None)


def test_after_an_error_in_an_overlapped_step_a_backward_of_ones_own_is_left_alone() -> None:
    def failing(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        raise ArithmeticError("the loss has a fault")

    def work(collective: Collective) -> Tensor | None:
        model = nn.Linear(4, 1)
        trainer = unisono.Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            failing,
            batch_size=2,
            microbatches=1,
            sync=Exact(overlap=True),
            collective=collective,
        )
        data = TensorDataset(torch.ones(2, 4), torch.ones(2, 1))
        with pytest.raises(ArithmeticError):
            trainer.step(next(iter(trainer.batches(data, epochs=1))))
        model(torch.ones(1, 4)).sum().backward()
        return model.weight.grad

    (gradient,) = run_threads(1, work)
    assert gradient is not None
    assert torch.equal(gradient, torch.ones(1, 4))
