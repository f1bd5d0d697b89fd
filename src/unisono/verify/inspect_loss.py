"""How a loss treats single samples: does it weigh each by what it is counted for, do samples influence each other, is it divided
by the number of microbatches? Found by computing it on a few samples, in several groupings.
"""

from __future__ import annotations

import ast
import contextlib
import linecache
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from unisono.verify.draws import constant_draws
from unisono.verify.places import undone
from unisono.verify.record import Note
from unisono.verify.watch import place, users_frame

_TOLERANCE = 2e-3
_PROBED = 6


class Inspection:
    """*local*. Leaves the model as it was.

    Args:
        model: The user's.
        loss: The user's.
        samples: Of one global batch.
        indices: Their numbers.
        collate: Makes a batch of samples.
        parts: Microbatches of a global batch.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Any],
        *,
        samples: Sequence[Any],
        indices: Sequence[int],
        collate: Callable[[list[Any]], Any],
        parts: int,
    ) -> None:
        self._model, self._loss, self._collate, self._parts = model, loss, collate, parts
        self._samples, self._indices = list(samples), list(indices)

    def findings(self) -> dict[str, Any]:
        """What is remarkable, by name: see the methods. What cannot be computed is left out."""
        found: dict[str, Any] = {}
        # Batch normalisation as in evaluation, constant draws: what is left depends on the samples alone.
        with undone(self._loss, self._model), constant_draws():
            for module in self._model.modules():
                if isinstance(module, _BatchNorm):
                    module.training = False
            for look in (self._repetition, self._weights, self._division):
                with contextlib.suppress(Exception):  # a loss may refuse single samples; then this look tells nothing
                    found.update(look())
        return found

    def _returned(self, numbers: Sequence[int]) -> tuple[float, float]:
        """Sum and count that the loss gives for these samples (a mean counts one a sample), from the same state each time."""
        with undone(self._loss, self._model), torch.no_grad():
            returned = self._loss(self._model, self._batch(numbers))
        if isinstance(returned, (tuple, list)):
            return float(returned[0]), float(returned[1])
        return float(returned) * len(numbers), float(len(numbers))

    def _batch(self, numbers: Sequence[int]) -> Any:
        return self._collate([self._samples[number] for number in numbers])

    def _repetition(self) -> dict[str, Any]:
        """Whether the loss is a mean that comes with a count: of a sample that stands there several times the sum grows as the
        count does, and the mean stays."""
        told = []
        for number in range(min(_PROBED, len(self._samples))):
            once, *more = (self._returned([number] * times) for times in (1, 2, 3))
            if abs(once[0]) < 1e-12 or once[1] == 0:
                continue  # tells nothing
            means = all(math.isclose(value, once[0], rel_tol=_TOLERANCE) for value, _ in more)
            counts = all(math.isclose(count, times * once[1], rel_tol=1e-6) for times, (_, count) in enumerate(more, start=2))
            if not (means and counts):
                return {}
            told.append((number, once, more[0]))
        if not told:
            return {}
        number, once, twice = told[0]
        return {"mean": {"sample": self._indices[number], "values": [once[0], twice[0]], "counts": [once[1], twice[1]]}}

    def _weights(self) -> dict[str, Any]:
        """The weight of a sample in the mean of two should be its share of the count."""
        singles = [self._returned([number]) for number in range(min(_PROBED, len(self._samples)))]
        for other in range(1, len(singles)):
            samples = [self._indices[0], self._indices[other]]
            pair = self._returned([0, other])
            if not math.isclose(pair[1], singles[0][1] + singles[other][1], rel_tol=1e-6):
                return {"count": {"samples": samples, "counts": [singles[0][1], singles[other][1], pair[1]]}}
            if 0.0 in (singles[0][1], singles[other][1]):
                continue
            one, two = (value / count for value, count in (singles[0], singles[other]))
            both = pair[0] / pair[1]
            room = _TOLERANCE * max(abs(one), abs(two), abs(both))
            if not min(one, two) - room <= both <= max(one, two) + room:  # no mean of the two, whatever the weights
                return self._coupled(other)
            if abs(one - two) < 1e-2 * max(abs(one), abs(two)):
                continue  # equal losses say nothing about weights
            share = (both - two) / (one - two)
            if abs(share - singles[0][1] / pair[1]) < _TOLERANCE * 10:
                continue
            # Is it a weighted mean at all? Then a sample that stands there twice has twice the weight.
            twice = self._returned([0, 0, other])
            predicted = (2 * share * one + (1 - share) * two) / (1 + share)
            if 0 < share < 1 and abs(twice[0] / twice[1] - predicted) < 10 * _TOLERANCE * abs(one - two):
                return {"weights": {"samples": samples, "ratio": share / (1 - share)}}
            return self._coupled(other)
        return {}

    def _coupled(self, other: int) -> dict[str, Any]:
        """Two samples influence each other: because one is padded to the other's length, or by what is computed."""
        shapes = [[tensor.shape[1:] for tensor in _tensors(self._batch(numbers))] for numbers in ([0], [other], [0, other])]
        padded = shapes[0] != shapes[2] or shapes[1] != shapes[2]
        return {"padded" if padded else "coupled": {"samples": [self._indices[0], self._indices[other]]}}

    def _division(self) -> dict[str, Any]:
        """Whether the loss is divided by the number of microbatches; then it would be smaller with more of them."""
        if self._parts < 2:
            return {}
        batch = self._collate(self._samples)
        plain = self._value(batch)
        with _Undivided(self._parts) as watcher:
            without = self._value(batch)
        if not watcher.places or plain == 0 or not math.isclose(without / plain, self._parts, rel_tol=1e-3):
            return {}
        where = watcher.places[0]
        return {"divided": {"by": self._parts, "divisor": _divisor(where), "where": where}}

    def _value(self, batch: Any) -> float:
        with undone(self._loss, self._model):
            returned = self._loss(self._model, batch)
        return float((returned[0] if isinstance(returned, (tuple, list)) else returned).detach())


class _Undivided(TorchFunctionMode):
    """Within, a scalar that needs a gradient is not divided by ``number``."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number
        self.places: list[Note] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        if name in ("div", "truediv", "true_divide", "itruediv", "div_") and len(args) == 2 and self._is_loss(args[0]):
            with torch._C.DisableTorchFunction():
                same = isinstance(args[1], (int, float, Tensor)) and float(args[1]) == self._number
            user = users_frame(sys._getframe(1)) if same else None
            if user is not None:
                self.places.append(Note(**place(user)))
                return args[0] * 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _is_loss(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() == 0 and value.requires_grad


def _divisor(where: Note) -> str:
    """The expression that a line of source divides by."""
    with contextlib.suppress(SyntaxError):
        for node in ast.walk(ast.parse(linecache.getline(where.file, where.line).strip())):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                return ast.unparse(node.right)
            if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Div):
                return ast.unparse(node.value)
    return ""


def _tensors(data: Any) -> Iterator[Tensor]:
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, (Mapping, list, tuple)):
        for value in data.values() if isinstance(data, Mapping) else data:
            yield from _tensors(value)
