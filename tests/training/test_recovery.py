"""Workers that are lost at any moment change nothing: those who are left go on, and end with the same bits."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unisono
from tests.training.hard_problem import digest
from tests.training.small_run import BATCH_SIZE, MICROBATCHES, Augmented, Net, loss
from unisono.elastic.link import Link
from unisono.testing.lives import Death, Died, Lives, run_lives

EPOCHS = 2
Found = dict[str, str]


def accuracy(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    inputs, targets = batch
    return (model(inputs).argmax(1) == targets).sum(), len(targets)


class Evaluates(unisono.Callback):
    edits_weights = False

    def __init__(self, data: Augmented) -> None:
        self.data = data
        self.seen: list[dict[str, float]] = []

    def on_epoch(self, trainer: unisono.Trainer, epoch: int) -> None:
        self.seen.append(trainer.evaluate(self.data, {"accuracy": accuracy}))


class DiesWhileUpdating(torch.optim.AdamW):
    """Ends its worker when it has updated some parameters of a step, and others not."""

    def __init__(self, *args: Any, at: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.at = at
        self.updates = 0

    def step(self, closure: Any = None) -> Any:
        self.updates += 1
        if self.updates == self.at:
            due = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            for parameter in due[len(due) // 2 :]:
                parameter.grad = None
            super().step(closure)
            raise Died
        return super().step(closure)


def train(link: Link | None, *, run: str = "", replicate_kib: float, own_loop: bool = False, dies_in_update: int = 0) -> Found:
    torch.manual_seed(7)
    model, data = Net(), Augmented()
    optimizer = DiesWhileUpdating(model.parameters(), lr=0.01, at=dies_in_update)
    watcher = Evaluates(data)
    trainer = unisono.Trainer(
        model,
        optimizer,
        loss,
        batch_size=BATCH_SIZE,
        microbatches=MICROBATCHES,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6),
        max_grad_norm=0.5,
        sync=unisono.Exact(replicate_kib=replicate_kib),
        run_dir=f"memory://recovery-{run or uuid.uuid4().hex}",
        checkpoint_every=2,
        callbacks=[watcher],
        collective=link,
    )
    results: Sequence[unisono.StepResult] = []
    if own_loop:
        results = [trainer.step(batch) for batch in trainer.batches(data, EPOCHS)]
    else:
        trainer.fit(data, EPOCHS)
    last = trainer.evaluate(data, {"accuracy": accuracy})
    found = {name: digest(value) for name, value in model.state_dict().items()}
    found |= {f"result {result.step}": repr(result) for result in results}
    return {**found, "seen": repr(watcher.seen), "last": repr(last), "position": repr(trainer.position)}


@functools.cache
def undisturbed(own_loop: bool = False) -> Found:
    return train(None, replicate_kib=0, own_loop=own_loop)


@pytest.mark.parametrize("told", [False, True], ids=["unheard", "heard"])
@pytest.mark.parametrize("replicate_kib", [0.0, 4096.0], ids=["owners", "everywhere"])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_worker_may_die_at_any_call_to_the_others(victim: int, replicate_kib: float, told: bool) -> None:
    def live(deaths: dict[int, Death]) -> Lives:
        return run_lives(3, functools.partial(train, run=uuid.uuid4().hex, replicate_kib=replicate_kib), deaths)

    calls = live({}).calls[victim]
    assert calls > 40

    for call in range(1, calls + 1, 3):
        lives = live({victim: Death(call, told)})
        # A checkpoint that is complete a step earlier or later makes a few calls more or less.
        died = {victim} if lives.calls[victim] >= call else set()
        assert sorted(lives.results) == sorted({0, 1, 2} - died), call
        for found in lives.results.values():
            assert found == undisturbed(), call
