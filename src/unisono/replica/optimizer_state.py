"""All that an optimizer keeps, as its ``state_dict()`` tells it, and whether that is all. Everything here is *local*.

Most optimizers keep a state for each parameter and settings for each group of parameters, and nothing else. Others hold another
optimizer, keep values that belong to no parameter, or add entries to their ``state_dict()``. Of these the whole ``state_dict()``
is saved and handed to other workers, which give it to ``load_state_dict()``, as in a plain loop.
"""

from __future__ import annotations

import contextlib
import enum
import math
import random
import types
from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unisono.errors import CheckpointError, ConfigurationError

_STANDARD = {"state", "param_groups"}
_BOOKKEEPING = {"_opt_called", "_step_count", "_warned_capturable_if_run_uncaptured"}
"""What PyTorch keeps for its warnings."""
_HOOKS = ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")
_GENERATORS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)
_SHARED = (*_GENERATORS, type, enum.Enum, nn.Module, types.ModuleType, types.FunctionType, types.MethodType)


def has_state_hooks(optimizer: Optimizer) -> bool:
    """Whether saving and loading the optimizer's state calls hooks."""
    return any(vars(optimizer).get(f"_optimizer_{hook}_hooks") for hook in _HOOKS)


def whole_state(optimizer: Optimizer, parameters: Collection[nn.Parameter]) -> dict[str, Any] | None:
    """The ``state_dict()``, not copied, of an optimizer that keeps more than a state for each of ``parameters`` and settings of
    groups; else None."""
    if has_state_hooks(optimizer):
        return _told(optimizer)
    kind = type(optimizer)
    known = {id(parameter) for parameter in parameters}
    standard = kind.load_state_dict is Optimizer.load_state_dict and all(id(key) in known for key in optimizer.state)
    if standard and kind.state_dict is Optimizer.state_dict:
        return None
    found = _told(optimizer)
    return None if standard and set(found) == _STANDARD else found


def is_code(value: Any) -> bool:
    """Whether a setting is a function, a class or their like: it cannot be saved, and every start makes it anew."""
    return isinstance(value, (enum.Enum, type, types.FunctionType, types.BuiltinFunctionType, types.MethodType))


def _told(optimizer: Optimizer) -> dict[str, Any]:
    """The ``state_dict()``, without code in its groups."""
    found: dict[str, Any] = optimizer.state_dict()
    if "param_groups" not in found:
        return found
    groups = [{key: value for key, value in group.items() if not is_code(value)} for group in found["param_groups"]]
    return {**found, "param_groups": groups}


def load_whole_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Gives the optimizer what ``whole_state`` gave. The tensors become its own.

    Raises:
        CheckpointError: It does not take it.
    """
    code = [{key: value for key, value in group.items() if is_code(value)} for group in optimizer.param_groups]
    try:
        with _dtypes_kept():
            optimizer.load_state_dict(dict(state))
        for group, own in zip(optimizer.param_groups, code, strict=True):
            group.update((key, value) for key, value in own.items() if key not in group)
    except Exception as error:
        raise CheckpointError(
            f"{type(optimizer).__name__}.load_state_dict() does not take what its state_dict() gave "
            f"({type(error).__name__}: {error}): make the optimizer as it was made for this run, or choose another run_dir"
        ) from error


@contextlib.contextmanager
def _dtypes_kept() -> Iterator[None]:
    """PyTorch casts state to the parameter's dtype when it is loaded: float32 beside bfloat16 weights would be rounded."""
    policy = Optimizer._process_value_according_to_param_policy

    def keep(param: Tensor, value: Tensor, *args: Any, **settings: Any) -> Tensor:
        placed = policy(param, value, *args, **settings)
        return placed if placed.dtype == value.dtype else value.to(placed.device)

    Optimizer._process_value_according_to_param_policy = staticmethod(keep)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Optimizer._process_value_according_to_param_policy = staticmethod(policy)  # type: ignore[method-assign]


def generators(optimizer: Optimizer) -> list[Any]:
    """The random generators that the optimizer holds, in a fixed order."""
    found: list[Any] = []
    seen: set[int] = set()

    def look(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, _GENERATORS):
            found.append(value)
        for _, part in _parts(value) or ():
            look(part)

    look(optimizer)
    return found


def seed_generator(generator: Any, seed: int) -> None:
    """Seeds a generator of torch, random or NumPy with 64 bits."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    elif isinstance(generator, np.random.RandomState):
        generator.seed(seed & 0xFFFF_FFFF)
    else:
        generator.bit_generator.state = type(generator.bit_generator)(seed).state


class Twin:
    """The optimizer as it is before its first update: a new start would have it so. What ``load_state_dict`` cannot give it
    afterwards would be gone after a stop.

    Args:
        optimizer: Its parameters, and the modules and functions that it holds, are not copied.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        kept = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        self._twin: Optimizer = _copied(optimizer, dict(kept))

    def check(self) -> None:
        """After the update: whether ``state_dict()`` holds all that the optimizer keeps.

        Raises:
            ConfigurationError: It does not; the message says what is missing.
        """
        name = type(self._optimizer).__name__
        changed = list(dict.fromkeys(_differences(self._optimizer, self._twin, "", set())))
        try:
            load_whole_state(self._twin, _told(self._optimizer))
        except CheckpointError as error:
            raise ConfigurationError(f"after the first update: {error}") from error
        still = set(_differences(self._optimizer, self._twin, "", set()))
        missing = [name for name in changed if name in still]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise ConfigurationError(
                f"{name} keeps what its state_dict() does not hold, or its load_state_dict() does not give back: "
                f"{', '.join(missing[:5])}{more}. A run that is resumed, or whose worker is replaced, would go on to "
                "other weights (in a plain loop, too). Let state_dict() return it and load_state_dict() take it, or train "
                "without run_dir, on workers that are not replaced"
            )


def _parts(value: Any) -> list[tuple[Any, Any]] | None:
    """What a container or an object holds, with the name of each; None if it is neither."""
    if isinstance(value, (Tensor, *_SHARED)):
        return None
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (list, tuple, deque)):
        return list(enumerate(value))
    if hasattr(value, "__dict__") and (isinstance(value, Optimizer) or not callable(value)):
        return [item for item in vars(value).items() if item[0] not in _BOOKKEEPING]
    return None


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of an optimizer: ``copy`` goes by its ``__getstate__``, which leaves out what it has besides state and groups."""
    if id(value) in memo:
        return memo[id(value)]
    parts = _parts(value)
    if isinstance(value, Tensor):
        found: Any = value.detach().clone()
    elif parts is None or (isinstance(value, Mapping) and not isinstance(value, dict)):
        return value
    elif isinstance(value, tuple):
        items = [_copied(part, memo) for _, part in parts]
        found = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    elif isinstance(value, defaultdict):
        found = memo[id(value)] = defaultdict(value.default_factory)
        found.update((key, _copied(part, memo)) for key, part in parts)
    elif isinstance(value, dict):
        found = memo[id(value)] = type(value)()
        found.update((key, _copied(part, memo)) for key, part in parts)
    elif isinstance(value, (list, deque)):
        found = memo[id(value)] = type(value)() if isinstance(value, list) else deque(maxlen=value.maxlen)
        found.extend(_copied(part, memo) for _, part in parts)
    else:
        found = memo[id(value)] = object.__new__(type(value))
        vars(found).update((key, _copied(part, memo)) for key, part in vars(value).items())
    memo[id(value)] = found
    return found


def _differences(here: Any, there: Any, path: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Where two objects that were copies of each other differ."""
    if here is there or (id(here), id(there)) in seen:
        return
    seen.add((id(here), id(there)))
    if isinstance(here, Tensor):
        if not (isinstance(there, Tensor) and _equal(here, there)):
            yield path
        return
    if isinstance(here, _SHARED):
        if is_code(here) and here != there:  # every access makes a bound method anew
            yield path
        return
    mine, other = _parts(here), _parts(there)
    if mine is None or other is None:
        same = type(here) is type(there) and (here == there or (isinstance(here, float) and math.isnan(here)))
        if not same and isinstance(here, (bool, int, float, complex, str, type(None))):
            yield path
        return
    others = dict(other)
    for key, part in mine:
        name = _name(path, key, is_object=not isinstance(here, (Mapping, list, tuple, deque)))
        if key in others:
            yield from _differences(part, others.pop(key), name, seen)
        elif _parts(part) != []:
            yield name
    yield from (_name(path, key, is_object=False) for key, part in others.items() if _parts(part) != [])


def _name(path: str, key: Any, *, is_object: bool) -> str:
    if isinstance(key, Tensor):
        return path  # one name for the same thing of all parameters
    if is_object or not path:
        return f"{path}.{key}" if path else str(key)
    return f"{path}[{key!r}]"


def _equal(here: Tensor, there: Tensor) -> bool:
    """Whether they are equal bit by bit, and lie alike in memory."""
    if (here.dtype, here.shape, here.device, here.layout) != (there.dtype, there.shape, there.device, there.layout):
        return False
    if here.layout is not torch.strided or type(here) is not type(there):
        return bool(torch.equal(here, there))
    if here.numel() > 1 and here.stride() != there.stride():
        return False
    if not here.numel() or here.data_ptr() == there.data_ptr():
        return True
    mine, other = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (here, there))
    return bool(torch.equal(mine, other))
