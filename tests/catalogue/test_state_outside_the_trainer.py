"""State that belongs to a script: patience, averages, temperatures, the best so far. It is kept, handed over, or refused."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unisono
from tests.catalogue.unbroken import Found, check_all, check_resume, weights
from tests.training.hard_problem import digest
from tests.training.small_run import Dies, Killed, memory_url
from unisono.testing import run_threads

EPOCHS = 5
CALLS = (14, 33, 52)


def data() -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return torch.utils.data.TensorDataset(
        torch.randn(24, 4, generator=generator), torch.randint(0, 3, (24,), generator=generator)
    )


def cross_entropy(model: Any, batch: Sequence[Tensor]) -> tuple[Tensor, int]:
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets, reduction="sum"), len(inputs)


def trainer_of(workers: Any, run_dir: str | None = None, callbacks: Sequence[Any] = (), **settings: Any) -> unisono.Trainer:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    defaults: dict[str, Any] = {"loss": cross_entropy, "checkpoint_every": 2, "sync": unisono.Exact(replicate_kib=0)}
    return unisono.Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.05),
        batch_size=8,
        microbatches=4,
        run_dir=run_dir,
        callbacks=callbacks,
        collective=workers,
        **{**defaults, **settings},
    )


class Patience(unisono.Callback):
    """Lowers the learning rate when the loss has not got better for two steps."""

    edits_weights = False

    def __init__(self) -> None:
        self.best, self.waited = float("inf"), 0
        self.begun: list[int] = []

    def on_begin(self, trainer: unisono.Trainer) -> None:
        self.begun.append(trainer.position.step)

    def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        self.waited = 0 if result.loss < self.best else self.waited + 1
        self.best = min(self.best, result.loss)
        if self.waited == 2:
            self.waited = 0
            trainer.optimizer.param_groups[0]["lr"] *= 0.5

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]


class Average(unisono.Callback):
    """An average of the weights, with a count on which its rate depends; every third step the weights go a bit of its way."""

    def __init__(self) -> None:
        self.count, self.shadow = 0, dict[str, Tensor]()

    def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        self.count += 1
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                self.shadow.setdefault(name, parameter.clone()).lerp_(parameter, 1 / self.count)
                if self.count % 3 == 0:
                    parameter.lerp_(self.shadow[name], 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.shadow = state["count"], state["shadow"]


@pytest.mark.parametrize("kind", [Patience, Average])
def test_what_callbacks_remember_is_saved_and_handed_over(kind: type[Any]) -> None:
    def train(workers: Any, run_dir: str | None, callbacks: Sequence[Any]) -> Found:
        mine = kind()
        trainer = trainer_of(workers, run_dir, [mine, *callbacks])
        trainer.fit(data(), EPOCHS)
        state = {name: repr(value) for name, value in mine.state_dict().items() if name != "shadow"}
        state |= {f"shadow {name}": digest(value) for name, value in mine.state_dict().get("shadow", {}).items()}
        return {**weights(trainer), **state}

    check_all(train, stop=8, calls=CALLS)


def test_callbacks_are_told_when_steps_begin_after_a_start_and_a_resume() -> None:
    def begun(run_dir: str, *more: Any) -> list[list[int]]:
        everybodys = [Patience() for _ in range(2)]

        def work(collective: Any) -> None:
            trainer_of(collective, run_dir, [everybodys[collective.rank], *more]).fit(data(), EPOCHS)

        with contextlib.suppress(Killed):
            run_threads(2, work)
        return [one.begun for one in everybodys]

    run_dir = memory_url()
    assert begun(run_dir, Dies(6)) == [[0], [0]]
    (first,), (second,) = begun(run_dir)
    assert first == second in (2, 4)


class Anneals(unisono.Callback):
    """A temperature, a tensor and a list in ``trainer.state``, which the loss reads."""

    edits_weights = False

    def on_begin(self, trainer: unisono.Trainer) -> None:
        trainer.state.setdefault("temperature", 2.0)
        trainer.state.setdefault("centre", torch.zeros(3))
        trainer.state.setdefault("history", {"losses": []})

    def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        trainer.state["temperature"] *= 0.9
        trainer.state["centre"].mul_(0.8).add_(result.loss)
        trainer.state["history"]["losses"] = [*trainer.state["history"]["losses"][-2:], result.loss]


@pytest.mark.parametrize("share_weights", [None, False])
def test_trainer_state_is_saved_handed_over_and_reads_as_it_did_when_steps_are_taken_again(share_weights: bool | None) -> None:
    def train(workers: Any, run_dir: str | None, callbacks: Sequence[Any]) -> Found:
        def loss(model: Any, batch: Sequence[Tensor]) -> tuple[Tensor, int]:
            inputs, targets = batch
            logits = (model(inputs) - trainer.state["centre"]) / trainer.state["temperature"]
            return F.cross_entropy(logits, targets, reduction="sum") * (1 + len(trainer.state["history"]["losses"])), len(inputs)

        sync = unisono.Exact(replicate_kib=0, share_weights=share_weights)
        trainer = trainer_of(workers, run_dir, [Anneals(), *callbacks], loss=loss, sync=sync)
        trainer.fit(data(), EPOCHS)
        state = {name: repr(value) for name, value in trainer.state.items()}
        return {**weights(trainer), **state}

    check_all(train, stop=8, calls=(*CALLS, 22, 27, 41))


def test_initial_values_give_way_to_those_of_the_run_that_goes_on() -> None:
    def train(workers: Any, run_dir: str | None, callbacks: Sequence[Any]) -> Found:
        trainer = trainer_of(workers, run_dir, [Counts(), *callbacks])
        trainer.state["steps"], trainer.state["sum"] = 0, torch.zeros(())
        trainer.fit(data(), EPOCHS)
        return {**weights(trainer), "steps": repr(trainer.state)}

    class Counts(unisono.Callback):
        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            trainer.state["steps"] += 1
            trainer.state["sum"] += result.loss

    with pytest.warns(UserWarning, match=r"trainer\.state\['steps'\] was set between"):
        check_resume(train, train(None, None, ()), stop=8)


def test_state_that_differs_between_workers_is_named() -> None:
    class Strays(unisono.Callback):
        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            trainer.state["level"] = {"now": result.step + (trainer.collective.rank == 1 and result.step == 3)}

    with pytest.raises(unisono.Desync, match=r"step 4: .*trainer\.state\['level'\]\['now'\] \(3 on worker 0, 4 on worker 1\)"):
        run_threads(2, lambda collective: trainer_of(collective, callbacks=[Strays()]).fit(data(), 3))


def test_a_tensor_in_the_state_that_differs_is_named_and_can_be_healed() -> None:
    class Strays(unisono.Callback):
        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            trainer.state.setdefault("queue", torch.zeros(4)).add_(trainer.collective.rank == 1 and result.step == 3)

    def work(collective: Any, on_desync: Any = "error") -> Tensor:
        trainer = trainer_of(collective, callbacks=[Strays()], compare_every=1, on_desync=on_desync)
        trainer.fit(data(), 3)
        found: Tensor = trainer.state["queue"]
        return found

    with pytest.raises(unisono.Desync, match=r"trainer\.state\['queue'\]"):
        run_threads(2, work)
    with pytest.warns(UserWarning, match=r"trainer\.state\['queue'\]"):
        queues = run_threads(3, lambda collective: work(collective, "heal"))
    assert all(queue.tolist() == [0, 0, 0, 0] for queue in queues)


def test_what_callbacks_remember_is_compared_with_each_checkpoint() -> None:
    class Strays(Patience):
        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            self.waited = trainer.collective.rank

    with pytest.raises(unisono.Desync, match=r"state of callback .*Strays: \['waited'\] \(0 on worker 0, 1 on worker 1\)"):
        run_threads(2, lambda collective: trainer_of(collective, memory_url(), [Strays()]).fit(data(), 3))


@pytest.mark.parametrize("workers", [1, 2])
def test_what_can_be_neither_saved_nor_sent_is_refused_at_the_first_step(workers: int) -> None:
    class Keeps(unisono.Callback):
        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            trainer.state["model"] = [trainer.model]

    class Remembers(Keeps):
        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            pass

        def state_dict(self) -> dict[str, Any]:
            return {"data": {1.5: 2}}

    with pytest.raises(unisono.ConfigurationError, match=r"trainer\.state\['model'\]\[0\] is a Sequential"):
        run_threads(workers, lambda collective: trainer_of(collective, callbacks=[Keeps()]).fit(data(), 1))
    with pytest.raises(unisono.ConfigurationError, match=r"callback .*Remembers\['data'\] has the key 1.5"):
        run_threads(workers, lambda collective: trainer_of(collective, callbacks=[Remembers()]).fit(data(), 1))


@pytest.mark.parametrize("writes", ["number", "tensor"])
def test_a_loss_that_changes_the_state_is_refused(writes: str) -> None:
    def work(collective: Any) -> None:
        def loss(model: Any, batch: Sequence[Tensor]) -> tuple[Tensor, int]:
            if writes == "number":
                trainer.state["calls"] += 1
            else:
                trainer.state["seen"].add_(batch[0].mean())
            return cross_entropy(model, batch)

        trainer = trainer_of(collective, loss=loss)
        trainer.state.update({"calls": 0, "seen": torch.zeros(())})
        trainer.fit(data(), 1)

    for workers in (1, 2):
        with pytest.raises(unisono.ConfigurationError, match=r"the loss changes trainer\.state"):
            run_threads(workers, work)
