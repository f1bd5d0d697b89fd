"""Which operations treat the rows of dimension 0 apart, known by name. Everything here is *local*.

An operation that does can be called once with the rows of several microbatches. This is about what an operation means, and about
kernels that are known to compute rows in another way; whether a kernel gives the same bits is seen by comparing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FACTS = _words(
    "shape dtype device ndim dim size stride numel len is_floating_point is_complex is_contiguous requires_grad is_leaf layout "
    "element_size is_cuda is_sparse is_nested is_quantized is_mkldnn is_meta nelement get_device grad_fn names hash itemsize"
)
_ELEMENTWISE = _words(
    "abs add radd sub rsub mul rmul div truediv rtruediv true_divide neg square sqrt exp tanh sin erf relu relu6 leaky_relu "
    "hardtanh clamp clip minimum maximum where masked_fill eq ne lt le gt ge logical_and logical_or logical_not and or invert "
    "iadd isub imul itruediv to float double half bfloat16 long int bool type_as detach clone contiguous data"
)
_ELEMENTWISE_IN_VECTORS = _words(
    "sigmoid silu elu selu celu mish softplus logsigmoid hardswish hardsigmoid pow rsqrt log log1p cos"
)
"""Kernels that compute the last elements of a tensor in another way than those before."""
_VECTOR = 32  # elements that no kernel splits
_ALONG_A_DIMENSION = _words(
    "softmax log_softmax sum mean amax amin logsumexp squeeze unsqueeze cumsum argmax select narrow unbind flip"
)
RESHAPING = _words("view reshape flatten unflatten")
_IN_PLACE = _words("setitem iadd isub imul itruediv iand ior")


def treats_rows_apart(name: str, args: Any, kwargs: Any, rows: Sequence[Tensor], constants: Sequence[Tensor], count: int) -> bool:
    """Whether an operation on rows and constants is the same for each microbatch as for all, known by its name."""
    first, dims = rows[0], rows[0].dim()
    if not dims or any(other.dim() != dims or other.shape[0] != first.shape[0] for other in rows):
        return False
    if any(other.dim() > dims or (other.dim() == dims and other.shape[0] != 1) for other in constants):
        return False
    if name in _ELEMENTWISE:
        return name not in _IN_PLACE or args[0] is first
    if name in _ELEMENTWISE_IN_VECTORS or name == "gelu":
        return first.numel() // count % _VECTOR == 0 or (name == "gelu" and kwargs.get("approximate", "none") == "none")
    if name in _ALONG_A_DIMENSION:
        along = kwargs.get("dim", args[1] if len(args) > 1 else None)
        return _spares_rows(along, dims + (name == "unsqueeze"))
    if name in ("cat", "stack", "concat"):
        along = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        return not constants and _spares_rows(along, dims + (name == "stack"))
    if name in ("chunk", "split"):
        return _spares_rows(kwargs.get("dim", args[2] if len(args) > 2 else 0), dims)
    if name == "transpose":
        return len(args) == 3 and _spares_rows(args[1:], dims)
    if name == "dropout":
        return (
            args[1:2] == (0.0,) or kwargs.get("p") == 0.0 or kwargs.get("training", args[2] if len(args) > 2 else True) is False
        )
    if name == "permute":
        order = args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:]
        return len(order) == dims and order[0] == 0
    if name == "getitem":
        return _keeps_rows(args[1], dims)
    if name in ("matmul", "bmm"):
        return len(rows) == 2 and dims >= 3
    if name == "scaled_dot_product_attention":
        return dims == 4 and len(rows) >= 3 and not (kwargs.get("dropout_p") or len(args) > 4)
    if name == "linear":
        return args[0] is first and len(rows) == 1 and first.is_contiguous() and products_agree(first, args[1], count)
    if name == "layer_norm":
        return len(rows) == 1 and dims > len(args[1] if len(args) > 1 else kwargs["normalized_shape"])
    return name == "embedding" and len(rows) == 1


def new_dimension(name: str, args: Any) -> int | None:
    """Where an operation that reorders dimensions puts dimension 0; None: it does something else."""
    if name == "T" and args[0].dim() == 2:
        return 1
    if name == "transpose" and len(args) == 3 and all(isinstance(dim, int) for dim in args[1:]):
        one, other = (int(dim % args[0].dim()) for dim in args[1:])
        return other if one == 0 else one
    if name == "permute":
        order = args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:]
        return [int(dim % args[0].dim()) for dim in order].index(0)
    return None


def takes_apart(name: str, args: Any, dim: int) -> bool:
    """Whether an operation takes dimension 0 away of a tensor whose rows are in ``dim``."""
    if name == "getitem":
        return dim > 0 and type(args[1]) is int
    return dim > 0 and name in ("unbind", "select") and (args[1] if len(args) > 1 else 0) == 0


def _spares_rows(along: Any, dims: int) -> bool:
    """Whether dimension 0 is none of ``along``."""
    if isinstance(along, int):
        along = (along,)
    return bool(along) and all(isinstance(dim, int) and dim % dims != 0 for dim in along)


def _keeps_rows(index: Any, dims: int) -> bool:
    index = index if isinstance(index, tuple) else (index,)
    if not all(part is None or part is Ellipsis or isinstance(part, (int, slice)) for part in index):
        return False
    if index[0] is Ellipsis:
        return sum(part is not None for part in index[1:]) < dims
    return isinstance(index[0], slice) and index[0] == slice(None)


def products_agree(rows: Tensor, weight: Tensor, count: int) -> bool:
    """Whether a matrix product's kernel is known to give a row the same bits whether it stands among the rows of one microbatch
    or of several."""
    each, outputs = rows.numel() // rows.shape[-1] // count, weight.shape[0]
    return each % 4 == 0 or (
        each > 4 and outputs > 1 and rows.dtype is torch.float32 and rows.device.type == "cpu" and torch.get_num_threads() == 1
    )


def writes(func: Callable[..., Any], name: str) -> bool:
    plain = func.__name__
    return name in _IN_PLACE or (plain.endswith("_") and not plain.endswith("__"))
