"""The user's own optimizer: what it must be, and its state, of which each worker holds the part that it owns."""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, SparseAdam

from unisono.collective import Collective
from unisono.errors import CheckpointError, ConfigurationError
from unisono.layout import Layout


def check_optimizer(optimizer: Any, trainable: Iterable[tuple[str, nn.Parameter]], model: nn.Module) -> None:
    """*local*. Whether ``optimizer`` updates each trainable parameter, on its own, and nothing else.

    Raises:
        ConfigurationError: It does not; the message says why and what to do.
    """
    if not isinstance(optimizer, Optimizer):
        raise ConfigurationError(f"optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer")
    step = inspect.signature(type(optimizer).step).parameters.get("closure")
    if isinstance(optimizer, LBFGS) or (step is not None and step.default is inspect.Parameter.empty):
        raise ConfigurationError(
            f"{type(optimizer).__name__} evaluates the loss several times a step and mixes all parameters in its update, so "
            "their update cannot be shared out to owners: use an optimizer that updates each parameter on its own (SGD, "
            "AdamW, Muon, ...)"
        )
    if isinstance(optimizer, SparseAdam):
        raise ConfigurationError(
            "SparseAdam needs sparse gradients, and gradients are dense once they are summed over workers: use Adam or Adagrad"
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    known = {id(parameter) for parameter in model.parameters()}
    if held and not held & known:
        raise ConfigurationError(
            "the optimizer holds no parameter of the model: it was made from another model, or from a copy. Make it from this "
            "very model's parameters"
        )
    missing = [name for name, parameter in trainable if id(parameter) not in held]
    if missing:
        raise ConfigurationError(
            f"the optimizer misses {len(missing)} trainable parameter{'s'[: len(missing) != 1]}: {_some(missing)}. Pass "
            "model.parameters(), or freeze them with requires_grad_(False)"
        )
    foreign = [
        f"group {number}, shape {tuple(parameter.shape)}"
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
        if id(parameter) not in known
    ]
    if foreign:
        raise ConfigurationError(
            f"the optimizer holds {len(foreign)} parameter{'s'[: len(foreign) != 1]} that the model does not have: "
            f"{_some(foreign)}. Make the optimizer from this very model's parameters"
        )


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """*local*. The parameter groups without their parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def copied_hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """*local*. ``hyperparameters`` that later steps do not change."""
    return [
        {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()}
        for group in hyperparameters(optimizer)
    ]


def set_hyperparameters(optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
    """*local*. Gives each parameter group its saved settings back."""
    if len(groups) != len(optimizer.param_groups):
        raise CheckpointError(
            f"the checkpoint has {len(groups)} parameter groups, the optimizer {len(optimizer.param_groups)}: make the "
            "optimizer as it was made for this run, or choose another run_dir"
        )
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key, value in saved.items():
            # A tensor learning rate may be captured in a graph or held by a scheduler: keep the object.
            if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                group[key].copy_(value)
            else:
                group[key] = value


def put_back_hyperparameters(optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
    """*local*. Each parameter group as ``copied_hyperparameters`` found it: what has been added since then goes."""
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key in [key for key in group if key != "params" and key not in saved]:
            del group[key]
    set_hyperparameters(optimizer, groups)


def owned_state(optimizer: Optimizer, layout: Layout, owned: Iterable[int]) -> dict[str, Any]:
    """*local*. The optimizer's state of the owned parameters (slot indices), by parameter name."""
    return {
        layout.names[index]: dict(optimizer.state[layout.parameters[index]])
        for index in owned
        if layout.parameters[index] in optimizer.state
    }


def full_state(optimizer: Optimizer, layout: Layout) -> dict[int, dict[str, Any]]:
    """*local*. All state that this worker holds, by slot."""
    return {
        index: dict(optimizer.state[parameter])
        for index, parameter in enumerate(layout.parameters)
        if parameter in optimizer.state
    }


def set_full_state(optimizer: Optimizer, layout: Layout, state: Mapping[int, Mapping[str, Any]]) -> None:
    """*local*. Takes over what ``full_state`` gave on another worker."""
    named = {layout.names[index]: values for index, values in state.items()}
    set_state(optimizer, layout, named, range(len(layout.parameters)))


def settle_state(optimizer: Optimizer, layout: Layout, owners: Sequence[Sequence[int]], collective: Collective) -> None:
    """*collective*. Leaves each worker with the state of the parameters that it owns, and of no other trainable one.

    An optimizer may come with state: made for every parameter at once (Adagrad), loaded, or left by an earlier Trainer, whose
    owners were others. An owner who holds some keeps it, else the first worker who does hands it over.

    Args:
        owners: For each rank, the slot indices that it owns.
    """
    mine = [index for index, parameter in enumerate(layout.parameters) if parameter in optimizer.state]
    holders = [set(json.loads(text)) for text in collective.all_gather_bytes(json.dumps(mine).encode())]
    source = {
        index: next(rank for rank, held in enumerate(holders) if index in held)
        for owner, owned in enumerate(owners)
        for index in owned
        if index not in holders[owner] and any(index in held for held in holders)
    }
    if source:
        buffer = io.BytesIO()
        sent = {index: dict(optimizer.state[layout.parameters[index]]) for index in mine if source.get(index) == collective.rank}
        torch.save(sent, buffer)
        received: dict[int, Any] = {}
        for data in collective.all_gather_bytes(buffer.getvalue()):
            received |= torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        for index in set(owners[collective.rank]) & received.keys():
            parameter = layout.parameters[index]
            group = groups[id(parameter)]
            optimizer.state[parameter] = {key: _placed(value, parameter, key, group) for key, value in received[index].items()}
    for index in set(mine) - set(owners[collective.rank]):
        del optimizer.state[layout.parameters[index]]


def set_state(optimizer: Optimizer, layout: Layout, state: Mapping[str, Mapping[str, Any]], owned: Iterable[int]) -> None:
    """*local*. Gives the owned parameters (slot indices) their saved state; the others have none."""
    optimizer.state.clear()
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for index in owned:
        parameter = layout.parameters[index]
        saved = state.get(layout.names[index])
        if saved is not None:
            group = groups[id(parameter)]
            optimizer.state[parameter] = {key: _placed(value, parameter, key, group) for key, value in saved.items()}


def _placed(value: Any, parameter: nn.Parameter, key: str, group: Mapping[str, Any]) -> Any:
    """A saved value where torch.optim keeps it: beside the parameter, but step counts on the CPU unless kernels read them."""
    if not isinstance(value, Tensor):
        return value
    if value.shape == parameter.shape and value.dim() > 0:
        # With the parameter's strides: reductions over a tensor see its memory order.
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    if key == "step" and not (group.get("capturable") or group.get("fused")):
        return value.clone()
    return value.to(parameter.device, copy=True)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
