"""A gradient of which only some rows are there: what an embedding table gets from a batch. Everything here is *local*."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some rows of a matrix; an absent row adds nothing, as an absent leaf does."""

    indices: Tensor
    """int64 ``[n]``, ascending, each once."""
    values: Tensor
    """``[n, *row]``, in the parameter's dtype."""

    @classmethod
    def of(cls, gradient: Tensor) -> Rows:
        """The rows of a sparse COO gradient with one sparse dimension; those named several times are added up, in order."""
        whole = gradient.detach().coalesce()
        return cls(whole.indices()[0], whole.values())

    def as_gradient(self, shape: Sequence[int]) -> Tensor:
        """As a sparse COO tensor."""
        return torch.sparse_coo_tensor(self.indices[None], self.values, tuple(shape), check_invariants=False, is_coalesced=True)

    def __add__(self, other: Rows) -> Rows:
        """The union of both, summed where a row is in both: of two summands no order shows."""
        indices = torch.cat([self.indices, other.indices])
        values = torch.cat([self.values, other.values])
        # The size is not looked at again, so the smallest that fits will do; ascending order is what coalescing gives.
        rows = int(indices.max()) + 1 if indices.numel() else 0
        return Rows.of(torch.sparse_coo_tensor(indices[None], values, (rows, *values.shape[1:]), check_invariants=False))


class RowBuffer:
    """A dense gradient that is zero but for some rows, for optimizers that look at the whole parameter.

    Args:
        dense: Zeros, laid out as the parameter.
    """

    def __init__(self, dense: Tensor) -> None:
        self.dense = dense
        self._written: Tensor | None = None

    def fill(self, rows: Rows) -> Tensor:
        """The dense gradient that holds ``rows``; valid until the next call. Costs what the rows cost, not the matrix."""
        if self._written is not None:
            self.dense.index_fill_(0, self._written, 0)
        self.dense.index_copy_(0, rows.indices, rows.values)
        self._written = rows.indices
        return self.dense
