"""Optimizers that do something else with rows than with a dense gradient get what plain PyTorch would give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

import unisono
from tests.catalogue.optimizers import other
from tests.training.hard_problem import digest
from unisono.collective import Collective
from unisono.errors import ConfigurationError
from unisono.testing import run_threads


class RowWiseAdagrad(Optimizer):
    """As DLRM's: one moment a row where gradients are sparse, one an element where they are dense."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.seen: set[bool] = set()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            gradient, state = parameter.grad, self.state[parameter]
            if gradient is None:
                continue
            if gradient.is_sparse:
                gradient = gradient.coalesce()
                rows, values = gradient.indices()[0], gradient.values()
                moment = state.setdefault("moment", torch.zeros(parameter.shape[0]))
                moment[rows] += values.square().mean(dim=1) + 0.01  # a row that was touched, zero or not
                parameter[rows] -= 0.1 * values / moment[rows].sqrt()[:, None]
            else:
                moment = state.setdefault("moment", torch.zeros_like(parameter))
                moment += gradient.square() + 0.01
                parameter -= 0.1 * gradient / moment.sqrt()


class Words(nn.Module):
    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 6, sparse=sparse)
        self.bag = nn.EmbeddingBag(30, 6, sparse=sparse, mode="sum")
        self.last = nn.Linear(6, 3)

    def forward(self, words: Tensor) -> Tensor:
        found: Tensor = self.last(torch.tanh(self.table(words % 40).sum(1) + self.bag(words % 30)))
        return found


def loss(model: Any, batch: Any) -> tuple[Tensor, int]:
    words, targets = batch
    return F.cross_entropy(model(words), targets, reduction="sum"), len(targets)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randint(0, 60, (30, 4), generator=generator), torch.randint(0, 3, (30,), generator=generator))


def make(*, sparse: bool, kind: Any) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = Words(sparse=sparse)
    return model, kind(model.parameters())


def trained(workers: int, *, sparse: bool = True, kind: Any = RowWiseAdagrad, epochs: int = 2, **settings: Any) -> str:
    def work(collective: Collective) -> str:
        model, optimizer = make(sparse=sparse, kind=kind)
        trainer = unisono.Trainer(
            model, optimizer, loss, batch_size=10, microbatches=5, collective=collective, sync=unisono.Exact(replicate_kib=0),
            **settings,
        )  # fmt: skip
        trainer.fit(data(), epochs, order="sequential")
        return digest(torch.cat([value.reshape(-1) for value in model.state_dict().values()]))

    found = set(run_threads(workers, work))
    assert len(found) == 1
    return found.pop()


def plainly(*, sparse: bool) -> list[Tensor]:
    model, optimizer = make(sparse=sparse, kind=RowWiseAdagrad)
    for _ in range(2):
        for start in range(0, 30, 10):
            optimizer.zero_grad()
            total, count = loss(model, data()[start : start + 10])
            (total / count).backward()
            optimizer.step()
    return [value.clone() for value in model.state_dict().values()]


@pytest.mark.parametrize("sparse", [True, False])
def test_it_is_the_update_of_the_plain_loop(sparse: bool) -> None:
    model, optimizer = make(sparse=sparse, kind=RowWiseAdagrad)
    trainer = unisono.Trainer(model, optimizer, loss, batch_size=10, microbatches=5)
    trainer.fit(data(), 2, order="sequential")
    for mine, plain, different in zip(
        model.state_dict().values(), plainly(sparse=sparse), plainly(sparse=not sparse), strict=True
    ):
        assert torch.allclose(mine, plain, atol=1e-5)
        assert mine.shape[0] == 3 or not torch.allclose(plain, different, atol=1e-3), "else this would prove nothing"


@pytest.mark.parametrize("clip", [None, 0.05])
def test_rows_are_the_same_on_any_number_of_workers(clip: float | None, tmp_path: Path) -> None:
    straight = trained(1, max_grad_norm=clip)
    assert {trained(workers, max_grad_norm=clip) for workers in (2, 3, 5)} == {straight}
    trained(3, max_grad_norm=clip, epochs=1, run_dir=tmp_path)
    assert trained(2, max_grad_norm=clip, run_dir=tmp_path) == straight


def test_an_optimizer_that_wants_dense_gradients_says_so() -> None:
    def kind(parameters: Any) -> Optimizer:
        found: Optimizer = other("adamp")(Holder(parameters))
        return found

    with pytest.raises(ConfigurationError, match=r"NoSparseGradientError.*make the tables with sparse=False"):
        trained(2, kind=kind)
    assert trained(2, kind=kind, sparse=False) == trained(3, kind=kind, sparse=False)


class Holder:
    """Hands on the parameters that it was given."""

    def __init__(self, parameters: Any) -> None:
        self.parameters = lambda: parameters


def test_the_optimizers_of_pytorch_get_dense_gradients_as_before() -> None:
    def kind(parameters: Any) -> Optimizer:
        return torch.optim.AdamW(parameters, lr=0.1)

    assert trained(1, kind=kind) == trained(3, kind=kind) == trained(2, kind=kind, sparse=False)
