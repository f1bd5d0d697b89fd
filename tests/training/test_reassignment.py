"""Microbatches that change hands while training goes on change no bit of the result."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests.sync.test_exact import rated, tables, trained
from tests.sync.test_two_levels import together
from tests.training.hard_problem import Digests, merged, train
from tests.training.restless import Ranges, drawn, make_restless
from tests.training.test_promise import differing
from unisono import ConfigurationError, Exact, Loader
from unisono.collective import Collective, InProcess
from unisono.data.batches import BatchStream
from unisono.layout import Layout
from unisono.observe.timing import StepClock
from unisono.order import Indices, Listed
from unisono.testing import run_threads, run_workers
from unisono.training.step import Batch

EPOCHS = 3


@cache
def alone() -> Digests:
    return train(None, 8, 1, epochs=EPOCHS)


@pytest.mark.parametrize(
    ("workers", "settings"),
    [
        (2, {"replicated": True, "num_workers": 2}),
        (3, {"num_workers": 1}),
        (4, {"overlap": True}),
        (5, {"replicated": True}),
        (7, {}),
    ],
)
def test_threads_end_with_the_bits_of_one_process(
    workers: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone()
    asked = make_restless(monkeypatch, seed=workers)

    found = run_threads(workers, lambda collective: train(collective, 8, workers, epochs=EPOCHS, **settings))

    assert differing(merged(found), expected) == []
    assert len(asked) >= 4 * workers
    assert len(set(asked)) >= 2


def restless_train(collective: Collective, seed: int, share_weights: bool) -> Digests:
    with pytest.MonkeyPatch.context() as monkeypatch:
        asked = make_restless(monkeypatch, seed=seed)
        found = train(collective, 8, collective.size, epochs=EPOCHS, share_weights=share_weights)
    assert len(set(asked)) >= 2
    return found


def test_processes_that_share_memory_and_weights_end_with_the_bits_of_one_process() -> None:
    found = run_workers(3, restless_train, 1, True, transport="shared memory")

    assert differing(merged(found), alone()) == []


@pytest.mark.parametrize("replicate_kib", [0, 256])
@pytest.mark.parametrize("workers", [2, 5])
def test_gradients_of_few_rows_have_the_same_sum(workers: int, replicate_kib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(0, 30, (40, 5), generator=torch.Generator().manual_seed(0))
    one, _ = trained(1, lambda: tables(True), tokens, forward=rated, epochs=4)
    asked = make_restless(monkeypatch)

    settings = Exact(replicate_kib=replicate_kib)
    several, _ = trained(workers, lambda: tables(True), tokens, forward=rated, settings=settings, epochs=4)

    assert several == one
    assert len(set(asked)) >= 3


@pytest.mark.parametrize("replicated", [False, True])
@pytest.mark.parametrize("hosts", [(2, 1), (1, 3, 2)], ids=str)
def test_hosts_of_several_workers_end_with_the_bits_of_one_process(
    hosts: tuple[int, ...], replicated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone()
    together(hosts, monkeypatch)
    make_restless(monkeypatch)
    size = sum(hosts)

    found = run_threads(size, lambda collective: train(collective, 8, size, epochs=EPOCHS, replicated=replicated))

    assert differing(merged(found), expected) == []


def test_batches_that_were_fetched_ahead_keep_the_ranges_that_they_were_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(0, 30, (80, 5), generator=torch.Generator().manual_seed(0))
    one, _ = trained(1, lambda: tables(False), tokens, forward=rated)
    asked = make_restless(monkeypatch)

    several, _ = trained(3, lambda: tables(False), tokens, forward=rated, ahead=2)

    assert several == one
    assert len(set(asked)) >= 3


# ---- memory ----


class Allocating(InProcess):
    """Counts what it allocates."""

    def __init__(self, like: InProcess) -> None:
        super().__init__(like._meeting, like.rank)
        self.allocated = 0

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.allocated += 1
        return super().allocate(numel, dtype, device)


@pytest.mark.parametrize("replicate_kib", [0, 256])
def test_a_hundred_changes_take_no_more_memory_than_the_largest_of_the_ranges_need(replicate_kib: float) -> None:
    """Memory of a transport is never given back."""
    leaves, workers = 16, 2

    def work(collective: Collective) -> int:
        assert isinstance(collective, InProcess)
        collective = Allocating(collective)
        model = nn.ParameterList([nn.Parameter(torch.zeros(40))])
        layout = Layout(model.named_parameters())
        reduction = Exact(replicate_kib=replicate_kib).bind(layout, collective, leaves)
        for number in range(100):
            reduction.reassign(drawn(leaves, workers, number))
            reduction.begin(leaves, overlap=False)
            for leaf in range(*reduction.ranges[collective.rank]):
                (model[0] * (leaf + 1)).sum().backward()
                reduction.add(leaf)
            reduction.launch()
            reduction.notes()
            found = reduction.finish(1.0, b"\1")
            assert all(torch.equal(gradient, torch.full((40,), 136.0)) for gradient in found.gradients)
            collective.barrier()
        return collective.allocated

    # The pieces of a range, growing and shrinking, are two for each level of the tree; more where sums rest for a step.
    assert max(run_threads(workers, work)) <= 8 * (2 if replicate_kib else 1)


@pytest.mark.parametrize(
    "ranges", [((0, 4),), ((0, 4), (4, 7)), ((0, 8), (8, 8)), ((0, 3), (4, 8)), ((4, 8), (0, 4)), ((0, 5), (3, 8))], ids=str
)
def test_ranges_that_do_not_share_everything_out_are_refused(ranges: Ranges) -> None:
    def work(collective: Collective) -> None:
        layout = Layout(nn.Linear(2, 2).named_parameters())
        with pytest.raises(ConfigurationError, match="do not share 8 microbatches out to 2 workers"):
            Exact().bind(layout, collective, 8, ranges=ranges)
        reduction = Exact().bind(layout, collective, 8, ranges=((0, 1), (1, 8)))
        with pytest.raises(ConfigurationError, match="do not share 8 microbatches out to 2 workers"):
            reduction.reassign(ranges)
        assert reduction.ranges == ((0, 1), (1, 8))

    run_threads(2, work)


# ---- batches ----


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
