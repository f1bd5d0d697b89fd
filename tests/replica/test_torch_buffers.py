"""Buffers that are rebound, or that come to be in forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import unisono
from tests.training.alike import DATA, Counting, check_alike, trained
from unisono.errors import ConfigurationError


@pytest.mark.parametrize("rebind", [False, True])
def test_what_evaluation_does_to_buffers_is_undone(rebind: bool) -> None:
    def evaluate(trainer: unisono.Trainer) -> float:
        before = trainer.model.kept.clone()  # type: ignore[union-attr, operator]
        loss = trainer.evaluate(DATA)["loss"]
        assert torch.equal(trainer.model.kept, before)  # type: ignore[arg-type]
        return loss * 0

    check_alike(lambda: Counting(rebind), between=evaluate)


def test_a_buffer_that_forward_makes_is_refused_by_name() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "center"):
                self.register_buffer("center", x.detach().mean(dim=0))
            output: Tensor = self.linear(x - self.center)
            return output

    with pytest.raises(ConfigurationError, match="came or went after the Trainer was made: center"):
        trained(1, Lazy)
