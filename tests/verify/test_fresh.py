"""A dataset that reading does not change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from unisono.verify.fresh import fresh


class Changing:
    def __init__(self, inside: Any) -> None:
        self.values, self.inside = torch.ones(4, 2), inside

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.values[index] *= 2
        self.inside[0][0] += 1
        return self.values[index], self.inside[0][0]


@pytest.mark.parametrize("inside", [np.zeros((1, 1), dtype=int), [[0]]], ids=["seen whole", "nested: read in a fork"])
def test_a_fresh_dataset_gives_the_same_sample_again_and_names_what_reading_changes(inside: Any) -> None:
    changed: list[str] = []
    dataset = fresh(Changing(inside), changed)
    for _ in range(3):
        values, count = dataset[1]
        assert (values.tolist(), int(count)) == ([2.0, 2.0], 1)
    assert "dataset.values" in changed
