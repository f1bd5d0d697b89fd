"""Brings together what the workers have computed of each sample, in the order of the global batch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unisono.collective import Collective, Expected
from unisono.errors import ConfigurationError


class _Kind(NamedTuple):
    """What the rows of a tensor are like."""

    dtype: str
    shape: list[int]
    wanted: bool
    """Whether their gradient is."""

    @classmethod
    def of(cls, rows: Tensor) -> _Kind:
        return cls(str(rows.dtype).removeprefix("torch."), list(rows.shape[1:]), rows.requires_grad)

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}{' with a gradient' if self.wanted else ''}"

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found


class SampleRows:
    """Gathers rows of samples, step by step.

    Args:
        collective: The workers; their microbatches follow each other in order of rank.
        device: Where rows lie.
    """

    def __init__(self, collective: Collective, device: torch.device) -> None:
        self._collective, self._device = collective, device
        self._memory: list[Tensor] = []  # sent from; memory of a transport is never given back

    def gather(self, rows: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], int]:
        """*collective*. The rows of the global batch.

        Args:
            rows: Of each of this worker's microbatches that holds samples, the same number of tensors ``[samples, ...]``.

        Returns:
            Tensors of all samples, in memory of their own (leaves, which require a gradient where those given do), and the row at
            which those of this worker begin. All bits are the same on all workers, and for every number of them.

        Raises:
            ConfigurationError: Microbatches have rows of different kinds.
        """
        mine = {"counts": [len(part[0]) for part in rows], "kinds": [[_Kind.of(row) for row in part] for part in rows]}
        told = [json.loads(text) for text in self._collective.all_gather_bytes(json.dumps(mine).encode())]
        counts = [sum(worker["counts"]) for worker in told]
        kinds = [[_Kind(*kind) for kind in part] for worker in told for part in worker["kinds"]]
        for microbatch, found in enumerate(kinds):
            if found != kinds[0]:
                raise ConfigurationError(
                    f"the rows of microbatch {microbatch} are of another kind than those of microbatch 0: "
                    f"{', '.join(map(str, found))}, not {', '.join(map(str, kinds[0]))}. Return tensors of the same dtypes and "
                    "shapes [samples, ...] from embed for every microbatch"
                )
        columns = kinds[0]
        expected: list[list[Expected]] = [
            [(count * kind.numel, kind.torch_dtype, self._device) for kind in columns if count] for count in counts
        ]
        with torch.no_grad():
            own = [self._placed(place, [part[place].flatten() for part in rows]) for place in range(len(columns)) if rows]
            received = self._collective.all_gather_lists(own, expected)
            whole = [
                torch.cat([tensors[place] for tensors in received if tensors]).view(-1, *kind.shape)
                for place, kind in enumerate(columns)
            ]
        return [row.requires_grad_(kind.wanted) for row, kind in zip(whole, columns, strict=True)], sum(
            counts[: self._collective.rank]
        )

    def _placed(self, place: int, parts: Sequence[Tensor]) -> Tensor:
        """The parts one after the other, where the transport sends fastest."""
        numel = sum(part.numel() for part in parts)
        memory = self._memory
        if len(memory) <= place or memory[place].numel() < numel or memory[place].dtype != parts[0].dtype:
            memory[place : place + 1] = [self._collective.allocate(numel, parts[0].dtype, self._device)]
        return torch.cat(list(parts), out=memory[place][:numel])
