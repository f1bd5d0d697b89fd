"""Things of another kind than is wanted: the error says what to give instead, before anything is trained."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import unisono
from tests.training.small_run import Augmented, make_trainer
from unisono.errors import ConfigurationError, DataError


def squares(model: Any, batch: Any) -> tuple[torch.Tensor, int]:
    return model(batch[0]).square().sum(), len(batch[0])


@pytest.mark.parametrize("name", ["batch_size", "microbatches", "checkpoint_every"])
def test_numbers_that_count_something_are_whole(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} must be a whole number, got 8.0"):
        make_trainer(**{name: 8.0})


def test_callbacks_are_callbacks() -> None:
    with pytest.raises(ConfigurationError, match=r"print>, which is not a unisono\.Callback: derive a class"):
        make_trainer(callbacks=[print])


def test_a_dataloader_is_not_what_is_loaded_from() -> None:
    loader: DataLoader[Any] = DataLoader(Augmented(), batch_size=4)
    with pytest.raises(ConfigurationError, match=r"loader is a DataLoader, not a unisono.Loader: give fit\(\) .* the dataset"):
        make_trainer(loader=loader)
    for call in (make_trainer().fit, make_trainer().batches):
        with pytest.raises(ConfigurationError, match=r"a DataLoader is given, .* give fit\(\) or batches\(\) the dataset"):
            call(loader, 1)
        with pytest.raises(ConfigurationError, match=r"loader is a DataLoader, not a unisono.Loader"):
            call(Augmented(), 1, loader=loader)


def test_the_scheduler_is_over_the_optimizer_that_is_used() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer, unused = (torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, other))
    scheduler = torch.optim.lr_scheduler.StepLR(unused, 1)
    with pytest.raises(ConfigurationError, match="a StepLR over another optimizer"):
        unisono.Trainer(model, optimizer, lambda *_: torch.zeros(()), batch_size=8, scheduler=scheduler)


def test_a_scheduler_whose_step_needs_arguments_is_refused_at_once() -> None:
    class ByEpoch:
        def step(self, epoch: int, metric: float | None = None) -> None: ...

        def state_dict(self) -> dict[str, int]:
            return {}

        def load_state_dict(self, state: dict[str, int]) -> None: ...

    model = nn.Linear(4, 2)
    with pytest.raises(ConfigurationError, match=r"ByEpoch whose step\(\) needs epoch"):
        unisono.Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), squares, batch_size=8, scheduler=ByEpoch())


def test_metrics_have_names() -> None:
    with pytest.raises(ConfigurationError, match="must be a mapping from names to functions"):
        make_trainer().evaluate(Augmented(), len)  # type: ignore[arg-type]


def test_a_batch_is_not_unpacked() -> None:
    batch = next(iter(make_trainer().batches(Augmented(), 1)))
    with pytest.raises(TypeError, match=r"given to trainer.step\(batch\) as it is"):
        _, _ = batch


class Unpicklable(Dataset[Any]):
    """A loader process cannot send its samples, and says so on its own: the worker hears nothing."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return threading.Lock()


@pytest.mark.filterwarnings("ignore")
def test_loader_processes_that_are_silent_are_given_up_after_the_time_limit(capfd: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(timeout_s=1.0, loader=unisono.Loader(num_workers=1, collate_fn=list))
    with pytest.raises(DataError, match="no microbatch came from 1 loader process in 1 s"):
        trainer.evaluate(Unpicklable())
    assert "cannot pickle" in capfd.readouterr().err
