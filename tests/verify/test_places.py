"""What Python code keeps, and whether it can be put back."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from unisono.verify.places import Snapshot


class Keeper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.number, self.word, self.nothing = 1, "a", None
        self.items, self.table, self.recent = [1, 2], {"a": 1}, deque([1], maxlen=3)
        self.rng, self.numpy_rng, self.torch_rng = random.Random(1), np.random.default_rng(1), torch.Generator()
        self.old_rng = np.random.RandomState(1)
        self.array = np.zeros(3)
        self.hidden = torch.zeros(3)
        self.child = nn.Linear(2, 2)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "number": lambda k: setattr(k, "number", 2),
    "word": lambda k: setattr(k, "word", "b"),
    "nothing": lambda k: setattr(k, "nothing", torch.ones(1)),
    "items": lambda k: k.items.append(3),
    "table": lambda k: k.table.update(b=2),
    "recent": lambda k: k.recent.append(2),
    "rng": lambda k: k.rng.random(),
    "numpy_rng": lambda k: k.numpy_rng.normal(),
    "old_rng": lambda k: k.old_rng.normal(),
    "torch_rng": lambda k: torch.rand(1, generator=k.torch_rng),
    "array": lambda k: k.array.__setitem__(0, 1.0),
    "hidden": lambda k: k.hidden.add_(1),
    "new": lambda k: setattr(k, "new", 1),
    "child.cache": lambda k: setattr(k.child, "cache", torch.ones(1)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named_and_undone(name: str) -> None:
    keeper = Keeper()
    before = Snapshot({"model": keeper})
    assert before.changed() == []
    CHANGES[name](keeper)
    assert before.changed() == [f"model.{name}"]
    assert before.restore() == [f"model.{name}"]
    assert before.changed() == []


def test_what_was_undone_is_found_again_when_it_happens_again() -> None:
    keeper = Keeper()
    before = Snapshot({"model": keeper})
    for _ in range(3):
        for change in CHANGES.values():
            change(keeper)
        assert len(before.restore()) == len(CHANGES)
    assert keeper.hidden.tolist() == [0.0, 0.0, 0.0]
    assert keeper.numpy_rng.normal() == np.random.default_rng(1).normal()


def test_parameters_and_buffers_are_not_looked_at() -> None:
    norm = nn.BatchNorm1d(2)
    before = Snapshot({"model": norm})
    norm(torch.randn(4, 2))
    assert before.changed() == []
