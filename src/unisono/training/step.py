"""One optimizer step, as the data flows: forward and backward, fold, reduce, update, publish.

Every decision (stop, do it again, refuse the batch) is taken from what all workers have told each other, so all take the same
one in the same step.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim import Optimizer

from unisono.collective import Collective, Expected
from unisono.errors import ConfigurationError, DataError, Desync
from unisono.guard.ledger import LOWER_HALVES, NOTHING, Entry, entry, samples_of, total
from unisono.guard.replicas import ReplicaGuard
from unisono.layout import Layout
from unisono.observe.timing import StepClock
from unisono.order import derive_seed
from unisono.replica.buffers import Buffers
from unisono.replica.randomness import seed_generators
from unisono.replica.torch_replica import Replica
from unisono.replica.weights import Weights
from unisono.sync import Reduced, Reduction
from unisono.training.header import Header, HeaderFormat, Signals, union
from unisono.training.session import Session
from unisono.tree import Span, fold_all

OnNonfinite = Literal["error", "skip"]


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """One of the parts of a global batch that this worker computes."""

    number: int
    """m, counted over the whole global batch."""
    indices: npt.NDArray[np.int64]
    """Sample indices, int64, 1-D."""
    data: Any
    """What ``collate_fn`` made of them."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """A global batch, as one worker holds it: its own microbatches, and how many there are in all."""

    epoch: int
    number: int
    """k: which batch of the epoch, from 0."""
    of: int
    """Batches in that epoch."""
    samples: int
    """Samples of the global batch, over all workers."""
    filled: int
    """Microbatches that hold samples: numbers below this one."""
    parts: tuple[Microbatch, ...]
    digest: int = 0
    """Of the sample indices of the global batch and of its place in the run: equal on all workers, or they have not been
    given the same order."""
    ledger: Entry | None = None
    """Of the samples of the global batch; None: not known, and nothing to check."""
    tally: tuple[tuple[Microbatch, ...], Entry] | None = None
    """Of the samples of these very ``parts``, if it was computed ahead."""
    ranges: Sequence[Span] = ()
    """Each worker's microbatches of this batch, by rank; empty: those of the batch before."""
    made_for: object = None
    """The team among whose workers it is divided so; None: the batch does not tell."""

    def __iter__(self) -> NoReturn:
        raise TypeError(
            "a Batch holds this worker's microbatches and is given to trainer.step(batch) as it is: the loss function unpacks "
            "microbatches"
        )


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
        replica: This worker's model.
        layout: Where its trainable parameters lie.
        weights: Their memory.
        buffers: Its buffers.
        reduction: How gradients are summed.
        optimizer: The user's optimizer, over exactly the parameters of ``layout`` (frozen ones aside).
        collective: The other workers.
        leaves: M, microbatches a step.
        seed: The run's seed.
        max_grad_norm: Clip the global gradient norm to this, if given.
        guard: Compares replicas.
        on_nonfinite: "error", or "skip" such steps.
        overlap: Whether gradients may leave during backward.
        clock: Told where the time goes.
        session: Told when the update begins and ends.

    Attributes:
        work_s: Seconds that microbatches have taken this worker so far, loading aside.
    """

    def __init__(
        self,
        *,
        replica: Replica,
        layout: Layout,
        weights: Weights,
        buffers: Buffers,
        reduction: Reduction,
        optimizer: Optimizer,
        collective: Collective,
        leaves: int,
        seed: int,
        max_grad_norm: float | None,
        guard: ReplicaGuard,
        on_nonfinite: OnNonfinite,
        overlap: bool,
        clock: StepClock,
        session: Session,
    ) -> None:
        self._session = session
        self._replica = replica
        self._layout = layout
        self._weights = weights
        self._buffers = buffers
        self._reduction = reduction
        self._optimizer = optimizer
        self._collective = collective
        self._leaves = leaves
        self._seed = seed
        self._max_grad_norm = max_grad_norm
        self._guard = guard
        self._on_nonfinite = on_nonfinite
        self._overlap = overlap
        self._clock = clock
        self._addresses = [parameter.data_ptr() for parameter in layout.parameters]
        self._held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._frozen = [parameter for parameter in self._held if not parameter.requires_grad]
        self.work_s = 0.0
        self._seconds = Signals().seconds  # worker 0's up to the step before: something that all workers know
        self._format = HeaderFormat(leaves, len(layout.parameters), len(buffers.names))

    def run(self, batch: Batch, step: int, signals: Signals) -> tuple[StepResult, list[Signals]]:
        """*collective*. Trains on ``batch`` as step number ``step`` (from 1).

        Returns:
            The result, and what every worker signalled, by rank.

        Raises:
            DataError: The loss or gradient is not finite, or the count is zero; no weight, buffer or state has changed.
        """
        self._check_model()
        if self._weights.shared:
            self._weights.check_untouched()
        for parameter in self._held:
            parameter.grad = None  # what a backward of the user's own may have left behind
        self._buffers.begin()
        headers, messages = self._gradients(batch, step, signals)
        losses = _columns([header.losses for header in headers])
        counts = _columns([header.counts for header in headers])
        told = [header.signals for header in headers]
        before, self._seconds = self._seconds, told[0].seconds
        loss, count = _tree_sum(losses[: batch.filled]), _tree_sum(counts[: batch.filled])
        if not (math.isfinite(loss) and count > 0):  # if each loss is finite, the sum may still overflow
            if self._on_nonfinite == "skip" and not all(map(math.isfinite, losses)):
                return self._skip(batch, step, losses, counts, told), told
            self._check_losses(losses, counts, batch, step)
        present = union([header.present for header in headers])
        with self._clock.phase("compute"):
            reduced = self._reduction.finish(count, present)
        if self._reduction.relays:
            with self._clock.phase("communication"):
                reduced = self._reduction.deliver(reduced, present)
        norms = self._agree(reduced)
        norm = math.sqrt(math.fsum(value * value for value in norms)) if all(map(math.isfinite, norms)) else math.nan
        if not math.isfinite(norm):
            if self._on_nonfinite == "skip":
                return self._skip(batch, step, losses, counts, told), told
            self._explain_gradient(norms, batch, step)
        learning_rates = self._learning_rates()
        with self._session.updating(step, _flags(told), _passed_s(before, self._seconds)), self._clock.phase("compute"):
            self._update(reduced, norm)
        if not self._reduction.replicated:
            with self._clock.phase("communication"):
                self._publish()
        if self._weights.shared:
            self._weights.remember()
        changed = union([header.changed for header in headers])
        self._buffers.finish(messages, self._reduction.ranges, batch.filled, changed)
        self.seed_what_follows(step)
        result = StepResult(
            step=step,
            epoch=batch.epoch,
            loss=loss / count,
            count=count,
            samples=batch.samples,
            gradient_norm=norm,
            learning_rates=learning_rates,
        )
        return result, told

    def _skip(
        self, batch: Batch, step: int, losses: Sequence[float], counts: Sequence[float], told: Sequence[Signals]
    ) -> StepResult:
        """Leaves everything as it was before the step; all workers do so, since all know the same losses and norms."""
        self._reduction.drop()
        with self._session.updating(step, _flags(told), 0.0, skips=True):
            self._buffers.restore()
        self.seed_what_follows(step)
        count = _tree_sum(counts[: batch.filled])
        return StepResult(
            step=step,
            epoch=batch.epoch,
            loss=_tree_sum(losses[: batch.filled]) / count if count else math.nan,
            count=count,
            samples=batch.samples,
            gradient_norm=math.nan,
            learning_rates=self._learning_rates(),
            skipped=True,
        )

    def seed_what_follows(self, step: int) -> None:
        """*local*. What is drawn after step ``step`` must not depend on which microbatches this worker happened to compute."""
        seed_generators(derive_seed("between", self._seed, step), self._replica.device)

    def _learning_rates(self) -> tuple[float, ...]:
        return tuple(float(group["lr"]) for group in self._optimizer.param_groups if "lr" in group)

    # ------------------------------------------------------------------ forward, backward, fold, reduce

    def _gradients(self, batch: Batch, step: int, signals: Signals) -> tuple[list[Header], list[Tensor]]:
        """Computes and sends until all workers have what they need: every worker's header and buffers, by rank."""
        ranges, rank = self._reduction.ranges, self._collective.rank
        while True:
            with self._clock.phase("compute"):
                try:
                    header = self._compute(batch, step, signals)
                except BaseException:
                    self._reduction.begin(0, overlap=False)  # a later backward of the user's own must send nothing
                    raise
                message = self._buffers.message(ranges[rank], batch.filled)
            with self._clock.phase("communication"):
                self._reduction.launch([self._format.pack(header), message], self._expected(batch))
            with self._clock.phase("waiting"):
                notes = self._reduction.notes()
            headers = [header if worker == rank else self._format.unpack(note[0]) for worker, note in enumerate(notes)]
            desync = not self._check_headers(headers, batch, step)
            torn = any(header.torn for header in headers)
            new_buffer = self._buffers.track(union([header.changed for header in headers]))
            if not (torn or new_buffer or desync or self._reduction.unfit):
                return headers, [note[1] for note in notes]
            # Same seeds, same start: the same gradients again, this time with nothing sent early or left unfollowed.
            self._overlap = self._overlap and not torn
            self._reduction.drop()
            if desync:
                self._guard.settle(step)
                self._buffers.begin()
            self._collective.barrier()
            self._buffers.restart()

    def _compute(self, batch: Batch, step: int, signals: Signals) -> Header:
        self._reduction.begin(batch.filled, overlap=self._overlap)
        replica = self._guard.digest(self._seconds)
        tally = batch.tally
        began = time.perf_counter()
        losses: list[Tensor] = []
        counts = [0.0] * self._leaves
        for part in batch.parts:
            self._reduction.before_backward(part.number)
            leaf = self._replica.gradient(
                part.data, samples=len(part.indices), seed=derive_seed("step", self._seed, step, part.number)
            )
            self._reduction.add(part.number)
            self._buffers.add(part.number)
            losses.append(leaf.loss)
            counts[part.number] = leaf.count
        self._buffers.check_known()
        sums = [0.0] * self._leaves
        if losses:
            # One look at the device a step: every .item() would wait for it.
            first = batch.parts[0].number
            sums[first : first + len(losses)] = torch.stack([loss.double() for loss in losses]).tolist()
        self.work_s += time.perf_counter() - began
        return Header(
            losses=sums,
            counts=counts,
            digest=batch.digest,
            ledger=tally[1] if tally is not None and tally[0] is batch.parts else _tally(batch),
            replica=replica,
            present=self._reduction.present,
            changed=self._buffers.changed.tobytes(),
            torn=self._reduction.torn,
            signals=signals,
        )

    def _expected(self, batch: Batch) -> list[list[Expected]]:
        cpu = torch.device("cpu")
        sizes = [self._buffers.message_size(span, batch.filled) for span in self._reduction.ranges]
        return [[self._format.expected, (size, torch.float64, cpu)] for size in sizes]

    # ------------------------------------------------------------------ agree, update, publish

    def _agree(self, reduced: Reduced) -> list[float]:
        """The L2 norm of each slot's gradient, from whoever has summed it up; 0 where there is none."""
        norms = [0.0] * len(self._layout.parameters)
        for slot, norm in reduced.norms.items():
            norms[slot] = norm
        if self._collective.size == 1 or (self._reduction.replicated and not self._reduction.relays):
            return norms
        with self._clock.phase("communication"):
            everybodys = self._collective.all_gather(torch.tensor(norms, dtype=torch.float64))
        # Each norm comes from one of these workers; the others' zeros change no bit of it.
        found: list[float] = torch.stack([everybodys[rank] for rank in self._reduction.measurers]).sum(dim=0).tolist()
        return found

    def _update(self, reduced: Reduced, norm: float) -> None:
        if self._max_grad_norm is not None:
            scale = self._max_grad_norm / (norm + 1e-6)
            if scale < 1:
                for alike in _by_dtype(reduced.gradients):
                    torch._foreach_mul_(alike, scale)
        for slot, gradient in zip(reduced.slots, reduced.gradients, strict=True):
            self._layout.parameters[slot.index].grad = gradient
        try:
            self._optimizer.step()
        finally:
            for slot in reduced.slots:
                self._layout.parameters[slot.index].grad = None

    def _publish(self) -> None:
        for flat, segments in zip(self._weights.flats, self._reduction.segments, strict=True):
            self._collective.publish(flat, [(segment.lo, segment.hi) for segment in segments])

    # ------------------------------------------------------------------ checks

    def _check_model(self) -> None:
        addresses = [parameter.data_ptr() for parameter in self._layout.parameters]
        if addresses != self._addresses:
            moved = next(index for index, address in enumerate(addresses) if address != self._addresses[index])
            raise ConfigurationError(
                f"parameter {self._layout.names[moved]!r} was moved to other memory after the Trainer was made "
                "(model.to(), .half(), or an assignment to .data): change the model before Trainer(...), and change "
                "values in place"
            )
        if self._frozen and any(parameter.requires_grad for parameter in self._frozen):
            raise ConfigurationError(
                "a parameter that was frozen when the Trainer was made now requires a gradient: make a new Trainer after "
                "unfreezing"
            )

    def _check_headers(self, headers: Sequence[Header], batch: Batch, step: int) -> bool:
        """Whether what was looked at of the replicas is alike. One pass for three guards: each of its own costs more in code that
        is in no cache than in work.

        Raises:
            ConfigurationError: Workers were given different batches.
            Desync: Not each sample of the batch was computed once.
        """
        first = headers[0]
        alike, used = True, NOTHING
        for rank, header in enumerate(headers):
            if header.digest != first.digest:
                raise ConfigurationError(
                    f"step {step}: worker {rank} was given other samples, or another place among them, than worker 0. Nothing "
                    "was updated. Every worker must be given the same order: seed the shuffle or sampler that makes it, alike on "
                    "all of them"
                )
            used += header.ledger
            if header.replica != first.replica:
                alike = False
        used &= LOWER_HALVES
        if used != batch.ledger and batch.ledger is not None:
            raise Desync(
                f"step {step}: the workers together computed {samples_of(used)} samples of a global batch of {batch.samples}, "
                "and not each of them once. Nothing was updated. Pass batches to step() as batches() gave them",
                step=step,
            )
        return alike

    def _check_losses(self, losses: Sequence[float], counts: Sequence[float], batch: Batch, step: int) -> None:
        if all(map(math.isfinite, losses)) and sum(counts) > 0:
            return
        self._reduction.drop()
        for leaf, loss in enumerate(losses):
            if math.isfinite(loss):
                continue
            samples = b"".join(self._collective.all_gather_bytes(self._samples_of(batch, leaf).encode())).decode()
            raise DataError(
                f"step {step}: the loss of microbatch {leaf} is {loss}{samples}. Nothing was updated. Look at these "
                "samples, lower the learning rate, or set max_grad_norm"
            )
        raise DataError(
            f"step {step}: the count over the whole batch of {batch.samples} samples is 0, so there is nothing to divide "
            "by. Nothing was updated. Does the loss count only samples that are masked out?"
        )

    def _explain_gradient(self, norms: Sequence[float], batch: Batch, step: int) -> None:
        """*collective*. Computes the step's microbatches once more, one by one, to name the one with the bad gradient."""
        names = [name for name, norm in zip(self._layout.names, norms, strict=True) if not math.isfinite(norm)]
        guilty = ""
        self._buffers.restore()
        for part in batch.parts:
            self._replica.gradient(part.data, samples=len(part.indices), seed=derive_seed("step", self._seed, step, part.number))
            self._buffers.restore()
            bad = any(
                parameter.grad is not None and not torch.isfinite(parameter.grad.to_dense()).all()
                for parameter in self._layout.parameters
            )
            for parameter in self._layout.parameters:
                parameter.grad = None
            if bad:
                guilty = f"microbatch {part.number}{self._samples_of(batch, part.number)}"
                break
        found = [text.decode() for text in self._collective.all_gather_bytes(guilty.encode()) if text]
        where = found[0] if found else "the sum over microbatches (each alone is finite)"
        raise DataError(
            f"step {step}: the gradient of {', '.join(names[:3])}{' and others' if len(names) > 3 else ''} is not finite; it "
            f"comes from {where}. Nothing was updated. Look at these samples, lower the learning rate, or set max_grad_norm"
        )

    def _samples_of(self, batch: Batch, leaf: int) -> str:
        for part in batch.parts:
            if part.number == leaf:
                return f" (samples {', '.join(map(str, part.indices[:8]))}{', ...' if len(part.indices) > 8 else ''})"
        return ""


def _tally(batch: Batch) -> Entry:
    """The ledger's entry of what this worker computes: of the parts that the batch has, whatever it was planned to have."""
    if batch.ledger is None:
        return NOTHING
    return total([entry(part.indices) for part in batch.parts])


def _flags(told: Sequence[Signals]) -> list[int]:
    return [signals.session for signals in told]


def _passed_s(before: Sequence[float], now: Sequence[float]) -> float:
    """What passed between two readings; 0 if one of them is not known."""
    passed_s = sum(now) - sum(before)
    return 0.0 if math.isnan(passed_s) else passed_s


def _columns(lines: Sequence[Sequence[float]]) -> list[float]:
    """The sum over workers: each microbatch is in one header, and 0 in the others."""
    return list(lines[0]) if len(lines) == 1 else [sum(column) for column in zip(*lines, strict=True)]


def _tree_sum(values: Sequence[float]) -> float:
    return fold_all(values, float.__add__) or 0.0


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Lists of one dtype each. On CUDA a list of several dtypes takes kernels that round differently, and which dtypes are
    together depends on who owns what."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())
