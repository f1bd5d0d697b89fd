"""One worker's copy of the model, behind the narrow seam through which the step sees it.

A model of another framework, or a compiled or captured microbatch, can take the place of ``TorchReplica``: whatever computes
the gradient, the loss sum and the count of one microbatch under a seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from unisono.errors import ConfigurationError, DataError
from unisono.layout import ALIGNMENT_BYTES
from unisono.replica.randomness import seed_generators
from unisono.replica.tables import Tables

LossFunction = Callable[[Any, Any], Any]
"""``loss(model, batch)``: the microbatch's loss *sum* (scalar tensor) and the *count* to divide by once, globally; or one
scalar tensor, which is the mean over the microbatch's samples."""

Precision = Literal["fp32", "bf16"]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What a microbatch adds to the step besides its gradient."""

    loss: Tensor
    """Summed loss, 0-dim, detached, on the model's device."""
    count: float


class Replica(Protocol):
    """What the step needs of a model."""

    device: torch.device

    def gradient(self, data: Any, *, samples: int, seed: int) -> Leaf:
        """*local*. Computes one microbatch under ``seed``; its gradient is in the parameters' ``.grad`` afterwards."""
        ...


class TorchReplica:
    """A ``torch.nn.Module`` and its loss.

    Args:
        model: The bare model, on ``device``.
        loss: See ``LossFunction``.
        precision: "fp32" leaves dtypes alone; "bf16" runs the loss under autocast to bfloat16.
    """

    def __init__(self, model: nn.Module, loss: LossFunction, *, device: torch.device, precision: Precision) -> None:
        self.model = model
        self.loss = loss
        self.device = device
        self.tables = Tables(model)
        self._autocast = precision == "bf16"
        self._parameters = list(model.named_parameters())
        self._is_first = True

    def gradient(self, data: Any, *, samples: int, seed: int) -> Leaf:
        versions = [parameter._version for _, parameter in self._parameters]
        before = self._gradients() if self._is_first else []
        with self.tables.switched():
            total, count = self._evaluate(data, samples=samples, seed=seed)
            if self._is_first:
                self._check_no_backward(before)
            if total.requires_grad:
                total.backward()  # type: ignore[no-untyped-call]
        if count and not total.requires_grad:
            raise ConfigurationError(
                "the loss does not depend on any trainable parameter: return it as computed from the model's output, "
                "without .detach(), .item() or torch.no_grad()"
            )
        self._check_parameters(versions)
        return Leaf(total.detach(), count)

    def _gradients(self) -> list[tuple[int, int] | None]:
        """What tells whether a gradient has changed: identity and version."""
        gradients = [parameter.grad for _, parameter in self._parameters]
        return [None if gradient is None else (id(gradient), gradient._version) for gradient in gradients]

    def _check_no_backward(self, before: Sequence[tuple[int, int] | None]) -> None:
        self._is_first = False
        if self._gradients() != before:
            raise ConfigurationError(
                "the loss function calls backward(), and every gradient would count twice: return the loss (its sum over the "
                "microbatch, and the count); the trainer calls backward() and steps the optimizer"
            )

    def _check_parameters(self, versions: list[int]) -> None:
        for (name, parameter), version in zip(self._parameters, versions, strict=True):
            if parameter._version != version:
                raise ConfigurationError(
                    f"parameter {name!r} is changed in place by forward or backward, so it would depend on which microbatches a "
                    "worker computes. Embedding(max_norm=...) does this; so do statistics that a model keeps in frozen "
                    "parameters: make these buffers, and change weights between steps, on every worker, in a callback"
                )

    def _evaluate(self, data: Any, *, samples: int, seed: int) -> tuple[Tensor, float]:
        batch = to_device(data, self.device)
        seed_generators(seed, self.device)
        with self.precision():
            returned = self.loss(self.model, batch)
        return sum_and_count(returned, samples, what="loss")

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which forward runs."""
        if self._autocast:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()


def sum_and_count(returned: Any, samples: int, *, what: str) -> tuple[Tensor, float]:
    """The ``(sum, count)`` that a loss or metric function has returned; a lone scalar is a mean over ``samples``.

    Raises:
        ConfigurationError: It is neither a scalar nor such a pair, or the count is negative or not finite.
    """
    pair = isinstance(returned, (tuple, list))
    if pair and len(returned) != 2:
        raise ConfigurationError(_shape_advice(what, f"{len(returned)} values"))
    value, count = returned if pair else (returned, samples)
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or what == "loss":
            raise ConfigurationError(_shape_advice(what, f"a {type(value).__name__}"))
        value = torch.tensor(float(value), dtype=torch.float64)
    if value.numel() != 1:
        raise ConfigurationError(_shape_advice(what, f"a tensor of shape {tuple(value.shape)}"))
    if isinstance(count, Tensor) and count.numel() != 1:
        raise ConfigurationError(_shape_advice(what, f"a count of shape {tuple(count.shape)}"))
    try:
        number = float(count)
    except (TypeError, ValueError):
        raise ConfigurationError(_shape_advice(what, f"a count of type {type(count).__name__}")) from None
    if not math.isfinite(number) or number < 0:
        raise ConfigurationError(f"the {what}'s count is {number}: it must be finite and not negative")
    value = value.reshape(())
    return (value if pair else value * samples), number


def _shape_advice(what: str, got: str) -> str:
    return (
        f"the {what} function returned {got}. Return the pair (sum over the microbatch as a scalar tensor, count to divide "
        'by), for example (F.cross_entropy(output, target, reduction="sum"), len(target)), or one scalar: the mean over '
        "the samples"
    )


def to_device(data: Any, device: torch.device) -> Any:
    """*local*. ``data`` with every tensor on ``device``, at an address that does not change the bits of what is computed
    from it. Understands mappings, sequences, named tuples and objects with ``to(device)``."""
    if isinstance(data, Tensor):
        if device.type != "cpu":
            return data.to(device, non_blocking=True)
        data = data.to(device)
        # Matrix kernels choose their path by alignment: memory that came from numpy, say, starts anywhere.
        if data.layout == torch.strided and data.data_ptr() % ALIGNMENT_BYTES:
            return data.clone()
        return data
    if isinstance(data, Mapping):
        moved = {key: to_device(value, device) for key, value in data.items()}
        return moved if type(data) is dict else _rebuilt(data, moved)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(to_device(value, device) for value in data))
    if isinstance(data, (list, tuple)):
        return type(data)(to_device(value, device) for value in data)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return dataclasses.replace(
            data, **{f.name: to_device(getattr(data, f.name), device) for f in dataclasses.fields(data) if f.init}
        )
    if hasattr(data, "to") and callable(data.to):
        return data.to(device)
    return data


def _rebuilt(data: Mapping[Any, Any], moved: dict[Any, Any]) -> Any:
    try:
        return type(data)(moved)  # type: ignore[call-arg]
    except TypeError as error:
        raise DataError(
            f"a batch holds a {type(data).__name__}, which cannot be rebuilt from a dict: return a dict from collate_fn"
        ) from error
