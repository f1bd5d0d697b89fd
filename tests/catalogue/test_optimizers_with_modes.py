"""Schedule-free optimizers train other weights than those to use: train() and eval() are called for their users."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer

import unisono
from tests.catalogue.optimizers import SCHEDULE_FREE, other, schedule_free_adamw, schedule_free_wrapper
from tests.catalogue.trained import Death, Net, drawn, in_lives, in_threads, loss
from unisono.collective import Collective
from unisono.errors import ConfigurationError
from unisono.testing import run_threads

Make = Callable[[nn.Module], Optimizer]
KINDS: list[Make] = [*SCHEDULE_FREE, schedule_free_wrapper]


@pytest.mark.parametrize("make", KINDS)
def test_the_same_weights_on_any_number_of_workers_with_a_stop_and_a_death(make: Make, tmp_path: Path) -> None:
    straight = in_threads(1, make, epochs=3)
    assert {in_threads(workers, make, epochs=3) for workers in (2, 3)} == {straight}
    for workers, epochs in ((2, 1), (3, 2)):
        in_threads(workers, make, epochs=epochs, run_dir=tmp_path)
    assert in_threads(1, make, epochs=3, run_dir=tmp_path) == straight
    assert set(in_lives(2, make, {1: Death(24)}, joiners=1, epochs=3).results.values()) == {straight}


class Evaluates(unisono.Callback):
    def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        trainer.evaluate(drawn())


@pytest.mark.parametrize("make", KINDS)
def test_evaluating_and_saving_between_steps_change_nothing(make: Make, tmp_path: Path) -> None:
    """Going to the other weights and back would round."""
    straight = in_threads(1, make)
    assert in_threads(2, make, callbacks=[Evaluates()]) == straight
    assert in_threads(2, make, run_dir=tmp_path, checkpoint_every=1, callbacks=[Evaluates()]) == straight


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _plainly(steps: int) -> tuple[dict[str, torch.Tensor], float]:
    """The weights to use after some steps of a plain loop, and their loss."""
    torch.manual_seed(3)
    model = Net()
    optimizer: Any = schedule_free_adamw(model)
    optimizer.train()
    data = drawn()[:]
    for _ in range(steps):
        optimizer.zero_grad()
        total, count = loss(model, data)
        (total / count).backward()
        optimizer.step()
    optimizer.eval()
    with torch.no_grad():
        return _weights(model), float(loss(model, data)[0] / len(data[0]))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_model_ends_with_the_weights_to_use_and_goes_on_with_those_that_are_trained(workers: int, tmp_path: Path) -> None:
    def work(collective: Collective) -> list[dict[str, torch.Tensor]]:
        torch.manual_seed(3)
        model = Net()
        optimizer = schedule_free_adamw(model)
        trainer = unisono.Trainer(
            model,
            optimizer,
            loss,
            batch_size=46,
            microbatches=4,
            run_dir=tmp_path,
            collective=collective,
            sync=unisono.Exact(replicate_kib=0),
        )
        found = []
        for epochs, ended in ((2, _plainly(2)), (4, _plainly(4))):
            trainer.fit(drawn(), epochs)
            found.append(_weights(model))
            for name, value in ended[0].items():
                assert torch.allclose(value, found[-1][name], atol=1e-6), name
                assert torch.equal(load_file(tmp_path / "model.safetensors")[name], found[-1][name])
            assert trainer.evaluate(drawn())["loss"] == pytest.approx(ended[1], abs=1e-5)
            trainer.save()
            assert all(torch.equal(value, model.state_dict()[name]) for name, value in found[-1].items())
        for batch in trainer.batches(drawn(), 5):
            assert not all(torch.equal(value, model.state_dict()[name]) for name, value in found[-1].items())
            trainer.step(batch)
        found.append(_weights(model))
        return found

    results = run_threads(workers, work)
    for name, value in results[0][-1].items():
        assert torch.allclose(value, _plainly(5)[0][name], atol=1e-6), name
        assert all(torch.equal(value, other[-1][name]) for other in results)


def test_a_finished_run_that_is_started_again_has_the_weights_to_use(tmp_path: Path) -> None:
    first = in_threads(2, schedule_free_adamw, run_dir=tmp_path)
    assert in_threads(3, schedule_free_adamw, run_dir=tmp_path) == first


def test_an_optimizer_with_modes_cannot_be_divided() -> None:
    sync = unisono.Exact(replicate_kib=0, shard_update=True)
    with pytest.raises(ConfigurationError, match=r"has train\(\) and eval\(\)"):
        in_threads(2, schedule_free_adamw, sync=sync)


def test_those_of_pytorch_optimizer_have_modes_too(tmp_path: Path) -> None:
    for name in ("schedulefreeadamw", "schedulefreesgd", "schedulefreeradam"):
        straight = in_threads(1, other(name))
        in_threads(3, other(name), epochs=1, run_dir=tmp_path / name)
        assert in_threads(2, other(name), run_dir=tmp_path / name) == straight
