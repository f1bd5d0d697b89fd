"""The fixed binary tree over microbatches: the one order in which unisono sums anything.

``tree(lo, hi)`` is a leaf when it holds one microbatch, else ``tree(lo, mid) + tree(mid, hi)`` with ``mid - lo`` the
largest power of two below ``hi - lo``. The tree depends on the number of microbatches M alone, so any sum taken along it
is the same for every number of workers. A worker computes a contiguous range of microbatches; the maximal complete subtrees
in that range are its *pieces*, and the pieces of all workers are all that is needed to finish the tree.

An absent leaf (an empty microbatch, an unused parameter) is ``None``: the sum of a node with an absent child is the other
child, untouched.

Pure Python; knows neither tensors nor processes. Everything here is *local*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
Span = tuple[int, int]
"""Microbatches ``lo <= m < hi`` as ``(lo, hi)``."""


def middle(lo: int, hi: int) -> int:
    """Where the node ``(lo, hi)`` of two or more microbatches splits: ``lo`` plus the largest power of two below its size."""
    return lo + (1 << ((hi - lo - 1).bit_length() - 1))


def is_node(lo: int, hi: int, microbatches: int) -> bool:
    """Whether ``(lo, hi)`` is a node of the tree over ``microbatches`` microbatches.

    The nodes are the aligned blocks of a power of two microbatches, cut off at the tree's end.
    """
    width = 1 << (hi - lo - 1).bit_length()
    return lo % width == 0 and (hi == lo + width or hi == microbatches)


def pieces(lo: int, hi: int, microbatches: int) -> tuple[Span, ...]:
    """The maximal nodes of the tree over ``microbatches`` microbatches that cover exactly the range ``(lo, hi)``, in order."""
    found: list[Span] = []

    def walk(node_lo: int, node_hi: int) -> None:
        if hi <= node_lo or node_hi <= lo:
            return
        if lo <= node_lo and node_hi <= hi:
            found.append((node_lo, node_hi))
            return
        mid = middle(node_lo, node_hi)
        walk(node_lo, mid)
        walk(mid, node_hi)

    walk(0, microbatches)
    return tuple(found)


def nodes_within(lo: int, hi: int, most: int) -> list[Span]:
    """The largest nodes of at most ``most`` microbatches below the node ``(lo, hi)``, in order."""
    if hi - lo <= max(1, most):
        return [(lo, hi)]
    mid = middle(lo, hi)
    return nodes_within(lo, mid, most) + nodes_within(mid, hi, most)


def combine(
    parts: Mapping[Span, T | None], microbatches: int, add: Callable[[T, T], T], *, lo: int = 0, hi: int | None = None
) -> T | None:
    """Finishes the tree from pieces that cover it: ``add(left, right)`` at every node whose children are both present.

    Args:
        parts: Node -> its sum, or None where every leaf below it is absent.
        microbatches: Of the whole tree.
        add: The sum of two neighbours; may reuse the memory of either.

    Returns:
        The sum of the node ``(lo, hi)``, by default of all microbatches; None if all are absent.
    """
    hi = microbatches if hi is None else hi
    if (lo, hi) in parts:
        return parts[lo, hi]
    mid = middle(lo, hi)
    left = combine(parts, microbatches, add, lo=lo, hi=mid)
    right = combine(parts, microbatches, add, lo=mid, hi=hi)
    if left is None or right is None:
        return right if left is None else left
    return add(left, right)


class Fold(Generic[T]):
    """Sums one value per microbatch, given in order, along the tree; holds at most one value per level.

    Args:
        microbatches: Of the whole tree.
        add: ``add(left, right)``; the fold drops both operands and keeps the result.
    """

    def __init__(self, microbatches: int, add: Callable[[T, T], T]) -> None:
        self._microbatches = microbatches
        self._add = add
        self._stack: list[tuple[Span, T | None]] = []

    def push(self, microbatch: int, value: T | None) -> None:
        """Takes the next microbatch's value (None if absent) and merges every node that it completes."""
        span: Span = (microbatch, microbatch + 1)
        while self._stack and self._merges(self._stack[-1][0], span):
            (lo, _), left = self._stack.pop()
            span = (lo, span[1])
            value = self._join(left, value)
        self._stack.append((span, value))

    def parts(self) -> dict[Span, T | None]:
        """The pieces folded so far, by node."""
        return dict(self._stack)

    def _merges(self, left: Span, right: Span) -> bool:
        return left[1] == right[0] and is_node(left[0], right[1], self._microbatches) and middle(left[0], right[1]) == right[0]

    def _join(self, left: T | None, right: T | None) -> T | None:
        if left is None or right is None:
            return right if left is None else left
        return self._add(left, right)


def fold_all(values: Sequence[T | None], add: Callable[[T, T], T]) -> T | None:
    """The tree sum of one value per microbatch."""
    return _fold_range(values, add, 0, len(values)) if values else None


def _fold_range(values: Sequence[T | None], add: Callable[[T, T], T], lo: int, hi: int) -> T | None:
    if hi - lo == 1:
        return values[lo]
    mid = middle(lo, hi)
    left, right = _fold_range(values, add, lo, mid), _fold_range(values, add, mid, hi)
    if left is None or right is None:
        return right if left is None else left
    return add(left, right)
