"""Where Python code keeps state: attributes, containers, global variables, random generators. What a call changed there is found
and can be undone. Parameters and buffers of modules are not looked at: they are state that training knows about.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import pickle
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unisono.verify.watch import is_users, users_modules

_MODULE = set(nn.Module().__dict__)
_GENERATORS: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    torch.Generator: (
        lambda generator: generator.get_state().numpy(),
        lambda generator, state: generator.set_state(torch.from_numpy(state)),
    ),
    random.Random: (random.Random.getstate, random.Random.setstate),
    np.random.Generator: (
        lambda generator: generator.bit_generator.state,
        lambda generator, state: setattr(generator.bit_generator, "state", state),
    ),
    np.random.RandomState: (np.random.RandomState.get_state, np.random.RandomState.set_state),
}
"""How to read and set the state of each kind."""
_CONTAINERS = (list, dict, set, bytearray, collections.deque)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), tuple)
_LARGEST_ARRAY = 4 << 20
"""Bytes of an array above which it is not watched: unlike a tensor it does not tell that it was changed."""
_LONGEST = 4096
"""Elements of a list or dict above which it is not watched."""
_DEEPEST = 5


def roots_of(loss: Any, model: Any) -> dict[str, Any]:
    """Where code that computes the loss may keep state: the model, what the loss function holds, the user's modules."""
    roots: dict[str, Any] = {"model": model}
    if not isinstance(loss, types.FunctionType):
        roots["loss"] = getattr(loss, "__self__", loss)
    function = getattr(loss, "__func__", loss)
    for name, cell in zip(
        getattr(getattr(function, "__code__", None), "co_freevars", ()),
        getattr(function, "__closure__", None) or (),
        strict=False,
    ):
        roots[name] = cell
    for module in users_modules():
        roots[f"module {module.__name__}"] = module
    names = getattr(function, "__globals__", None)  # a script run by runpy: its module has another dictionary
    if names is not None and is_users(names.get("__file__") or "<none>"):
        roots["script"] = names
    return roots


@contextlib.contextmanager
def same_mode_and_buffers(model: nn.Module) -> Iterator[None]:
    """*local*. Afterwards the model's buffers and modes (training or evaluation) are as before."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


@contextlib.contextmanager
def undone(loss: Any, model: nn.Module) -> Iterator[None]:
    """*local*. Afterwards everything that the loss may keep state in is as before, parameters excepted."""
    before = Snapshot(roots_of(loss, model))
    try:
        with same_mode_and_buffers(model):
            yield
    finally:
        before.restore()


class Snapshot:
    """What the places below ``roots`` held at one moment.

    Args:
        roots: Where to look, by name.
        largest: Bytes of a tensor above which only its version is kept, not its content.
    """

    def __init__(self, roots: Mapping[str, Any], *, largest: int = 4 << 20) -> None:
        self._largest = largest
        self._cells: list[tuple[str, Any, Any, Any, Any]] = []
        self._holders: list[tuple[str, Any, set[str]]] = []
        self._seen: set[int] = set()
        self._kept: list[Any] = []  # an object that is gone would give its id to another one
        for name, root in roots.items():
            if isinstance(root, types.CellType):
                try:
                    self._visit(name, root, "cell_contents", root.cell_contents, 0)
                except ValueError:
                    continue  # empty
            else:
                self._enter("" if name.startswith(("module ", "script")) else name, root, 0)

    @property
    def whole(self) -> bool:
        """Whether everything that was found can be put back: nothing too large to watch, nothing inside containers."""
        return not any(
            (isinstance(value, (np.ndarray, *_CONTAINERS)) and content is None)
            or (isinstance(value, _CONTAINERS) and not _flat_plain(value))
            for _, _, _, value, content in self._cells
        )

    def changed(self) -> list[str]:
        """Names of the places that hold something else now."""
        old = [path for path, holder, key, value, content in self._cells if _differs(holder, key, value, content)]
        return [*old, *(path for path, _, _ in self._new())]

    def restore(self) -> list[str]:
        """Puts back what was there; the names of the places where that was needed."""
        found = []
        for path, holder, key, value, content in self._cells:
            if _differs(holder, key, value, content):
                found.append(path)
                _put_back(holder, key, value, content)
        for path, names, key in list(self._new()):
            found.append(path)
            del names[key]
        return found

    def _new(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Attributes and global variables that were not there."""
        for path, thing, keys in self._holders:
            names = thing if isinstance(thing, dict) else getattr(thing, "__dict__", {})
            for key in [key for key, _ in _inside(thing) if key in names and key not in keys]:
                value = names[key]
                if not isinstance(value, (types.ModuleType, types.FunctionType, type)):
                    yield (f"{path}.{key}" if path else key), names, key

    def _enter(self, path: str, thing: Any, depth: int) -> None:
        if id(thing) in self._seen or depth > _DEEPEST:
            return
        self._seen.add(id(thing))
        self._kept.append(thing)
        self._holders.append((path, thing, {key for key, _ in _inside(thing)}))
        for key, value in list(_inside(thing)):
            self._visit(f"{path}.{key}" if path else str(key), thing, key, value, depth)

    def _visit(self, path: str, holder: Any, key: Any, value: Any, depth: int) -> None:
        if isinstance(value, (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type, Optimizer)):
            return
        if isinstance(value, (*_PLAIN, *_CONTAINERS, *_GENERATORS, np.ndarray, Tensor)):
            self._cells.append((path, holder, key, value, _content(value, self._largest)))
        if _has_state(value):
            self._enter(path, value, depth + 1)
            if not isinstance(value, nn.Module):
                self._cells.append((path, holder, key, value, None))


def _inside(thing: Any) -> Iterator[tuple[Any, Any]]:
    """Names and values of what an object holds."""
    if isinstance(thing, nn.Module):
        yield from ((key, value) for key, value in thing.__dict__.items() if key not in _MODULE)
        yield from thing._modules.items()
        return
    names = thing if isinstance(thing, dict) else getattr(thing, "__dict__", {})
    for key, value in names.items():
        if isinstance(key, str) and not (key.startswith("__") and key.endswith("__")):
            yield key, value


def _has_state(value: Any) -> bool:
    """Whether to look inside: modules, and objects of the user's own classes."""
    if isinstance(value, nn.Module):
        return True
    if isinstance(value, (*_PLAIN, *_CONTAINERS, *_GENERATORS, np.ndarray, Tensor)) or not hasattr(value, "__dict__"):
        return False
    module = sys.modules.get(type(value).__module__)
    return type(value).__module__ in ("__main__", "<run_path>") or (
        module is not None and is_users(getattr(module, "__file__", None) or "<none>")
    )


def _now(holder: Any, key: Any) -> Any:
    if isinstance(holder, types.CellType):
        return holder.cell_contents
    if isinstance(holder, nn.Module) and key in holder._modules:
        return holder._modules[key]
    return (holder if isinstance(holder, dict) else holder.__dict__).get(key, _now)


def _differs(holder: Any, key: Any, value: Any, content: Any) -> bool:
    now = _now(holder, key)
    if now is not value:
        return not (isinstance(value, _PLAIN) and type(now) is type(value) and _equal(now, value))
    if content is None:
        return False
    if isinstance(value, Tensor):
        return bool(value._version != content[0])
    if isinstance(value, _CONTAINERS):
        return len(value) != len(content) or any(
            left is not right for left, right in zip(_flat(value), _flat(content), strict=True)
        )
    return bool(_content(value) != content)


def _content(value: Any, largest: int = 4 << 20) -> Any:
    """What to compare a value with and to put back later; None if it is too large, or nothing that changes."""
    if isinstance(value, Tensor):
        small = value.nbytes <= largest and value.layout == torch.strided and not value.is_meta
        return [value._version, value.detach().clone() if small else None]
    if isinstance(value, np.ndarray):
        return value.tobytes() if value.nbytes <= _LARGEST_ARRAY and value.dtype != object else None
    if isinstance(value, _CONTAINERS):
        return copy.copy(value) if len(value) <= _LONGEST else None
    return next((pickle.dumps(get(value)) for kind, (get, _) in _GENERATORS.items() if isinstance(value, kind)), None)


def _put_back(holder: Any, key: Any, value: Any, content: Any) -> None:
    if _now(holder, key) is not value:
        if isinstance(holder, types.CellType):
            holder.cell_contents = value
        else:
            in_modules = isinstance(holder, nn.Module) and key in holder._modules
            names: Any = holder if isinstance(holder, dict) else holder._modules if in_modules else holder.__dict__
            names[key] = value
    if content is None:
        return
    if isinstance(value, Tensor):
        if content[1] is not None and value._version != content[0]:
            with torch.no_grad():
                value.copy_(content[1])
            content[0] = value._version
    elif isinstance(value, np.ndarray):
        value[...] = np.frombuffer(content, value.dtype).reshape(value.shape)
    elif isinstance(value, _CONTAINERS):
        value.clear()
        (value.update if isinstance(value, (dict, set)) else value.extend)(content)
    else:
        next(put for kind, (_, put) in _GENERATORS.items() if isinstance(value, kind))(value, pickle.loads(content))


def _flat(container: Any) -> list[Any]:
    return [item for pair in container.items() for item in pair] if isinstance(container, dict) else list(container)


def _flat_plain(container: Any) -> bool:
    return all(isinstance(item, (bool, int, float, complex, str, bytes, type(None))) for item in _flat(container))


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # a tuple of arrays
        return False
