"""Which replica there is for what a user gives to the trainer. *Local.*"""

from __future__ import annotations

from typing import Any

import torch

from unisono.errors import ConfigurationError
from unisono.replica.base import LossFunction, Replica
from unisono.replica.torch_replica import Precision, TorchReplica


def replica_for(
    model: Any,
    optimizer: Any,
    loss: LossFunction | None,
    *,
    scheduler: Any = None,
    device: torch.device,
    precision: Precision = "fp32",
) -> Replica:
    """A ``TorchReplica`` of a module; a ``Replica`` is taken as it is, with what belongs to it.

    Raises:
        ConfigurationError: Model or optimizer cannot be trained exactly.
    """
    if isinstance(model, Replica):
        if any(given is not None for given in (optimizer, loss, scheduler)):
            raise ConfigurationError(
                f"a {type(model).__name__} has its own optimizer, loss and schedule: pass None for optimizer and loss"
            )
        return model
    if loss is None:
        raise ConfigurationError("loss is None: pass a function loss(model, batch)")
    return TorchReplica(model, optimizer, loss, scheduler=scheduler, device=device, precision=precision)
