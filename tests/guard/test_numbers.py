"""Steps whose loss or gradient is not finite: an error, or left out by all workers alike."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.training.hard_problem import digest
from unisono import Callback, ConfigurationError, Exact, StepResult, Trainer
from unisono.checkpoint.store import Store
from unisono.collective import Collective, InProcess
from unisono.observe.metrics import read_metrics
from unisono.testing import run_threads


class Sick(nn.Module):
    """The loss of some samples is infinite; that of others has a gradient that is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.linear(x)).square().sum(dim=1) / torch.where(x[:, 0] > 90, 0.0, 1.0)
        if bool((x[:, 0] < -90).any()):
            out = out + (0.0 * self.linear.weight.sum()).abs().sqrt()  # 0, with an infinite slope
        return out


def data(kind: str) -> TensorDataset:
    values = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
    for index in {"none": (), "loss": (7, 30), "gradient": (7, 30)}[kind]:
        values[index, 0] = 100.0 if kind == "loss" else -100.0
    return TensorDataset(values)


def trained(collective: Collective, kind: str, callbacks: Any = (), **settings: Any) -> tuple[list[str], int, list[bool]]:
    torch.manual_seed(0)
    model = Sick()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer = Trainer(
        model,
        optimizer,
        lambda model, batch: (model(batch[0]).sum(), len(batch[0])),
        batch_size=8,
        microbatches=4,
        collective=collective,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        callbacks=callbacks,
        **settings,
    )
    skipped: list[bool] = []

    class Sees(Callback):
        def on_step(self, trainer: Trainer, result: StepResult) -> None:
            skipped.append(result.skipped)

    trainer.callbacks = (*trainer.callbacks, Sees())
    trainer.fit(data(kind), 2)
    return [digest(value) for value in model.state_dict().values()], trainer.position.skipped, skipped


@pytest.mark.parametrize("replicate_kib", [0, 256])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_skipping_leaves_the_same_steps_out_on_any_number_of_workers(kind: str, replicate_kib: float) -> None:
    settings: dict[str, Any] = {"on_nonfinite": "skip", "sync": Exact(replicate_kib=replicate_kib)}
    alone = trained(InProcess(), kind, on_nonfinite="skip")

    assert alone[1] == sum(alone[2])
    assert 2 <= alone[1] <= 4
    for workers in (2, 3, 4):
        assert run_threads(workers, lambda collective: trained(collective, kind, **settings)) == [alone] * workers


def test_a_skipped_step_changes_neither_weights_nor_buffers_nor_the_learning_rate() -> None:
    seen: list[tuple[bool, list[str], float]] = []

    class Looks(Callback):
        def on_step(self, trainer: Trainer, result: StepResult) -> None:
            state = [digest(value) for value in trainer.model.state_dict().values()]
            seen.append((result.skipped, state, trainer.optimizer.param_groups[0]["lr"]))

    trained(InProcess(), "gradient", [Looks()], on_nonfinite="skip")

    for before, (skipped, state, rate) in itertools.pairwise(seen):
        assert (state == before[1]) == skipped
        assert (rate == before[2]) == skipped


def test_skipped_steps_are_counted_and_survive_a_restart() -> None:
    class Stops(Callback):
        def on_step(self, trainer: Trainer, result: StepResult) -> None:
            if result.step == 7:
                raise KeyboardInterrupt

    undisturbed = trained(InProcess(), "loss", on_nonfinite="skip")
    settings: dict[str, Any] = {"on_nonfinite": "skip", "run_dir": "memory://skips", "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        trained(InProcess(), "loss", [Stops()], **settings)

    resumed = run_threads(2, lambda collective: trained(collective, "loss", **settings))

    assert [found[:2] for found in resumed] == [undisturbed[:2]] * 2
    assert read_metrics(Store("memory://skips"))[-1]["skipped"] == undisturbed[1]


def test_a_run_without_bad_numbers_skips_nothing() -> None:
    assert trained(InProcess(), "none", on_nonfinite="skip") == trained(InProcess(), "none")


@pytest.mark.parametrize(("name", "value"), [("on_nonfinite", "ignore"), ("on_desync", "hope")])
def test_other_policies_are_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} must be .*, got '{value}'"):
        trained(InProcess(), "none", **{name: value})
