"""A model that changes while it trains: other parts are refused at the next step, freezing is followed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import unisono
from tests.catalogue import trained
from tests.catalogue.unbroken import Found, check_all, weights
from unisono.testing import run_threads

Change = Callable[[unisono.Trainer], Any]


def replaces_a_module(trainer: unisono.Trainer) -> None:
    trainer.model[2] = nn.Linear(8, 3)


def replaces_a_parameter(trainer: unisono.Trainer) -> None:
    trainer.model[0].bias = nn.Parameter(torch.zeros(8))


def adds_a_parameter(trainer: unisono.Trainer) -> None:
    trainer.model.register_parameter("scale", nn.Parameter(torch.ones(1)))


def adds_a_module(trainer: unisono.Trainer) -> None:
    trainer.model.append(nn.Tanh())


def removes_a_module(trainer: unisono.Trainer) -> None:
    del trainer.model[1]


def prunes(trainer: unisono.Trainer) -> None:
    prune.l1_unstructured(trainer.model[0], "weight", 2)  # type: ignore[no-untyped-call]


def adds_a_group(trainer: unisono.Trainer) -> None:
    trainer.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})  # type: ignore[union-attr]


def unfreezes(trainer: unisono.Trainer) -> None:
    trainer.model[0].weight.requires_grad_(True)


def net() -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    model[0].weight.requires_grad_(False)
    return model


def trainer_of(
    model: nn.Module, workers: Any = None, run_dir: str | None = None, callbacks: Sequence[Any] = (), **settings: Any
) -> unisono.Trainer:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return unisono.Trainer(
        model,
        torch.optim.AdamW(trainable, lr=0.05),
        trained.loss,
        batch_size=12,
        microbatches=4,
        run_dir=run_dir,
        checkpoint_every=2,
        callbacks=callbacks,
        collective=workers,
        **settings,
    )


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaces_a_module, r"module '2' is another object"),
        (replaces_a_parameter, r"parameter '0\.bias' is another object"),
        (adds_a_parameter, r"parameter 'scale' is new"),
        (adds_a_module, r"module '3' is new"),
        (removes_a_module, r"module '1' is another object"),
        (prunes, r"parameter '0\.weight_orig' is new"),
        (adds_a_group, r"numbers of parameters by group: \[3\], now \[3, 1\]"),
        (unfreezes, r"parameter '0\.weight' now requires a gradient"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_other_parts_are_refused_at_the_next_step(workers: int, change: Change, message: str) -> None:
    class Changes(unisono.Callback):
        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            steps.append(result.step)
            if result.step == 2:
                change(trainer)

    steps: list[int] = []
    with pytest.raises(unisono.ConfigurationError, match=rf"{message}.* make a new Trainer"):
        run_threads(workers, lambda collective: trainer_of(net(), collective, callbacks=[Changes()]).fit(trained.drawn(), 2))
    assert max(steps) == 2


def test_parts_of_a_compiled_model_are_seen() -> None:
    model = net()
    trainer = trainer_of(torch.compile(model, backend="eager"))  # type: ignore[arg-type]
    model[2] = nn.Linear(8, 3)
    with pytest.raises(unisono.ConfigurationError, match=r"module '2' is another object"):
        trainer.fit(trained.drawn(), 1)


class Freezes(unisono.Callback):
    """As fine-tuning recipes do: a layer rests from the fifth step on, for a while."""

    edits_weights = False

    def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        if result.step in (5, 13):
            trainer.model[2].requires_grad_(result.step == 13)


@pytest.mark.parametrize("replicate_kib", [0.0, 4096.0], ids=["owners", "everywhere"])
def test_a_layer_that_a_callback_freezes_is_frozen_after_a_resume_and_on_those_who_join(replicate_kib: float) -> None:
    def train(workers: Any, run_dir: str | None, callbacks: Sequence[Any]) -> Found:
        trainer = trainer_of(net(), workers, run_dir, [Freezes(), *callbacks], sync=unisono.Exact(replicate_kib=replicate_kib))
        trainer.fit(trained.drawn(), 5)
        return weights(trainer)

    expected = check_all(train, stop=7)
    never = trainer_of(net())
    never.fit(trained.drawn(), 5)
    assert expected != weights(never)


def test_a_layer_that_one_worker_freezes_is_named() -> None:
    class Strays(unisono.Callback):
        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            if trainer.collective.rank == 1 and result.step == 2:
                trainer.model[2].bias.requires_grad_(False)

    with pytest.raises(unisono.Desync, match=r"'frozen' of parameter group 0 .*'2\.bias'.* on worker 1"):
        run_threads(2, lambda collective: trainer_of(net(), collective, callbacks=[Strays()]).fit(trained.drawn(), 2))
