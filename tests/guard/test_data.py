"""Workers that read other data than the rest are named before the first step."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from unisono import Callback, DataError, Desync, StepResult, Trainer
from unisono.collective import Collective
from unisono.guard.ledger import entry
from unisono.testing import run_threads


class Files(Dataset[Any]):
    """On some workers, one file is another version."""

    def __init__(self, other: bool, index: int = 6) -> None:
        self.other, self.index = other, index

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        value = {"x": torch.full((4,), float(index)), "name": f"{index}.png", "box": (1, np.ones(2))}
        if self.other and index == self.index:
            value["box"] = (1, np.ones(2) + 1e-9)
        return value


class Restless(Files):
    """Draws without a seed: also on one worker, no two reads are the same."""

    def __getitem__(self, index: int) -> Any:
        return {"x": torch.from_numpy(np.random.default_rng().normal(size=4)).float()}


def make(collective: Collective, callback: Callback | None = None, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    return Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model, batch: model(batch["x"] if isinstance(batch, dict) else batch[0]).sum(),
        batch_size=6,
        microbatches=3,
        collective=collective,
        callbacks=[callback] if callback else [],
        **settings,
    )


@pytest.mark.parametrize("index", [0, 6, 11])
def test_another_version_of_a_sample_is_named_with_the_worker(index: int) -> None:
    def work(collective: Collective) -> str:
        with pytest.raises(DataError) as found:
            make(collective).fit(Files(collective.rank == 1, index), 1)
        assert found.value.index == index
        return str(found.value)

    for message in run_threads(3, work):
        assert f"sample {index} of the data on worker 1 is not what the others have" in message


def test_two_workers_that_differ_are_both_named() -> None:
    def work(collective: Collective) -> None:
        with pytest.raises(DataError, match="sample 6 of the data is not the same on all workers"):
            make(collective).fit(Files(collective.rank == 1), 1)

    run_threads(2, work)


class SeededOnce(Files):
    """Draws from a generator of its own, which begins alike on all workers."""

    def __init__(self) -> None:
        super().__init__(False)
        self.own = np.random.default_rng(7)

    def __getitem__(self, index: int) -> Any:
        return {"x": torch.from_numpy(self.own.normal(size=4)).float()}


@pytest.mark.parametrize("data", [lambda: Restless(False), SeededOnce])
def test_data_that_draw_from_a_generator_of_their_own_are_warned_of_once_and_not_taken_for_another_file(data: Any) -> None:
    with pytest.warns(UserWarning, match="sample 0 of the data is another each time it is read") as warned:
        summaries = run_threads(3, lambda collective: make(collective).fit(data(), 1))
    assert [summary.steps for summary in summaries] == [2] * 3
    assert len(warned) == 1


def test_a_data_set_of_another_length_is_refused_by_name() -> None:
    def work(collective: Collective) -> None:
        with pytest.raises(ValueError, match="worker 2 has samples = 9, worker 0 has 12"):
            make(collective).fit(TensorDataset(torch.ones(9 if collective.rank == 2 else 12, 4)), 1)

    run_threads(3, work)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_microbatches_that_do_not_make_up_the_batch_are_refused(workers: int) -> None:
    def work(collective: Collective) -> None:
        trainer = make(collective)
        for batch in trainer.batches(TensorDataset(torch.ones(12, 4)), 1):
            if collective.rank == workers - 1:
                *others, part = batch.parts
                wrong = dataclasses.replace(part, indices=np.full_like(part.indices, 3))
                batch = dataclasses.replace(batch, parts=(*others, wrong))
            with pytest.raises(
                Desync, match="step 1: the workers together computed 6 samples of a global batch of 6, and not each"
            ):
                trainer.step(batch)
            return

    run_threads(workers, work)


class Notes(Callback):
    """Writes down the ledger after each step."""

    def __init__(self) -> None:
        self.ledgers: dict[int, Any] = {}

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        self.ledgers[result.step] = trainer.position.ledger


def noted(workers: int, run_dir: str, *, until: int) -> list[dict[int, Any]]:
    """The ledgers that a start of this run has on each worker; it is left after step ``until``, with a checkpoint."""

    def work(collective: Collective) -> dict[int, Any]:
        notes = Notes()
        trainer = make(collective, notes, run_dir=run_dir)
        for batch in trainer.batches(TensorDataset(torch.ones(45, 4)), 2):
            if trainer.step(batch).step == until:
                trainer.save()
                break
        return notes.ledgers

    return run_threads(workers, work)


def test_the_ledger_goes_on_in_the_middle_of_an_epoch_on_any_number_of_workers() -> None:
    (whole,) = noted(1, "memory://ledger-whole", until=17)
    assert len({*whole.values()}) == 15, "only those of the two epochs' ends are alike"

    starts = [noted(workers, "memory://ledger-parts", until=until) for workers, until in ((2, 3), (3, 5), (1, 12), (3, 17))]

    for start in starts:
        for ledgers in start:
            assert ledgers == {step: whole[step] for step in ledgers}
    assert [*starts[1][0]] == [4, 5]
    assert [*starts[3][0]] == [13, 14, 15, 16]


class Tampers(Callback):
    """Makes the trainer believe that a sample of this epoch was another one."""

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        if result.step == 1:
            trainer.position.ledger = entry(np.arange(6))


@pytest.mark.parametrize(("order", "complains"), [("shuffle", True), ("sequential", False), ([*range(12)], False)])
def test_at_the_end_of_an_epoch_each_sample_was_used_exactly_once(order: Any, complains: bool) -> None:
    def work(collective: Collective) -> None:
        trainer = make(collective, Tampers())
        if complains:
            with pytest.raises(Desync, match="epoch 1 used 12 samples of 12, or not each of them once"):
                trainer.fit(TensorDataset(torch.ones(12, 4)), 1, order=order)
        else:
            trainer.fit(TensorDataset(torch.ones(12, 4)), 1, order=order)

    run_threads(2, work)
