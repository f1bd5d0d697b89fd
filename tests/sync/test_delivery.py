"""Where more than two hosts hold all of the state each, sums are made once and sent on: the same bits, in a ring's bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.sync.test_exact import assert_same_bits, drawn, exchanged, rated, reduced, tables, trained, wanted
from tests.sync.test_two_levels import Counting, ranks, together
from tests.training.hard_problem import shared, train
from tests.training.test_promise import alone, differing
from unisono import Exact
from unisono.collective import Collective
from unisono.replica.parameters import layout_of
from unisono.sync import finish
from unisono.sync.exact import ExactReduction
from unisono.testing import run_threads

WORLDS = [(1, 1, 1), (1, 1, 1, 1), (1,) * 5, (1,) * 7, (2, 1, 1), (2, 1, 2), (1, 3, 1, 2)]
"""Workers of each host."""


@pytest.fixture(params=[64, None], ids=["in stretches", "in one go"])
def stretches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(finish, "_STRETCH", request.param)


@pytest.mark.usefixtures("stretches")
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("hosts", WORLDS, ids=str)
def test_every_host_gets_the_naive_tree_sum(hosts: tuple[int, ...], overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    microbatches = 7
    together(hosts, monkeypatch)
    steps = [(drawn(microbatches, seed=filled), filled) for filled in [*range(microbatches, 0, -1), microbatches]]

    found = reduced(sum(hosts), steps, per_host=len(hosts), overlap=overlap, bucket_mib=0.004)

    for sums, (gradients, filled) in zip(found, steps, strict=True):
        assert_same_bits(sums, wanted(gradients, filled))


class PerHost(Exact):
    """As a run is reduced that can lose hosts."""

    def bind(self, *args: Any, **settings: Any) -> ExactReduction:
        return super().bind(*args, **{**settings, "per_host": True})


@pytest.mark.parametrize("hosts", [(1, 1, 1), (2, 1, 2), (1, 3, 1, 2)], ids=str)
def test_gradients_of_few_rows_have_the_same_sum(hosts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(0, 30, (40, 5), generator=torch.Generator().manual_seed(0))
    one, _ = trained(1, lambda: tables(True), tokens, forward=rated)
    together(hosts, monkeypatch)

    several, _ = trained(sum(hosts), lambda: tables(True), tokens, forward=rated, settings=PerHost(replicate_kib=0))

    assert several == one


class Whole(Exact):
    """As a large model is reduced whose optimizer may mix parameters."""

    def bind(self, *args: Any, **settings: Any) -> ExactReduction:
        reduction = super().bind(*args, **{**settings, "whole": True})
        assert reduction.replicates
        return reduction


class WholePerHost(Whole, PerHost):
    """The same in a run that can lose hosts."""


ANYWHERE = [(2,), (3,), (5,), (1, 1), (1, 1, 1), (2, 2), (2, 1, 2), (1, 3, 1, 2)]


@pytest.mark.parametrize("kind", [Whole, WholePerHost])
@pytest.mark.parametrize("hosts", ANYWHERE, ids=str)
def test_every_worker_updates_everything_with_the_same_sums(
    hosts: tuple[int, ...], kind: type[Exact], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.randint(0, 30, (40, 5), generator=torch.Generator().manual_seed(0))
    expected = alone(8)
    one, _ = trained(1, lambda: tables(True), tokens, forward=rated)
    together(hosts, monkeypatch)
    monkeypatch.setattr("tests.training.hard_problem.Exact", kind)
    size = sum(hosts)

    several, _ = trained(size, lambda: tables(True), tokens, forward=rated, settings=kind(replicate_kib=0))
    found = run_threads(size, lambda collective: train(collective, 8, size))

    assert several == one
    for rank, worker in enumerate(found):
        assert differing(worker, expected) == [], rank


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("hosts", [(1,) * 3, (1,) * 5, (1, 3, 1, 2)], ids=str)
def test_training_ends_with_the_bits_of_one_worker(
    hosts: tuple[int, ...], overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(8)
    together(hosts, monkeypatch)
    monkeypatch.setattr("tests.training.hard_problem.Exact", PerHost)
    size = sum(hosts)

    found = run_threads(size, lambda collective: train(collective, 8, size, overlap=overlap))

    for rank, worker in enumerate(found):
        assert differing(shared(worker), shared(expected)) == [], rank
    for group in ranks(hosts):
        together_hold = {name: value for rank in group for name, value in found[rank].items()}
        assert differing(together_hold, expected) == [], "each host holds all of the state"


@pytest.mark.parametrize("hosts", [(1,) * 3, (1,) * 4, (1,) * 8, (2,) * 4, (4, 4, 4)], ids=str)
def test_each_host_sends_what_a_ring_would_send(hosts: tuple[int, ...]) -> None:
    size, width, count = sum(hosts), 16, 240
    microbatches = 2 * size  # the microbatches of a host are one node of the tree: one sum

    def work(collective: Collective) -> int:
        counting = Counting(collective, hosts)
        model = nn.ParameterList([nn.Parameter(torch.zeros(width)) for _ in range(count)])
        layout = layout_of(list(model.named_parameters()))
        reduction = Exact(replicate_kib=0).bind(layout, counting, microbatches, per_host=True)
        reduction.begin(microbatches)
        for microbatch in range(*reduction.ranges[counting.rank]):
            reduction.add(microbatch, [torch.ones_like(parameter) for parameter in model])
        exchanged(reduction, size)
        reduction.finish(1.0)
        return counting.crossed

    sent = run_threads(size, work)

    nbytes, others = 4 * width * count, len(hosts) - 1
    most = max(sum(sent[rank] for rank in group) for group in ranks(hosts))
    assert most <= 1.02 * 2 * nbytes * others / len(hosts)
