"""Rows of samples arrive in the order of the global batch, whoever has computed them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unisono.collective import Collective
from unisono.errors import ConfigurationError
from unisono.sync.sample_rows import SampleRows
from unisono.testing import run_threads

CPU = torch.device("cpu")


def batch(counts: list[int], seed: int) -> list[list[Tensor]]:
    """Rows of some microbatches: vectors with a gradient, labels, numbers in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            torch.randn(count, 2, 3, generator=generator).requires_grad_(),
            torch.randint(0, 9, (count,), generator=generator),
            torch.randn(count, generator=generator).bfloat16(),
        ]
        for count in counts
    ]


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_all_workers_get_all_rows_in_order_and_know_where_their_own_begin(workers: int) -> None:
    steps = [batch(counts, seed) for seed, counts in enumerate([[4, 3, 3, 3, 3], [5, 4, 4, 4, 4], [2, 1], [4, 3, 3, 3, 3]])]

    def work(collective: Collective) -> None:
        gather = SampleRows(collective, CPU).gather
        bounds = [5 * rank // workers for rank in range(workers + 1)]
        for parts in steps:  # the last worker has none in a short batch
            whole, first = gather(parts[bounds[collective.rank] : bounds[collective.rank + 1]])
            assert first == sum(len(part[0]) for part in parts[: bounds[collective.rank]])
            for place, rows in enumerate(whole):
                assert torch.equal(rows, torch.cat([part[place] for part in parts]))
                assert rows.dtype == parts[0][place].dtype
                assert rows.requires_grad == parts[0][place].requires_grad
                assert rows.is_leaf
                assert rows.grad is None

    run_threads(workers, work)


@pytest.mark.parametrize("workers", [1, 3])
def test_rows_of_another_kind_are_refused_on_every_worker(workers: int) -> None:
    parts = batch([2, 2, 2], 0)
    parts[1][1] = parts[1][1].int()

    def work(collective: Collective) -> str:
        own = parts if workers == 1 else [parts[collective.rank]]
        with pytest.raises(ConfigurationError) as refused:
            SampleRows(collective, CPU).gather(own)
        return str(refused.value)

    for message in run_threads(workers, work):
        assert message.startswith(
            "the rows of microbatch 1 are of another kind than those of microbatch 0: float32 [2, 3] with a"
        )
