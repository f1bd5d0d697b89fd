"""A tool that ends a run early: the run directory is as after any finished run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from unisono import Batch, Trainer
from unisono.training.observer import Observer

DATA = TensorDataset(torch.linspace(0, 1, 24).view(8, 3), torch.linspace(1, 0, 8).view(8, 1))


class TwoSteps(Observer):
    def around_batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        return islice(batches, 2)


class Observed(Trainer):
    observer = TwoSteps()


def loss(model: Any, batch: Any) -> tuple[torch.Tensor, int]:
    return F.mse_loss(model(batch[0]), batch[1], reduction="sum"), len(batch[0])


@pytest.mark.parametrize("own_loop", [False, True], ids=["fit", "own loop"])
def test_an_observer_that_ends_the_batches_ends_the_run_with_all_its_files(tmp_path: Path, own_loop: bool) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Observed(model, optimizer, loss, batch_size=2, microbatches=2, run_dir=tmp_path / "run")
    if own_loop:
        for batch in trainer.batches(DATA, epochs=3):
            trainer.step(batch)
    else:
        assert trainer.fit(DATA, epochs=3).steps == 2
    assert trainer.position.step == 2
    assert {"model.safetensors", "summary.json", "metrics.jsonl"} <= {path.name for path in (tmp_path / "run").iterdir()}
