"""A loss over all samples of the global batch: each microbatch is computed once for the rows that the loss sees, and once
more for their gradient. Everything here is *local*; ``unisono.sync.sample_rows`` brings the rows together.

The activations of one microbatch are in memory at a time. Both passes run under the microbatch's seed, and both with a graph:
without one, kernels may round differently. A worker that has a single microbatch keeps its graph, and computes it once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unisono.errors import ConfigurationError
from unisono.replica.base import LossPart, Microbatch
from unisono.replica.loss import sum_and_count, to_device
from unisono.replica.parameters import check_model
from unisono.replica.torch_replica import TorchReplica
from unisono.sync.base import GradientSink

_PREFIX = "whole_batch_loss."


@dataclasses.dataclass(frozen=True)
class WholeBatchLoss:
    """A loss in which every sample of the global batch may meet every other one (contrastive, triplet, decorrelation).

    Given to ``Trainer`` in the place of the loss, or to ``Trainer.evaluate`` as a metric: then it is computed over ``batch_size``
    samples at a time, in the data set's order, as in training.
    """

    embed: Callable[[Any, Any], Any]
    """``embed(model, batch)``, called with one microbatch: a tensor with a row for each sample, or a tuple of these. Labels that
    the loss needs are rows, too. A training step may call it twice for a microbatch, under one seed."""
    loss: Callable[..., Any]
    """``loss(*rows)``, called with the rows of all samples of the global batch, in order: the loss sum and the count to divide
    by, or one scalar, a mean. If it is an ``nn.Module`` with parameters, these are trained, too: give them to the optimizer. They
    are saved with the model's weights, under names that begin with ``whole_batch_loss.``"""

    def __call__(self, model: Any, batch: Any) -> Any:
        """*local*. The loss over the samples of this batch alone."""
        rows = self.embed(model, batch)
        return self.loss(*rows) if isinstance(rows, (tuple, list)) else self.loss(rows)


@dataclasses.dataclass(frozen=True)
class _WholeBatch:
    """The whole batch, as the loss has seen it."""

    rows: Sequence[Tensor]
    """With the loss's gradient, where it has one."""
    first: int
    """Row at which this worker's microbatches begin."""
    direct: Sequence[Tensor | None]
    """Gradients of parameters that the loss uses itself, by slot. They count once: with the first microbatch."""
    buffers: Sequence[tuple[Tensor, Tensor]]
    """The loss's own buffers, and what it has made of them."""
    total: Tensor
    count: float
    is_finite: bool


class WholeBatchReplica(TorchReplica):
    """Trains a ``WholeBatchLoss``. A step calls ``rows`` and ``see`` before ``gradients``; arguments as for ``TorchReplica``."""

    loss: WholeBatchLoss

    def __init__(self, model: nn.Module, optimizer: Optimizer, loss: WholeBatchLoss, **options: Any) -> None:
        check_model(model)
        whole = _Joint(model, loss.loss) if isinstance(loss.loss, nn.Module) else model
        super().__init__(whole, optimizer, loss, **options)
        self.model = model
        self._loss_buffers = [i for i, name in enumerate(self.buffers.names) if name.startswith(_PREFIX)]
        self._seen: _WholeBatch | None = None
        self._before: list[tuple[int, int]] | None = None  # what parameters held when the step began
        self._kept: Sequence[Tensor] | None = None  # of the only microbatch of this step, with their graph

    def rows(self, microbatches: Sequence[Microbatch], seeds: Sequence[int]) -> list[list[Tensor]]:
        self._seen = self._kept = None
        self._before = self._guard.values()
        found: list[list[Tensor]] = []
        with self._tables.switched():
            for microbatch, seed in zip(microbatches, seeds, strict=True):
                rows = self._embed(microbatch, seed)
                if len(microbatches) == 1:
                    self._kept = rows
                else:  # the second pass is the one that counts
                    self.buffers.restore()
                found.append([row.detach().requires_grad_(row.requires_grad) for row in rows])
                del rows  # with its graph, before the next one is made
        return found

    def see(self, rows: Sequence[Tensor], first: int, seed: int) -> None:
        held = self._known_gradients()
        self.seed(seed)
        with self._precision():
            total, count = sum_and_count(self.loss.loss(*rows), len(rows[0]), what="loss")
        if self._is_first:
            self._check_no_backward(held)
        if count and not total.requires_grad:
            raise ConfigurationError(
                "the loss depends neither on the rows that embed has returned nor on a parameter: compute it from its arguments, "
                "without .detach(), .item() or torch.no_grad()"
            )
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]
        if self._loss_buffers:
            self.buffers.collect()
        tensors, start = self.buffers.tensors, self.buffers.start
        buffers = [(tensors[i], tensors[i].clone()) for i in self._loss_buffers]
        with torch.no_grad():
            for index in self._loss_buffers:
                tensors[index].copy_(start[index])
        is_finite = math.isfinite(total.item())
        self._seen = _WholeBatch(rows, first, self._take_gradients(), buffers, total.detach(), count, is_finite)

    def gradients(self, microbatches: Sequence[Microbatch], seeds: Sequence[int], sink: GradientSink) -> list[LossPart]:
        assert self._seen is not None
        parts: list[LossPart] = []
        place = self._seen.first
        try:
            for microbatch, seed in zip(microbatches, seeds, strict=True):
                parts.append(self._send_back(self._seen, place, microbatch, seed, sink))
                place += len(microbatch.indices)
                sink.add(microbatch.number, self._take_gradients())
        except BaseException:
            self._early = self._kept = None
            for parameter in self.parameters:
                parameter.grad = None
            raise
        self.buffers.check_known()
        self._guard.check_values(self._before)
        self._before = None
        return parts

    def _send_back(self, seen: _WholeBatch, place: int, microbatch: Microbatch, seed: int, sink: GradientSink) -> LossPart:
        """The rows' gradient goes through the microbatch, whose rows begin at ``place``."""
        versions = [parameter._version for _, parameter in self._all]
        with self._tables.switched():
            rows, self._kept = self._kept or self._embed(microbatch, seed), None
            whole = [row[place : place + len(microbatch.indices)] for row in seen.rows]
            if not all(bool(((row == known) | (row != row)).all()) for row, known in zip(rows, whole, strict=True)):
                raise ConfigurationError(
                    f"microbatch {microbatch.number}: embed returned other rows when it was called a second time with the same "
                    "seed, weights and samples, so their gradient would be that of something else. It keeps state between calls "
                    "(a counter, a cache, a generator of its own): let it depend on its arguments alone, and draw from torch, "
                    "numpy.random or random"
                )
            if place == 0:
                for parameter, gradient in zip(self.parameters, seen.direct, strict=True):
                    parameter.grad = None if gradient is None else gradient.clone()
            if sink.takes_early(microbatch.number):
                self._install_hooks()
                self._early = sink
            gradients = [None if row.grad is None else row.grad[place : place + len(microbatch.indices)] for row in seen.rows]
            pairs = [(row, grad) for row, grad in zip(rows, gradients, strict=True) if row.requires_grad and grad is not None]
            if pairs:
                torch.autograd.backward([row for row, _ in pairs], [grad for _, grad in pairs])
            self._early = None
        self._check_parameters(versions)
        with torch.no_grad():
            for buffer, value in seen.buffers:
                buffer.copy_(value)
        return LossPart(self._share(seen, place, rows), seen.count if place == 0 else 0.0)

    def _embed(self, microbatch: Microbatch, seed: int) -> Sequence[Tensor]:
        batch = to_device(microbatch.data, self.device)
        self.seed(seed)
        with self._precision():
            returned = self.loss.embed(self.model, batch)
        rows = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
        samples = len(microbatch.indices)
        for row in rows or (None,):
            if not isinstance(row, Tensor) or not row.dim() or len(row) != samples:
                got = f"a tensor of shape {tuple(row.shape)}" if isinstance(row, Tensor) else f"a {type(row).__name__}"
                raise ConfigurationError(
                    f"embed returned {got} for {samples} samples: return a tensor with a row for each sample, or a tuple "
                    "of these (two views of each sample: two tensors)"
                )
        return rows

    @staticmethod
    def _share(seen: _WholeBatch, place: int, rows: Sequence[Tensor]) -> Tensor:
        """What the microbatch reports of the loss: the first one all of it. If that is not finite, those to blame do."""
        if not seen.is_finite and not _all_finite(seen.rows):
            return torch.zeros_like(seen.total) if _all_finite(rows) else seen.total
        return torch.zeros_like(seen.total) if place else seen.total


def _all_finite(rows: Sequence[Tensor]) -> bool:
    return all(bool(torch.isfinite(row).all()) for row in rows)


class _Joint(nn.Module):
    """A model and a loss that is a module, as one: the model's names stay as they are."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    @property
    def training(self) -> bool:
        return self.model.training

    @training.setter
    def training(self, mode: bool) -> None:
        """``train`` sets it of the parts themselves."""

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        yield from self.model.named_modules(memo, prefix, remove_duplicate)
        yield from self.loss.named_modules(memo, prefix + _PREFIX[:-1], remove_duplicate)

    def state_dict(self, **_: Any) -> dict[str, Any]:  # type: ignore[override]
        return {**self.model.state_dict(), **self.loss.state_dict(prefix=_PREFIX)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        own = {name.removeprefix(_PREFIX): value for name, value in state_dict.items() if name.startswith(_PREFIX)}
        self.loss.load_state_dict(own, strict, assign)
        others = {name: value for name, value in state_dict.items() if not name.startswith(_PREFIX)}
        return self.model.load_state_dict(others, strict, assign)
