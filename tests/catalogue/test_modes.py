"""Training and evaluation mode: `fit` trains in the one, `evaluate` uses the other, and parts stay where they were put."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unisono
from tests.catalogue.unbroken import Found, check_all, weights
from unisono.testing import run_threads

EPOCHS = 5


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


def data() -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return torch.utils.data.TensorDataset(
        torch.randn(24, 4, generator=generator), torch.randint(0, 3, (24,), generator=generator)
    )


def loss(model: Any, batch: Sequence[Tensor]) -> tuple[Tensor, int]:
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets, reduction="sum"), len(inputs)


def trainer_of(
    model: nn.Module, workers: Any = None, run_dir: str | None = None, callbacks: Sequence[Any] = ()
) -> unisono.Trainer:
    return unisono.Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.05),
        loss,
        batch_size=8,
        microbatches=4,
        run_dir=run_dir,
        checkpoint_every=2,
        callbacks=callbacks,
        collective=workers,
    )


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def trained(model: nn.Module) -> Found:
    trainer = trainer_of(model)
    trainer.fit(data(), 1)
    return weights(trainer)


def test_a_model_that_comes_in_evaluation_mode_is_trained_in_training_mode(capsys: pytest.CaptureFixture[str]) -> None:
    model = net().eval()
    assert trained(model) == trained(net())
    assert modes(model) == [False] * 7
    assert capsys.readouterr().out.count("was in evaluation mode") == 1


def test_parts_that_were_put_into_evaluation_mode_stay_there_also_when_the_model_comes_back_from_an_evaluation() -> None:
    model = net()
    model[1].eval()
    expected = trained(model)
    assert expected != trained(net())
    assert not modes(model)[2]
    assert sum(modes(model)) == 6

    model = net()
    model[1].eval()
    trainer = trainer_of(model)
    model.eval()  # as one's own evaluation leaves it
    trainer.fit(data(), 1)
    assert weights(trainer) == expected
    assert modes(model) == [False] * 7


def test_a_head_that_is_new_in_a_model_in_evaluation_mode_says_nothing_about_the_rest() -> None:
    model = net().eval()
    model[5].train()
    assert trained(model) == trained(net())


def test_an_evaluation_puts_back_what_it_found_while_training_goes_on() -> None:
    class Looks(unisono.Callback):
        edits_weights = False

        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            assert modes(trainer.model) == [True, True, False, *[True] * 4]
            trainer.evaluate(data(), {"mode": lambda model, batch: (float(any(modes(model))), 1)})
            assert modes(trainer.model) == [True, True, False, *[True] * 4]

    model = net()
    model[1].eval()
    assert trainer_of(model, callbacks=[Looks()]).fit(data(), 1).metrics.get("mode", 0.0) == 0.0


class Freezes(unisono.Callback):
    """As fine-tuning recipes do: statistics stay from the third epoch on."""

    def on_epoch(self, trainer: unisono.Trainer, epoch: int) -> None:
        if epoch == 1:
            trainer.model[4].eval()


def test_a_part_that_a_callback_puts_into_evaluation_mode_is_there_after_a_resume_and_on_those_who_join() -> None:
    def train(workers: Any, run_dir: str | None, callbacks: Sequence[Any]) -> Found:
        model = net().eval()
        trainer = trainer_of(model, workers, run_dir, [Freezes(), *callbacks])
        trainer.fit(data(), EPOCHS)
        assert modes(model) == [False] * 7
        return weights(trainer)

    check_all(train, stop=11)


def test_a_loop_of_ones_own_keeps_the_mode_and_is_warned() -> None:
    def work(collective: Any) -> list[bool]:
        model = net().eval()
        trainer = trainer_of(model, collective)
        for batch in trainer.batches(data(), 1):
            trainer.step(batch)
        return modes(model)

    with pytest.warns(UserWarning, match=r"call model\.train\(\) first"):
        assert run_threads(2, work) == [[False] * 7] * 2
