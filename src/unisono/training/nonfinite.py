"""What a worker says when the loss or the gradient of a step is not finite: which microbatch it was, and its samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from unisono.collective import Collective
from unisono.data.batch import Batch
from unisono.errors import DataError
from unisono.replica.base import Replica
from unisono.replica.buffers import BufferFold
from unisono.sync.base import GradientSink


def raise_bad_loss(losses: Sequence[float], batch: Batch, step: int, collective: Collective) -> NoReturn:
    """*collective*.

    Args:
        losses: Loss sum of each microbatch; if all are finite, there is no count to divide by.

    Raises:
        DataError: Always.
    """
    for microbatch, loss in enumerate(losses):
        if math.isfinite(loss):
            continue
        samples = b"".join(collective.all_gather_bytes(_samples_of(batch, microbatch).encode())).decode()
        raise DataError(
            f"step {step}: the loss of microbatch {microbatch} is {loss}{samples}. Nothing was updated. Look at these "
            "samples, lower the learning rate, or set max_grad_norm"
        )
    raise DataError(
        f"step {step}: the count over the whole batch of {batch.samples} samples is 0, so there is nothing to divide "
        "by. Nothing was updated. Does the loss count only samples that are masked out?"
    )


def raise_bad_gradient(
    norms: Sequence[float],
    batch: Batch,
    step: int,
    collective: Collective,
    *,
    replica: Replica,
    buffers: BufferFold,
    seeds: Sequence[int],
) -> NoReturn:
    """*collective*. Computes the step's microbatches once more, to name the one with the bad gradient.

    Args:
        norms: Of each slot's gradient.
        seeds: Of this worker's microbatches.

    Raises:
        DataError: Always.
    """
    names = [slot.name for slot, norm in zip(replica.layout.slots, norms, strict=True) if not math.isfinite(norm)]
    buffers.restore()
    search = _Search(buffers)
    replica.gradients(batch.parts, seeds, search)
    guilty = "" if search.found is None else f"microbatch {search.found}{_samples_of(batch, search.found)}"
    found = [text.decode() for text in collective.all_gather_bytes(guilty.encode()) if text]
    where = found[0] if found else "the sum over microbatches (each alone is finite)"
    raise DataError(
        f"step {step}: the gradient of {', '.join(names[:3])}{' and others' if len(names) > 3 else ''} is not finite; it "
        f"comes from {where}. Nothing was updated. Look at these samples, lower the learning rate, or set max_grad_norm"
    )


class _Search(GradientSink):
    """A sink that finds the first microbatch with a gradient that is not finite."""

    def __init__(self, buffers: BufferFold) -> None:
        self.found: int | None = None
        self._buffers = buffers

    def add(self, microbatch: int, gradients: Sequence[Tensor | None]) -> None:
        self._buffers.restore()
        if self.found is None and any(g is not None and not torch.isfinite(g.to_dense()).all() for g in gradients):
            self.found = microbatch


def _samples_of(batch: Batch, microbatch: int) -> str:
    for part in batch.parts:
        if part.number == microbatch:
            return f" (samples {', '.join(map(str, part.indices[:8]))}{', ...' if len(part.indices) > 8 else ''})"
    return ""
