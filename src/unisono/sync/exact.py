"""The exact reduction: an all-to-all of pieces, then a local sum in the order of the fixed tree.

Each worker folds the gradients of its microbatches into its pieces. The owner of a segment receives every piece's part of
that segment and finishes the tree. For aligned ranges these are the bytes of a ring all-reduce, but the order of summation
is ours: it depends on the number of microbatches alone. Between hosts of several workers, pieces travel in two levels
(``two_levels.py``). Where more than two hosts, or workers, update everything each, sums travel once more (``delivery.py``).

Where gradients are sent during backward, they go in buckets, last layers first, in the same order on every worker.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from unisono.assignment import assignment, checked_ranges
from unisono.collective import Collective, Expected, Pending
from unisono.collective.hosts import HostMap, host_sizes
from unisono.errors import ConfigurationError
from unisono.layout import Layout, allocate
from unisono.sync.base import Clock, NoClock, Reduced, Reduction, Sync
from unisono.sync.buckets import Bucket, buckets
from unisono.sync.delivery import Delivery
from unisono.sync.finish import Finisher, Norms, Stretch, is_large, stretches
from unisono.sync.fold import LocalFold, NodePlan, Sums, real
from unisono.sync.ownership import Ownership
from unisono.sync.row_exchange import RowExchange
from unisono.sync.two_levels import TwoLevels
from unisono.system.memory import free_memory_bytes
from unisono.tree import Span, nodes_within, pieces


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

    shard_update: bool | None = None
    """Whether each worker updates a part of the parameters. That is exact only if the optimizer updates each parameter on its
    own, from that parameter's gradient, state and settings, and draws no random numbers. None: it does for the classes of
    ``torch.optim`` themselves, which are known to, without hooks on their step. Every other optimizer is updated whole by every
    worker, which is exact for all of them, but each worker then has all of its state and does all of its work. True: you vouch
    for your optimizer. False: every worker updates everything, whatever the optimizer."""

    one_pass: bool | Literal["auto"] = "auto"
    """Whether a worker computes several of its microbatches in one forward and backward, where that has been seen to give the
    bits of separate passes, and is faster. False: never; it changes no bit."""

    one_pass_mib: float | None = None
    """What the forward passes of microbatches that are computed together may keep in memory for backward, in MiB. None: a quarter
    of the memory that is free when training begins, divided by the workers of the host."""

    def __post_init__(self) -> None:
        if self.one_pass not in (False, "auto"):
            raise ConfigurationError(f'one_pass must be "auto" or False, got {self.one_pass!r}')
        if self.one_pass_mib is not None and not self.one_pass_mib > 0:
            raise ConfigurationError(f"one_pass_mib must be positive, got {self.one_pass_mib}")
        if not self.bucket_mib > 0:
            raise ConfigurationError(f"bucket_mib must be positive, got {self.bucket_mib}")
        if not self.replicate_kib >= 0:
            raise ConfigurationError(f"replicate_kib must be 0 or more, got {self.replicate_kib}")
        if self.shard_update not in (True, False, None):
            raise ConfigurationError(f"shard_update must be True, False or None, got {self.shard_update!r}")

    def bind(self, layout: Layout, collective: Collective, microbatches: int, **options: Any) -> ExactReduction:
        return ExactReduction(self, layout, collective, microbatches, **options)

    def one_pass_bytes(self, workers: int) -> int:
        """*local*. What microbatches that are computed together may keep for backward, on each of a host's ``workers``."""
        if self.one_pass is False:
            return 0
        return free_memory_bytes() // 4 // workers if self.one_pass_mib is None else int(self.one_pass_mib * 2**20)

    def overlaps(self, device: torch.device) -> bool:
        """*local*. Whether gradients leave while the last microbatch's backward still runs, on such a device."""
        return device.type == "cuda" if self.overlap is None else self.overlap


@dataclasses.dataclass
class _StepState:
    """How far the step under way has come."""

    filled: int
    """Microbatches that hold samples."""
    overlaps: bool
    """Whether gradients leave during backward."""
    plan: NodePlan | None = None
    """The last microbatch's, while its gradients leave during backward."""
    gradients: list[Tensor | None] = dataclasses.field(default_factory=list)
    """What has arrived early, by slot."""
    missing: list[int] = dataclasses.field(default_factory=list)
    """Gradients that each bucket still waits for, during that backward."""
    folded: int = 0
    """Buckets that are complete, in order."""
    late_gradient: bool = False
    """Whether a gradient arrived after another one for the same parameter: that one had to wait for it."""
    pending: list[Pending] = dataclasses.field(default_factory=list)
    received: dict[int, list[list[Tensor]]] = dataclasses.field(default_factory=dict)
    """What the exchanges that have been waited for brought, by number."""
    header_bytes: int = 0
    notes: tuple[Sequence[Tensor], Sequence[Sequence[Expected]]] = ((), ())
    """What goes to all workers after the pieces, where these go in two levels; and what comes from them."""
    present: bytes = b""
    """For each slot, 1 if any microbatch of any worker has a gradient for it."""


class ExactReduction(Reduction):
    """See the module. *Collective* as a whole: every worker makes one, with equal arguments."""

    def __init__(
        self,
        settings: Exact,
        layout: Layout,
        collective: Collective,
        microbatches: int,
        *,
        sparse: Collection[int] = (),
        per_host: bool = False,
        whole: bool = False,
        ranges: Sequence[Span] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._settings = settings
        self._layout = layout
        self._collective = collective
        self._microbatches = microbatches
        self._clock = clock or NoClock()
        self._overlaps = settings.overlaps(layout.blocks[0].device)
        hosts = HostMap(collective.hosts, collective.rank)
        self._one_pass_bytes = settings.one_pass_bytes(next(len(host) for host in collective.hosts if collective.rank in host))
        self.ranges = (
            assignment(microbatches, collective.size, host_sizes(collective))
            if ranges is None
            else checked_ranges(ranges, collective.size, microbatches)
        )
        small = layout.nbytes <= settings.replicate_kib * 1024
        whole = whole if settings.shard_update is None else not settings.shard_update
        self._owners = owners = Ownership(layout, collective, hosts, per_host=per_host, small=small, whole=whole)
        self.updates_whole = whole and not small and settings.shard_update is None
        self.segments, self.replicates = owners.segments, owners.replicates
        self._delivery = Delivery(layout, collective, owners.summed, owners.updated) if owners.delivers else None
        # What several workers sum up each for itself, they read of each other.
        own_changes = owners.delivers or not (owners.replicated or owners.apart)
        self._pieces = [pieces(lo, hi, microbatches) for lo, hi in self.ranges]
        self._rows = RowExchange(
            [slot for slot in layout.slots if slot.index in sparse],
            layout,
            collective,
            self._pieces,
            microbatches,
            owners.updated_by,
        )
        # Where every worker reads every piece, nobody may write to its own or keep it elsewhere. Sums are sent from one place.
        kept = own_changes and not owners.delivers
        large = [i for i in owners.updated_by(collective.rank) if is_large(layout.slots[i])] if kept else []
        self._fold = LocalFold(
            layout,
            self.ranges[collective.rank],
            microbatches,
            collective.allocate,
            kept=large,
            sparse=sparse,
            resting=owners.replicated and not owners.delivers,
        )
        self._levels: TwoLevels | None = None
        self._arriving: Sequence[Sequence[Span]] = self._pieces  # what each worker sends here
        if hosts.two_levels:
            self._levels = TwoLevels(collective, hosts, self._pieces, microbatches, own_changes=own_changes)
            self._arriving = self._levels.arriving
        self._finisher = Finisher(
            layout, self._arriving, collective.rank, microbatches, allocate=allocate, own_changes=own_changes
        )
        self._dense: set[int] = set()  # slots that were to get few rows, but got a dense gradient at some step
        self._state = _StepState(filled=0, overlaps=False)
        self._divide()

    def _divide(self) -> None:
        """Buckets, and what of them this worker finishes, over all slots but the sparse ones."""
        layout, skip = self._layout, self._fold.sparse
        self._whole = buckets(layout, None, skip)
        self._small = buckets(layout, self._settings.bucket_mib * 2**20, skip)
        self._bucket_of = {slot.index: bucket for bucket in self._small for slot in bucket.slots}
        ends = {slot.index: end for block in layout.blocks for slot, end in zip(block.slots, block.ends, strict=True)}
        mine = set(self._owners.summed_by(self._collective.rank))

        def finished(all_of: Sequence[Bucket]) -> list[list[Stretch]]:
            return [
                stretches(b.block, [slot for slot in b.slots if slot.index in mine], ends, layout.blocks[b.block].device)
                if b.hi > b.lo
                else []
                for b in all_of
            ]

        self._stretches = {True: finished(self._small), False: finished(self._whole)}

    def reassign(self, ranges: Sequence[Span]) -> None:
        self.ranges = checked_ranges(ranges, self._collective.size, self._microbatches)
        self._pieces = [pieces(lo, hi, self._microbatches) for lo, hi in self.ranges]
        self._arriving = self._pieces
        self._fold.reassign(self.ranges[self._collective.rank])
        self._rows.reassign(self._pieces)
        if self._levels is not None:
            self._levels.reassign(self._pieces)
            self._arriving = self._levels.arriving
        self._finisher.reassign(self._arriving)

    def updated_by(self, rank: int) -> list[int]:
        return self._owners.updated_by(rank)

    def saved_by(self, rank: int) -> list[int]:
        return self._owners.saved_by(rank)

    def state_dict(self) -> dict[str, Any]:
        return {"dense": [self._layout.names[slot] for slot in sorted(self._dense)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        dense = set(state.get("dense", ()))
        self._densify({index for index, name in enumerate(self._layout.names) if name in dense})

    def _densify(self, slots: Collection[int]) -> None:
        """From now on the gradients of these slots are dense."""
        if slots:
            self._dense |= set(slots)
            self._fold.densify(slots)
            self._rows.densify(slots)
            self._divide()

    # ------------------------------------------------------------------ one step

    def begin(self, filled: int) -> None:
        self._fold.begin(filled)
        self._rows.begin(filled)
        if self._levels is not None:
            self._levels.begin(filled)
        self._state = _StepState(filled=filled, overlaps=self._overlaps)
        self.must_repeat = False

    def takes_early(self, microbatch: int) -> bool:
        state = self._state
        if not state.overlaps or microbatch != self._fold.last:
            return False
        state.plan = self._fold.plan((microbatch, microbatch + 1))
        state.gradients = [None] * len(self._layout.slots)
        state.missing = [len(bucket.slots) for bucket in self._small]
        return True

    def early(self, slot: int, gradient: Tensor) -> None:
        state = self._state
        if state.gradients[slot] is not None:
            state.late_gradient = True
            return
        state.gradients[slot] = gradient
        bucket = self._bucket_of.get(slot)
        if bucket is None:
            return  # of few rows
        state.missing[bucket.number] -= 1
        while state.folded < len(self._small) and state.missing[state.folded] == 0:
            self._fold_early(self._small[state.folded])
            if state.folded < len(self._small):
                self._send(self._small[state.folded - 1])

    def _fold_early(self, bucket: Bucket) -> None:
        assert self._state.plan is not None
        self._fold.fold(self._state.plan, bucket.slots, self._state.gradients)
        self._state.folded = bucket.number + 1

    def add(self, microbatch: int, gradients: Sequence[Tensor | None]) -> None:
        state = self._state
        if state.plan is not None:
            for slot, gradient in enumerate(gradients):
                if gradient is not None:
                    self.early(slot, gradient)
            for bucket in self._small[state.folded :]:
                self._fold_early(bucket)
            self._fold.fold(state.plan, self._rows.slots, state.gradients)
            state.plan, state.gradients = None, []
            return
        self.add_node((microbatch, microbatch + 1), gradients)

    def nodes(self, lo: int, hi: int, kept_bytes: int) -> Sequence[Span]:
        if self._state.overlaps or self._one_pass_bytes == 0:
            return super().nodes(lo, hi, kept_bytes)
        most = max(1, self._one_pass_bytes // kept_bytes) if kept_bytes else self._microbatches
        return [part for node in pieces(lo, hi, self._microbatches) for part in nodes_within(*node, most)]

    def add_node(self, node: Span, gradients: Sequence[Tensor | None]) -> None:
        plan = self._fold.plan(node)
        for bucket in self._whole:
            self._fold.fold(plan, bucket.slots, gradients)
        if self._rows.slots:
            self._fold.fold(plan, self._rows.slots, gradients)

    def launch(self, header: bytes, message: Tensor, sizes: Sequence[int]) -> None:
        state, size = self._state, self._collective.size
        state.header_bytes = len(header)
        own = bytearray(header)
        own.append(state.late_gradient)
        own += self._fold.present
        own += self._rows.note(self._fold)
        fixed = len(header) + 1 + len(self._fold.present)
        notes = [torch.frombuffer(own, dtype=torch.uint8), message]
        expected: list[Sequence[Expected]] = [
            [(fixed + self._rows.note_size(peer), torch.uint8, _CPU), (sizes[peer], torch.float64, _CPU)] for peer in range(size)
        ]
        todo = self._buckets[len(state.pending) :]
        # A backend sends tensors of one device at a time.
        along = self._levels is None and bool(todo) and self._layout.blocks[0].device.type == "cpu"
        for bucket in todo[: len(todo) - along]:
            self._send(bucket)
        if along:
            self._send(todo[-1], notes, expected)
        elif self._levels is not None:
            state.notes = (notes, expected)
        else:
            state.pending.append(self._collective.start_exchange([notes] * size, expected, name="notes"))

    def notes(self) -> list[tuple[memoryview, Tensor]]:
        received = self._all_notes()
        start, state = self._state.header_bytes, self._state
        end = start + 1 + len(self._layout.slots)
        found = [(tensors[-2].numpy().data, tensors[-1]) for tensors in received]
        own = [header[start:] for header, _ in found]
        state.late_gradient = any(note[0] for note in own)
        first = own[0][1 : end - start]
        same = all(note[1 : end - start] == first for note in own[1:])
        state.present = bytes(first) if same else bytes(map(max, *(note[1 : end - start] for note in own)))
        if self._rows.slots:
            self._rows.read([header[end:] for header, _ in found])
        self._overlaps = self._overlaps and not state.late_gradient
        self.must_repeat = state.late_gradient or bool(self._rows.strays)
        return found

    def _all_notes(self) -> list[list[Tensor]]:
        if self._levels is not None:
            self._levels.forward()
            return self._collective.all_gather_lists(*self._state.notes)
        return self._received(len(self._state.pending) - 1)

    def drop(self) -> None:
        for number in range(len(self._state.pending)):
            self._received(number)
        self._densify(self._rows.strays)

    def finish(self, count: float) -> Reduced:
        present = self._state.present
        with self._clock.phase("compute"):
            found, measured, holder, rows = self._sums(count)
        if self._delivery is not None:
            with self._clock.phase("communication"):
                sums = self._delivery.deliver([(bucket.block, bucket.lo, bucket.hi) for bucket in self._whole], holder)
            sparse = {slot.index for slot in self._rows.slots}
            found = {index: gradient for index, gradient in found.items() if index in sparse}
            found |= {i: sums.views[i] for i in self.updated_by(self._collective.rank) if i not in sparse}
        slots = [slot for slot in self._layout.slots if slot.index in found and present[slot.index]]
        return Reduced(slots, [found[slot.index] for slot in slots], self._agreed(measured), rows)

    def publish(self, flats: Sequence[Tensor]) -> None:
        if not self._owners.replicated:
            with self._clock.phase("communication"):
                for flat, segments in zip(flats, self.segments, strict=True):
                    self._collective.publish(flat, [(segment.lo, segment.hi) for segment in segments])

    # ------------------------------------------------------------------ the end of the tree

    def _sums(self, count: float) -> tuple[dict[int, Tensor], dict[int, float], Sums | None, dict[int, Tensor]]:
        """What this worker sums up: the gradients and their norms, by slot; where those that are dense lie; and the rows of those
        that are not."""
        norms = Norms()
        found: dict[int, Tensor] = {}
        own = self._fold.pieces()
        holder: Sums | None = None
        for number, bucket in enumerate(self._buckets):
            received = [tensors[: self._pieces_in(worker, bucket)] for worker, tensors in enumerate(self._received(number))]
            origin, _ = self._wanted(bucket, self._collective.rank)
            for stretch in self._stretches[self._state.overlaps][number]:
                holder = self._finisher.finish(stretch, own, received, origin, self._state.filled, count)
                norms.add(stretch, holder)
                found.update((slot.index, holder.views[slot.index]) for slot in stretch.slots)
        mine = set(self.saved_by(self._collective.rank)) if self._owners.delivers and self._rows.slots else ()
        indices: dict[int, Tensor] = {}
        for slot, rows, gradient in self._rows.finish(own, count):
            indices[slot.index] = rows.indices
            if not self._owners.delivers or slot.index in mine:  # others have the same sum
                norms.add_tensors([slot.index], [real(rows.values)])
            found[slot.index] = gradient
        present = self._state.present
        return found, {i: _finite(norm, found[i]) for i, norm in norms.values().items() if present[i]}, holder, indices

    def _agreed(self, measured: Mapping[int, float]) -> list[float]:
        """The norm of each slot's gradient, from whoever has summed it up; 0 where there is none."""
        norms = [0.0] * len(self._layout.slots)
        for slot, norm in measured.items():
            norms[slot] = norm
        if self._collective.size == 1 or (self._owners.replicated and not self._owners.delivers):
            return norms
        with self._clock.phase("communication"):
            everybodys = self._collective.all_gather(torch.tensor(norms, dtype=torch.float64))
        # Each norm comes from one of these workers; the others' zeros change no bit of it.
        found: list[float] = torch.stack([everybodys[rank] for rank in self._owners.measurers]).sum(dim=0).tolist()
        return found

    # ------------------------------------------------------------------ pieces to those who update

    @property
    def _buckets(self) -> Sequence[Bucket]:
        return self._small if self._state.overlaps else self._whole

    def _send(self, bucket: Bucket, notes: Sequence[Tensor] = (), expected: Sequence[Sequence[Expected]] | None = None) -> None:
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

    def _wanted(self, bucket: Bucket, worker: int) -> tuple[int, int]:
        """The elements of the bucket that this worker sums up."""
        return bucket.part(self._owners.summed[bucket.block][worker])

    def _pieces_in(self, worker: int, bucket: Bucket) -> int:
        """How many pieces that worker sends here with the bucket."""
        lo, hi = self._wanted(bucket, self._collective.rank)
        if worker == self._collective.rank or hi <= lo:
            return 0
        return sum(span[0] < self._state.filled for span in self._arriving[worker])


_CPU = torch.device("cpu")


def _finite(norm: float, gradient: Tensor) -> float:
    """The L2 norm of a gradient: squares overflow long before the values do."""
    return norm if math.isfinite(norm) else float(torch.linalg.vector_norm(gradient.double()))
