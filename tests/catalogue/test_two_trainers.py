"""Models that train in turn: two Trainers in one loop are refused, and one Trainer of both is exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import unisono
from tests.catalogue import trained
from tests.catalogue.unbroken import Found, check_all, weights
from unisono.testing import run_threads

WORKERS = pytest.mark.parametrize("workers", [1, 2, 3])


def trainer_of(workers: Any = None, callbacks: Sequence[unisono.Callback] = ()) -> unisono.Trainer:
    torch.manual_seed(1)
    model = trained.Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return unisono.Trainer(model, optimizer, trained.loss, batch_size=12, microbatches=4, callbacks=callbacks, collective=workers)


@WORKERS
def test_two_in_one_loop_are_refused_before_the_first_step(workers: int) -> None:
    def work(collective: Any) -> None:
        one, two = trainer_of(collective), trainer_of(collective)
        try:
            for first, second in zip(one.batches(trained.drawn(), 1), two.batches(trained.drawn(), 1), strict=True):
                one.step(first)
                two.step(second)
        finally:
            assert one.position.step == two.position.step == 0

    with pytest.raises(
        unisono.ConfigurationError, match=r"another loop .* as one model with one Trainer: see \"Several losses, GANs"
    ):
        run_threads(workers, work)


@WORKERS
def test_a_training_inside_anothers_callback_is_refused(workers: int) -> None:
    class Probes(unisono.Callback):
        def on_epoch(self, trainer: unisono.Trainer, epoch: int) -> None:
            trainer_of(trainer.collective).fit(trained.drawn(), 1)

    with pytest.raises(unisono.ConfigurationError, match="another loop over batches is under way"):
        run_threads(workers, lambda collective: trainer_of(collective, [Probes()]).fit(trained.drawn(), 1))


def test_one_after_the_other_is_fine_also_when_a_loop_was_left_early_or_failed() -> None:
    class Fails(unisono.Callback):
        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            raise OSError("no")

    def work(collective: Any) -> list[int]:
        left, kept, last = (trainer_of(collective) for _ in range(3))
        for batch in left.batches(trained.drawn(), 1):
            left.step(batch)
            break
        batches = kept.batches(trained.drawn(), 1)
        kept.step(next(batches))
        batches.close()  # type: ignore[attr-defined]
        last.fit(trained.drawn(), 1)
        return [trainer.position.step for trainer in (left, kept, last)]

    with pytest.raises(OSError, match="no"):
        trainer_of(None, [Fails()]).fit(trained.drawn(), 1)
    assert run_threads(2, work) == [[1, 1, 4]] * 2


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


class Both(torch.optim.Optimizer):
    """As the guide has it."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def adversarial(turn: Callable[[], int | None]) -> Callable[[Any, Any], tuple[Tensor, int]]:
    def loss(model: Any, batch: Sequence[Tensor]) -> tuple[Tensor, int]:
        (real,) = batch
        fake = model.generator(torch.randn(len(real), 4))
        scores = torch.cat([model.critic(real), model.critic(fake.detach())])
        truth = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)])
        critic = F.binary_cross_entropy_with_logits(scores, truth, reduction="sum")
        fixed = {name: parameter.detach() for name, parameter in model.critic.named_parameters()}
        generator = -torch.func.functional_call(model.critic, fixed, (fake,)).sum()
        return {None: critic + generator, 0: critic, 1: generator}[turn()], len(real)

    return loss


@pytest.mark.parametrize("in_turn", [False, True], ids=["together", "in turn"])
def test_one_trainer_of_both_models_is_the_same_through_all(in_turn: bool) -> None:
    data = TensorDataset(torch.randn(46, 6, generator=torch.Generator().manual_seed(5)))

    def train(workers: Any, run_dir: str | None, callbacks: Sequence[Any]) -> Found:
        torch.manual_seed(1)
        model = Gan()
        optimizer = Both(
            torch.optim.Adam(model.generator.parameters(), lr=0.02), torch.optim.RMSprop(model.critic.parameters(), lr=0.01)
        )
        trainer = unisono.Trainer(
            model,
            optimizer,
            adversarial(lambda: trainer.position.step % 2 if in_turn else None),
            batch_size=12,
            microbatches=4,
            run_dir=run_dir,
            checkpoint_every=2,
            callbacks=callbacks,
            collective=workers,
        )
        trainer.fit(data, 5)
        return weights(trainer)

    check_all(train, stop=9)
