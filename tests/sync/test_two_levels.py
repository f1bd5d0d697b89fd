"""The exact reduction between hosts of several workers: the same sums, and each of them on the wire once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor, nn

from tests.sync.test_exact import assert_same_bits, drawn, exchanged, rated, reduced, tables, trained, wanted
from tests.training.hard_problem import merged, train
from tests.training.test_promise import alone, differing
from unisono import Exact
from unisono.collective import Collective, Expected, InProcess, Pending
from unisono.replica.parameters import layout_of
from unisono.testing import run_threads

WORLDS = [(1, 1, 2), (2, 1), (2, 2), (2, 3), (2, 1, 2), (3, 1), (4, 4), (1, 3, 1, 2)]
"""Workers of each host."""


def ranks(hosts: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(range(lo, hi)) for lo, hi in pairwise(accumulate(hosts, initial=0))]


def together(hosts: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads believe that they are on these hosts."""
    monkeypatch.setattr(InProcess, "hosts", property(lambda collective: ranks(hosts)))


@pytest.mark.parametrize("replicated", [False, True])
@pytest.mark.parametrize("microbatches", [5, 7, 8])
@pytest.mark.parametrize("hosts", WORLDS, ids=str)
def test_the_sum_is_the_naive_tree_in_full_and_short_batches(
    hosts: tuple[int, ...], microbatches: int, replicated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sum(hosts) > microbatches:
        microbatches = 2 * sum(hosts) - 3
    together(hosts, monkeypatch)
    steps = [(drawn(microbatches, seed=filled), filled) for filled in [*range(microbatches, 0, -1), microbatches]]

    for found, (gradients, filled) in zip(reduced(sum(hosts), steps, replicated=replicated), steps, strict=True):
        assert_same_bits(found, wanted(gradients, filled))


@pytest.mark.parametrize("bucket_mib", [1e-6, 0.004, 25.0])
@pytest.mark.parametrize("hosts", [(2, 1), (2, 2), (2, 3)], ids=str)
def test_gradients_that_leave_during_backward_have_the_same_sum(
    hosts: tuple[int, ...], bucket_mib: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    together(hosts, monkeypatch)
    steps = [(drawn(8, seed=filled), filled) for filled in range(8, 0, -1)]

    for found, (gradients, filled) in zip(reduced(sum(hosts), steps, bucket_mib=bucket_mib, overlap=True), steps, strict=True):
        assert_same_bits(found, wanted(gradients, filled))


@pytest.mark.parametrize("replicate_kib", [0, 256])
@pytest.mark.parametrize("hosts", [(2, 1), (2, 2), (2, 3)], ids=str)
def test_gradients_of_few_rows_have_the_same_sum(
    hosts: tuple[int, ...], replicate_kib: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.randint(0, 30, (40, 5), generator=torch.Generator().manual_seed(0))
    one, _ = trained(1, lambda: tables(True), tokens, forward=rated)
    together(hosts, monkeypatch)

    several, _ = trained(sum(hosts), lambda: tables(True), tokens, forward=rated, settings=Exact(replicate_kib=replicate_kib))

    assert several == one


@pytest.mark.parametrize(("overlap", "replicated"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("hosts", WORLDS, ids=str)
def test_training_ends_with_the_bits_of_one_worker(
    hosts: tuple[int, ...], overlap: bool, replicated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(8)
    together(hosts, monkeypatch)
    size = sum(hosts)

    found = run_threads(size, lambda collective: train(collective, 8, size, overlap=overlap, replicated=replicated))

    assert differing(merged(found), expected) == []


# ---- bytes on the wire ----


class Counting(InProcess):
    """Threads on hosts; counts the bytes of gradients (float32, unlike notes and norms) that leave this worker's host."""

    def __init__(self, collective: Collective, hosts: Sequence[int]) -> None:
        assert isinstance(collective, InProcess)
        super().__init__(collective._meeting, collective.rank)
        self._groups = ranks(hosts)
        self.crossed = 0

    @property
    def hosts(self) -> Sequence[Sequence[int]]:
        return self._groups

    def start_exchange(
        self, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Expected]], *, name: str = "exchange"
    ) -> Pending:
        near = next(host for host in self._groups if self.rank in host)
        self.crossed += sum(
            t.nbytes for peer, sent in enumerate(outgoing) if peer not in near for t in sent if t.dtype == torch.float32
        )
        return super().start_exchange(outgoing, incoming, name=name)


@pytest.mark.parametrize(
    ("hosts", "microbatches", "sums"),
    [
        ((2, 2), 8, (1, 1)),
        ((4, 4), 8, (1, 1)),
        ((2, 2, 2, 2), 16, (1, 1, 1, 1)),
        ((2, 1), 8, (2, 1)),
        ((3, 2), 8, (1, 1)),
        ((3, 3), 8, (1, 1)),
        ((2, 2), 10, (1, 2)),
    ],
)
def test_each_host_sends_each_of_its_sums_once(hosts: tuple[int, ...], microbatches: int, sums: tuple[int, ...]) -> None:
    """To the owner, whatever the number of workers that computed it."""
    size = sum(hosts)

    def work(collective: Collective) -> tuple[int, int]:
        counting = Counting(collective, hosts)
        model = nn.ParameterList([nn.Parameter(torch.zeros(16)) for _ in range(64)])
        layout = layout_of(list(model.named_parameters()))
        reduction = Exact(replicate_kib=0).bind(layout, counting, microbatches)
        reduction.begin(microbatches)
        for microbatch in range(*reduction.ranges[counting.rank]):
            reduction.add(microbatch, [torch.ones_like(parameter) for parameter in model])
        exchanged(reduction, size)
        reduction.finish(1.0)
        (segments,) = reduction.segments
        return counting.crossed, segments[counting.rank].hi - segments[counting.rank].lo

    found = run_threads(size, work)

    owned = [sum(found[rank][1] for rank in group) for group in ranks(hosts)]
    for group, own, count in zip(ranks(hosts), owned, sums, strict=True):
        assert sum(found[rank][0] for rank in group) == 4 * count * (sum(owned) - own)
