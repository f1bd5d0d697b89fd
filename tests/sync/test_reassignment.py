"""Microbatches that change hands while training goes on change no bit of the result."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.sync.test_exact import exchanged, rated, tables, trained
from tests.sync.test_two_levels import together
from tests.training.hard_problem import Digests, merged, train
from tests.training.restless import Ranges, drawn, make_restless
from tests.training.test_promise import differing
from unisono import ConfigurationError, Exact
from unisono.collective import Collective, InProcess
from unisono.replica.parameters import layout_of
from unisono.testing import run_threads, run_workers

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
    microbatches, workers = 16, 2

    def work(collective: Collective) -> int:
        assert isinstance(collective, InProcess)
        collective = Allocating(collective)
        model = nn.ParameterList([nn.Parameter(torch.zeros(40))])
        layout = layout_of(list(model.named_parameters()))
        reduction = Exact(replicate_kib=replicate_kib).bind(layout, collective, microbatches)
        for number in range(100):
            reduction.reassign(drawn(microbatches, workers, number))
            reduction.begin(microbatches)
            for microbatch in range(*reduction.ranges[collective.rank]):
                reduction.add(microbatch, [torch.full((40,), microbatch + 1.0)])
            exchanged(reduction, workers)
            found = reduction.finish(1.0)
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
        layout = layout_of(list(nn.Linear(2, 2).named_parameters()))
        with pytest.raises(ConfigurationError, match="do not divide 8 microbatches among 2 workers"):
            Exact().bind(layout, collective, 8, ranges=ranges)
        reduction = Exact().bind(layout, collective, 8, ranges=((0, 1), (1, 8)))
        with pytest.raises(ConfigurationError, match="do not divide 8 microbatches among 2 workers"):
            reduction.reassign(ranges)
        assert reduction.ranges == ((0, 1), (1, 8))

    run_threads(2, work)
