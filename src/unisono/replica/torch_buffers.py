"""The buffers of a ``torch.nn.Module``: modules may rebind them, and PyTorch counts (most) writes. Everything here is *local*."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import nn

from unisono.errors import ConfigurationError
from unisono.replica.buffers import Buffers
from unisono.replica.parameters import plain_name


class TorchBuffers(Buffers):
    """All buffers of a model, non-persistent ones included.

    Args:
        model: On its device; its buffers are followed by name, so a module may rebind them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = list(model.modules())
        self._places = list(_places(model))
        tensors = [tensor for _, module, key in self._places if (tensor := module._buffers[key]) is not None]
        super().__init__([name for name, _, _ in self._places], tensors)
        self._versions = [tensor._version for tensor in self.tensors]
        self._known = self._count()

    def check_known(self) -> None:
        """Whether the model has just the buffers that it had at the beginning.

        Raises:
            ConfigurationError: A forward has made another one, which nobody keeps equal on all workers.
        """
        if self._count() != self._known:
            new = [name for name, _, _ in _places(self._model) if name not in self.names]
            raise ConfigurationError(
                f"buffers of the model came or went after the Trainer was made{': ' + ', '.join(new[:3]) if new else ''}. "
                "Register them when the model is made (or run it once before Trainer(...)); keep a cache in a plain attribute"
            )

    def collect(self) -> None:
        """Takes the values of buffers that were replaced, and puts the tensors that others may hold back in their places."""
        for index, (name, module, key) in enumerate(self._places):
            tensor = self.tensors[index]
            if tensor.shape != self.start[index].shape:
                raise ConfigurationError(
                    f"buffer {name!r} was resized in forward, from {tuple(self.start[index].shape)} to {tuple(tensor.shape)}: "
                    "run the model once before Trainer(...) if it has its final size then, or keep it in a plain attribute"
                )
            now = module._buffers[key] if key in module._buffers else None  # noqa: SIM401 - a ScriptModule's have no get
            if now is not tensor:
                if now is None or now.shape != tensor.shape or now.dtype != tensor.dtype:
                    raise ConfigurationError(
                        f"buffer {name!r} was replaced by one of another shape or dtype: keep such a cache in a plain attribute, "
                        "not in a buffer"
                    )
                with torch.no_grad():
                    tensor.copy_(now)
                module._buffers[key] = tensor

    def restore(self, changed: Collection[int] | None = None) -> None:
        if changed is None:
            for tensor, (_, module, key) in zip(self.tensors, self._places, strict=True):
                if key not in module._buffers or module._buffers[key] is not tensor:
                    module._buffers[key] = tensor
        super().restore(changed)

    def changes(self, known: Sequence[bool]) -> list[int]:
        # Batch norm's kernels write statistics without counting a version.
        return [
            i
            for i, tensor in enumerate(self.tensors)
            if known[i]
            or tensor._version != self._versions[i]
            or (tensor.is_floating_point() and not torch.equal(tensor, self.start[i]))
        ]

    def written(self) -> list[int]:
        return [i for i, tensor in enumerate(self.tensors) if tensor._version != self._versions[i]]

    def settled(self, indices: Sequence[int]) -> None:
        for index in indices:
            self._versions[index] = self.tensors[index]._version

    def _count(self) -> int:
        # Most modules have none: this is looked at in every step.
        return sum(tensor is not None for module in self._modules if module._buffers for tensor in module._buffers.values())


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, module and key of every buffer, each once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for key, tensor in module._buffers.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield plain_name(f"{prefix}.{key}" if prefix else key), module, key
