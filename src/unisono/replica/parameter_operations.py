"""Operations of rows and parameters that are called once for several microbatches, with each one's own gradients.

Their backward multiplies microbatch by microbatch, and can add along the tree while the sum is in the cache. Everything here is
*local*.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unisono.layout import ALIGNMENT_BYTES
from unisono.replica.row_operations import products_agree
from unisono.tree import fold_all, middle

_BETA_TERMS = 192
"""Terms up to which a product that is added to a sum has the bits of the product, then added (MKL on AVX-512)."""


class Node:
    """What one pass collects: the gradients of a node of the tree, by slot.

    Args:
        slots: How many.
    """

    def __init__(self, slots: int) -> None:
        self.gradients: list[Tensor | None] = [None] * slots

    def take(self, slot: int, gradient: Tensor) -> None:
        """The sum of all microbatches' gradients of this slot."""
        self.gradients[slot] = gradient


@dataclasses.dataclass(slots=True)
class Use:
    """One use of parameters by an operation that is called once."""

    count: int
    """Microbatches."""
    node: Node | None = None
    """Takes the sums of gradients over all microbatches; None: each microbatch's own alias gets its gradient."""
    slots: Sequence[int] = ()
    """Of the parameters."""

    def deliver(self, gradients: Sequence[Sequence[Tensor]]) -> list[Tensor | None]:
        """For autograd: of each parameter, of each microbatch."""
        if self.node is None:
            return [gradient for each in gradients for gradient in each]
        for slot, each in zip(self.slots, gradients, strict=True):
            total = fold_all(list(each), Tensor.add_)
            assert total is not None
            self.node.take(slot, total)
        return [None] * len(gradients)


class OperationOnRows(torch.autograd.Function):
    """An operation of rows and parameters."""

    @staticmethod
    def options(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], list[Tensor | None]]:
        """Its arguments behind the rows: settings, and parameters."""
        raise NotImplementedError

    @staticmethod
    def fits(rows: Tensor, tensors: Sequence[Tensor], count: int, *options: Any) -> bool:
        """Whether its kernels are known to compute rows apart."""
        raise NotImplementedError


class _Linear(OperationOnRows):
    @staticmethod
    def options(weight: Tensor, bias: Tensor | None = None) -> tuple[tuple[Any, ...], list[Tensor | None]]:
        return (), [weight, bias]

    @staticmethod
    def fits(rows: Tensor, tensors: Sequence[Tensor], count: int) -> bool:
        return rows.dim() >= 2 and rows.is_contiguous() and products_agree(rows, tensors[0], count)

    @staticmethod
    def forward(ctx: Any, use: Use, parameters: int, options: Any, rows: Tensor, *aliases: Tensor) -> Tensor:
        weight = aliases[0]
        ctx.save_for_backward(rows, weight)
        ctx.use, ctx.parameters = use, parameters
        return F.linear(rows, weight, aliases[len(aliases) // 2] if parameters == 2 else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, weight = ctx.saved_tensors
        grad, use = grads[0].reshape(-1, weight.shape[0]), ctx.use
        back = grad.mm(weight).view(rows.shape) if ctx.needs_input_grad[3] else None
        outs, ins = parts_of(grad, use.count), parts_of(rows.reshape(-1, weight.shape[1]), use.count)
        sums = [[out.sum(0) for out in outs]] if ctx.parameters == 2 else []
        if use.node is None:
            products = [out.t().mm(rows) for out, rows in zip(outs, ins, strict=True)]
        else:
            products = [_sum_of_products(outs, ins, 0, use.count)]
        return None, None, None, back, *use.deliver([products, *sums])


class _LayerNorm(OperationOnRows):
    @staticmethod
    def options(
        normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> tuple[tuple[Any, ...], list[Tensor | None]]:
        return (list(normalized_shape), eps, weight is not None), [weight, bias]

    @staticmethod
    def fits(rows: Tensor, tensors: Sequence[Tensor], count: int, shape: Sequence[int], *_: Any) -> bool:
        return rows.dim() > len(shape) and rows.is_contiguous() and len(tensors) == 2

    @staticmethod
    def forward(ctx: Any, use: Use, parameters: int, options: Any, rows: Tensor, *aliases: Tensor) -> Tensor:
        weight, bias = aliases[0], aliases[len(aliases) // 2]
        result, mean, rstd = torch.native_layer_norm(rows, options[0], weight, bias, options[1])
        ctx.save_for_backward(rows, mean, rstd, weight, bias)
        ctx.use, ctx.shape = use, options[0]
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, mean, rstd, weight, bias = ctx.saved_tensors
        grad, use = grads[0].contiguous(), ctx.use
        kernel = torch.ops.aten.native_layer_norm_backward
        back = None
        if ctx.needs_input_grad[3]:
            back = kernel(grad, rows, ctx.shape, mean, rstd, weight, bias, [True, False, False])[0]
        each = zip(*(tensor.chunk(use.count) for tensor in (grad, rows, mean, rstd)), strict=True)
        found = [kernel(g, x, ctx.shape, m, r, weight, bias, [False, True, True])[1:] for g, x, m, r in each]
        return None, None, None, back, *use.deliver([[pair[0] for pair in found], [pair[1] for pair in found]])


WITH_PARAMETERS: dict[str, type[OperationOnRows]] = {"linear": _Linear, "layer_norm": _LayerNorm}


def _sum_of_products(outs: Sequence[Tensor], ins: Sequence[Tensor], lo: int, hi: int) -> Tensor:
    """The products ``out.T @ in`` of microbatches, summed along the tree: the last summand of a node is added by the product."""
    if hi - lo == 1:
        return outs[lo].t().mm(ins[lo])
    mid = middle(lo, hi)
    total = _sum_of_products(outs, ins, lo, mid)
    terms, wide = ins[lo].shape
    adds = terms <= _BETA_TERMS and wide >= 12 and outs[lo].shape[1] >= 4 and total.dtype is torch.float32
    if adds and hi - mid == 1 and total.device.type == "cpu":
        return total.addmm_(outs[mid].t(), ins[mid])
    return total.add_(_sum_of_products(outs, ins, mid, hi))


def parts_of(rows: Tensor, count: int, dim: int = 0) -> Sequence[Tensor]:
    """Each microbatch's rows, in memory as aligned as a tensor of their own."""
    each = rows.shape[dim] // count
    parts: Sequence[Tensor] = torch.split(rows, each, dim) if each else (rows,) * count
    if rows.data_ptr() % ALIGNMENT_BYTES or each * rows.stride(dim) * rows.itemsize % ALIGNMENT_BYTES:
        return [part.clone() for part in parts]
    return parts
