"""PyTorch's random draws, replaced by constants, so that computations that draw at other times can be compared."""

from __future__ import annotations

import contextlib
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten


def constant_draws() -> contextlib.AbstractContextManager[Any]:
    """*local*. Within, uniform numbers are 1/2, normal ones their mean, coins show heads, and permutations leave all in place."""
    return cast("contextlib.AbstractContextManager[Any]", _ConstantDraws())  # type: ignore[no-untyped-call]


class _ConstantDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in _IN_PLACE:
            target: Tensor = args[0]
            return target.copy_(_IN_PLACE[packet](target, *args[1:], **{k: v for k, v in kwargs.items() if k != "generator"}))
        if packet in _NEW:
            # Made as PyTorch makes it (dtype, layout, device), then overwritten.
            value = func(*args, **kwargs)
            return value.copy_(torch.full_like(value, _NEW[packet])) if isinstance(value, Tensor) else value
        if packet is _aten.native_dropout:
            data, share, train = args[:3]
            if not train:
                return func(*args, **kwargs)
            return data / (1 - share) if share < 1 else data * 0, torch.ones_like(data, dtype=torch.bool)
        if packet is _aten.randperm:
            value = func(*args, **kwargs)
            return value.copy_(torch.arange(value.numel(), device=value.device))
        if packet in (_aten.randint, _aten.randint_like):
            value = func(*args, **kwargs)
            return value.fill_(_lowest(func, args))
        if packet is _aten.bernoulli:
            return torch.ones_like(args[0])
        if packet is _aten.multinomial:
            value = func(*args, **kwargs)
            return value.copy_(torch.arange(value.shape[-1], device=value.device).expand_as(value))
        if packet is _aten.normal and isinstance(args[0], Tensor):
            return args[0].clone()
        if packet is _aten.normal:
            value = func(*args, **kwargs)
            return value.fill_(args[0] if isinstance(args[0], (int, float)) else 0.0)
        return func(*args, **kwargs)


def _lowest(func: Any, args: tuple[Any, ...]) -> int:
    """The low end of ``randint([low,] high, size)`` and ``randint_like(tensor, [low,] high)``."""
    numbers = [value for value in args if isinstance(value, int) and not isinstance(value, bool)]
    return numbers[0] if len(numbers) > 1 else 0


_IN_PLACE: dict[Any, Any] = {
    _aten.uniform_: lambda target, low=0.0, high=1.0: torch.full_like(target, (low + high) / 2),
    _aten.normal_: lambda target, mean=0.0, std=1.0: torch.full_like(target, mean),
    _aten.bernoulli_: lambda target, p=0.5: torch.ones_like(target),
    _aten.exponential_: lambda target, rate=1.0: torch.full_like(target, 1 / rate),
    _aten.random_: lambda target, *bounds, **named: torch.zeros_like(target),
    _aten.cauchy_: lambda target, median=0.0, sigma=1.0: torch.full_like(target, median),
    _aten.log_normal_: lambda target, mean=1.0, std=2.0: torch.ones_like(target),
    _aten.geometric_: lambda target, p: torch.ones_like(target),
}
_NEW: dict[Any, float] = {_aten.rand: 0.5, _aten.rand_like: 0.5, _aten.randn: 0.0, _aten.randn_like: 0.0}
