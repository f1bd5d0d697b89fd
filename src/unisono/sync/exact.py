"""The exact reduction: an all-to-all of pieces, then a local sum in the order of the fixed tree.

Each worker folds the gradients of its microbatches into its pieces. The owner of a segment receives every piece's part of
that segment and finishes the tree. For aligned ranges these are the bytes of a ring all-reduce, but the order of summation
is ours: it depends on the number of microbatches alone.

Where gradients are sent during backward, they go in buckets, last layers first, in the same order on every worker.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from unisono.collective import Collective, Pending
from unisono.errors import ConfigurationError
from unisono.layout import Layout, Segment, Slot
from unisono.sync.base import Reduction, Sync
from unisono.tree import Span, combine, is_node, middle, pieces
from unisono.tree import assignment as assign


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact(Sync):
    """Replicas and results are bit for bit the same on any number of workers. The default."""

    bucket_mib: float = 25.0
    """Size of the buckets in which gradients leave during backward, in MiB."""

    overlap: bool | None = None
    """Whether gradients leave while the last microbatch's backward runs. None: on CUDA, where computing and sending use
    different hardware; on a CPU sending takes the cycles that backward needs."""

    def __post_init__(self) -> None:
        if not self.bucket_mib > 0:
            raise ConfigurationError(f"bucket_mib must be positive, got {self.bucket_mib}")

    def bind(self, layout: Layout, collective: Collective, leaves: int) -> ExactReduction:
        return ExactReduction(self, layout, collective, leaves)

    def overlaps(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.overlap is None else self.overlap


class _Sums:
    """A gradient, or a sum of gradients, of all parameters: flat tensors and each slot's view into them."""

    def __init__(self, layout: Layout, collective: Collective) -> None:
        self.flats = [collective.allocate(block.numel, block.dtype, block.device) for block in layout.blocks]
        for flat in self.flats:
            flat.zero_()  # the padding between slots must never hold a NaN
        self.views = [view for block, flat in zip(layout.blocks, self.flats, strict=True) for view in block.views(flat)]


@dataclasses.dataclass(frozen=True)
class _Bucket:
    """A run of slots of one block, reduced together."""

    number: int
    block: int
    slots: tuple[Slot, ...]
    lo: int
    hi: int

    def part(self, segment: Segment) -> tuple[int, int]:
        """The elements of the block that lie in both."""
        return max(self.lo, segment.lo), min(self.hi, segment.hi)


@dataclasses.dataclass(frozen=True)
class _LeafPlan:
    """What a leaf does to the stack of sums: copy or add the gradients to ``target``, then merge neighbours."""

    target: _Sums
    fresh: bool
    merges: tuple[tuple[_Sums, _Sums], ...]


@dataclasses.dataclass
class _StepState:
    """How far the step under way has come."""

    filled: int
    """Microbatches that hold samples."""
    overlap: bool
    last_leaf: int | None
    """This worker's last microbatch that holds samples."""
    plan: _LeafPlan | None = None
    """The last microbatch's, while its gradients leave during backward."""
    missing: list[int] | None = None
    """Gradients that each bucket still waits for, during that backward."""
    folded: int = 0
    """Buckets that are complete, in order."""
    torn: bool = False
    pending: list[Pending] = dataclasses.field(default_factory=list)


class ExactReduction(Reduction):
    """See the module. *Collective* as a whole: every worker makes one, with equal arguments."""

    def __init__(self, settings: Exact, layout: Layout, collective: Collective, leaves: int) -> None:
        self._layout = layout
        self._collective = collective
        self._leaves = leaves
        self.ranges = assign(leaves, collective.size)
        self.segments = layout.segments(collective.size)
        self._pieces = [pieces(lo, hi, leaves) for lo, hi in self.ranges]
        self._whole = _buckets(layout, None)
        self._small = _buckets(layout, settings.bucket_mib * 2**20)
        self._bucket_of = {slot.index: bucket for bucket in self._small for slot in bucket.slots}
        self._pool: list[_Sums] = []
        self._scratch: dict[tuple[int, int], Tensor] = {}
        self.present = np.zeros(len(layout.parameters), dtype=np.uint8)
        self._stack: list[tuple[Span, _Sums | None]] = []
        self._told_sparse = False
        self._hooks_installed = False
        self._state = _StepState(filled=0, overlap=False, last_leaf=None)

    # ------------------------------------------------------------------ one step

    def begin(self, filled: int, *, overlap: bool) -> None:
        self._pool += [sums for _, sums in self._stack if sums is not None]
        self._stack.clear()
        self.present[:] = 0
        lo, hi = self.ranges[self._collective.rank]
        self._state = _StepState(filled=filled, overlap=overlap, last_leaf=min(hi, filled) - 1 if filled > lo else None)
        if overlap and not self._hooks_installed:
            self._install_hooks()

    def before_backward(self, leaf: int) -> None:
        if self._state.overlap and leaf == self._state.last_leaf:
            self._state.plan = self._plan_leaf(leaf)
            self._state.missing = [len(bucket.slots) for bucket in self._small]

    def add(self, leaf: int) -> None:
        if self._state.plan is not None:
            for bucket in self._small[self._state.folded :]:
                self._fold_bucket(bucket)
            if any(parameter.grad is not None for parameter in self._layout.parameters):
                self._state.torn = True
            self._state.missing = None
        else:
            plan = self._plan_leaf(leaf)
            for bucket in self._whole:
                self._fold(plan, bucket)
        for parameter in self._layout.parameters:
            parameter.grad = None

    def launch(self) -> None:
        for bucket in self._buckets[len(self._state.pending) :]:
            self._send(bucket)

    def finish(self) -> list[tuple[Slot, Tensor]]:
        mine: list[tuple[Slot, Tensor]] = []
        for bucket, pending in zip(self._buckets, self._state.pending, strict=True):
            segment = self.segments[bucket.block][self._collective.rank]
            lo, hi = bucket.part(segment)
            received = pending.wait()
            if hi <= lo:
                continue
            total = self._finish_tree(bucket, received)
            mine += [(slot, slot.view(total, lo)) for slot in bucket.slots if lo <= slot.offset < hi]
        return sorted(mine, key=lambda owned: owned[0].index)

    @property
    def torn(self) -> bool:
        return self._state.torn

    # ------------------------------------------------------------------ fold: this worker's leaves into its pieces

    def _plan_leaf(self, leaf: int) -> _LeafPlan:
        """Puts the leaf on the stack, and the absent ones behind the last; the sums themselves follow in ``_fold``."""
        span = (leaf, leaf + 1)
        left = self._sibling(span)
        fresh = left is None
        if left is None:
            target = self._pool.pop() if self._pool else _Sums(self._layout, self._collective)
        else:
            # Adding a leaf to its sibling's memory is the tree's own sum: a + b, in place.
            target = left
            span = (self._stack.pop()[0][0], span[1])
        merges, span, sums = self._merge(span, target)
        self._stack.append((span, sums))
        if leaf == self._state.last_leaf:
            for absent in range(leaf + 1, self.ranges[self._collective.rank][1]):
                more, span, rest = self._merge((absent, absent + 1), None)
                merges += more
                self._stack.append((span, rest))
        return _LeafPlan(target, fresh, tuple(merges))

    def _merge(self, span: Span, sums: _Sums | None) -> tuple[list[tuple[_Sums, _Sums]], Span, _Sums | None]:
        merges: list[tuple[_Sums, _Sums]] = []
        while self._completes(span):
            (lo, _), left = self._stack.pop()
            span = (lo, span[1])
            if left is not None and sums is not None:
                merges.append((left, sums))
                self._pool.append(sums)
            sums = sums if left is None else left
        return merges, span, sums

    def _completes(self, span: Span) -> bool:
        if not self._stack:
            return False
        lo, hi = self._stack[-1][0][0], span[1]
        return is_node(lo, hi, self._leaves) and middle(lo, hi) == span[0]

    def _sibling(self, span: Span) -> _Sums | None:
        return self._stack[-1][1] if self._completes(span) else None

    def _fold(self, plan: _LeafPlan, bucket: _Bucket) -> None:
        views = [plan.target.views[slot.index] for slot in bucket.slots]
        grads: list[Tensor] = []
        places: list[Tensor] = []
        for slot, view in zip(bucket.slots, views, strict=True):
            grad = self._layout.parameters[slot.index].grad
            if grad is not None:
                self.present[slot.index] = 1
                grads.append(_real(self._densified(grad, slot)))
                places.append(_real(view))
            elif plan.fresh:
                # -0.0 is what adding leaves untouched, sign of zero included: the sum of an absent leaf and x is x.
                _real(view).fill_(-0.0)
        with torch.no_grad():
            if places:
                (torch._foreach_copy_ if plan.fresh else torch._foreach_add_)(places, grads)
            for left, right in plan.merges:
                _real(left.flats[bucket.block][bucket.lo : bucket.hi]).add_(
                    _real(right.flats[bucket.block][bucket.lo : bucket.hi])
                )

    def _densified(self, grad: Tensor, slot: Slot) -> Tensor:
        if grad.layout == torch.strided:
            return grad
        if not self._told_sparse:
            self._told_sparse = True
            if self._collective.rank == 0:
                warnings.warn(
                    f"parameter {slot.name!r} has sparse gradients: they are made dense before they are summed (correct, "
                    "but it costs the bytes of the whole parameter)",
                    stacklevel=2,
                )
        return grad.to_dense()

    # ------------------------------------------------------------------ reduce: pieces to owners

    @property
    def _buckets(self) -> Sequence[_Bucket]:
        return self._small if self._state.overlap else self._whole

    def _send(self, bucket: _Bucket) -> None:
        segments = self.segments[bucket.block]
        block = self._layout.blocks[bucket.block]
        mine = [sums.flats[bucket.block] for _, sums in self._stack if sums is not None]
        outgoing = [[flat[lo:hi] for flat in mine] if hi > lo else [] for lo, hi in map(bucket.part, segments)]
        lo, hi = bucket.part(segments[self._collective.rank])
        expected = (hi - lo, block.dtype, block.device)
        incoming = [[expected] * len(self._filled_pieces(peer)) if hi > lo else [] for peer in range(len(segments))]
        name = f"reduce {bucket.number} of {len(self._buckets)}"
        self._state.pending.append(self._collective.start_exchange(outgoing, incoming, name=name))

    def _filled_pieces(self, worker: int) -> list[Span]:
        return [span for span in self._pieces[worker] if span[0] < self._state.filled]

    def _finish_tree(self, bucket: _Bucket, received: list[list[Tensor]]) -> Tensor:
        """The tree's root over the pieces of all workers, in memory that this worker may change."""
        parts: dict[Span, Tensor | None] = {span: None for spans in self._pieces for span in spans}
        for worker, tensors in enumerate(received):
            parts.update(zip(self._filled_pieces(worker), tensors, strict=True))
        changeable = {tensor.data_ptr() for tensor in received[self._collective.rank]}
        used = 0

        def scratch(like: Tensor) -> Tensor:
            nonlocal used
            key = (bucket.number if self._state.overlap else -1 - bucket.number, used)
            used += 1
            if key not in self._scratch or self._scratch[key].numel() != like.numel():
                self._scratch[key] = self._collective.allocate(like.numel(), like.dtype, like.device)
            changeable.add(self._scratch[key].data_ptr())
            return self._scratch[key]

        def add(left: Tensor, right: Tensor) -> Tensor:
            # a + b and b + a are the same bits, so the sum may go to whichever of the two is ours.
            for mine, other in ((left, right), (right, left)):
                if mine.data_ptr() in changeable:
                    _real(mine).add_(_real(other))
                    return mine
            total = scratch(left)
            torch.add(_real(left), _real(right), out=_real(total))
            return total

        root = combine(parts, self._leaves, add)
        if root is None:
            raise ConfigurationError("a step without a single sample has no gradient")  # pragma: no cover - never planned
        return root if root.data_ptr() in changeable else scratch(root).copy_(root)

    # ------------------------------------------------------------------ overlap with backward

    def _install_hooks(self) -> None:
        for index, parameter in enumerate(self._layout.parameters):
            parameter.register_post_accumulate_grad_hook(self._arrived(index))  # type: ignore[no-untyped-call]
        self._hooks_installed = True

    def _arrived(self, index: int) -> Callable[[Tensor], None]:
        bucket = self._bucket_of[index]

        def hook(_: Tensor) -> None:
            if self._state.missing is None or bucket.number < self._state.folded:
                return  # not the last microbatch; or too late, which add() notices by the gradient that is left over
            self._state.missing[bucket.number] -= 1
            while self._state.folded < len(self._small) and self._state.missing[self._state.folded] == 0:
                self._fold_bucket(self._small[self._state.folded])
                self._send(self._small[self._state.folded - 1])

        return hook

    def _fold_bucket(self, bucket: _Bucket) -> None:
        if self._state.plan is not None:
            self._fold(self._state.plan, bucket)
            for slot in bucket.slots:
                self._layout.parameters[slot.index].grad = None
        self._state.folded = bucket.number + 1


def _real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones: their own sum multiplies by 1 + 0i first, which may change the sign of a zero."""
    return torch.view_as_real(tensor.resolve_conj().resolve_neg()) if tensor.is_complex() else tensor


def _buckets(layout: Layout, limit_bytes: float | None) -> list[_Bucket]:
    """Runs of slots of at most ``limit_bytes`` (or one slot), from the last layer to the first; one a block if None."""
    found: list[_Bucket] = []
    for number in reversed(range(len(layout.blocks))):
        block = layout.blocks[number]
        ends = block.ends
        stop = len(block.slots)
        while stop:
            start = stop - 1
            while start and (
                limit_bytes is None or (ends[stop - 1] - block.slots[start - 1].offset) * block.dtype.itemsize <= limit_bytes
            ):
                start -= 1
            found.append(_Bucket(len(found), number, block.slots[start:stop], lo=block.slots[start].offset, hi=ends[stop - 1]))
            stop = start
    return found
