"""The user's own ``torch.optim`` optimizer: what it must be, and what belongs to it besides its parameters."""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import LBFGS, Adafactor, Optimizer, SparseAdam
from torch.optim import optimizer as torch_optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from unisono.errors import CheckpointError, ConfigurationError
from unisono.replica.optimizer_state import has_state_hooks, is_code

_APART = frozenset(
    {
        *(optim.ASGD, optim.SGD, optim.Adadelta, optim.Adafactor, optim.Adagrad, optim.Adam, optim.Adamax, optim.AdamW),
        *(optim.Muon, optim.NAdam, optim.RAdam, optim.RMSprop, optim.Rprop),
    }
)
"""Known by reading (PyTorch 2.13) to update each parameter from its own gradient, state and settings; drawing nothing."""


def is_known(optimizer: Optimizer) -> bool:
    """*local*. Whether ``optimizer`` is one of those that are known by reading, and nobody's hooks take part in its state."""
    return type(optimizer) in _APART and not has_state_hooks(optimizer)


def updates_apart(optimizer: Optimizer) -> bool:
    """*local*. Whether ``optimizer`` is known to update each parameter on its own. No experiment tells: some couple parameters at
    large gradients only, some at small ones, some at their own learning rate only. So a subclass is not known, and neither is
    one whose step calls somebody's hooks."""
    if not is_known(optimizer) or calls_hooks(optimizer):
        return False
    step = vars(optimizer).get("step")
    if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):
        return False  # somebody has put another step in its place
    # Where eps[0] is None, Adafactor takes the epsilon of the first dtype that it meets, for parameters of other dtypes, too.
    return not isinstance(optimizer, Adafactor) or not any(
        group["eps"][0] is None and len({parameter.dtype for parameter in group["params"]}) > 1
        for group in optimizer.param_groups
    )


def calls_hooks(optimizer: Optimizer) -> bool:
    """*local*. Whether the optimizer's step calls hooks, which may do anything."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )


def check_scheduler(scheduler: Any) -> None:
    """*local*. Whether ``scheduler`` can be stepped without arguments.

    Raises:
        ConfigurationError: It cannot.
    """
    if scheduler is None or isinstance(scheduler, ReduceLROnPlateau):
        return
    needed = [
        parameter.name
        for parameter in inspect.signature(scheduler.step).parameters.values()
        if parameter.default is inspect.Parameter.empty and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    if needed:
        raise ConfigurationError(
            f"scheduler is a {type(scheduler).__name__} whose step() needs {', '.join(needed)}, but unisono calls step() after "
            "each update, without arguments: give a torch.optim.lr_scheduler, or call this one in a callback's on_step"
        )


def check_optimizer(optimizer: Any, trainable: Iterable[tuple[str, nn.Parameter]], model: nn.Module) -> None:
    """*local*. Whether ``optimizer`` updates each trainable parameter, on its own, and nothing else.

    Raises:
        ConfigurationError: It does not; the message says why and what to do.
    """
    if isinstance(optimizer, (list, tuple, dict)):
        raise ConfigurationError(
            f"optimizer is a {type(optimizer).__name__}: give one torch.optim.Optimizer. Several become one by a class "
            'whose step() calls theirs and whose state_dict() holds theirs: see "Several optimizers" in docs/guide.md'
        )
    if not isinstance(optimizer, Optimizer):
        raise ConfigurationError(f"optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer")
    step = inspect.signature(type(optimizer).step).parameters.get("closure")
    if isinstance(optimizer, LBFGS) or (step is not None and step.default is inspect.Parameter.empty):
        raise ConfigurationError(
            f"{type(optimizer).__name__} evaluates the loss several times a step, by a closure; unisono evaluates each "
            "microbatch once, and calls step() without one: use an optimizer that needs no closure (SGD, AdamW, Muon, ...)"
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
            f"the optimizer lacks {len(missing)} trainable parameter{'s'[: len(missing) != 1]}: {_some(missing)}. Pass "
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
            f"{_some(foreign)}. Make the optimizer from this very model's parameters. If the loss function has parameters of its "
            "own, make it a part of the model (model.criterion = criterion)"
        )


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """*local*. Copies of the parameter groups, without their parameters and without code, which every start makes anew."""
    return [
        {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in group.items()
            if key != "params" and not is_code(value)
        }
        for group in optimizer.param_groups
    ]


_PROGRESS = {"_step_count", "_last_lr", "last_epoch", "best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i"}


def schedule_settings(scheduler: Any) -> dict[str, Any]:
    """*local*. The plain settings of a scheduler that has just been made (``T_max``, ``total_steps``): a checkpoint of a run with
    others would put its own in their place."""
    state = scheduler.state_dict() if scheduler is not None else {}
    plain = (bool, int, float, str, type(None))
    return {
        name: repr(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in state.items()
        if type(value) in plain and name not in _PROGRESS and not name.startswith("_")
    }


def check_schedule(scheduler: Any, steps: int) -> None:
    """*local*. Whether a scheduler that knows how long it is, as ``OneCycleLR`` does, lasts for so many steps.

    Raises:
        ConfigurationError: It would fail in the middle.
    """
    length = getattr(scheduler, "total_steps", None)
    if isinstance(length, int) and length < steps:
        raise ConfigurationError(
            f"the {type(scheduler).__name__} ends after total_steps={length}, and this run has {steps} steps: make it for all of "
            "them. A run that has begun keeps its schedule: for a longer one choose another run_dir"
        )


def set_hyperparameters(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]], *, exactly: bool) -> None:
    """*local*. Gives each parameter group its saved settings back.

    Args:
        exactly: Whether settings that have been added since then go.

    Raises:
        CheckpointError: There is another number of groups.
    """
    if len(groups) != len(optimizer.param_groups):
        raise CheckpointError(
            f"the checkpoint has {len(groups)} parameter groups, the optimizer {len(optimizer.param_groups)}: make the "
            "optimizer as it was made for this run, or choose another run_dir"
        )
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key in [key for key in group if exactly and key != "params" and key not in saved and not is_code(group[key])]:
            del group[key]
        for key, value in saved.items():
            # A tensor learning rate may be captured in a graph or held by a scheduler: keep the object.
            if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                group[key].copy_(value)
            else:
                group[key] = value


def placed(value: Any, parameter: nn.Parameter, key: str, group: Mapping[str, Any], *, strides: bool) -> Any:
    """*local*. A copy of a saved value where torch.optim keeps it: beside the parameter, but step counts on the CPU unless
    kernels read them."""
    if type(value) in (list, tuple, deque):
        items = (placed(item, parameter, key, group, strides=strides) for item in value)
        return deque(items, value.maxlen) if isinstance(value, deque) else type(value)(items)
    if type(value) is dict:
        return {name: placed(item, parameter, key, group, strides=strides) for name, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    if not strides and value.shape == parameter.shape and value.dim() > 0:
        # With the parameter's strides: reductions over a tensor see its memory order.
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    stays = key == "step" and not (group.get("capturable") or group.get("fused"))
    device = value.device if stays else parameter.device
    if value.layout is not torch.strided or value.is_contiguous():
        return value.to(device, copy=True)
    # A copy by PyTorch's own rules would close gaps.
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
