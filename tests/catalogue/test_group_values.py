"""Learning rates and all other values of parameter groups are compared between workers in every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unisono
from unisono.guard.values import Values
from unisono.testing import run_threads


def train(collective: Any, change: Callable[[torch.optim.Optimizer], None], optimizer: type[Any] = torch.optim.AdamW) -> None:
    class Strays(unisono.Callback):
        edits_weights = False

        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            if trainer.collective.rank == 1 and result.step == 2:
                change(trainer.optimizer)

    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    trainer = unisono.Trainer(
        model,
        optimizer([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.2}], lr=0.1),
        lambda model, batch: (model(batch[0]).square().sum(), len(batch[0])),
        batch_size=8,
        microbatches=4,
        callbacks=[Strays()],
        collective=collective,
    )
    trainer.fit(torch.utils.data.TensorDataset(torch.ones(32, 4)), 1)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("lr", 0.3, r"'lr' of parameter group 1 \(0\.2 on worker 0, 0\.3 on worker 1"),
        ("weight_decay", 0.5, r"'weight_decay' of parameter group 1 \(0\.01 on worker 0, 0\.5 on worker 1"),
        ("betas", (0.8, 0.99), r"'betas' of parameter group 1 \(\[0\.9, 0\.999\] on worker 0, \[0\.8, 0\.99\] on worker 1"),
        ("mine", "x", r"'mine' of parameter group 1 \(not there on worker 0, 'x' on worker 1"),
    ],
)
@pytest.mark.parametrize("workers", [2, 3])
def test_a_value_of_a_group_that_differs_is_named_in_the_next_step(key: str, value: Any, said: str, workers: int) -> None:
    def change(optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[1][key] = value

    with pytest.raises(unisono.Desync, match=f"step 3: the workers differ in {said}"):
        run_threads(workers, lambda collective: train(collective, change))


def test_a_learning_rate_in_a_tensor_that_is_changed_in_place_is_seen() -> None:
    group: dict[str, Any] = {"lr": torch.tensor(0.1), "betas": (0.9, 0.99), "params": []}
    values = Values(lambda: [group], lambda: 0, dict)
    before = values.digest()
    assert values.digest() == before
    group["lr"].mul_(2)
    assert values.digest() != before
    group["lr"].div_(2)
    assert values.digest() == before


def test_the_order_of_keys_and_objects_that_nobody_can_compare_do_not_count() -> None:
    one: dict[str, Any] = {"lr": 0.1, "made": object(), "names": ["a"], "rate": float("nan"), "params": [Tensor()]}
    other = {key: one[key] for key in reversed(one)} | {"made": object(), "rate": float("inf") - float("inf")}
    assert Values(lambda: [one], lambda: 0, dict).digest() == Values(lambda: [other], lambda: 0, dict).digest()


def test_values_that_are_alike_train_on() -> None:
    run_threads(3, lambda collective: train(collective, lambda optimizer: None))
