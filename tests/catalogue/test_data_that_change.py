"""Data that change from epoch to epoch: those who want to know the epoch are told, and what cannot go on exactly is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset

import unisono
from tests.catalogue.unbroken import Found, check_all, weights
from tests.fault_injection import run_lives
from tests.training.small_run import Dies, Killed, memory_url
from unisono.errors import ConfigurationError, FingerprintMismatch
from unisono.testing import run_threads

EPOCHS = 5
SAMPLES = 24


class Plain:
    """Samples that depend on an attribute that somebody sets."""

    def __init__(self) -> None:
        self.inputs = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(1))
        self.level = 0
        self.reads = 0

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        self.reads += 1
        return self.inputs[index] * (1 + 0.1 * self.level)


class Follows(Plain):
    def set_epoch(self, epoch: int) -> None:
        self.level = epoch


class Collate:
    level = 0

    def set_epoch(self, epoch: int) -> None:
        self.level = epoch

    def __call__(self, samples: list[Tensor]) -> Tensor:
        return torch.stack(samples) + 0.05 * self.level


class Sampler:
    """Gives an order of its own for each epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Cycles(Sampler):
    """Goes on where it has stopped the last time."""

    start = 0

    def __iter__(self) -> Iterator[int]:
        start, self.start = self.start, self.start + 5
        return iter([(start + number) % SAMPLES for number in range(SAMPLES)])


class LooksAtTheModel(Sampler):
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __iter__(self) -> Iterator[int]:
        with torch.no_grad():
            return iter(self.model(Plain().inputs).sum(dim=1).argsort().tolist())


def loss(model: Any, batch: Tensor) -> tuple[Tensor, int]:
    return model(batch).square().sum(), len(batch)


def train(
    workers: Any,
    run_dir: str | None,
    callbacks: Sequence[Any],
    *,
    make: Callable[[], Any] = Plain,
    order: Callable[[nn.Module], Any] = lambda model: "shuffle",
    loader: unisono.Loader | None = None,
    epochs: int = EPOCHS,
) -> Found:
    torch.manual_seed(3)
    model = nn.Linear(4, 2)
    dataset = make()
    for callback in callbacks:
        callback.dataset = dataset
    trainer = unisono.Trainer(
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
    trainer.fit(dataset, epochs, order=order(model), loader=loader)
    return weights(trainer)


class SavesAndDies(Dies):
    def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
        if result.step == self.step:
            trainer.save()
        super().on_step(trainer, result)


class Sets(unisono.Callback):
    """What people write: the next epoch's level, once an epoch is over."""

    edits_weights = False
    dataset: Any

    def on_epoch(self, trainer: unisono.Trainer, epoch: int) -> None:
        self.dataset.level = epoch + 1


class SetsAlways(Sets):
    """And as it is right after a resume and a join, too."""

    def on_begin(self, trainer: unisono.Trainer) -> None:
        self.dataset.level = trainer.position.epoch


def with_sets(kind: type[Sets], **settings: Any) -> Any:
    def run(workers: Any, run_dir: str | None, callbacks: Sequence[Any]) -> Found:
        return train(workers, run_dir, [kind(), *callbacks], **settings)

    return run


def expected() -> Found:
    return train(None, None, [SetsAlways()])


def test_set_epoch_of_a_data_set_is_called_in_every_process() -> None:
    assert check_all(partial(train, make=Follows), stop=8) == expected()
    for processes in (0, 2):
        assert train(None, None, (), make=Follows, loader=unisono.Loader(num_workers=processes)) == expected()


@pytest.mark.parametrize("processes", [0, 2])
def test_set_epoch_of_what_others_hold_and_of_a_collate_function_is_called_too(processes: int) -> None:
    parts = partial(Subset, Follows(), range(SAMPLES))
    assert train(None, None, (), make=parts, loader=unisono.Loader(num_workers=processes)) == expected()
    both = lambda: ConcatDataset([Subset(Follows(), range(10)), Subset(Follows(), range(10, SAMPLES))])  # noqa: E731
    assert train(None, None, (), make=both, loader=unisono.Loader(num_workers=processes)) == expected()
    found = {
        tuple(train(None, None, (), loader=unisono.Loader(num_workers=n, collate_fn=Collate())).items()) for n in (0, processes)
    }
    assert len(found) == 1
    assert found.pop() != tuple(train(None, None, ()).items())


def test_an_attribute_that_loader_processes_do_not_see_is_named() -> None:
    assert with_sets(Sets)(None, None, ()) == expected()
    with pytest.raises(ConfigurationError, match=r"'level' of the data set \(Plain\) was changed from 0 to 1.*set_epoch"):
        with_sets(Sets, loader=unisono.Loader(num_workers=2))(None, None, ())


def test_an_attribute_that_is_set_in_on_begin_too_goes_on_exactly() -> None:
    check_all(with_sets(SetsAlways), stop=8)


def test_an_attribute_that_a_resume_does_not_set_is_noticed() -> None:
    with pytest.raises(ConfigurationError, match=r"middle of epoch 3.*samples of the data set are not what they were"):
        resumed(with_sets(Sets), stop=7)


def test_a_worker_whose_data_are_as_at_the_beginning_does_not_join() -> None:
    class Calls(unisono.Callback):
        def on_step(self, trainer: unisono.Trainer, result: unisono.StepResult) -> None:
            if result.step == 7:
                link_of_first.tell("it is time", "now")

    def work(link: Any) -> Any:
        nonlocal link_of_first
        if link.membership.is_founder:
            link_of_first = link
        while not link.membership.is_founder and link.ask("it is time") is None:
            link.pause(0.01)
        try:
            return with_sets(Sets, epochs=8)(link, None, [Calls()])
        except FingerprintMismatch as error:
            return str(error)

    link_of_first: Any = None
    lives = run_lives(2, work, {}, joiners=1)
    assert lives.results[0] == lives.results[1] == train(None, None, [SetsAlways()], epochs=8)
    assert "samples of the data set are not what they were" in lives.results[2]


def test_a_sampler_that_follows_set_epoch_goes_on_exactly() -> None:
    sampler = lambda model: Sampler()  # noqa: E731
    check_all(partial(train, order=sampler), stop=8)


@pytest.mark.parametrize("kind", [lambda model: Cycles(), LooksAtTheModel], ids=["cycles", "looks at the model"])
def test_a_sampler_that_gives_another_order_after_a_resume_is_refused(kind: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"middle of epoch 3.*the order gives other batches for epoch 3.*set_epoch"):
        resumed(partial(train, order=kind), stop=7)
    with pytest.warns(UserWarning, match="may go on differently.*other batches for epoch 2"):
        resumed(partial(train, order=kind), stop=6)


def test_a_list_that_is_another_one_in_the_middle_of_an_epoch_is_refused() -> None:
    run_dir = memory_url()
    with pytest.raises(Killed):
        train(None, run_dir, [SavesAndDies(7)], order=lambda model: list(range(SAMPLES)))
    with pytest.raises(ConfigurationError, match="the order gives other batches"):
        train(None, run_dir, (), order=lambda model: list(range(SAMPLES))[::-1])


def test_a_sampler_is_read_once_an_epoch_and_a_data_set_shows_no_trace_of_a_look() -> None:
    class Counts(Sampler):
        read = 0

        def __iter__(self) -> Iterator[int]:
            self.read += 1
            return super().__iter__()

    sampler, dataset = Counts(), Plain()
    train(None, memory_url(), (), make=lambda: dataset, order=lambda model: sampler)
    assert sampler.read == EPOCHS + 1, "once to see what it is"
    assert dataset.reads == EPOCHS * SAMPLES


def resumed(train: Any, *, stop: int) -> Found:
    """On another number of workers, from a checkpoint of this step."""
    run_dir = memory_url()
    with pytest.raises(Killed):
        run_threads(2, partial(train, run_dir=run_dir, callbacks=[SavesAndDies(stop)]))
    found = run_threads(3, partial(train, run_dir=run_dir, callbacks=()))
    assert found[0] == found[1] == found[2]
    return found[0]
