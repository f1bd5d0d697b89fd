"""What the parameters of a module must be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unisono.errors import ConfigurationError
from unisono.replica.parameters import layout_of


def test_parameters_tied_by_their_memory_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.data = model[0].weight.data
    with pytest.raises(ConfigurationError, match=r"'0.weight' and '1.weight' share memory"):
        layout_of(list(model.named_parameters()))


def test_empty_parameters_share_nothing() -> None:
    assert layout_of([(name, nn.Parameter(torch.empty(0))) for name in "ab"]).nbytes == 0
