"""State that belongs to the user's code: ``trainer.state``, and what callbacks keep. Everything here is *local*."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from unisono.errors import ConfigurationError
from unisono.guard.replicas import digest_of
from unisono.training.callbacks import Callback

if TYPE_CHECKING:
    from unisono.training.trainer import Trainer

_PLAIN = (bool, int, float, str, type(None))


class UserState:
    """See the module.

    Args:
        callbacks: In the order in which they are called.

    Attributes:
        values: ``trainer.state``: always the same dict.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.values: dict[str, Any] = {}
        self._all = callbacks
        self._callbacks = _by_name(callbacks)
        self._has_begun = False
        self._resumed: dict[str, Any] | None = None

    def edits_weights(self) -> bool:
        """Whether a callback may change weights."""
        return any(callback.edits_weights for callback in self._all)

    def begin(self, trainer: Trainer) -> None:
        """Steps will follow; the first time callbacks are told."""
        if not self._has_begun:
            self._has_begun = True
            for callback in self._all:
                callback.on_begin(trainer)

    # ------------------------------------------------------------------ kept, handed over, taken over

    def describe(self) -> dict[str, Any]:
        """All of it, for a checkpoint or for ``adopt`` on another worker.

        Raises:
            ConfigurationError: Some of it can be neither saved nor sent; it is named.
        """
        return {"values": _copied(self.values, "trainer.state"), "callbacks": dict(self._of_callbacks())}

    def adopt(self, description: Mapping[str, Any]) -> None:
        """Takes over what ``describe`` gave."""
        self._put(description["values"])
        for name, state in description["callbacks"].items():
            if name in self._callbacks:
                self._callbacks[name].load_state_dict(state)
            else:
                warnings.warn(f"the run has state of {name}, which is not among the callbacks now: it is dropped", stacklevel=2)

    def resume(self, description: Mapping[str, Any]) -> None:
        """The same from a checkpoint. What the script puts into ``trainer.state`` before its first call are initial values, which
        ``begin_call`` replaces."""
        self.adopt(description)
        self._resumed = description["values"]

    def begin_call(self, *, tells: bool) -> None:
        """A call of ``fit`` or ``batches`` begins.

        Args:
            tells: Whether this worker speaks for all.
        """
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            return
        changed = [key for key, value in resumed.items() if _text({"": value}) != _text({"": self.values.get(key)})]
        if changed and tells:
            warnings.warn(
                f"trainer.state[{changed[0]!r}] was set between Trainer(...) and the first fit(...), but the run that goes on "
                f"has another value, which is taken. Give initial values with trainer.state.setdefault({changed[0]!r}, ...)",
                stacklevel=6,
            )
        self._put({**self.values, **resumed})

    def _put(self, values: Mapping[str, Any]) -> None:
        new = _copied(values, "trainer.state")
        self.values.clear()
        self.values.update(new)

    def _of_callbacks(self) -> Iterator[tuple[str, Any]]:
        for name, callback in self._callbacks.items():
            state = callback.state_dict()
            if not isinstance(state, Mapping):
                raise ConfigurationError(f"state_dict() of {name} returned a {type(state).__name__}: return a dict")
            if state:
                yield name, _copied(state, name)

    # ------------------------------------------------------------------ a step that is taken again

    def snapshot(self) -> dict[str, Any]:
        """``trainer.state`` as it is now."""
        return _copied(self.values, "trainer.state") if self.values else {}

    @contextlib.contextmanager
    def showing(self, snapshot: Mapping[str, Any]) -> Iterator[None]:
        """While the body runs ``trainer.state`` is as it was then."""
        now = dict(self.values)  # the objects themselves: others may hold them
        self.values.clear()
        self.values.update(snapshot)
        try:
            yield
        finally:
            self.values.clear()
            self.values.update(now)

    # ------------------------------------------------------------------ compared

    def mark(self) -> int:
        """32 bits that change when ``trainer.state`` does, tensors too, as far as PyTorch counts writes to them.

        Raises:
            ConfigurationError: It holds something that can be neither saved nor sent.
        """
        if not self.values:
            return 0
        return crc32(repr([_text(self.values), [(id(one), one._version) for _, one in self.tensors()]]).encode())

    def digest(self) -> int:
        """32 bits of ``trainer.state``: of all but the tensors' elements, and alike wherever these are alike."""
        return crc32(_text(self.values).encode()) if self.values else 0

    def tensors(self) -> list[tuple[str, Tensor]]:
        """The tensors in ``trainer.state``, by name for a person."""
        if not self.values:
            return []
        return [(path, leaf) for path, leaf in _leaves(self.values, "trainer.state") if isinstance(leaf, Tensor) and leaf.numel()]

    def named(self) -> dict[str, str]:
        """The numbers and texts in ``trainer.state``, and everything that callbacks keep, by name for a person."""
        found = {path: repr(leaf) for path, leaf in _leaves(self.values, "trainer.state") if not isinstance(leaf, Tensor)}
        for name, state in self._of_callbacks():
            for path, leaf in _leaves(state, f"state of {name}: "):
                found[path] = f"tensor {digest_of([leaf]).hex()}" if isinstance(leaf, Tensor) else repr(leaf)
        return found


def _by_name(callbacks: Sequence[Callback]) -> dict[str, Callback]:
    """Those that keep state, by a name that they have at every start."""
    found: dict[str, Callback] = {}
    for callback in callbacks:
        if type(callback).state_dict is not Callback.state_dict:
            kind = type(callback).__qualname__
            number = sum(name.split(" (")[0] == f"callback {kind}" for name in found) + 1
            found[f"callback {kind}" + (f" ({number})" if number > 1 else "")] = callback
    return found


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Tensors and plain values, each with its path.

    Raises:
        ConfigurationError: There is something else.
    """
    if type(value) in _PLAIN or isinstance(value, np.generic):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_key(key, path)
            yield from _leaves(item, f"{path}[{key!r}]")
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{path}[{number}]")
    elif isinstance(value, Tensor) and type(value.detach()) is Tensor and value.layout is torch.strided and not value.is_meta:
        yield path, value
    else:
        raise ConfigurationError(
            f"{path} is a {type(value).__name__}, which can be neither saved nor sent to other workers: keep tensors, numbers, "
            "strings, None, and dicts, lists and tuples of these"
        )


def _check_key(key: Any, path: str) -> None:
    if type(key) not in (str, int):
        raise ConfigurationError(f"{path} has the key {key!r}: use strings or whole numbers")


def _text(values: Mapping[str, Any]) -> str:
    """All of it but the tensors' elements."""
    return repr([(path, f"{v.dtype}{v.shape}" if isinstance(v, Tensor) else v) for path, v in _leaves(values, "trainer.state")])


def _copied(value: Any, path: str) -> Any:
    """A copy that nobody else holds."""
    if isinstance(value, Mapping):
        for key in value:
            _check_key(key, path)
        return {key: _copied(item, f"{path}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item, f"{path}[{number}]") for number, item in enumerate(value))
    ((_, leaf),) = _leaves(value, path)
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
