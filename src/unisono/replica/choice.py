"""Which replica a model gets. Frameworks that the user's script has not imported stay unimported."""

from __future__ import annotations

import sys
from typing import Any

import torch

from unisono.errors import ConfigurationError
from unisono.replica.base import LossFunction, Replica
from unisono.replica.torch_replica import Precision, TorchReplica
from unisono.replica.whole_batch import WholeBatchLoss, WholeBatchReplica


def foreign_replica(
    model: Any, optimizer: Any, loss: LossFunction | None, *, scheduler: Any, precision: Precision
) -> Replica | None:
    """*local*. The replica of a model of another framework than PyTorch, or one that is given as it is; None: it is PyTorch's.

    Raises:
        ConfigurationError: It cannot be trained exactly, or arguments belong to a PyTorch model.
    """
    if isinstance(model, Replica):
        if any(given is not None for given in (optimizer, loss, scheduler)):
            raise ConfigurationError(
                f"a {type(model).__name__} has its own optimizer, loss and schedule: pass None for optimizer and loss"
            )
        return model
    keras = sys.modules.get("keras")
    if keras is None or not isinstance(model, keras.Model) or keras.backend.backend() == "torch":
        return None  # on that backend a model is a torch.nn.Module
    if scheduler is not None:
        raise ConfigurationError(
            "a Keras optimizer has its schedule in it, and scheduler is for PyTorch: pass keras.optimizers.schedules... as the "
            "optimizer's learning_rate"
        )
    if precision != "fp32":
        raise ConfigurationError(
            f'precision="{precision}" is for PyTorch: call keras.mixed_precision.set_global_policy("mixed_bfloat16") '
            "before you make a Keras model"
        )
    from unisono.replica.keras_replica import KerasReplica

    return KerasReplica(model, optimizer, loss)


def torch_replica(
    model: Any, optimizer: Any, loss: LossFunction | None, *, scheduler: Any, device: torch.device, precision: Precision
) -> Replica:
    """*local*. The replica of a PyTorch model.

    Raises:
        ConfigurationError: Model or optimizer cannot be trained exactly.
    """
    if loss is None:
        raise ConfigurationError("loss is None: pass a function loss(model, batch)")
    if isinstance(loss, WholeBatchLoss):
        return WholeBatchReplica(model, optimizer, loss, scheduler=scheduler, device=device, precision=precision)
    return TorchReplica(model, optimizer, loss, scheduler=scheduler, device=device, precision=precision)
