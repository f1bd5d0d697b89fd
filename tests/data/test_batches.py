"""Batches in the order that the user gives, divided among workers as they are now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

import unisono
from tests.training.alike import DATA, WORKERS, squares
from tests.training.restless import Ranges, drawn
from unisono import ConfigurationError, Loader
from unisono.collective import Collective
from unisono.data.batch import Batch
from unisono.data.batches import BatchStream
from unisono.observe.timing import StepClock
from unisono.order import Indices, Listed
from unisono.testing import run_threads

# ---- orders ----


class Restless(Sampler[int]):
    """Another permutation each time it is read."""

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return len(DATA)

    def __iter__(self) -> Iterator[int]:
        self.reads += 1
        return iter(torch.randperm(len(DATA), generator=torch.Generator().manual_seed(self.reads)).tolist())


def fitted(workers: int, order: Callable[[int], Any]) -> list[Tensor]:
    def work(collective: Collective) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(6, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = unisono.Trainer(model, optimizer, squares, batch_size=10, microbatches=4, collective=collective)
        trainer.fit(DATA, epochs=2, order=order(collective.rank))
        return model.weight.detach().clone()

    return run_threads(workers, work)


def test_a_sampler_that_counts_how_often_it_is_read_counts_alike_on_all_workers() -> None:
    (one,) = fitted(1, lambda rank: Restless())
    for workers in WORKERS:
        for weight in fitted(workers, lambda rank: Restless()):
            assert torch.equal(weight, one)


def test_another_order_on_each_worker_is_refused_before_anything_is_updated() -> None:
    with pytest.raises(ConfigurationError, match=r"step 1: worker 1 was given other samples.*same order"):
        fitted(2, lambda rank: np.random.default_rng(rank).permutation(len(DATA)))


# ---- ranges that change ----


class Read(Dataset[Any]):
    """Its samples are their numbers; it notes which were read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 88

    def __getitem__(self, index: int) -> Tensor:
        self.read.append(index)
        return torch.tensor(index)


def stream(ranges: Ranges, rank: int, dataset: Dataset[Any], num_workers: int = 0) -> BatchStream:
    """Six batches, 16 samples each in eight microbatches; the last has 8 in four."""
    return BatchStream(
        dataset,
        Listed(range(88), length=88, batch_size=16),
        ranges=ranges,
        rank=rank,
        batch_size=16,
        microbatches=8,
        loader=Loader(num_workers=num_workers),
        seed=0,
        device=torch.device("cpu"),
        clock=StepClock(),
        timeout_s=60.0,
    )


def parts(batch: Batch) -> list[tuple[int, list[int]]]:
    """Number and samples of each microbatch."""
    for part in batch.parts:
        assert part.data.tolist() == part.indices.tolist()
    return [(part.number, part.indices.tolist()) for part in batch.parts]


def expected(number: int, span: tuple[int, int]) -> list[tuple[int, list[int]]]:
    samples: Indices = np.arange(16 * number, min(16 * number + 16, 88)).reshape(-1, 2)
    return [(m, samples[m].tolist()) for m in range(*span) if m < len(samples)]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("seed", range(3))
def test_from_the_next_batch_on_a_worker_has_its_new_microbatches(seed: int, num_workers: int) -> None:
    ranges = [drawn(8, 3, f"{seed} {number}") for number in range(6)]
    for rank in range(3):
        made = stream(ranges[0], rank, Read(), num_workers)
        for number, batch in enumerate(made.batches(0, 0, 1)):
            assert batch.ranges == ranges[number]
            assert parts(batch) == expected(number, ranges[number][rank])
            if number < 5:
                made.reassign(ranges[number + 1])
        assert number == 5


def test_what_was_loaded_is_not_loaded_again() -> None:
    dataset = Read()
    made = stream(((0, 4), (4, 8)), 0, dataset)
    for number, _ in enumerate(made.batches(0, 0, 1)):
        made.reassign(((0, number + 2), (number + 2, 8)))
    assert dataset.read == sorted(set(dataset.read))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_worker_that_was_done_may_get_more_of_the_last_batch(num_workers: int) -> None:
    """It has nothing in the short last batch, so its loader is at the end already."""
    made = stream(((0, 4), (4, 8)), 1, Read(), num_workers)
    batches = made.batches(0, 0, 1)
    for number in range(5):
        assert parts(next(batches)) == expected(number, (4, 8))
    made.reassign(((0, 1), (1, 8)))
    assert parts(next(batches)) == expected(5, (1, 8))
    assert list(batches) == []
