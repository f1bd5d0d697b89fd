"""Several microbatches of a worker in one forward and backward, with the bits of separate passes.

No kernel promises that a row has the same bits in a larger batch, so nothing here is believed. For each *kind* of group (how
many microbatches, of which shapes, in which mode of the model), the first few steps compute both ways and compare all bits of
gradients and losses; what is used is what the separate passes gave. Only then one pass is used, if it is faster, and from time
to time both are computed and compared again. A kind that differs once, or that cannot be computed so, is computed separately
for good; ``reasons`` says why.

``side_by_side.py`` runs the loss functions, and ``microbatch_mode.py`` the model. Everything here is *local*.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unisono.replica.base import LossPart, Microbatch
from unisono.replica.microbatch_mode import CannotJoinError, MicrobatchMode, Parameter
from unisono.replica.parameter_operations import Node
from unisono.replica.side_by_side import Inputs, RunLoss, SideBySide
from unisono.replica.tables import Tables
from unisono.sync.base import GradientSink
from unisono.sync.rows import Rows
from unisono.tree import Fold, fold_all

_TRIALS = 3
"""Both ways are computed so often before one is chosen."""
_GUARD_EVERY = 256
"""Uses of a kind after which both ways are computed again; and after each power of two."""
_KEPT_TIMES = 5

Separate = Callable[[Microbatch, int, GradientSink], LossPart]
"""Computes one microbatch, under a seed, with a backward of its own, and gives its gradients to the sink."""


@dataclasses.dataclass
class _GroupKind:
    """Groups of microbatches that are computed alike."""

    uses: int = 0
    is_separate: bool = False
    """For good."""
    draws: bool = True
    """Whether forward may draw random numbers."""
    fused: frozenset[int] = frozenset()
    """Slots whose gradients are summed within the backward of their only use."""
    inputs: Inputs | None = None
    """What the loss gives to the model, if it gives tensors of its batch."""
    proved: frozenset[int] | None = None
    """``fused`` of the last time that both ways gave the same bits."""
    fuses: bool = True
    separate_s: list[float] = dataclasses.field(default_factory=list)
    one_pass_s: list[float] = dataclasses.field(default_factory=list)

    @property
    def is_on_trial(self) -> bool:
        """Whether this use computes both ways."""
        is_due = self.uses <= _TRIALS or self.uses % _GUARD_EVERY == 0 or self.uses & (self.uses - 1) == 0
        return is_due or self.proved != self.fused

    @property
    def wins(self) -> bool:
        return statistics.median(self.one_pass_s[-_KEPT_TIMES:]) < statistics.median(self.separate_s[-_KEPT_TIMES:])


class OnePass:
    """See the module.

    Args:
        model: Whose parameters are in place.
        parameters: Trained ones, by slot.
        tables: Of the model.
        separate: See ``Separate``.
        run_loss: See ``RunLoss``.
        place: Puts a microbatch's data where the model computes.
        restore: Puts back the buffers with which the step began.

    Attributes:
        reasons: Why some kinds of groups are computed separately, for a person.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        tables: Tables,
        *,
        separate: Separate,
        run_loss: RunLoss,
        place: Callable[[Any], Any],
        restore: Callable[[], None],
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._tables = tables
        self._separate = separate
        self._run_loss = run_loss
        self._place = place
        self._restore = restore
        self.reasons: set[str] = set()
        self._kinds: dict[Hashable, _GroupKind] = {}
        self._kept: dict[Hashable, int] = {}  # bytes, by what tells microbatches apart; 0: they cannot be joined
        self._aliases: dict[int, dict[int, Parameter]] = {}  # by number of microbatches
        self._buffers = [module._buffers for module in model.modules() if module._buffers]

    def moved(self) -> None:
        """The parameters lie in other memory now."""
        self._aliases.clear()

    def compute(self, microbatches: Sequence[Microbatch], seeds: Sequence[int], sink: GradientSink) -> list[LossPart]:
        """As ``Replica.gradients``."""
        seeded = dict(zip((part.number for part in microbatches), seeds, strict=True))
        parts: list[LossPart] = []
        for group, key in self._groups(microbatches, sink):
            if len(group) > 1:
                parts += self._together(group, [seeded[part.number] for part in group], sink, (len(group), key))
            elif key is None or key in self._kept:
                parts.append(self._separate(group[0], seeded[group[0].number], sink))
            else:
                parts.append(self._measure(group[0], seeded[group[0].number], sink, key))
        return parts

    def _groups(self, microbatches: Sequence[Microbatch], sink: GradientSink) -> Iterator[tuple[Sequence[Microbatch], Hashable]]:
        """Consecutive microbatches that are alike, and are nodes of the tree."""
        if len(microbatches) < 2 or len(sink.nodes(microbatches[0].number, microbatches[-1].number + 1, 0)) == len(microbatches):
            yield from (([part], None) for part in microbatches)
            return
        mode = tuple([module.training for module in self._model.modules()])
        keys = [(mode, len(part.indices), _signature(part.data)) for part in microbatches]
        start = 0
        for end in range(1, len(keys) + 1):
            last = microbatches[end - 1].number + 1
            if end == len(keys) or keys[end] != keys[start] or microbatches[end].number != last:
                first = microbatches[start].number
                kept = self._kept.get(keys[start])
                nodes = sink.nodes(first, last, kept) if kept else [(m, m + 1) for m in range(first, last)]
                for lo, hi in nodes:
                    yield microbatches[start + lo - first : start + hi - first], keys[start]
                start = end

    def _measure(self, microbatch: Microbatch, seed: int, sink: GradientSink, key: Hashable) -> LossPart:
        """Computes it separately, and counts the bytes that its forward keeps for backward."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self._parameters}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.layout is torch.strided and (storage := tensor.untyped_storage()).data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        versions = self._versions()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            part = self._separate(microbatch, seed, sink)
        if self._versions() != versions:
            self.reasons.add("the model's forward changes buffers")
            kept.clear()
        self._kept[key] = max(1, sum(kept.values())) if kept else 0
        return part

    # ------------------------------------------------------------------ one group

    def _together(self, group: Sequence[Microbatch], seeds: Sequence[int], sink: GradientSink, key: Hashable) -> list[LossPart]:
        kind = self._kinds.setdefault(key, _GroupKind())
        kind.uses += 1
        if not kind.is_separate and kind.is_on_trial:
            return self._both_ways(kind, group, seeds, sink)
        if not kind.is_separate and kind.wins:
            try:
                parts, gradients, _ = self._in_one(kind, group, seeds)
            except Exception as error:
                self._give_up(kind, error)
            else:
                sink.add_node((group[0].number, group[-1].number + 1), gradients)
                return parts
        return [self._separate(part, seed, sink) for part, seed in zip(group, seeds, strict=True)]

    def _both_ways(
        self, kind: _GroupKind, group: Sequence[Microbatch], seeds: Sequence[int], sink: GradientSink
    ) -> list[LossPart]:
        """What the separate passes give goes on; that of one pass is compared with it."""
        copy = _Copy(sink, len(group))
        began = time.perf_counter()
        parts = [self._separate(part, seed, copy) for part, seed in zip(group, seeds, strict=True)]
        separate_s = time.perf_counter() - began
        try:
            self._check_plain()
            before = _attributes(self._model)
            began = time.perf_counter()
            found, gradients, mode = self._in_one(kind, group, seeds)
            one_pass_s = time.perf_counter() - began
            if _attributes(self._model) != before:
                raise CannotJoinError("the model's forward sets attributes of modules")
            _compare(parts, copy.sums(), found, gradients)
        except Exception as error:
            self._give_up(kind, error)
            return parts
        kind.draws, kind.proved = mode.has_drawn, kind.fused
        if kind.fuses:
            kind.fused = frozenset(slot for slot, uses in mode.uses.items() if uses == [True])
        kind.separate_s.append(separate_s - copy.own_s)
        kind.one_pass_s.append(one_pass_s)
        return parts

    def _in_one(
        self, kind: _GroupKind, group: Sequence[Microbatch], seeds: Sequence[int]
    ) -> tuple[list[LossPart], list[Tensor | None], MicrobatchMode]:
        count = len(group)
        parameters = self._aliases_of(count)
        node = Node(len(self._parameters))
        mode = MicrobatchMode(count, parameters, kind.fused, node, [] if kind.draws else None)
        versions = self._versions()
        try:
            batches = [self._place(part.data) for part in group]
            losses = SideBySide(self._model, mode, self._run_loss, batches, seeds, kind.inputs, is_trial=kind.is_on_trial)
            with self._tables.switched():
                totals = losses.run([len(part.indices) for part in group])
            kind.inputs = losses.inputs()
            if any(count and not total.requires_grad for total, count in totals):
                raise CannotJoinError("the loss does not depend on the model's output")
            torch.autograd.backward([total for total, _ in totals if total.requires_grad])
            if self._versions() != versions:
                self._restore()
                raise CannotJoinError("the model's forward changes parameters or buffers")
            if any(parameter.grad is not None for parameter in self._parameters):
                raise CannotJoinError("parameters are used outside of the model's forward, or again in backward")
            for slot, uses in mode.uses.items():
                if slot not in kind.fused and uses:
                    node.gradients[slot] = _node_sum(parameters[id(self._parameters[slot])].aliases)
        finally:
            for parameter in self._parameters:
                parameter.grad = None
            for each in parameters.values():
                for alias in each.aliases:
                    alias.grad = None
        return [LossPart(total.detach(), count) for total, count in totals], node.gradients, mode

    def _aliases_of(self, count: int) -> dict[int, Parameter]:
        found = self._aliases.get(count)
        if found is None:
            found = self._aliases[count] = {
                id(parameter): Parameter(slot, [parameter.detach().requires_grad_() for _ in range(count)])
                for slot, parameter in enumerate(self._parameters)
            }
        return found

    def _versions(self) -> list[int]:
        buffers = [tensor for held in self._buffers for tensor in held.values() if tensor is not None]
        return [tensor._version for tensor in (*self._parameters, *buffers)]

    def _check_plain(self) -> None:
        """Whether calling the model is calling its ``forward``, and nobody looks at what is inside."""
        for name, module in self._model.named_modules():
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
                raise CannotJoinError(f"module {name!r} has hooks")
            if module._compiled_call_impl is not None or isinstance(module, torch._dynamo.eval_frame.OptimizedModule):
                raise CannotJoinError(f"module {name!r} is compiled")
        if any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in self._parameters):
            raise CannotJoinError("a parameter has hooks")

    def _give_up(self, kind: _GroupKind, error: Exception) -> None:
        if kind.fused:  # perhaps it is only these
            kind.fused, kind.proved, kind.fuses = frozenset(), None, False
            return
        kind.is_separate = True
        self.reasons.add(str(error) if isinstance(error, CannotJoinError) else f"{type(error).__name__}: {error}")


class _Copy(GradientSink):
    """Gives on gradients, and keeps their sum.

    Args:
        sink: Takes them.
        count: Microbatches.

    Attributes:
        own_s: Seconds that keeping it has taken.
    """

    def __init__(self, sink: GradientSink, count: int) -> None:
        self._sink = sink
        self._fold: Fold[Sequence[Tensor | None]] = Fold(count, _add_all)
        self._number = 0
        self.own_s = 0.0

    def add(self, microbatch: int, gradients: Sequence[Tensor | None]) -> None:
        began = time.perf_counter()
        self._fold.push(self._number, [None if gradient is None else gradient.clone() for gradient in gradients])
        self._number += 1
        self.own_s += time.perf_counter() - began
        self._sink.add(microbatch, gradients)

    def sums(self) -> Sequence[Tensor | None]:
        """By slot."""
        (total,) = self._fold.parts().values()
        assert total is not None
        return total


def _compare(
    parts: Sequence[LossPart], gradients: Sequence[Tensor | None], found: Sequence[LossPart], one: Sequence[Tensor | None]
) -> None:
    for part, twin in zip(parts, found, strict=True):
        if part.count != twin.count or not _same_bits(part.loss, twin.loss):
            raise CannotJoinError("the loss has other bits")
    for slot, (gradient, other) in enumerate(zip(gradients, one, strict=True)):
        if not _same_bits(gradient, other):
            raise CannotJoinError(f"the gradient of parameter {slot} has other bits")


def _add_all(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [fold_all(pair, _add) for pair in zip(left, right, strict=True)]


def _add(left: Tensor, right: Tensor) -> Tensor:
    if left.layout is torch.sparse_coo and right.layout is torch.sparse_coo:
        return (Rows.of(left) + Rows.of(right)).as_gradient(left.shape)
    return left.to_dense().add_(right.to_dense())


def _node_sum(aliases: Sequence[Tensor]) -> Tensor | None:
    """Of the gradients of these leaves, along the tree."""
    return fold_all([alias.grad for alias in aliases], _add)


def _same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.layout is torch.sparse_coo or other.layout is torch.sparse_coo:
        if one.layout is not other.layout:
            return False
        left, right = Rows.of(one), Rows.of(other)
        return torch.equal(left.indices, right.indices) and _same_bits(left.values, right.values)
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.detach().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def _attributes(model: nn.Module) -> list[Any]:
    """What the modules' own attributes are: numbers and texts, and which tensors."""
    return [
        (name, id(value) if isinstance(value, Tensor) else value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, (Tensor, int, float, str)) and name != "forward"
    ]


def _signature(data: Any) -> Any:
    """What tells microbatches apart that cannot be computed in one pass."""
    if isinstance(data, Tensor):
        return data.shape, data.dtype
    if isinstance(data, (tuple, list)):
        return type(data), *map(_signature, data)
    if isinstance(data, Mapping):
        return type(data), *((key, _signature(value)) for key, value in data.items())
    return type(data)
