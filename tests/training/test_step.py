"""What happens in a step, and between two, belongs to the batch and not to the worker."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn

import unisono
from tests.training.alike import INPUTS, Normed, OneByOne, check_alike
from unisono.training.step import _by_dtype


def test_what_the_loop_draws_before_a_step_does_not_depend_on_the_samples_that_this_worker_has_read() -> None:
    check_alike(
        lambda: nn.Linear(6, 4),
        data=OneByOne(),
        between=lambda trainer: (torch.rand(1).item(), random.random(), float(np.random.rand())),
    )


def test_a_forward_in_training_mode_between_steps_moves_the_statistics_alike_for_any_number_of_workers() -> None:
    check_alike(Normed, between=lambda trainer: trainer.model(INPUTS[:8]) is None)


def test_a_buffer_replaced_between_steps_counts_for_every_microbatch() -> None:
    def replace(trainer: unisono.Trainer) -> None:
        trainer.model.norm.running_mean = torch.full((8,), 3.0)  # type: ignore[union-attr]

    check_alike(Normed, between=replace)


def test_gradients_of_one_dtype_are_computed_on_together_whoever_owns_others() -> None:
    groups = _by_dtype([torch.ones(2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16) * 2])
    assert [len(group) for group in groups] == [2, 2]
    assert all(len({gradient.dtype for gradient in group}) == 1 for group in groups)
