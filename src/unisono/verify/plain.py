"""The reference: training as everybody writes it, one device, whole batches. It shares no code with the exact path.

``PlainTrainer`` takes the trainer's place in the script. Only data is taken from unisono: which samples make up each batch,
and the seed under which a sample is read. There are no microbatches, no tree, no layout, no workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import Subset

from unisono.collective import InProcess
from unisono.data.loader import Loader, dataset_length
from unisono.order import derive_seed, make_order, microbatch_bounds
from unisono.replica.randomness import seed_generators
from unisono.replica.whole_batch import WholeBatchLoss
from unisono.training.callbacks import Callback
from unisono.training.evaluation import Validation
from unisono.training.record import Position
from unisono.training.setup import check_length
from unisono.training.step import StepResult
from unisono.verify.bench import Bench, few, watch_scheduler
from unisono.verify.fresh import fresh
from unisono.verify.inspect_loss import Inspection
from unisono.verify.job import Change, Variant
from unisono.verify.places import same_mode_and_buffers
from unisono.verify.record import StepRecord, TrainerRecord, data_digest, groups
from unisono.world import World

_ADDITIVE = 1e-4
"""Relative difference up to which a metric of the whole and of parts of the samples are the same."""


class _NotJoinable(Exception):
    """Microbatches that must be collated one by one, and cannot be put together."""


@dataclasses.dataclass(frozen=True)
class PlainBatch:
    """Sample indices of a global batch, and where it stands."""

    indices: list[int]
    epoch: int
    number: int
    of: int
    bounds: list[tuple[int, int]]
    """Of those microbatches that are not empty."""
    dataset: Any
    loader: Loader

    @property
    def samples(self) -> int:
        """How many."""
        return len(self.indices)


class PlainTrainer:
    """Takes what ``unisono.Trainer`` takes, and trains with a plain loop."""

    bench: ClassVar[Bench]

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Any, Any], Any],
        *,
        batch_size: int,
        microbatches: int = 8,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        bench = self.bench
        self.variant = bench.spec.job.reference
        self._record = TrainerRecord(batch_size=batch_size, microbatches=microbatches, settings=groups(optimizer))
        bench.begins(self._record, model)
        self.model, self.optimizer, self.scheduler = model, optimizer, settings.get("scheduler")
        self.batch_size, self.microbatches, self.seed = batch_size, microbatches, seed
        self.callbacks: tuple[Callback, ...] = tuple(settings.get("callbacks") or ())
        if Change.NO_CALLBACKS in bench.changes:
            self.callbacks = ()
        self.position = Position()
        self.device = torch.device(settings.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.world, self.collective = World(), InProcess()
        self._loss, self._precision = loss, settings.get("precision", "fp32")
        self._max_grad_norm = settings.get("max_grad_norm") or math.inf
        self._loader = settings.get("loader") or Loader()
        parts = [part for part in (model, getattr(loss, "loss", None)) if isinstance(part, nn.Module)]
        self._trained = [parameter for part in parts for parameter in part.parameters()]
        for part in parts:
            part.to(self.device, torch.float64 if self.variant is Variant.DOUBLE else None)
        if self.scheduler is not None:
            self._schedule = watch_scheduler(self.scheduler, bench.watch, obey=Change.USER_SCHEDULES in bench.changes)
        bench.made()

    # ------------------------------------------------------------------ what a script calls

    def fit(
        self,
        dataset: Any,
        epochs: int | None = None,
        *,
        steps: int | None = None,
        validation: Any = None,
        metrics: Any = None,
        validate_every: int | None = None,
        keep_best: str | None = None,
        **settings: Any,
    ) -> None:
        """As the trainer's."""
        watched = Validation(dataset=validation, metrics=metrics, every=validate_every, keep_best=keep_best)
        for batch in self.batches(dataset, check_length(epochs, steps), **settings):
            self.step(batch)
            if watched.is_due(self.position.step, ends_epoch=batch.number + 1 == batch.of):
                self.evaluate(validation, metrics)
            if self.position.step == steps:
                return

    def batches(
        self, dataset: Any, epochs: int, *, order: Any = "shuffle", drop_last: bool = False, loader: Loader | None = None
    ) -> Iterator[PlainBatch]:
        """As the trainer's."""
        length = dataset_length(dataset)
        samples = make_order(order, length=length, batch_size=self.batch_size, seed=self.seed, drop_last=drop_last)
        if Change.FRESH_DATA in self.bench.changes:
            dataset = fresh(dataset, self.bench.record.data_state)
        while self.position.epoch < epochs:
            epoch = samples.epoch(self.position.epoch)
            for number in range(self.position.batch, epoch.batches):
                if self.position.step >= self.bench.spec.steps or self.position.finished:
                    return
                indices = epoch.batch(number).tolist()
                bounds = [(lo, hi) for lo, hi in microbatch_bounds(len(indices), self.batch_size, self.microbatches) if hi > lo]
                yield PlainBatch(indices, self.position.epoch, number, epoch.batches, bounds, dataset, loader or self._loader)

    def step(self, batch: PlainBatch) -> StepResult:
        """As the trainer's: forward, backward, clip, update, over the whole batch at once."""
        record = StepRecord(step=self.position.step + 1)
        self._learn(record.step)
        before = [parameter.detach().clone() for parameter in self._trained]
        self.optimizer.zero_grad()
        if self.variant is Variant.PLAIN and record.step == 1 and not isinstance(self._loss, WholeBatchLoss):
            self._record.findings = self._inspect(batch)
        total, count = self._in_parts(batch, record) if self.variant is Variant.PARTS else self._at_once(batch, record)
        for parameter in self._trained:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
        record.rates = tuple(float(group["lr"]) for group in self.optimizer.param_groups if "lr" in group)
        record.norm = float(nn.utils.clip_grad_norm_(self._trained, self._max_grad_norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        moved = [float((new.detach() - old).double().norm()) for new, old in zip(self._trained, before, strict=True)]
        record.update = math.hypot(*moved)
        record.loss = total / count
        self._advance(batch)
        if self.scheduler is not None:
            self._schedule(*([record.loss] if isinstance(self.scheduler, ReduceLROnPlateau) else []))
        result = StepResult(
            step=record.step,
            epoch=batch.epoch,
            loss=record.loss,
            count=count,
            samples=batch.samples,
            gradient_norm=record.norm,
            learning_rates=record.rates,
        )
        seed_generators(derive_seed("between", self.seed, record.step), self.device)
        self._tell("on_step", result)
        if batch.number + 1 == batch.of:
            self._tell("on_epoch", batch.epoch)
        self.bench.stepped(self._record, record, self.model, self.optimizer)
        return result

    def evaluate(
        self, dataset: Any, metrics: Mapping[str, Any] | None = None, *, batch_size: int | None = None, loader: Any = None
    ) -> dict[str, float]:
        """As the trainer's, over the first samples, in one batch."""
        data = few(dataset, self.batch_size)
        collate = (loader or self._loader).collate_fn
        size = batch_size or -(-self.batch_size // self.microbatches)
        results: dict[str, float] = {}
        with same_mode_and_buffers(self.model), torch.no_grad():
            self.model.eval()
            samples = self._read(data, range(len(data)), 0)
            parts = [samples[lo : lo + size] for lo in range(0, len(samples), size)]
            for name, metric in ({"loss": self._loss} if metrics is None else metrics).items():
                whole, *pairs = [_pair(metric(self.model, self._placed(collate(part))), len(part)) for part in (samples, *parts)]
                results[name] = float(whole[0]) / whole[1]
                summed = sum(float(value) for value, _ in pairs) / (sum(count for _, count in pairs) or 1.0)
                apart = not isinstance(metric, WholeBatchLoss)
                if apart and abs(summed - results[name]) > _ADDITIVE * max(abs(summed), abs(results[name]), 1e-12):
                    self._record.findings.setdefault("metrics", {})[name] = [results[name], summed]
        self._record.evaluations.append(results)
        self.bench.happened()
        self._tell("on_evaluate", results)
        return results

    def predict(self, dataset: Any, function: Any = None, *, batch_size: int | None = None, loader: Any = None) -> Any:
        """As the trainer's, in one batch."""
        with same_mode_and_buffers(self.model), torch.no_grad():
            self.model.eval()
            samples = self._placed((loader or self._loader).collate_fn(self._read(dataset, range(len(dataset)), 0)))
            return self.model(samples) if function is None else function(self.model, samples)

    def finish(self) -> None:
        """As the trainer's."""
        self.position.finished = True

    def save(self) -> None:
        """The reference leaves nothing behind."""

    # ------------------------------------------------------------------ one batch

    def _learn(self, step: int) -> None:
        """Starts from where the trainer was: each step is compared by itself, and errors do not add up over steps."""
        teacher, number = self.bench.spec.teacher, self.bench.record.trainers.index(self._record)
        file = None if teacher is None else teacher / f"tensors-{number}-{step - 1}-0.pt"
        if file is None or not file.exists():
            return  # the first step, or there was no room
        known = torch.load(file, weights_only=True)
        with torch.no_grad():
            for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
                if name in known["model"]:
                    tensor.copy_(known["model"][name])
            for name, parameter in self.model.named_parameters():
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    kept = known["optimizer"].get(f"{name} ({key})")
                    if isinstance(value, Tensor) and kept is not None:
                        value.copy_(kept)

    def _at_once(self, batch: PlainBatch, record: StepRecord) -> tuple[float, float]:
        try:
            data = self._load(batch)
        except _NotJoinable:
            self._record.findings["in_parts"] = True
            return self._in_parts(batch, record)
        record.data[0] = data_digest(data)
        value, count = self._forward(data, batch.samples, 0)
        (value / count).backward()  # type: ignore[no-untyped-call]
        return float(value.detach()), count

    def _in_parts(self, batch: PlainBatch, record: StepRecord) -> tuple[float, float]:
        total = count = 0.0
        for number, (lo, hi) in enumerate(batch.bounds):
            samples = self._read(batch.dataset, batch.indices[lo:hi], batch.epoch)
            self._seed_collate(batch, lo)
            value, share = self._forward(self._placed(batch.loader.collate_fn(samples)), hi - lo, number)
            value.backward()  # type: ignore[no-untyped-call]
            total, count = total + float(value.detach()), count + share
        for parameter in self._trained:
            if parameter.grad is not None:
                parameter.grad /= count
        return total, count

    def _forward(self, data: Any, samples: int, number: int) -> tuple[Tensor, float]:
        seed_generators(derive_seed("step", self.seed, self.position.step + 1, number), self.device)
        with contextlib.ExitStack() as modes:
            if self.variant is Variant.DOUBLE:  # what forward makes itself must match
                modes.callback(torch.set_default_dtype, torch.get_default_dtype())
                torch.set_default_dtype(torch.float64)
            elif self._precision == "bf16":
                modes.enter_context(torch.autocast(self.device.type, dtype=torch.bfloat16))
            modes.enter_context(self.bench.calling(self._loss, self.model))
            returned = self._loss(self.model, data)
        value, count = _pair(returned, samples)
        return value.reshape(()), count

    # ------------------------------------------------------------------ data

    def _load(self, batch: PlainBatch) -> Any:
        """The whole batch, collated at once; its randomness keyed as the trainer keys it."""
        turned = self.variant is Variant.REVERSED
        read = [self._read(batch.dataset, batch.indices[lo:hi], batch.epoch) for lo, hi in batch.bounds]
        samples = [sample for part in read for sample in part]
        self._seed_collate(batch, 0)
        state = torch.default_generator.get_state()
        data = batch.loader.collate_fn(samples[::-1] if turned else samples)
        if not torch.equal(state, torch.default_generator.get_state()):
            # Collating draws (masks of a language model, say), once a microbatch: so it must be done as the trainer does it.
            whole = []
            for (lo, _), part in zip(batch.bounds, read, strict=True):
                self._seed_collate(batch, lo)
                whole.append(batch.loader.collate_fn(part))
            try:
                data = _joined(whole)
            except RuntimeError as error:  # padded to other lengths
                raise _NotJoinable from error
            if turned:
                data = _mapped(data, lambda t: t.flip(0) if t.dim() and t.shape[0] == len(samples) else t)
        return self._placed(data)

    def _seed_collate(self, batch: PlainBatch, first: int) -> None:
        seed_generators(derive_seed("collate", self.seed, batch.epoch, batch.indices[first]))

    def _read(self, dataset: Any, indices: Sequence[int], epoch: int) -> list[Any]:
        with self.bench.phase("data"):
            if _in_one_go(dataset):
                seed_generators(derive_seed("samples", self.seed, epoch, indices[0]))
                return list(dataset.__getitems__(list(indices)))
            samples = []
            for index in indices:
                seed_generators(derive_seed("sample", self.seed, epoch, index))
                samples.append(dataset[index])
            return samples

    def _placed(self, data: Any) -> Any:
        double = self.variant is Variant.DOUBLE
        return _mapped(data, lambda t: t.to(self.device, torch.float64 if double and t.is_floating_point() else t.dtype))

    # ------------------------------------------------------------------

    def _advance(self, batch: PlainBatch) -> None:
        self.position.step += 1
        self.position.samples += batch.samples
        last = batch.number + 1 == batch.of
        self.position.epoch, self.position.batch = (batch.epoch + 1, 0) if last else (batch.epoch, batch.number + 1)

    def _tell(self, method: str, value: Any) -> None:
        for callback in self.callbacks:
            with self.bench.phase(f"callback {type(callback).__name__}"):
                getattr(callback, method)(self, value)

    def _inspect(self, batch: PlainBatch) -> dict[str, Any]:
        inspection = Inspection(
            self.model,
            self._loss,
            samples=self._read(batch.dataset, batch.indices, batch.epoch),
            indices=batch.indices,
            collate=lambda part: self._placed(batch.loader.collate_fn(part)),
            parts=self.microbatches,
        )
        return inspection.findings()


def _pair(returned: Any, samples: int) -> tuple[Any, float]:
    if isinstance(returned, (tuple, list)):
        return returned[0], float(returned[1])
    return returned * samples, float(samples)


def _in_one_go(dataset: Any) -> bool:
    if type(dataset) is Subset:
        return _in_one_go(dataset.dataset)
    return callable(getattr(dataset, "__getitems__", None))


def _mapped(data: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(data, Tensor):
        return change(data)
    if isinstance(data, Mapping):
        moved = {key: _mapped(value, change) for key, value in data.items()}
        return moved if type(data) is dict else type(data)(moved)  # type: ignore[call-arg]
    if isinstance(data, (list, tuple)):
        items = [_mapped(value, change) for value in data]
        return type(data)(*items) if hasattr(data, "_fields") else type(data)(items)
    return data.to("cpu") if callable(getattr(data, "to", None)) else data


def _joined(parts: list[Any]) -> Any:
    """Microbatches as one batch."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([part if part.dim() else part.reshape(1) for part in parts])
    if isinstance(first, Mapping):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, (list, tuple)) and len({len(part) for part in parts}) == 1 and isinstance(first[0], (Tensor, Mapping)):
        return type(first)(_joined(list(items)) for items in zip(*parts, strict=True))
    return [item for part in parts for item in part] if isinstance(first, list) else first
