"""Whether a ``torch.nn.Module`` stays what it was when the trainer took it: nothing is replaced or added between two steps, and
nobody but the optimizer writes to a parameter while gradients are computed. Everything here is *local*."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unisono.errors import ConfigurationError
from unisono.replica.parameters import named_parameters, plain_name

_ADVICE = (
    "Make all parts of the model, and all parameter groups, before Trainer(...), and choose among them in forward; or end the "
    "loop and make a new Trainer of the changed model, with a run_dir of its own"
)


class ModelGuard:
    """See the module. Looks at identities in every step, and at values in a few.

    Args:
        model: On its device.
        optimizer: Over its parameters.

    Attributes:
        frozen: The parameters that are not trained, by name.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        # Held, so that nothing new takes over an identity. TorchScript makes its objects anew for each look.
        self._modules = [
            (name, module) for name, module in model.named_modules() if not isinstance(module, torch.jit.ScriptModule)
        ]
        self._parameters = named_parameters(model)
        self.frozen = [(name, parameter) for name, parameter in self._parameters if not parameter.requires_grad]
        self._trained = {id(parameter): name for name, parameter in self._parameters if parameter.requires_grad}
        self._parts = self._look()
        self._names = dict(self._named())
        self._groups = self._grouped()
        self._steps = 0

    # ------------------------------------------------------------------ between steps

    def check_parts(self) -> None:
        """Whether model and parameter groups consist of what they consisted of.

        Raises:
            ConfigurationError: They do not; the message names the first difference.
        """
        if self._look() != self._parts:
            raise ConfigurationError(f"the model was changed after the Trainer was made: {self._difference()}. {_ADVICE}")
        if self._grouped() != self._groups:
            before, now = ([len(group) for group in groups] for groups in (self._groups, self._grouped()))
            raise ConfigurationError(
                f"the optimizer's parameter groups were changed after the Trainer was made (numbers of parameters by group: "
                f"{before}, now {now}), by add_param_group(), say. {_ADVICE}"
            )
        for name, parameter in self.frozen:
            if parameter.requires_grad:
                raise ConfigurationError(
                    f"parameter {name!r} now requires a gradient, and was frozen when the Trainer was made: make a new Trainer "
                    "after unfreezing; or leave it trainable, in a parameter group of its own whose learning rate is 0 at first"
                )

    def groups(self) -> Sequence[Mapping[str, Any]]:
        """The parameter groups, and which of their parameters were frozen since the Trainer was made: what workers compare."""
        groups = self._optimizer.param_groups
        if all(parameter.requires_grad for group in groups for parameter in group["params"] if id(parameter) in self._trained):
            return groups
        return [
            {**group, "frozen": tuple(self._trained.get(id(p), "") for p in group["params"] if not p.requires_grad)}
            for group in groups
        ]

    def _look(self) -> list[int]:
        return [
            id(part) for _, module in self._modules for parts in (module._parameters, module._modules) for part in parts.values()
        ]

    def _grouped(self) -> list[list[int]]:
        return [[id(parameter) for parameter in group["params"]] for group in self._optimizer.param_groups]

    def _named(self) -> Iterator[tuple[str, object]]:
        for prefix, module in self._modules:
            for parts in (module._parameters, module._modules):
                yield from ((plain_name(f"{prefix}.{key}" if prefix else key), part) for key, part in parts.items())

    def _difference(self) -> str:
        now = dict(self._named())
        for name, part in now.items():
            kind = "parameter" if isinstance(part, Tensor) else "module"
            if name not in self._names:
                return f"{kind} {name!r} is new"
            if part is not self._names[name]:
                return f"{kind} {name!r} is another object"
        gone = [name for name in self._names if name not in now]
        return f"{gone[0]!r} is gone" if gone else "its parts are in another order"

    # ------------------------------------------------------------------ while gradients are computed

    def values(self) -> list[tuple[int, int]] | None:
        """Where the parameters are and what they hold, in steps 1, 2, 4, 8, ...; else None: to look at it takes time."""
        self._steps += 1
        return None if self._steps & (self._steps - 1) else self._values()

    def check_values(self, before: list[tuple[int, int]] | None) -> None:
        """Whether they are as they were ``before`` gradients were computed. PyTorch counts most writes, but none through
        ``.data``.

        Raises:
            ConfigurationError: One was written to.
        """
        if before is None:
            return
        for (name, _), known, now in zip(self._parameters, before, self._values(), strict=True):
            if known != now:
                raise ConfigurationError(
                    f"parameter {name!r} is changed through .data by forward, backward or the loss, so it would depend on which "
                    "microbatches a worker computes. Change parameters between steps, on every worker, in a callback's on_step "
                    "(clipped or normalized weights, a target network that follows another); keep statistics in buffers"
                )

    def _values(self) -> list[tuple[int, int]]:
        with torch.no_grad():
            sums = [_sum(parameter) for _, parameter in self._parameters]
        known = [total for total in sums if total is not None]
        totals = iter(torch.stack(known).tolist() if known else ())
        return [
            (parameter.data_ptr(), 0) if total is None else (parameter.data_ptr(), next(totals))
            for (_, parameter), total in zip(self._parameters, sums, strict=True)
        ]


def _sum(parameter: Tensor) -> Tensor | None:
    """The sum of a tensor's memory, as integers of 8 bytes; None where it has none, or none that can be looked at."""
    if parameter.is_meta or not parameter.numel() or parameter.layout != torch.strided or type(parameter.data) is not Tensor:
        return None
    memory = parameter.detach().contiguous().reshape(-1).view(torch.uint8)
    if memory.storage_offset() % 8:
        memory = memory.clone()
    end = memory.numel() // 8 * 8
    return memory[:end].view(torch.int64).sum() + memory[end:].sum()
