"""One copy of the weights for all workers of a host, while nobody but the trainer may write to them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from tests.training.hard_problem import digest, merged, train
from tests.training.test_promise import alone, differing
from unisono import Callback, ConfigurationError, Exact, StepResult, Trainer
from unisono.collective import Collective, InProcess
from unisono.training.weights import Weights


class Looks(Callback):
    """Sees, after each step, whether a number that one worker of the host writes is everybody's there; it is put back at once."""

    edits_weights = False

    def __init__(self) -> None:
        self.shared: list[bool] = []

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        collective, weights = trainer.collective, next(trainer.model.parameters()).data
        before = weights[0, 0].clone()
        writers = {host[0] for host in collective.hosts if len(host) > 1} or {0}
        collective.barrier()
        if collective.rank in writers:
            weights[0, 0] = 12345.0
        collective.barrier()
        self.shared.append(collective.size > 1 and bool(weights[0, 0] == 12345.0) and weights_of(trainer).shared)
        collective.barrier()
        if collective.rank in writers:
            weights[0, 0] = before
        collective.barrier()


class Halves(Callback):
    """Edits the weights in a way that must be done once: in place, or behind the back of autograd's counters."""

    def __init__(self, *, behind: bool = False, admits: bool = True) -> None:
        self.behind = behind
        self.edits_weights = admits

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                (parameter.data if self.behind else parameter).mul_(0.5)


def weights_of(trainer: Trainer) -> Weights:
    return trainer._local.weights


def fit(collective: Collective, callback: Callback, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 300), nn.ReLU(), nn.Linear(300, 100))
    data = TensorDataset(torch.randn(24, 100), torch.randn(24, 100))
    trainer = Trainer(
        model,
        torch.optim.AdamW(model.parameters()),
        lambda model, batch: ((model(batch[0]) - batch[1]) ** 2).mean(),
        batch_size=12,
        microbatches=4,
        collective=collective,
        callbacks=[callback],
        sync=Exact(replicate_kib=0, **settings),
    )
    trainer.fit(data, epochs=2)
    return trainer


def digests(trainer: Trainer) -> list[str]:
    return [digest(parameter) for parameter in trainer.model.parameters()]


def shared_fit(collective: Collective) -> tuple[list[bool], list[str], bool]:
    looks = Looks()
    trainer = fit(collective, looks)
    found = digests(trainer)
    collective.barrier()
    if collective.rank == 0:  # afterwards everybody has weights of its own
        with torch.no_grad():
            next(trainer.model.parameters()).zero_()
    collective.barrier()
    return looks.shared, found, collective.rank == 0 or digests(trainer) == found


def edited_fit(collective: Collective) -> list[str]:
    trainer = fit(collective, Halves())
    assert not weights_of(trainer).shared
    return digests(trainer)


def secretly_edited_fit(collective: Collective, behind: bool) -> str:
    with pytest.raises(ConfigurationError) as refused:
        fit(collective, Halves(behind=behind, admits=False))
    return str(refused.value)


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_shared_weights_end_with_the_bits_of_one_process(workers: int, run_workers: Callable[..., Any]) -> None:
    found = run_workers(workers, partial(train, share_weights=True), 8, workers, transport="shared memory")

    assert differing(merged(found), alone(8)) == []


def test_fit_shares_weights_and_gives_everybody_a_copy_of_its_own_afterwards(run_workers: Callable[..., Any]) -> None:
    expected = digests(fit(InProcess(), Looks()))

    for shared, found, independent in run_workers(3, shared_fit, transport="shared memory"):
        assert shared == [True] * 4, "one worker's writes are seen by all"
        assert found == expected
        assert independent


def test_a_callback_that_edits_weights_does_so_once_on_any_number_of_workers(run_workers: Callable[..., Any]) -> None:
    expected = digests(fit(InProcess(), Halves()))

    assert run_workers(2, edited_fit, transport="shared memory") == [expected] * 2


@pytest.mark.parametrize("behind", [False, True])
def test_an_edit_of_shared_weights_is_refused(behind: bool, run_workers: Callable[..., Any]) -> None:
    for message in run_workers(2, secretly_edited_fit, behind, transport="shared memory"):
        assert "weights were changed between two steps" in message
        assert "share_weights=False" in message


def test_a_worker_alone_and_one_over_gloo_share_nothing() -> None:
    looks = Looks()
    fit(InProcess(), looks)

    assert looks.shared == [False] * 4
