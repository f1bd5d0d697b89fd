"""A forward pass over the rows of several microbatches at once, whose backward gives each microbatch's own gradients.

Inside ``MicrobatchMode`` a tensor stands for one of three things:

- *rows*: every microbatch's tensor, one below the other in dimension 0;
- *a value for each*: a tensor per microbatch that cannot be put so (a parameter, what is made of parameters alone, a scalar);
- *a constant*: anything else, the same for all.

An operation is called once with the rows if that is the same as calling it for each microbatch: it is known to treat the rows
of dimension 0 apart. Every other one is called for each microbatch with what that has. Linear layers and layer norms, whose
parameters mix rows only in backward, are called once as well; their backward multiplies microbatch by microbatch, and adds
along the tree while the sum is in the cache. Everything here is *local*.

What is the same in exact arithmetic need not have the same bits: ``one_pass.py`` compares.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from unisono.replica.parameter_operations import WITH_PARAMETERS, Node, OperationOnRows, Use, parts_of
from unisono.replica.row_operations import FACTS, RESHAPING, new_dimension, takes_apart, treats_rows_apart, writes

_SIMPLE = (int, float, str, bool, type(None), torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)


class CannotJoinError(Exception):
    """These microbatches cannot be computed in one pass; the message says why."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A trained parameter inside the mode.

    Attributes:
        slot: Where it lies in the layout.
        aliases: The same memory as one autograd leaf for each microbatch.
    """

    slot: int
    aliases: Sequence[Tensor]


class MicrobatchMode(TorchFunctionMode):
    """See the module.

    Args:
        count: Microbatches, two or more.
        parameters: Trained parameters, by ``id``.
        fused: Those (by slot) whose gradients are summed inside their only operation's backward.
        node: Takes these sums.
        generators: The state of torch's generator with which each microbatch's forward begins; None: nothing draws from it.
    """

    def __init__(
        self,
        count: int,
        parameters: Mapping[int, Parameter],
        fused: frozenset[int],
        node: Node,
        generators: list[Tensor] | None,
    ) -> None:
        super().__init__()
        self._count = count
        self._parameters = parameters
        self._fused = fused
        self._node = node
        self._token = object()
        self._values: dict[int, Sequence[Tensor]] = {}  # by id of the first, which is what the model sees
        self._split: dict[int, tuple[Tensor, Sequence[Tensor]]] = {}
        self.generators = generators
        self.has_drawn = False
        self.uses: dict[int, list[bool]] = {}
        """For each slot, each use of its parameter: whether its gradient can be summed there."""

    # ------------------------------------------------------------------ what tensors stand for

    def join(self, values: Sequence[Any]) -> Any:
        """What the model sees in place of one value for each microbatch."""
        first = values[0]
        if not isinstance(first, Tensor):
            return _common(values)
        if all(value is first for value in values):
            return first
        alike = all(value.shape == first.shape and value.dtype == first.dtype for value in values)
        # Others keep their strides: kernels look at these.
        if first.dim() and alike and first.layout is torch.strided and all(value.is_contiguous() for value in values):
            return self._as_rows(torch.cat(list(values)))
        self._values[id(first)] = values
        return first

    def each(self, value: Any) -> Sequence[Any]:
        """What each microbatch has in place of ``value``; ``join`` undone."""
        if not isinstance(value, Tensor):
            return [value] * self._count
        if self._rows_in(value) is not None:
            return self._rows(value)
        return self._values_of(value) or [value] * self._count

    def forget(self) -> None:
        """Lets go of the tensors that the forward pass has made."""
        self._values.clear()
        self._split.clear()

    def _as_rows(self, value: Any, dim: int = 0) -> Any:
        if isinstance(value, Tensor):
            value._unisono_rows = self._token, dim  # type: ignore[attr-defined]
            return value
        for tensor in _tensors(value):
            tensor._unisono_rows = self._token, dim  # type: ignore[attr-defined]
        return value

    def _rows_in(self, value: Tensor) -> int | None:
        """The dimension in which microbatches' rows follow each other; None: it is no such tensor."""
        mark = getattr(value, "_unisono_rows", None)
        return mark[1] if mark is not None and mark[0] is self._token else None

    def _values_of(self, value: Tensor) -> Sequence[Tensor] | None:
        parameter = self._parameters.get(id(value))
        if parameter is None:
            return self._values.get(id(value))
        if parameter.slot in self._fused:
            raise CannotJoinError("a parameter is used in another way than before")
        self.uses.setdefault(parameter.slot, []).append(False)
        return parameter.aliases

    def _rows(self, value: Tensor) -> Sequence[Tensor]:
        found = self._split.get(id(value))
        if found is None:
            # All in one operation: backward puts their gradients side by side, instead of adding each to zeros.
            found = self._split[id(value)] = value, parts_of(value, self._count, self._rows_in(value) or 0)
        return found[1]

    # ------------------------------------------------------------------ operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if name in FACTS:
            return func(*args, **kwargs)
        rows: list[Tensor] = []
        values: list[Tensor] = []
        constants: list[Tensor] = []
        for tensor in _tensors(args) + _tensors(kwargs) if kwargs else _tensors(args):
            dim = self._rows_in(tensor)
            if dim == 0:
                rows.append(tensor)
            elif dim is not None or id(tensor) in self._parameters or id(tensor) in self._values:
                values.append(tensor)
            else:
                constants.append(tensor)
        if not (rows or values):
            return func(*args, **kwargs)
        if not values:
            if treats_rows_apart(name, args, kwargs, rows, constants, self._count):
                return self._as_rows(func(*args, **kwargs))
            if (moved := new_dimension(name, args)) is not None:
                return self._as_rows(func(*args, **kwargs), moved)
            if name in RESHAPING and (shaped := func(*args, **kwargs)).dim() and shaped.shape[0] % self._count == 0:
                return self._as_rows(shaped)
        elif not rows and values[0] is args[0] and takes_apart(name, args, self._rows_in(values[0]) or 0):
            return self._as_rows(func(*args, **kwargs), (self._rows_in(values[0]) or 0) - 1)
        elif name in WITH_PARAMETERS and rows and args and rows[0] is args[0]:
            found = self._with_parameters(WITH_PARAMETERS[name], *args, **kwargs)
            if found is not None:
                return self._as_rows(found)
        if writes(func, name) or "out" in kwargs:
            raise CannotJoinError(f"{name} writes in place")
        totals = {tensor.shape[0] for tensor in rows if tensor.dim()}
        if any(tensor.dim() and tensor.shape[0] in totals for tensor in constants):
            raise CannotJoinError(f"{name} is given a constant with as many rows as all microbatches together")
        mine = {id(tensor): self.each(tensor) for tensor in (*rows, *values)}
        results = [self._for_one(m, mine, func, args, kwargs) for m in range(self._count)]
        return self._put_together(results, is_rows=bool(rows))

    def _for_one(
        self, number: int, mine: Mapping[int, Sequence[Tensor]], func: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        def own(value: Tensor) -> Tensor:
            return mine[id(value)][number] if id(value) in mine else value

        args, kwargs = _map(args, own), _map(kwargs, own)
        if self.generators is None:
            return func(*args, **kwargs)
        outside = torch.get_rng_state()
        torch.set_rng_state(self.generators[number])
        result = func(*args, **kwargs)
        after = torch.get_rng_state()
        if not torch.equal(after, self.generators[number]):
            self.has_drawn = True
            self.generators[number] = after
        torch.set_rng_state(outside)
        return result

    def _put_together(self, results: Sequence[Any], *, is_rows: bool) -> Any:
        first = results[0]
        if isinstance(first, (tuple, list)) and not isinstance(first, torch.Size):
            if any(len(result) != len(first) for result in results):
                raise CannotJoinError("an operation gives microbatches different numbers of tensors")
            parts = [self._put_together(alike, is_rows=is_rows) for alike in zip(*results, strict=True)]
            return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
        if is_rows or not isinstance(first, Tensor):
            return self.join(results)
        self._values[id(first)] = results
        return first

    def _with_parameters(self, rule: type[OperationOnRows], rows: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """The operation called once, with a backward of its own; None: it must be called for each microbatch."""
        options, given = rule.options(*args, **kwargs)
        tensors = [tensor for tensor in given if tensor is not None]
        if torch.is_autocast_enabled(rows.device.type) or not rule.fits(rows, tensors, self._count, *options):
            return None
        found = [self._parameters.get(id(tensor)) for tensor in tensors]
        slots = [parameter.slot for parameter in found if parameter is not None]
        if len(slots) == len(tensors):
            is_fused = self._fused.issuperset(slots)
            for slot in slots:
                self.uses.setdefault(slot, []).append(True)
                if is_fused and len(self.uses[slot]) > 1:
                    raise CannotJoinError("a parameter is used more often than before")
            if is_fused:
                use = Use(self._count, self._node, slots)
                aliases = [[parameter.aliases[0]] for parameter in found if parameter is not None]
            else:
                use = Use(self._count)
                aliases = [list(parameter.aliases) for parameter in found if parameter is not None]
        else:
            use = Use(self._count)
            aliases = [list(self.each(tensor)) for tensor in tensors]
        result: Tensor = rule.apply(use, len(tensors), options, rows, *(alias for each in aliases for alias in each))  # type: ignore[no-untyped-call]
        return result


def _common(values: Sequence[Any]) -> Any:
    """The one value that all microbatches have."""
    first = values[0]
    if all(value is first for value in values) and isinstance(first, _SIMPLE):
        return first
    if isinstance(first, _SIMPLE) and all(type(value) is type(first) and value == first for value in values):
        return first
    if isinstance(first, _SIMPLE):
        raise CannotJoinError("the model looks at values, and they differ between microbatches")
    raise CannotJoinError(f"the model is given, or returns, a {type(first).__name__}")


def _name(func: Any) -> str:
    name: str = getattr(func, "__name__", "")
    return func.__self__.__name__ if name == "__get__" else name.strip("_")


def _tensors(value: Any) -> list[Tensor]:
    """Those in nested tuples, lists and dicts."""
    found: list[Tensor] = []
    for part in value.values() if isinstance(value, dict) else value:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, (tuple, list, dict)):
            found += _tensors(part)
    return found


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(_map(part, change) for part in value)
    if isinstance(value, dict):
        return {key: _map(part, change) for key, part in value.items()}
    return value
