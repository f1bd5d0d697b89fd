"""Training as everybody writes it: one device, whole batches. The standard that unisono is measured against.

Imports nothing of unisono, and shall never do so. Which samples make up each batch is data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import default_collate


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Any, Any], Any],
    dataset: Any,
    batches: Iterable[Sequence[int]],
    *,
    collate: Callable[[list[Any]], Any] = default_collate,
    scheduler: Any = None,
    max_grad_norm: float | None = None,
) -> tuple[list[float], list[float]]:
    """Steps once for each list of sample indices in ``batches``.

    Returns:
        Each step's mean loss, and its gradient norm before clipping.
    """
    losses: list[float] = []
    norms: list[float] = []
    for indices in batches:
        optimizer.zero_grad()
        returned = loss(model, collate([dataset[index] for index in indices]))
        mean = returned[0] / returned[1] if isinstance(returned, tuple) else returned
        mean.backward()
        limit = float("inf") if max_grad_norm is None else max_grad_norm
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), limit)))
        optimizer.step()
        losses.append(float(mean.detach()))
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(losses[-1])
        elif scheduler is not None:
            scheduler.step()
    return losses, norms
