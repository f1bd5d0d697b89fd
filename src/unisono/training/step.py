"""One optimizer step, as the data flows: forward and backward, fold, reduce, update, publish.

Every decision (stop, do it again, refuse the batch) is taken from what all workers have told each other, so all take the same
one in the same step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim import Optimizer

from unisono.collective import Collective
from unisono.errors import ConfigurationError, DataError
from unisono.layout import Layout, Slot
from unisono.observe.timing import StepClock
from unisono.order import derive_seed
from unisono.sync import Reduction
from unisono.training.buffers import Buffers
from unisono.training.randomness import seed_generators
from unisono.training.replica import Replica
from unisono.tree import fold_all


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
    parts: Sequence[Microbatch]
    digest: int = 0
    """Of the sample indices of the global batch and of its place in the run: equal on all workers, or they have not been
    given the same order."""


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


@dataclasses.dataclass(frozen=True)
class Signals:
    """What a worker tells the others along with each step."""

    stop: int = 0
    """Signal number of a request to stop; 0 if there was none."""
    written: int = -1
    """Step of the newest checkpoint whose part this worker has written."""
    failed: bool = False
    """Whether this worker could not write its part."""


class Stepper:
    """Computes steps. *Collective*: every worker makes one with equal arguments, and calls ``run`` in unison.

    Args:
        replica: This worker's model.
        layout: Where its trainable parameters lie.
        flats: The flat tensors that hold them, one a block.
        buffers: Its buffers.
        reduction: How gradients are summed.
        optimizer: The user's optimizer, over exactly the parameters of ``layout`` (frozen ones aside).
        collective: The other workers.
        leaves: M, microbatches a step.
        seed: The run's seed.
        max_grad_norm: Clip the global gradient norm to this, if given.
        overlap: Whether gradients may leave during backward.
        clock: Told where the time goes.
    """

    def __init__(
        self,
        *,
        replica: Replica,
        layout: Layout,
        flats: Sequence[Tensor],
        buffers: Buffers,
        reduction: Reduction,
        optimizer: Optimizer,
        collective: Collective,
        leaves: int,
        seed: int,
        max_grad_norm: float | None,
        overlap: bool,
        clock: StepClock,
    ) -> None:
        self._replica = replica
        self._layout = layout
        self._flats = flats
        self._buffers = buffers
        self._reduction = reduction
        self._optimizer = optimizer
        self._collective = collective
        self._leaves = leaves
        self._seed = seed
        self._max_grad_norm = max_grad_norm
        self._overlap = overlap
        self._clock = clock
        self._addresses = [parameter.data_ptr() for parameter in layout.parameters]
        self._held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._frozen = [parameter for parameter in self._held if not parameter.requires_grad]
        self._header_type = np.dtype(
            [
                ("losses", "f8", (leaves,)),
                ("counts", "f8", (leaves,)),
                ("digest", "u8"),
                ("written", "i8"),
                ("stop", "u1"),
                ("failed", "u1"),
                ("torn", "u1"),
                ("present", "u1", (len(layout.parameters),)),
                ("changed", "u1", (len(buffers.names),)),
            ]
        )

    def run(self, batch: Batch, step: int, signals: Signals) -> tuple[StepResult, list[Signals]]:
        """*collective*. Trains on ``batch`` as step number ``step`` (from 1).

        Returns:
            The result, and what every worker signalled, by rank.

        Raises:
            DataError: The loss or gradient is not finite, or the count is zero; no weight, buffer or state has changed.
        """
        self._check_model()
        for parameter in self._held:
            parameter.grad = None  # what a backward of the user's own may have left behind
        self._buffers.begin()
        headers, gradients = self._gradients(batch, step, signals)
        with self._clock.phase("compute"):
            losses = np.sum([header["losses"] for header in headers], axis=0)  # every leaf is in one header, else 0
            counts = np.sum([header["counts"] for header in headers], axis=0)
            self._check_losses(losses, counts, batch, step)
            count = _tree_sum(counts[: batch.filled])
            present = np.bitwise_or.reduce([header["present"] for header in headers])
            changed = np.bitwise_or.reduce([header["changed"] for header in headers])
            gradients = [(slot, gradient) for slot, gradient in gradients if present[slot.index]]
            _divide(gradients, count)
            norms = self._norms(gradients)
        with self._clock.phase("communication"):
            norms, messages = self._agree(norms, batch)
        norm = _total_norm(norms)
        if not math.isfinite(norm):
            self._explain_gradient(norms, batch, step)
        learning_rates = tuple(float(group["lr"]) for group in self._optimizer.param_groups if "lr" in group)
        with self._clock.phase("compute"):
            self._update(gradients, norm)
        with self._clock.phase("communication"):
            self._publish()
        self._buffers.finish(messages, self._reduction.ranges, batch.filled, changed)
        # What is drawn between steps must not depend on which microbatches this worker happened to compute.
        seed_generators(derive_seed("between", self._seed, step), self._replica.device)
        result = StepResult(
            step=step,
            epoch=batch.epoch,
            loss=_tree_sum(losses[: batch.filled]) / count,
            count=count,
            samples=batch.samples,
            gradient_norm=norm,
            learning_rates=learning_rates,
        )
        told = [
            Signals(stop=int(header["stop"]), written=int(header["written"]), failed=bool(header["failed"])) for header in headers
        ]
        return result, told

    # ------------------------------------------------------------------ forward, backward, fold, reduce

    def _gradients(self, batch: Batch, step: int, signals: Signals) -> tuple[list[npt.NDArray[Any]], list[tuple[Slot, Tensor]]]:
        """Every worker's header, and the summed gradient of each slot that this worker owns."""
        overlap = self._overlap
        while True:
            with self._clock.phase("compute"):
                try:
                    header = self._compute(batch, step, overlap=overlap)
                except BaseException:
                    self._reduction.begin(0, overlap=False)  # a later backward of the user's own must send nothing
                    raise
            header["stop"], header["written"], header["failed"] = signals.stop, signals.written, signals.failed
            self._reduction.launch()
            with self._clock.phase("waiting"):
                headers = self._gather(header)
            with self._clock.phase("communication"):
                gradients = self._reduction.finish()
            self._check_same_batch(headers, step)
            torn = any(bool(header["torn"]) for header in headers)
            new_buffer = self._buffers.track(np.bitwise_or.reduce([header["changed"] for header in headers]))
            if not (torn or new_buffer):
                return headers, gradients
            # Same seeds, same start: the same gradients again, this time with nothing sent early or left unfollowed.
            overlap = overlap and not torn
            self._overlap = overlap
            self._collective.barrier()
            self._buffers.restart()

    def _compute(self, batch: Batch, step: int, *, overlap: bool) -> npt.NDArray[Any]:
        header = np.zeros((), dtype=self._header_type)
        self._reduction.begin(batch.filled, overlap=overlap)
        losses: list[Tensor] = []
        for part in batch.parts:
            self._reduction.before_backward(part.number)
            leaf = self._replica.gradient(
                part.data, samples=len(part.indices), seed=derive_seed("step", self._seed, step, part.number)
            )
            self._reduction.add(part.number)
            self._buffers.add(part.number)
            losses.append(leaf.loss)
            header["counts"][part.number] = leaf.count
        if losses:
            # One look at the device a step: every .item() would wait for it.
            first = batch.parts[0].number
            header["losses"][first : first + len(losses)] = torch.stack([loss.double() for loss in losses]).cpu().numpy()
        self._buffers.check_known()
        header["digest"] = batch.digest
        header["present"] = self._reduction.present
        header["changed"] = self._buffers.changed
        header["torn"] = self._reduction.torn
        return header

    def _gather(self, header: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        raw = torch.frombuffer(bytearray(header.tobytes()), dtype=torch.uint8)
        return [np.frombuffer(other.numpy().tobytes(), dtype=self._header_type)[0] for other in self._collective.all_gather(raw)]

    # ------------------------------------------------------------------ agree, update, publish

    def _norms(self, gradients: Sequence[tuple[Slot, Tensor]]) -> Tensor:
        """The L2 norm of each slot's gradient, float64; 0 for slots of other owners."""
        norms = torch.zeros(len(self._layout.parameters), dtype=torch.float64)
        if gradients:
            for alike in _by_dtype(gradients):
                values = torch.stack([norm.double() for norm in torch._foreach_norm([gradient for _, gradient in alike])])
                norms[[slot.index for slot, _ in alike]] = values.cpu()
            if not torch.isfinite(norms).all():
                for slot, gradient in gradients:  # squares overflow long before the values do
                    if not math.isfinite(norms[slot.index]):
                        norms[slot.index] = torch.linalg.vector_norm(gradient.double())
        return norms

    def _agree(self, norms: Tensor, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """All owners' norms, and all workers' buffers."""
        ranges, size = self._reduction.ranges, self._collective.size
        mine = torch.cat([norms, self._buffers.message(ranges[self._collective.rank], batch.filled)])
        sizes = [norms.numel() + self._buffers.message_size(span, batch.filled) for span in ranges]
        received = self._collective.exchange(
            [[mine]] * size, [[(numel, torch.float64, mine.device)] for numel in sizes], name="agree"
        )
        # Each norm comes from one owner; the others' zeros change no bit of it.
        all_norms = torch.stack([message[0][: norms.numel()] for message in received]).sum(dim=0)
        return all_norms, [message[0][norms.numel() :].clone() for message in received]

    def _update(self, gradients: Sequence[tuple[Slot, Tensor]], norm: float) -> None:
        if self._max_grad_norm is not None:
            scale = self._max_grad_norm / (norm + 1e-6)
            if scale < 1:
                for alike in _by_dtype(gradients):
                    torch._foreach_mul_([gradient for _, gradient in alike], scale)
        for slot, gradient in gradients:
            self._layout.parameters[slot.index].grad = gradient
        try:
            self._optimizer.step()
        finally:
            for slot, _ in gradients:
                self._layout.parameters[slot.index].grad = None

    def _publish(self) -> None:
        for flat, segments in zip(self._flats, self._reduction.segments, strict=True):
            self._collective.publish(flat, [(segment.lo, segment.hi) for segment in segments])

    # ------------------------------------------------------------------ checks

    def _check_model(self) -> None:
        for index, parameter in enumerate(self._layout.parameters):
            if parameter.data_ptr() != self._addresses[index]:
                raise ConfigurationError(
                    f"parameter {self._layout.names[index]!r} was moved to other memory after the Trainer was made "
                    "(model.to(), .half(), or an assignment to .data): change the model before Trainer(...), and change "
                    "values in place"
                )
        if any(parameter.requires_grad for parameter in self._frozen):
            raise ConfigurationError(
                "a parameter that was frozen when the Trainer was made now requires a gradient: make a new Trainer after "
                "unfreezing"
            )

    def _check_same_batch(self, headers: Sequence[npt.NDArray[Any]], step: int) -> None:
        for rank, header in enumerate(headers):
            if header["digest"] != headers[0]["digest"]:
                raise ConfigurationError(
                    f"step {step}: worker {rank} was given other samples, or another place among them, than worker 0. Nothing "
                    "was updated. Every worker must be given the same order: seed the shuffle or sampler that makes it, alike on "
                    "all of them"
                )

    def _check_losses(self, losses: npt.NDArray[np.float64], counts: npt.NDArray[np.float64], batch: Batch, step: int) -> None:
        for leaf in map(int, np.flatnonzero(~np.isfinite(losses))):
            samples = b"".join(self._collective.all_gather_bytes(self._samples_of(batch, leaf).encode())).decode()
            raise DataError(
                f"step {step}: the loss of microbatch {leaf} is {losses[leaf]}{samples}. Nothing was updated. Look at these "
                "samples, lower the learning rate, or set max_grad_norm"
            )
        if not counts.sum() > 0:
            raise DataError(
                f"step {step}: the count over the whole batch of {batch.samples} samples is 0, so there is nothing to divide "
                "by. Nothing was updated. Does the loss count only samples that are masked out?"
            )

    def _explain_gradient(self, norms: Tensor, batch: Batch, step: int) -> None:
        """*collective*. Computes the step's microbatches once more, one by one, to name the one with the bad gradient."""
        names = [self._layout.names[int(index)] for index in torch.nonzero(~torch.isfinite(norms))]
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


def _tree_sum(values: npt.NDArray[np.float64]) -> float:
    add: Callable[[float, float], float] = float.__add__
    return fold_all([float(value) for value in values], add) or 0.0


def _by_dtype(gradients: Sequence[tuple[Slot, Tensor]]) -> list[list[tuple[Slot, Tensor]]]:
    """Lists of one dtype each. On CUDA a list of several dtypes takes kernels that round differently, and which dtypes are
    together depends on who owns what."""
    groups: dict[torch.dtype, list[tuple[Slot, Tensor]]] = {}
    for slot, gradient in gradients:
        groups.setdefault(gradient.dtype, []).append((slot, gradient))
    return list(groups.values())


def _divide(gradients: Sequence[tuple[Slot, Tensor]], count: float) -> None:
    if count != 1:
        for alike in _by_dtype(gradients):
            torch._foreach_div_([gradient for _, gradient in alike], count)


def _total_norm(norms: Tensor) -> float:
    return math.sqrt(math.fsum(float(norm) ** 2 for norm in norms.tolist())) if bool(torch.isfinite(norms).all()) else math.nan
