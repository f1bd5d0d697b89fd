"""What user code reads of the trainer while steps are taken again after a death: it reads as it did the first time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unisono
from tests.catalogue.unbroken import Found, check_numbers_of_workers, check_resume, weights
from tests.fault_injection import Died, run_lives
from tests.memory import empty_memory
from tests.training.small_run import memory_url
from unisono.elastic.link import Link
from unisono.training.participant import Participant

EPOCHS = 6


class Notes(unisono.Callback):
    edits_weights = False

    def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        trainer.state["losses"] = [*trainer.state.get("losses", []), result.loss][-3:]


class DiesWhileUpdating(torch.optim.AdamW):
    """Ends its worker in the middle of an update, so that the others have to go back to the copy."""

    def __init__(self, *args: Any, at: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.at = at
        self.updates = itertools.count(1)

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        if next(self.updates) == self.at:
            raise Died
        return None


def train(workers: Any, run_dir: str | None, callbacks: Sequence[Any], *, victim: int = -1, at: int = 0) -> Found:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    dies = isinstance(workers, Link) and workers.membership.me.process.pid == victim
    optimizer = DiesWhileUpdating(model.parameters(), lr=0.05, at=at if dies else 0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=18)

    def loss(model: Any, batch: Sequence[Tensor]) -> tuple[Tensor, int]:
        inputs, targets = batch
        position = trainer.position
        weight = min(1.0, position.step / 20) + 0.1 * position.epoch + 0.01 * position.batch + 0.001 * position.samples
        weight += sum(trainer.state.get("losses", [])) + scheduler.get_last_lr()[0] + optimizer.param_groups[0]["lr"]
        return weight * F.cross_entropy(model(inputs), targets, reduction="sum"), len(inputs)

    trainer = unisono.Trainer(
        model,
        optimizer,
        loss,
        batch_size=8,
        microbatches=4,
        scheduler=scheduler,
        run_dir=run_dir,
        checkpoint_every=2,
        sync=unisono.Exact(replicate_kib=0, shard_update=True),
        callbacks=[Notes(), *callbacks],
        collective=workers,
    )
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(24, 4, generator=generator), torch.randint(0, 3, (24,), generator=generator)
    trainer.fit(torch.utils.data.TensorDataset(inputs, targets), EPOCHS)
    return {**weights(trainer), "position": repr(trainer.position), "state": repr(trainer.state)}


def test_position_state_and_learning_rates_read_as_they_did(monkeypatch: pytest.MonkeyPatch) -> None:
    again: list[int] = []
    redo = Participant.redo

    def noted(self: Participant, key: Any, flags: int) -> None:
        again.append(key.step)
        redo(self, key, flags)

    def now(self: Any, nbytes: int, step_s: float, *, replay: bool) -> bool:
        self._saved_s += 1.0
        due: bool = self._first or self._saved_s >= 4
        if due:
            self._first, self._saved_s = False, 0.0
        return due

    # The copy is old, so that several steps must be taken again.
    monkeypatch.setattr("unisono.elastic.shared_state._Budget.now", now)
    monkeypatch.setattr(Participant, "redo", noted)
    expected = check_numbers_of_workers(train)
    check_resume(train, expected, stop=9)
    for at in range(3, 15):
        work = partial(train, run_dir=memory_url(), callbacks=(), victim=at % 3, at=at)
        lives = run_lives(3, work, {}, joiners=at % 2)
        for rank, found in lives.results.items():
            assert found == expected or lives.calls[rank] <= 10, (at, rank)
        empty_memory()
    assert len(again) > 20, "hardly a step was taken again"
