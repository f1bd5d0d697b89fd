"""Sums of a worker's own microbatches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unisono.collective import Collective
from unisono.replica.parameters import layout_of
from unisono.sync import Exact
from unisono.testing import run_threads


def test_an_absent_complex_gradient_leaves_every_bit_alone() -> None:
    def work(collective: Collective) -> list[Tensor]:
        layout = layout_of([("weight", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))])
        reduction = Exact(replicate_kib=0).bind(layout, collective, 2)
        reduction.begin(2)
        for microbatch in range(*reduction.ranges[collective.rank]):
            # The first microbatch has none, so the sum is that of the second.
            negative = torch.full((2,), complex(-0.0, -0.0), dtype=torch.complex64)
            reduction.add(microbatch, [negative if microbatch else None])
        reduction.launch(b"", torch.empty(0, dtype=torch.float64), [0] * collective.size)
        reduction.notes()
        return [torch.view_as_real(gradient).clone() for gradient in reduction.finish(1.0).gradients]

    for workers in (1, 2):
        found = [gradient for worker in run_threads(workers, work) for gradient in worker]
        assert len(found) == 1
        assert torch.signbit(found[0]).all()
