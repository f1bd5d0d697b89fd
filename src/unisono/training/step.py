"""One optimizer step, as the data flows: forward and backward, fold, reduce, update, publish.

Every decision (stop, do it again, refuse the batch) is taken from what all workers have told each other, so all take the same
one in the same step.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import time
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from unisono.collective import Collective
from unisono.data.batch import Batch
from unisono.errors import ConfigurationError
from unisono.guard.ledger import NOTHING, Entry, entry, samples_of, total
from unisono.guard.replicas import ReplicaGuard
from unisono.order import derive_seed
from unisono.replica.buffers import BufferFold
from unisono.sync import Reduced, Reduction
from unisono.sync.base import GradientSink
from unisono.sync.sample_rows import SampleRows
from unisono.training.header import Header, HeaderFormat, Signals, check_headers, union
from unisono.training.nonfinite import raise_bad_gradient, raise_bad_loss
from unisono.training.session import Session
from unisono.training.settings import Settings
from unisono.training.state import LocalState, check_carried
from unisono.tree import Span, fold_all


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step tells; the same on every worker."""

    step: int
    """Number of the step in the run, from 1."""
    epoch: int
    """Epoch that the batch belongs to, from 0."""
    loss: float
    """Loss sum over the global batch, divided by the count."""
    count: float
    """What the loss and the gradient were divided by."""
    samples: int
    """Samples of the global batch."""
    gradient_norm: float
    """L2 norm of the whole gradient, before clipping."""
    learning_rates: tuple[float, ...]
    """Learning rate of each parameter group in this step."""
    skipped: bool = False
    """Whether nothing was updated, since the loss or the gradient was not finite (see ``Trainer(on_nonfinite=...)``)."""


class Stepper:
    """Computes steps. *Collective*: every worker makes one with equal arguments, and calls ``run`` in unison.

    Args:
        local: This worker's replica, weights and buffers.
        settings: What steps are computed by.
        collective: The other workers.
        reduction: How gradients are summed.
        guard: Compares replicas.
        session: Told when the update begins and ends.

    Attributes:
        work_s: Seconds that microbatches have taken this worker so far, loading aside.
    """

    def __init__(
        self,
        local: LocalState,
        settings: Settings,
        *,
        collective: Collective,
        reduction: Reduction,
        guard: ReplicaGuard,
        session: Session,
    ) -> None:
        self._replica, self._weights, self._buffers, self._clock = local.replica, local.weights, local.buffers, local.clock
        self._user = local.user
        self._settings = settings
        self._collective = collective
        self._reduction = reduction
        self._guard = guard
        self._session = session
        self._must_prove = local.carries
        self._sink = _StepSink(reduction, local.buffers, len(local.layout.slots))
        self._rows = SampleRows(collective, local.replica.device)
        self._format = HeaderFormat(settings.microbatches, len(local.buffers.changed))
        self.work_s = 0.0
        self._seconds = Signals().seconds  # worker 0's up to the step before: something that all workers know

    def run(self, batch: Batch, step: int, signals: Signals) -> tuple[StepResult, list[Signals]]:
        """*collective*. Trains on ``batch`` as step number ``step`` (from 1).

        Returns:
            The result, and what every worker signalled, by rank.

        Raises:
            DataError: The loss or gradient is not finite, or the count is zero; no weight, buffer or state has changed.
        """
        if self._weights.shared:
            self._weights.check_untouched()
        self._replica.begin_step()
        self._buffers.begin()
        headers, messages = self._gradients(batch, step, signals)
        losses = _columns([header.losses for header in headers])
        counts = _columns([header.counts for header in headers])
        told = [header.signals for header in headers]
        samples = batch.samples or sum(samples_of(header.ledger) for header in headers)
        before, self._seconds = self._seconds, told[0].seconds
        loss, count = _tree_sum(losses[: batch.filled]), _tree_sum(counts[: batch.filled])
        skips = self._settings.on_nonfinite == "skip"
        if not (math.isfinite(loss) and count > 0):  # if each loss is finite, the sum may still overflow
            if skips and (count == 0 or not all(map(math.isfinite, losses))):
                return self._skip(batch, step, loss, count, samples, told), told
            self._explain_loss(losses, counts, batch, step)
        reduced = self._reduction.finish(count)
        norm = _whole_norm(reduced.norms)
        if not math.isfinite(norm):
            if skips:
                return self._skip(batch, step, loss, count, samples, told), told
            self._explain_gradient(reduced.norms, batch, step)
        learning_rates = self._replica.learning_rates()
        with self._session.updating(step, _flags(told), _passed_s(before, self._seconds)), self._clock.phase("compute"):
            self._update(reduced, norm, step)
        self._reduction.publish(self._weights.flats)
        if self._weights.shared:
            self._weights.remember()
        changed = union([header.changed for header in headers])
        empty = union([header.empty for header in headers])
        self._buffers.finish(messages, self._reduction.ranges, batch.filled, changed, empty)
        self._replica.end_step()
        self.seed_what_follows(step)
        result = StepResult(
            step=step,
            epoch=batch.epoch,
            loss=loss / count,
            count=count,
            samples=samples,
            gradient_norm=norm,
            learning_rates=learning_rates,
        )
        return result, told

    def _skip(self, batch: Batch, step: int, loss: float, count: float, samples: int, told: Sequence[Signals]) -> StepResult:
        """Leaves everything as it was before the step; all workers do so, since all know the same losses and norms."""
        self._reduction.drop()
        with self._session.updating(step, _flags(told), 0.0, skips=True):
            self._buffers.restore()
        self.seed_what_follows(step)
        return StepResult(
            step=step,
            epoch=batch.epoch,
            loss=loss / count if count else math.nan,
            count=count,
            samples=samples,
            gradient_norm=math.nan,
            learning_rates=self._replica.learning_rates(),
            skipped=True,
        )

    def seed_what_follows(self, step: int) -> None:
        """*local*. What is drawn after step ``step`` must not depend on which microbatches this worker happened to compute."""
        self._replica.seed(derive_seed("between", self._settings.seed, step))

    # ------------------------------------------------------------------ forward, backward, fold, reduce

    def _gradients(self, batch: Batch, step: int, signals: Signals) -> tuple[list[Header], list[Tensor]]:
        """Computes and sends until all workers have what they need: every worker's header and buffers, by rank."""
        ranges, rank = self._reduction.ranges, self._collective.rank
        while True:
            with self._clock.phase("compute"):
                header = self._compute(batch, step, signals)
                message = self._buffers.message(ranges[rank], batch.filled)
            with self._clock.phase("communication"):
                sizes = [self._buffers.message_size(span, batch.filled) for span in ranges]
                self._reduction.launch(self._format.pack(header), message, sizes)
            with self._clock.phase("waiting"):
                notes = self._reduction.notes()
            headers = [header if worker == rank else self._format.unpack(note[0]) for worker, note in enumerate(notes)]
            desync = not check_headers(headers, batch, step)
            new_buffer = self._buffers.track(union([header.changed for header in headers]))
            if not (new_buffer or desync or self._reduction.must_repeat):
                return headers, [note[1] for note in notes]
            # Same seeds, same start: the same gradients again, this time with nothing sent early or left unfollowed.
            self._reduction.drop()
            if desync:
                self._guard.settle(step)
                self._buffers.begin()
            self._collective.barrier()
            self._buffers.restart()

    def _compute(self, batch: Batch, step: int, signals: Signals) -> Header:
        self._reduction.begin(batch.filled)
        replica = self._guard.digest(self._seconds)
        tally = batch.tally
        began = time.perf_counter()
        mark = self._user.mark()
        span = self._reduction.ranges[self._collective.rank]
        own = range(span[0], min(span[1], batch.filled))
        seeds = self._seeds(batch, step)
        apart_s = self._see_whole_batch(batch, seeds, step)
        self._sink.begin(own)
        parts = self._replica.gradients(batch.parts, seeds, self._sink)
        self._sink.end()
        if self._user.mark() != mark:
            raise ConfigurationError(
                "the loss changes trainer.state, which would then depend on the samples that this worker computes: change it in "
                "a callback's on_step, or between two steps of a loop of your own"
            )
        counts = [0.0] * self._settings.microbatches
        losses = [0.0] * self._settings.microbatches
        empty = bytearray(self._settings.microbatches)
        empty[own.start : own.stop] = b"\1" * len(own)
        if parts:
            # One look at the device a step: every .item() would wait for it.
            summed = torch.stack([part.loss.double() for part in parts]).tolist()
            for given, part, loss in zip(batch.parts, parts, summed, strict=True):
                counts[given.number], losses[given.number], empty[given.number] = part.count, loss, 0
        self.work_s += time.perf_counter() - began - apart_s
        return Header(
            losses=losses,
            counts=counts,
            digest=batch.digest,
            ledger=tally[1] if tally is not None and tally[0] is batch.parts else _tally(batch),
            replica=replica,
            changed=self._buffers.changed.tobytes(),
            empty=bytes(empty),
            signals=signals,
        )

    def _see_whole_batch(self, batch: Batch, seeds: Sequence[int], step: int) -> float:
        """*collective*, if the loss sees the whole batch. Seconds that this took apart from this worker's microbatches."""
        rows = self._replica.rows(batch.parts, seeds)
        if rows is None:
            return 0.0
        began = time.perf_counter()
        with self._clock.phase("communication"):
            whole, first = self._rows.gather(rows)
        self._replica.see(whole, first, derive_seed("whole batch", self._settings.seed, step))
        return time.perf_counter() - began

    def _seeds(self, batch: Batch, step: int) -> list[int]:
        return [derive_seed("step", self._settings.seed, step, part.number) for part in batch.parts]

    def _update(self, reduced: Reduced, norm: float, step: int) -> None:
        if self._settings.max_grad_norm is not None:
            scale = self._settings.max_grad_norm / (norm + 1e-6)
            if scale < 1:
                for alike in _by_dtype(reduced.gradients):
                    torch._foreach_mul_(alike, scale)
        self._replica.seed_update(derive_seed("update", self._settings.seed, step))
        slots = [slot.index for slot in reduced.slots]
        gradients = reduced.gradients
        if self._replica.wants_rows:
            few = [slot in self._replica.wants_rows and slot in reduced.rows for slot in slots]
            gradients = [
                _only_rows(gradient, reduced.rows[slot]) if is_few else gradient
                for slot, gradient, is_few in zip(slots, gradients, few, strict=True)
            ]
        if not self._must_prove:
            self._replica.update(slots, gradients)
            return
        with self._replica.proving():
            self._replica.update(slots, gradients)
        check_carried(self._replica, self._reduction, self._collective.rank)
        self._must_prove = False

    def _explain_loss(self, losses: Sequence[float], counts: Sequence[float], batch: Batch, step: int) -> None:
        """*collective*. Raises if the loss of a microbatch, or the count of all, is to blame; else a gradient will be."""
        if not all(map(math.isfinite, losses)) or sum(counts) <= 0:
            self._reduction.drop()
            raise_bad_loss(losses, batch, step, self._collective)

    def _explain_gradient(self, norms: Sequence[float], batch: Batch, step: int) -> NoReturn:
        """*collective*."""
        seeds = self._seeds(batch, step)
        raise_bad_gradient(norms, batch, step, self._collective, replica=self._replica, buffers=self._buffers, seeds=seeds)


class _StepSink(GradientSink):
    """Gradients go to the reduction, and what forward has made of the buffers to their fold."""

    def __init__(self, reduction: Reduction, buffers: BufferFold, slots: int) -> None:
        self._reduction = reduction
        self._buffers = buffers
        self._nothing: Sequence[None] = [None] * slots
        self._left = range(0)

    def begin(self, own: range) -> None:
        """These microbatches follow, but for those whose streams have ended."""
        self._left = own

    def takes_early(self, microbatch: int) -> bool:
        self._skip_to(microbatch)
        return self._reduction.takes_early(microbatch)

    def early(self, slot: int, gradient: Tensor) -> None:
        self._reduction.early(slot, gradient)

    def nodes(self, lo: int, hi: int, kept_bytes: int) -> Sequence[Span]:
        return self._reduction.nodes(lo, hi, kept_bytes)

    def add_node(self, node: Span, gradients: Sequence[Tensor | None]) -> None:
        self._skip_to(node[0])
        self._left = self._left[node[1] - node[0] :]
        self._reduction.add_node(node, gradients)
        for microbatch in range(*node):
            self._buffers.add(microbatch)

    def add(self, microbatch: int, gradients: Sequence[Tensor | None]) -> None:
        self._skip_to(microbatch)
        self._left = self._left[1:]
        self._reduction.add(microbatch, gradients)
        self._buffers.add(microbatch)

    def _skip_to(self, microbatch: int) -> None:
        """Those before it are absent leaves."""
        while self._left and self._left[0] < microbatch:
            self._reduction.add(self._left[0], self._nothing)
            self._buffers.skip(self._left[0])
            self._left = self._left[1:]

    def end(self) -> None:
        """No more follow."""
        self._skip_to(self._left.stop)


def _tally(batch: Batch) -> Entry:
    """The ledger's entry of what this worker computes: of the parts that the batch has, whatever it was planned to have."""
    if batch.ledger is None:
        return NOTHING
    return total([entry(part.indices) for part in batch.parts])


def _only_rows(gradient: Tensor, rows: Tensor) -> Tensor:
    """These rows of a dense gradient, as an embedding table with ``sparse=True`` has them."""
    values = gradient.index_select(0, rows)
    return torch.sparse_coo_tensor(rows[None], values, gradient.shape, check_invariants=False, is_coalesced=True)


def _flags(told: Sequence[Signals]) -> list[int]:
    return [signals.session for signals in told]


def _whole_norm(norms: Sequence[float]) -> float:
    """The L2 norm of the whole gradient; not a number where a part's is none."""
    return math.sqrt(math.fsum(norm * norm for norm in norms)) if all(map(math.isfinite, norms)) else math.nan


def _passed_s(before: Sequence[float], now: Sequence[float]) -> float:
    """What passed between two readings; 0 if one of them is not known."""
    passed_s = sum(now) - sum(before)
    return 0.0 if math.isnan(passed_s) else passed_s


def _columns(lines: Sequence[Sequence[float]]) -> list[float]:
    """The sum over workers: each microbatch is in one header, and 0 in the others."""
    return list(lines[0]) if len(lines) == 1 else [sum(column) for column in zip(*lines, strict=True)]


def _tree_sum(values: Sequence[float]) -> float:
    return fold_all(values, operator.add) or 0.0


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Lists of one dtype each. On CUDA a list of several dtypes takes kernels that round differently, and which dtypes are
    together depends on who owns what."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())
