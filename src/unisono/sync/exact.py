"""The exact reduction: an all-to-all of pieces, then a local sum in the order of the fixed tree.

Each worker folds the gradients of its microbatches into its pieces. The owner of a segment receives every piece's part of
that segment and finishes the tree. For aligned ranges these are the bytes of a ring all-reduce, but the order of summation
is ours: it depends on the number of microbatches alone. Between hosts of several workers, pieces travel in two levels
(``two_levels.py``). Where more than two hosts update everything each, sums travel once more (``relay.py``).

Where gradients are sent during backward, they go in buckets, last layers first, in the same order on every worker.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from unisono.collective import Collective, Expected, Pending
from unisono.collective.hosts import Hosts
from unisono.errors import ConfigurationError
from unisono.layout import Layout, Segment, Slot, allocate
from unisono.sync.base import Reduced, Reduction, Sync
from unisono.sync.finish import Finisher, Norms, Run, is_large, runs
from unisono.sync.fold import LeafPlan, LocalFold, Sums, real
from unisono.sync.relay import Relay
from unisono.sync.row_exchange import RowExchange
from unisono.sync.two_levels import TwoLevels
from unisono.tree import Span, pieces
from unisono.tree import assignment as assign


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact(Sync):
    """Replicas and results are bit for bit the same on any number of workers. The default."""

    bucket_mib: float = 25.0
    """Size of the buckets in which gradients leave during backward, in MiB; used with ``overlap`` only."""

    overlap: bool | None = None
    """Whether gradients leave while the last microbatch's backward runs. None: on CUDA, where computing and sending use
    different hardware; on a CPU sending takes the cycles that backward needs."""

    replicate_kib: float = 256.0
    """Models of up to this many KiB of parameters are updated by every worker as a whole: one round of messages a step instead
    of three, for a little more arithmetic and bytes."""

    share_weights: bool | None = None
    """Whether the workers of a host that can share memory keep one copy of the weights among them. None: while ``fit`` runs,
    unless a callback may edit weights. True: in loops of your own, too; then nothing but the trainer may change weights between
    steps, since a change made by every worker would be made several times."""

    def __post_init__(self) -> None:
        if not self.bucket_mib > 0:
            raise ConfigurationError(f"bucket_mib must be positive, got {self.bucket_mib}")
        if not self.replicate_kib >= 0:
            raise ConfigurationError(f"replicate_kib must be 0 or more, got {self.replicate_kib}")

    def bind(
        self,
        layout: Layout,
        collective: Collective,
        leaves: int,
        *,
        sparse: Collection[int] = (),
        per_host: bool = False,
        ranges: Sequence[Span] | None = None,
    ) -> ExactReduction:
        return ExactReduction(self, layout, collective, leaves, sparse=sparse, per_host=per_host, ranges=ranges)

    def overlaps(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.overlap is None else self.overlap


@dataclasses.dataclass(frozen=True)
class _Bucket:
    """A run of slots of one block, reduced together."""

    number: int
    block: int
    slots: tuple[Slot, ...]
    lo: int
    hi: int

    def part(self, bounds: tuple[int, int]) -> tuple[int, int]:
        """The elements of the block that lie in both."""
        return max(self.lo, bounds[0]), min(self.hi, bounds[1])


@dataclasses.dataclass
class _StepState:
    """How far the step under way has come."""

    filled: int
    """Microbatches that hold samples."""
    overlap: bool
    plan: LeafPlan | None = None
    """The last microbatch's, while its gradients leave during backward."""
    missing: list[int] | None = None
    """Gradients that each bucket still waits for, during that backward."""
    folded: int = 0
    """Buckets that are complete, in order."""
    torn: bool = False
    pending: list[Pending] = dataclasses.field(default_factory=list)
    received: dict[int, list[list[Tensor]]] = dataclasses.field(default_factory=dict)
    """What the exchanges that have been waited for brought, by number."""
    notes: tuple[Sequence[Tensor], Sequence[Sequence[Expected]]] = ((), ())
    """What goes to all workers after the pieces, where these go in two levels; and what comes from them."""
    holder: Sums | None = None
    """Where this worker's finished sums lie; None: there is nothing that it sums up."""


class ExactReduction(Reduction):
    """See the module. *Collective* as a whole: every worker makes one, with equal arguments."""

    def __init__(
        self,
        settings: Exact,
        layout: Layout,
        collective: Collective,
        leaves: int,
        *,
        sparse: Collection[int] = (),
        per_host: bool = False,
        ranges: Sequence[Span] | None = None,
    ) -> None:
        self._settings = settings
        self._layout = layout
        self._collective = collective
        self._leaves = leaves
        hosts = Hosts(collective.hosts, collective.rank)
        self.ranges = assign(leaves, collective.size, host_sizes(collective)) if ranges is None else self._checked(ranges)
        apart = per_host and len(hosts.groups) > 1
        groups = hosts.groups if apart else [tuple(range(collective.size))]
        self.segments = [
            tuple(itertools.chain.from_iterable(of_host))
            for of_host in zip(*(layout.segments(len(g)) for g in groups), strict=True)
        ]
        self.updaters = next(group for group in groups if collective.rank in group)
        self.savers = groups[0]
        small = layout.nbytes <= settings.replicate_kib * 1024
        # What a GPU holds is gone with its process: there everyone has to have everything.
        lone = max(map(len, groups)) == 1 if apart else per_host and layout.blocks[0].device.type != "cpu"
        self.replicates = small or lone
        self.replicated = collective.size > 1 and self.replicates
        self.relays = apart and len(groups) > 2 and not small
        self.measurers = tuple(range(collective.size)) if self.relays else self.updaters
        self._relayed = layout.segments(collective.size) if self.relays else self.segments
        everything = [[(0, block.numel)] * collective.size for block in layout.blocks]
        self._summed = everything if self.replicated and not self.relays else _bounds(self._relayed)
        updated = everything if self.replicated else _bounds(self.segments)
        self._relay = Relay(layout, collective, self._summed, updated) if self.relays else None
        # What several workers sum up each for itself, they read of each other.
        own_changes = self.relays or not (self.replicated or apart)
        self._pieces = [pieces(lo, hi, leaves) for lo, hi in self.ranges]
        self._slots = [slot for block in layout.blocks for slot in block.slots]
        self._rows = RowExchange(
            [slot for slot in self._slots if slot.index in sparse], layout, collective, self._pieces, leaves, self.updated_by
        )
        # Where every worker reads every piece, nobody may write to its own or keep it elsewhere. Sums are sent from one place.
        kept = own_changes and not self.relays
        large = [i for i in self.updated_by(collective.rank) if is_large(self._slots[i])] if kept else []
        self._fold = LocalFold(
            layout,
            self.ranges[collective.rank],
            leaves,
            collective.allocate,
            kept=large,
            sparse=sparse,
            resting=self.replicated and not self.relays,
        )
        self._levels: TwoLevels | None = None
        self._arriving: Sequence[Sequence[Span]] = self._pieces  # what each worker sends here
        if hosts.two_levels:
            self._levels = TwoLevels(collective, hosts, self._pieces, leaves, own_changes=own_changes)
            self._arriving = self._levels.arriving
        self._finisher = Finisher(layout, self._arriving, collective.rank, leaves, allocate=allocate, own_changes=own_changes)
        self.densified: set[int] = set()
        self._hooks: list[RemovableHandle] = []
        self._state = _StepState(filled=0, overlap=False)
        self._divide()

    def _divide(self) -> None:
        """Buckets, and what of them this worker finishes, over all slots but the sparse ones."""
        layout, skip = self._layout, self._fold.sparse
        self._whole = _buckets(layout, None, skip)
        self._small = _buckets(layout, self._settings.bucket_mib * 2**20, skip)
        self._bucket_of = {slot.index: bucket for bucket in self._small for slot in bucket.slots}
        ends = {slot.index: end for block in layout.blocks for slot, end in zip(block.slots, block.ends, strict=True)}
        mine = set(self._summed_by(self._collective.rank))

        def finished(buckets: Sequence[_Bucket]) -> list[list[Run]]:
            return [
                runs(
                    b.block, [slot for slot in b.slots if slot.index in mine and b.hi > b.lo], ends, layout.blocks[b.block].device
                )
                for b in buckets
            ]

        self._runs = {True: finished(self._small), False: finished(self._whole)}

    def _summed_by(self, rank: int) -> list[int]:
        """The slots (by index) whose gradients worker ``rank`` sums up."""
        if not self.relays:
            return self.updated_by(rank)
        return [slot.index for segments in self._relayed for slot in segments[rank].slots]

    def _checked(self, ranges: Sequence[Span]) -> tuple[Span, ...]:
        edges = [0, *(hi for _, hi in ranges)]
        whole = len(ranges) == self._collective.size and edges[-1] == self._leaves
        if not whole or list(ranges) != list(pairwise(edges)) or any(hi <= lo for lo, hi in ranges):
            raise ConfigurationError(
                f"ranges {list(ranges)} do not share {self._leaves} microbatches out to {self._collective.size} workers: give "
                "each worker at least one, contiguous and in order of rank"
            )
        return tuple((lo, hi) for lo, hi in ranges)

    def reassign(self, ranges: Sequence[Span]) -> None:
        self.ranges = self._checked(ranges)
        self._pieces = [pieces(lo, hi, self._leaves) for lo, hi in self.ranges]
        self._arriving = self._pieces
        self._fold.reassign(self.ranges[self._collective.rank])
        self._rows.reassign(self._pieces)
        if self._levels is not None:
            self._levels.reassign(self._pieces)
            self._arriving = self._levels.arriving
        self._finisher.reassign(self._arriving)

    def densify(self, slots: Collection[int]) -> None:
        self.densified |= set(slots)
        self._fold.densify(slots)
        self._rows.densify(slots)
        self._divide()

    # ------------------------------------------------------------------ one step

    @property
    def present(self) -> bytes:
        return bytes(self._fold.present)

    @property
    def torn(self) -> bool:
        return self._state.torn

    @property
    def unfit(self) -> bool:
        return bool(self._rows.strays)

    def begin(self, filled: int, *, overlap: bool) -> None:
        self._fold.begin(filled)
        self._rows.begin(filled)
        if self._levels is not None:
            self._levels.begin(filled)
        self._state = _StepState(filled=filled, overlap=overlap)
        if overlap and not self._hooks:
            self._install_hooks()

    def before_backward(self, leaf: int) -> None:
        if self._state.overlap and leaf == self._fold.last_leaf:
            self._state.plan = self._fold.plan(leaf)
            self._state.missing = [len(bucket.slots) for bucket in self._small]

    def add(self, leaf: int) -> None:
        plan = self._state.plan
        if plan is not None:
            for bucket in self._small[self._state.folded :]:
                self._fold_bucket(bucket)
            self._fold.fold(plan, self._rows.slots)
            for parameter in self._layout.parameters:
                if parameter.grad is not None:
                    self._state.torn = True
                    parameter.grad = None
            self._state.missing = None
        else:
            plan = self._fold.plan(leaf)
            for bucket in self._whole:
                self._fold.fold(plan, bucket.slots)
            if self._rows.slots:
                self._fold.fold(plan, self._rows.slots)

    def launch(self, notes: Sequence[Tensor] = (), expected: Sequence[Sequence[Expected]] | None = None) -> None:
        size = self._collective.size
        notes = [*notes, *self._rows.note(self._fold)]
        expected = [[*(expected[peer] if expected else ()), *self._rows.expected(peer)] for peer in range(size)]
        todo = self._buckets[len(self._state.pending) :]
        # A backend sends tensors of one device at a time.
        along = self._levels is None and bool(todo) and self._layout.blocks[0].device.type == "cpu"
        for bucket in todo[: len(todo) - along]:
            self._send(bucket)
        if along:
            self._send(todo[-1], notes, expected)
        elif self._levels is not None:
            self._state.notes = (notes, expected)
        else:
            self._state.pending.append(self._collective.start_exchange([notes] * size, expected, name="notes"))

    def notes(self) -> list[list[Tensor]]:
        received = self._all_notes()
        if self._rows.slots:
            self._rows.read([tensors[-1] for tensors in received])
            received = [tensors[:-1] for tensors in received]
        return received

    def _all_notes(self) -> list[list[Tensor]]:
        if self._levels is not None:
            self._levels.forward()
            return self._collective.all_gather_lists(*self._state.notes)
        last = len(self._state.pending) - 1
        received = self._received(last)
        if last == len(self._buckets):
            return received
        return [tensors[self._pieces_in(worker, self._buckets[last]) :] for worker, tensors in enumerate(received)]

    def drop(self) -> None:
        for number in range(len(self._state.pending)):
            self._received(number)
        if self._rows.strays:
            self.densify(self._rows.strays)

    def finish(self, count: float, present: bytes) -> Reduced:
        norms = Norms()
        found: dict[int, Tensor] = {}
        own = self._fold.pieces()
        self._state.holder = None
        for number, bucket in enumerate(self._buckets):
            received = [tensors[: self._pieces_in(worker, bucket)] for worker, tensors in enumerate(self._received(number))]
            origin, _ = self._wanted(bucket, self._collective.rank)
            for run in self._runs[self._state.overlap][number]:
                holder = self._finisher.finish(run, own, received, origin, self._state.filled, count)
                self._state.holder = holder
                norms.add(run, holder)
                found.update((slot.index, holder.views[slot.index]) for slot in run.slots)
        for slot, rows, gradient in self._rows.finish(own, count):
            if not self.relays or self._collective.rank in self.savers:  # other hosts have the same sum
                norms.add_tensors([slot.index], [real(rows.values)])
            found[slot.index] = gradient
        measured = {index: _finite(norm, found[index]) for index, norm in norms.values().items() if present[index]}
        slots = [slot for slot in self._slots if slot.index in found and present[slot.index]]
        return Reduced(slots, [found[slot.index] for slot in slots], measured)

    def deliver(self, reduced: Reduced, present: bytes) -> Reduced:
        if self._relay is None:
            return reduced
        sums = self._relay.deliver([(bucket.block, bucket.lo, bucket.hi) for bucket in self._whole], self._state.holder)
        sparse = {slot.index for slot in self._rows.slots}
        found = {s.index: g for s, g in zip(reduced.slots, reduced.gradients, strict=True) if s.index in sparse}
        found |= {i: sums.views[i] for i in self.updated_by(self._collective.rank) if i not in sparse and present[i]}
        slots = [slot for slot in self._slots if slot.index in found]
        return Reduced(slots, [found[slot.index] for slot in slots], reduced.norms)

    # ------------------------------------------------------------------ pieces to those who update

    @property
    def _buckets(self) -> Sequence[_Bucket]:
        return self._small if self._state.overlap else self._whole

    def _send(self, bucket: _Bucket, notes: Sequence[Tensor] = (), expected: Sequence[Sequence[Expected]] | None = None) -> None:
        rank, size = self._collective.rank, self._collective.size
        block = self._layout.blocks[bucket.block]
        flats = [sums.flats[bucket.block] for sums in self._fold.pieces()]
        name = f"reduce {bucket.number} of {len(self._buckets)}"
        if self._levels is not None:
            wanted = [self._wanted(bucket, peer) for peer in range(size)]
            self._state.pending.append(self._levels.start(flats, wanted, (block.dtype, block.device), name))
            return
        outgoing: list[list[Tensor]] = []
        incoming: list[list[Expected]] = []
        mine_lo, mine_hi = self._wanted(bucket, rank)
        for peer in range(size):
            lo, hi = self._wanted(bucket, peer)
            outgoing.append([*([flat[lo:hi] for flat in flats] if peer != rank and hi > lo else ()), *notes])
            piece = (mine_hi - mine_lo, block.dtype, block.device)
            incoming.append([*[piece] * self._pieces_in(peer, bucket), *(expected[peer] if expected else ())])
        self._state.pending.append(self._collective.start_exchange(outgoing, incoming, name=name))

    def _received(self, number: int) -> list[list[Tensor]]:
        """What each worker sent in the exchange of this number; waits for it the first time."""
        if number not in self._state.received:
            self._state.received[number] = self._state.pending[number].wait()
        return self._state.received[number]

    def _wanted(self, bucket: _Bucket, worker: int) -> tuple[int, int]:
        """The elements of the bucket that this worker sums up."""
        return bucket.part(self._summed[bucket.block][worker])

    def _pieces_in(self, worker: int, bucket: _Bucket) -> int:
        """How many pieces that worker sends here with the bucket."""
        lo, hi = self._wanted(bucket, self._collective.rank)
        if worker == self._collective.rank or hi <= lo:
            return 0
        return sum(span[0] < self._state.filled for span in self._arriving[worker])

    # ------------------------------------------------------------------ overlap with backward

    def _install_hooks(self) -> None:
        for index, parameter in enumerate(self._layout.parameters):
            handle = parameter.register_post_accumulate_grad_hook(self._arrived(index))  # type: ignore[no-untyped-call]
            self._hooks.append(handle)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _arrived(self, index: int) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            bucket = self._bucket_of.get(index)
            if bucket is None or self._state.missing is None or bucket.number < self._state.folded:
                return  # not the last microbatch; or too late, which add() notices by the gradient that is left over
            self._state.missing[bucket.number] -= 1
            while self._state.folded < len(self._small) and self._state.missing[self._state.folded] == 0:
                self._fold_bucket(self._small[self._state.folded])
                if self._state.folded < len(self._small):
                    self._send(self._small[self._state.folded - 1])

        return hook

    def _fold_bucket(self, bucket: _Bucket) -> None:
        if self._state.plan is not None:
            self._fold.fold(self._state.plan, bucket.slots)
        self._state.folded = bucket.number + 1


def _bounds(segments: Sequence[Sequence[Segment]]) -> list[list[tuple[int, int]]]:
    return [[(segment.lo, segment.hi) for segment in of_block] for of_block in segments]


def _finite(norm: float, gradient: Tensor) -> float:
    """The L2 norm of a gradient: squares overflow long before the values do."""
    return norm if math.isfinite(norm) else float(torch.linalg.vector_norm(gradient.double()))


def host_sizes(collective: Collective) -> tuple[int, ...]:
    """*local*. The number of workers of each host, where ranges of hosts matter, since pieces travel in two levels; else
    nothing."""
    hosts = Hosts(collective.hosts, collective.rank)
    return tuple(map(len, hosts.groups)) if hosts.two_levels else ()


def _buckets(layout: Layout, limit_bytes: float | None, skip: Collection[int]) -> list[_Bucket]:
    """Runs of neighbouring slots, none of them in ``skip``, of at most ``limit_bytes`` (or one slot), from the last layer to the
    first; None: as long as they can be."""
    found: list[_Bucket] = []
    for number in reversed(range(len(layout.blocks))):
        block = layout.blocks[number]
        ends = block.ends
        stop = len(block.slots)
        while stop:
            start = stop - 1
            if block.slots[start].index in skip:
                stop = start
                continue
            while (
                start
                and block.slots[start - 1].index not in skip
                and (
                    limit_bytes is None or (ends[stop - 1] - block.slots[start - 1].offset) * block.dtype.itemsize <= limit_bytes
                )
            ):
                start -= 1
            found.append(_Bucket(len(found), number, block.slots[start:stop], lo=block.slots[start].offset, hi=ends[stop - 1]))
            stop = start
    return found
