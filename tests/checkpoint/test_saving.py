"""Checkpoints that a trainer writes on demand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import unisono
from tests.training.alike import squares
from unisono.errors import CheckpointError


def test_extra_state_that_no_tensor_holds_is_refused_by_name(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

    model = Extra(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = unisono.Trainer(model, optimizer, squares, batch_size=10, microbatches=4, run_dir=tmp_path)
    with pytest.raises(CheckpointError, match="cannot save '_extra_state' of the state dict: it is a dict"):
        trainer.save()


def test_after_a_failed_checkpoint_the_next_one_is_written_once_the_cause_is_gone(tmp_path: Path) -> None:
    model = nn.Linear(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = unisono.Trainer(model, optimizer, squares, batch_size=10, microbatches=4, run_dir=tmp_path)
    in_the_way = tmp_path / "checkpoints"
    in_the_way.touch()
    with pytest.raises(CheckpointError):
        trainer.save()
    in_the_way.unlink()
    trainer.save()
    assert (in_the_way / "step-0" / "checkpoint.json").exists()
