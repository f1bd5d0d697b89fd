"""The parameters of a ``torch.nn.Module``: what they must be, and how they move into flat memory. Everything here is *local*."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from unisono.errors import ConfigurationError
from unisono.layout import Allocate, Layout, ParameterSpec

Named = Sequence[tuple[str, nn.Parameter]]


def plain_name(name: str) -> str:
    """The name of a part of a model without what ``torch.compile`` puts into it: compiled or not, it is the same part."""
    return name.replace("_orig_mod.", "")


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """All parameters, each once, by plain name."""
    return [(plain_name(name), parameter) for name, parameter in model.named_parameters()]


def _check_observers(model: nn.Module) -> None:
    within: tuple[str, ...] = ()  # what belongs to a module that turns its observer on and off
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}  # to import them takes a second
        if name.startswith(within) or not kinds & {"ObserverBase", "FakeQuantizeBase"}:
            continue
        if "observer_enabled" in module._buffers:
            within = (*within, f"{name}.")
        if bool(module._buffers.get("observer_enabled", torch.ones(1))[0]):
            raise ConfigurationError(
                f"module {name!r} is a {type(module).__name__} that observes ranges for quantization: extremes over what it has "
                "seen, which microbatches of one step see differently. Let it observe some batches first, and turn it off before "
                "Trainer(...): model.apply(torch.ao.quantization.disable_observer)"
            )


def check_model(model: Any) -> None:
    """Whether ``model`` is a bare module that data parallelism can train exactly, on one device.

    Raises:
        ConfigurationError: It is not; the message says why.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        raise ConfigurationError(f"model is wrapped in {type(model).__name__}: pass the bare module, model.module")
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise ConfigurationError(
                f"module {name!r} is a SyncBatchNorm, whose statistics depend on the number of workers: use BatchNorm, which "
                "sees one microbatch on any number of workers"
            )
    _check_observers(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta and all(other.is_meta for other in model.parameters()):
            raise ConfigurationError(
                f"parameter {name!r} is on the meta device, where tensors have no values: give the model values first, with "
                "model.to_empty(device=...) and its own initialization"
            )
    places = {parameter.device.type: name for name, parameter in model.named_parameters()}
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise ConfigurationError(
            f"parameters lie on two devices ({', '.join(f'{name!r} on {place}' for place, name in places.items())}): data "
            "parallelism needs the whole model on each worker's one device; move it with model.to(device)"
        )


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that training changes, by name."""
    return [(name, parameter) for name, parameter in named_parameters(model) if parameter.requires_grad]


def layout_of(named: Named) -> Layout:
    """Where parameters are to lie; slot ``i`` is that of ``in_slot_order(layout, named)[i]``.

    Args:
        named: Floating point (or complex) and dense, each once.

    Raises:
        ConfigurationError: A parameter cannot be trained; the message names it.
    """
    for name, parameter in named:
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ConfigurationError(f"parameter {name!r} is lazy and has no shape yet: run the model once before Trainer(...)")
        if parameter.is_meta:
            raise ConfigurationError(f"parameter {name!r} is on the meta device: materialise the model before Trainer(...)")
        if parameter.layout != torch.strided:
            raise ConfigurationError(f"parameter {name!r} has layout {parameter.layout}: only dense parameters can be trained")
    first_at: dict[int, str] = {}
    for name, parameter in named:
        other = first_at.setdefault(parameter.data_ptr(), name) if parameter.numel() else name
        if other != name:
            raise ConfigurationError(
                f"parameters {other!r} and {name!r} share memory, but are two Parameter objects, which would no longer be tied. "
                "Tie them by assigning the Parameter itself (decoder.weight = encoder.weight), not its .data"
            )
    return Layout(_spec(name, parameter) for name, parameter in named)


def in_slot_order(layout: Layout, named: Named) -> list[nn.Parameter]:
    """The parameters of ``layout``, by slot."""
    by_name = dict(named)
    return [by_name[name] for name in layout.names]


def adopt(layout: Layout, parameters: Sequence[nn.Parameter], allocate: Allocate) -> list[Tensor]:
    """Moves the parameters, by slot, into flat memory; the ``Parameter`` objects stay the same.

    Returns:
        The flat tensors, one per block, of which the parameters are now views.
    """
    flats = layout.flats(allocate)
    with torch.no_grad():
        for parameter, view in zip(parameters, layout.views(flats), strict=True):
            view.copy_(parameter.data)
            parameter.data = view
    return flats


def _spec(name: str, parameter: nn.Parameter) -> ParameterSpec:
    # The shape's own dense strides (channels_last, say) are kept: kernels choose by them.
    stride = torch.empty_like(parameter, device="meta").stride()
    return ParameterSpec(name, tuple(parameter.shape), stride, parameter.dtype, parameter.device)
