"""The loss functions of several microbatches, run side by side: the model is called once, with the inputs of all.

Each runs up to its call of the model, whose inputs are put below one another; the last one then calls the model with all of
them; and each runs again, with its own rows of the outputs. A loss that was seen to give tensors of its batch to the model, as
they are, needs no first run. Everything here is *local*.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from unisono.replica.microbatch_mode import CannotJoinError, MicrobatchMode

RunLoss = Callable[[Any, int, int], tuple[Tensor, float]]
"""Calls the loss function on a microbatch's data and its number of samples, under a seed: the loss sum and the count."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the model is called with: tensors of the batch, as they are.

    Attributes:
        structure: How they are nested.
        positions: Which they are, in the order of the batch.
    """

    structure: Any
    positions: tuple[int, ...]


class _ReachedModel(BaseException):
    """Ends a loss function at its call of the model. No ``Exception``: loss functions may catch those."""


class SideBySide:
    """See the module. For one use.

    Args:
        model: What the loss functions call.
        mode: Joins what they call it with.
        run_loss: See ``RunLoss``.
        batches: Data of the microbatches, where the model computes.
        seeds: Of the microbatches.
        inputs: What was seen the last time; None: what the loss calls the model with is not known.
        is_trial: Whether to look at everything that could go wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        mode: MicrobatchMode,
        run_loss: RunLoss,
        batches: Sequence[Any],
        seeds: Sequence[int],
        inputs: Inputs | None,
        *,
        is_trial: bool,
    ) -> None:
        self._model = model
        self._mode = mode
        self._run_loss = run_loss
        self._batches = batches
        self._seeds = seeds
        self._known = None if is_trial else inputs
        self._is_trial = is_trial
        self._forward = model.forward
        self._calls: list[tuple[Sequence[Any], Any]] = []
        self._outputs: list[Any] = []

    def run(self, samples: Sequence[int]) -> list[tuple[Tensor, float]]:
        """The loss sum and count of each microbatch, all of one graph.

        Args:
            samples: Of each microbatch.

        Raises:
            CannotJoinError: Loss or model cannot be computed so.
        """
        last = len(self._batches) - 1
        first: list[int] = []
        if self._known is None:
            first = list(range(last))
        else:
            leaves = [_flat(batch)[0] for batch in self._batches]
            self._calls = [([own[p] for p in self._known.positions], self._known.structure) for own in leaves]
        with _replaced(self._model) as replace:
            for number in first:
                replace(self._reach)
                with contextlib.suppress(_ReachedModel):
                    self._run_loss(self._batches[number], samples[number], self._seeds[number])
                    raise CannotJoinError("the loss does not call the model")
            replace(self._compute)
            own = self._run_loss(self._batches[last], samples[last], self._seeds[last])
            if not self._outputs:
                raise CannotJoinError("the loss does not call the model")
            totals: list[tuple[Tensor, float]] = []
            for number in range(last):
                replace(lambda *args, number=number, **kwargs: self._give(number, args, kwargs))
                totals.append(self._run_loss(self._batches[number], samples[number], self._seeds[number]))
        return [*totals, own]

    def inputs(self) -> Inputs | None:
        """What the loss has called the model with; None: not tensors of its batch, or after it drew random numbers."""
        if not self._is_trial:
            return self._known
        found: set[tuple[int, ...]] = set()
        for batch, (leaves, _) in zip(self._batches, self._calls, strict=True):
            places = {id(leaf): place for place, leaf in enumerate(_flat(batch)[0]) if isinstance(leaf, Tensor)}
            if any(id(leaf) not in places for leaf in leaves):
                return None
            found.add(tuple(places[id(leaf)] for leaf in leaves))
        return Inputs(self._calls[0][1], found.pop()) if len(found) == 1 and not self._mode.has_drawn else None

    def _reach(self, *args: Any, **kwargs: Any) -> Any:
        self._take(args, kwargs)
        raise _ReachedModel

    def _take(self, args: Any, kwargs: Any) -> None:
        self._calls.append(_flat((args, kwargs)))
        if self._mode.generators is not None:
            self._mode.generators.append(torch.get_rng_state())

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        if self._outputs:
            raise CannotJoinError(_TWICE)
        if self._known is None:
            self._take(args, kwargs)
        if not torch.is_grad_enabled():
            raise CannotJoinError("the loss calls the model without gradients")
        self._outputs = self._call_model()
        return self._give(len(self._batches) - 1, args, kwargs)

    def _give(self, number: int, args: Any, kwargs: Any) -> Any:
        if self._known is not None:
            leaves, structure = _flat((args, kwargs))
            expected, nested = self._calls[number]
            if structure != nested or any(one is not other for one, other in zip(leaves, expected, strict=True)):
                raise CannotJoinError("the loss calls the model with other inputs than before")
        if self._mode.generators is not None:
            torch.set_rng_state(self._mode.generators[number])
        self._outputs[number], output = _TAKEN, self._outputs[number]
        if output is _TAKEN:
            raise CannotJoinError(_TWICE)
        return output

    def _call_model(self) -> list[Any]:
        """What the model returns to each microbatch."""
        mode, (leaves, structure) = self._mode, self._calls[0]
        if any(other != structure for _, other in self._calls):
            raise CannotJoinError("the model is called in different ways")
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            raise CannotJoinError("the model's inputs require gradients")
        joined = [mode.join(each) for each in zip(*(own for own, _ in self._calls), strict=True)]
        args, kwargs = _unflat(joined, structure)
        before, others = torch.get_rng_state(), _other_generators() if self._is_trial else None
        with mode:
            output = self._forward(*args, **kwargs)
        if not torch.equal(torch.get_rng_state(), before) or (self._is_trial and _other_generators() != others):
            raise CannotJoinError("the model draws random numbers in a way that is not known")
        leaves, structure = _flat(output)
        each = [mode.each(leaf) if isinstance(leaf, Tensor) else [mode.join([leaf])] * len(self._calls) for leaf in leaves]
        mode.forget()
        return [_unflat(own, structure) for own in zip(*each, strict=True)]


_TAKEN = object()
_TWICE = "the loss calls the model more than once"


@contextlib.contextmanager
def _replaced(model: nn.Module) -> Iterator[Callable[[Callable[..., Any]], None]]:
    """While the body runs the model's ``forward`` can be replaced."""
    own = vars(model)
    had = own.get("forward")

    def replace(forward: Callable[..., Any]) -> None:
        own["forward"] = forward

    try:
        yield replace
    finally:
        own.pop("forward", None)
        if had is not None:
            own["forward"] = had


def _flat(value: Any) -> tuple[Sequence[Any], Any]:
    """What is in nested containers, and how they are nested. Python's own way through them takes longer than a small layer."""
    if isinstance(value, Tensor):
        return (value,), None
    if type(value) is tuple and len(value) == 2:
        if all(isinstance(part, Tensor) for part in value):
            return value, "pair"
        if value[1] == {} and all(isinstance(part, Tensor) for part in value[0]):
            return value[0], "arguments"
    return pytree.tree_flatten(value)


def _unflat(leaves: Sequence[Any], structure: Any) -> Any:
    if structure is None:
        return leaves[0]
    if structure == "pair":
        return tuple(leaves)
    return (tuple(leaves), {}) if structure == "arguments" else pytree.tree_unflatten(leaves, structure)


def _other_generators() -> Any:
    numbers = np.random.get_state(legacy=False)
    return random.getstate(), numbers["state"]["pos"], numbers["state"]["key"].tobytes()
