"""How a loss treats single samples: does it weigh each by what it is counted for, do samples influence each other, is it divided
by the number of microbatches? Found by computing it on a few samples, in several groupings.
"""

from __future__ import annotations

import ast
import contextlib
import linecache
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from unisono.verify.draws import constant_draws
from unisono.verify.places import Snapshot, roots_of
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
        with self._aside():
            for look in (self._repetition, self._weights, self._coupling, self._division):
                try:
                    found.update(look())
                except Exception as error:  # a loss may refuse single samples; then this look tells nothing
                    found.setdefault("unknown", []).append(f"{look.__name__.strip('_')}: {type(error).__name__}: {error}")
        return found

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Batch normalisation as in evaluation, constant draws; afterwards everything is as before."""
        before = Snapshot(roots_of(self._loss, self._model))
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        modes = [(module, module.training) for module in self._model.modules()]
        for module in self._model.modules():
            if isinstance(module, _BatchNorm):
                module.training = False
        try:
            with constant_draws():
                yield
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for name, buffer in self._model.named_buffers():
                    buffer.copy_(buffers[name])
            before.restore()

    def _returned(self, numbers: Sequence[int]) -> tuple[float, float]:
        """Sum and count that the loss gives for these samples (a mean counts one a sample), from the same state each time."""
        before = Snapshot(roots_of(self._loss, self._model))
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        with torch.no_grad():
            returned = self._loss(self._model, self._collate([self._samples[number] for number in numbers]))
            for name, buffer in self._model.named_buffers():
                buffer.copy_(buffers[name])
        before.restore()
        if isinstance(returned, (tuple, list)):
            return float(returned[0]), float(returned[1])
        return float(returned) * len(numbers), float(len(numbers))

    def _repetition(self) -> dict[str, Any]:
        """Whether the loss is a mean that comes with a count: of a sample that stands there several times the sum grows as the
        count does, and the mean stays."""
        probed = range(min(_PROBED, len(self._samples)))
        told = []
        for number in probed:
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
            pair = self._returned([0, other])
            if not math.isclose(pair[1], singles[0][1] + singles[other][1], rel_tol=1e-6):
                return {
                    "count": {
                        "samples": [self._indices[0], self._indices[other]],
                        "counts": [singles[0][1], singles[other][1], pair[1]],
                    }
                }
            if 0.0 in (singles[0][1], singles[other][1]):
                continue
            one, two = (value / count for value, count in (singles[0], singles[other]))
            both = pair[0] / pair[1]
            room = _TOLERANCE * max(abs(one), abs(two), abs(both))
            if not min(one, two) - room <= both <= max(one, two) + room:  # no mean of the two, whatever the weights
                return {"coupled": {"samples": [self._indices[0], self._indices[other]]}}
            if abs(one - two) < 1e-2 * max(abs(one), abs(two)):
                continue  # equal losses say nothing about weights
            share = (both - two) / (one - two)
            expected = singles[0][1] / pair[1]
            if abs(share - expected) < _TOLERANCE * 10:
                continue
            # Is it a weighted mean at all? Then a sample that stands there twice has twice the weight.
            twice = self._returned([0, 0, other])
            predicted = (2 * share * one + (1 - share) * two) / (1 + share)
            mean = 0 < share < 1 and abs(twice[0] / twice[1] - predicted) < 10 * _TOLERANCE * abs(one - two)
            return {
                "weights" if mean else "coupled": {
                    "samples": [self._indices[0], self._indices[other]],
                    "share": share,
                    "expected": expected,
                    "ratio": share / (1 - share) if mean else None,
                }
            }
        return {}

    def _coupling(self) -> dict[str, Any]:
        """The first module that gives a sample another output beside other samples than alone with half of them."""
        count = len(self._samples) // 2 * 2
        if count < 4:
            return {}
        whole, shapes = self._outputs(list(range(count)))
        half, other_shapes = self._outputs(list(range(count // 2)))
        if shapes != other_shapes:
            return {"padded": {"whole": shapes, "half": other_shapes}}
        for name, (kind, value) in whole.items():
            if name in half and value.shape[0] == count and half[name][1].shape[1:] == value.shape[1:]:
                part = half[name][1]
                scale = float(value.abs().max()) or 1.0
                if float((value[: count // 2] - part).abs().max()) > _TOLERANCE * scale:
                    return {"module": {"name": name, "kind": kind}}
        return {}

    def _outputs(self, numbers: list[int]) -> tuple[dict[str, tuple[str, Tensor]], list[list[int]]]:
        outputs: dict[str, tuple[str, Tensor]] = {}
        hooks = []
        for name, module in self._model.named_modules():

            def hook(module: nn.Module, _: Any, output: Any, name: str = name) -> None:
                if isinstance(output, Tensor) and output.dim() > 1 and output.is_floating_point():
                    outputs.setdefault(name or "the model", (type(module).__name__, output.detach().clone()))

            hooks.append(module.register_forward_hook(hook))
        try:
            batch = self._collate([self._samples[number] for number in numbers])
            before = Snapshot(roots_of(self._loss, self._model))
            with torch.no_grad():
                self._loss(self._model, batch)
            before.restore()
        finally:
            for handle in hooks:
                handle.remove()
        return outputs, [list(tensor.shape[1:]) for tensor in _tensors(batch)]

    def _division(self) -> dict[str, Any]:
        """Whether the loss is divided by the number of microbatches; then it would be smaller with more of them."""
        if self._parts < 2:
            return {}
        batch = self._collate(self._samples)
        plain = self._value(batch)
        watcher = _Undivided(self._parts)
        with watcher:
            without = self._value(batch)
        if not watcher.places or plain == 0 or not math.isclose(without / plain, self._parts, rel_tol=1e-3):
            return {}
        return {"divided": {"by": self._parts, **watcher.places[0]}}

    def _value(self, batch: Any) -> float:
        before = Snapshot(roots_of(self._loss, self._model))
        returned = self._loss(self._model, batch)
        before.restore()
        return float((returned[0] if isinstance(returned, (tuple, list)) else returned).detach())


class _Undivided(TorchFunctionMode):
    """Within, a scalar that needs a gradient is not divided by ``number``."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number
        self.places: list[dict[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        if name in ("div", "truediv", "true_divide", "itruediv", "div_") and len(args) == 2 and self._is_loss(args[0]):
            with torch._C.DisableTorchFunction():
                same = isinstance(args[1], (int, float, Tensor)) and float(args[1]) == self._number
            user = users_frame(sys._getframe(1)) if same else None
            if user is not None:
                where = place(user)
                self.places.append({**where, "divisor": _divisor(where["file"], where["line"])})
                return args[0] * 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _is_loss(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() == 0 and value.requires_grad


def _divisor(file: str, line: int) -> str:
    """The expression that a line of source divides by."""
    with contextlib.suppress(SyntaxError):
        for node in ast.walk(ast.parse(linecache.getline(file, line).strip())):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                return ast.unparse(node.right)
            if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Div):
                return ast.unparse(node.value)
    return ""


def _tensors(data: Any) -> Iterator[Tensor]:
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, dict) or hasattr(data, "items"):
        for value in data.values():
            yield from _tensors(value)
    elif isinstance(data, (list, tuple)):
        for value in data:
            yield from _tensors(value)
