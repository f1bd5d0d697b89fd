"""Exact evaluation and prediction: each sample counts once, and every worker count gives the same numbers."""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unisono.checkpoint.message import from_bytes, to_bytes
from unisono.collective import Collective
from unisono.data.loader import Loader, Request, dataset_length, load
from unisono.errors import ConfigurationError, DataError
from unisono.order import derive_seed
from unisono.replica.base import MetricFunction, Replica
from unisono.replica.whole_batch import WholeBatchLoss
from unisono.training.run import Run
from unisono.training.session import Session
from unisono.training.settings import Settings
from unisono.training.setup import check_alike
from unisono.training.state import LocalState
from unisono.tree import Fold, Span, combine, pieces


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validation:
    """What ``fit`` measures while it trains.

    Raises:
        ConfigurationError: The arguments do not go together.
    """

    dataset: Any
    metrics: Mapping[str, MetricFunction] | None = None
    every: int | None = None
    """Steps between two evaluations; None: at the end of each epoch."""
    keep_best: str | None = None
    """Name of the metric whose highest value is best, or "-name": whose lowest."""

    def __post_init__(self) -> None:
        if self.dataset is None:
            if (self.metrics, self.every, self.keep_best) != (None, None, None):
                raise ConfigurationError("metrics, validate_every and keep_best are of a validation: pass validation=dataset")
            return
        if self.every is not None and self.every < 1:
            raise ConfigurationError(f"validate_every must be 1 or more, got {self.every}")
        names = ["loss"] if self.metrics is None else list(self.metrics)
        if self.keep_best is not None and self.keep_best.removeprefix("-") not in names:
            raise ConfigurationError(
                f"keep_best={self.keep_best!r} is none of the metrics {names}: give the name of one whose highest value is "
                'best ("accuracy"), or with a minus sign of one whose lowest is ("-loss")'
            )

    def is_due(self, step: int, *, ends_epoch: bool) -> bool:
        """*local*. Whether to measure after step number ``step``."""
        if self.dataset is None:
            return False
        return ends_epoch if self.every is None else step % self.every == 0

    def score(self, results: Mapping[str, float]) -> float | None:
        """*local*. What is to be as high as it can; None: nothing is kept."""
        if self.keep_best is None:
            return None
        value = results[self.keep_best.removeprefix("-")]
        return -value if self.keep_best.startswith("-") else value


class Evaluator:
    """Evaluates and predicts with the weights of now. *Collective*.

    Args:
        local: What this worker trains with.
        settings: What steps are computed by.
        session: The workers.
        run: Where results are logged.
    """

    def __init__(self, local: LocalState, settings: Settings, session: Session, run: Run) -> None:
        self._local, self._settings, self._session, self._run = local, settings, session, run

    def evaluate(
        self, dataset: Any, metrics: Mapping[str, MetricFunction] | None, batch_size: int | None, loader: Loader
    ) -> dict[str, float]:
        """*collective*. See ``Trainer.evaluate``."""
        tries = 0

        def measure() -> dict[str, float]:
            nonlocal tries
            tries += 1
            chosen = {"loss": self._local.replica.loss} if metrics is None else metrics
            how = self._how(dataset, batch_size, loader)
            results = evaluate_each(
                self._local.replica, self._session.collective, dataset, chosen, whole=self._settings.batch_size, **how
            )
            self._run.write_metrics(results, again=tries > 1)
            return results

        results: dict[str, float] = self._together("evaluate", measure)
        self._run.count_evaluation()
        return results

    def predict(
        self,
        dataset: Any,
        function: Callable[[Any, Any], Any],
        batch_size: int | None,
        loader: Loader,
        pad: float | None,
    ) -> Any:
        """*collective*. See ``Trainer.predict``; as text where workers may come who need it, too (``outputs_of`` reads it)."""

        def compute() -> Any:
            outputs = predict(
                self._local.replica,
                self._session.collective,
                dataset,
                function,
                pad=pad,
                **self._how(dataset, batch_size, loader),
            )
            return base64.b64encode(to_bytes(outputs)).decode() if self._session.can_change else outputs

        return self._together("predict", compute)

    def _how(self, dataset: Any, batch_size: int | None, loader: Loader) -> dict[str, Any]:
        settings = self._settings
        size = batch_size or -(-settings.batch_size // settings.microbatches)
        check_alike(self._session.collective, {"samples": dataset_length(dataset), "batch_size": size})
        return {"microbatch_size": size, "loader": loader, "timeout_s": settings.timeout_s, "seed": settings.seed}

    def _together(self, name: str, body: Callable[[], Any]) -> Any:
        with self._local.clock.pause():
            found = self._session.perform(name, body)
            # What is drawn afterwards must not depend on what this worker computed of it, if anything.
            self._local.replica.seed(derive_seed("after evaluation", self._settings.seed))
        return found


def outputs_of(result: Any) -> Any:
    """*local*. The outputs that ``Evaluator.predict`` has returned, here or on another worker."""
    return from_bytes(base64.b64decode(result)) if isinstance(result, str) else result


def evaluate_each(
    replica: Replica, collective: Collective, dataset: Any, metrics: Mapping[str, MetricFunction], *, whole: int, **how: Any
) -> dict[str, float]:
    """*collective*. Each metric over the whole dataset; those that see whole batches, over ``whole`` samples at a time."""
    over = {name: metric for name, metric in _checked(metrics).items() if isinstance(metric, WholeBatchLoss)}
    others = {name: metric for name, metric in metrics.items() if name not in over}
    found = evaluate(replica, collective, dataset, others, **how) if others else {}
    for name, metric in over.items():
        rows = predict(replica, collective, dataset, metric.embed, **how)
        batches = zip(*(torch.split(row, whole) for row in (rows if isinstance(rows, tuple) else (rows,))), strict=True)
        of_rows = {name: functools.partial(_of_rows, metric.loss)}
        replica.buffers.begin()
        try:
            with replica.evaluating():
                parts = [replica.evaluate(of_rows, batch, len(batch[0]), how["seed"]) for batch in batches]
        finally:
            replica.buffers.restore()
        found[name] = _quotient(name, *torch.stack(parts).sum(dim=0)[0].tolist())
    return {name: found[name] for name in metrics}


def evaluate(
    replica: Replica,
    collective: Collective,
    dataset: Any,
    metrics: Mapping[str, MetricFunction],
    *,
    microbatch_size: int,
    loader: Loader,
    timeout_s: float,
    seed: int,
) -> dict[str, float]:
    """*collective*. Each metric over the whole dataset, from (sum, count) pairs folded in the order of the fixed tree.

    Microbatches are runs of ``microbatch_size`` consecutive samples, so the result is a function of that size and not of
    the number of workers. The model is in evaluation mode meanwhile; what forward does to its buffers is undone.

    Raises:
        DataError: A sample cannot be read, or a metric's count is zero over the whole dataset.
    """
    length = dataset_length(dataset)
    microbatches = -(-length // microbatch_size)
    lo, hi = _range(microbatches, collective.rank, collective.size)
    replica.buffers.begin()
    try:
        with replica.evaluating():
            parts = _fold(replica, dataset, metrics, (lo, hi), microbatches, length, microbatch_size, loader, timeout_s, seed)
    finally:
        replica.buffers.restore()
    return _finish(parts, metrics, collective, microbatches)


def predict(
    replica: Replica,
    collective: Collective,
    dataset: Any,
    function: Callable[[Any, Any], Any],
    *,
    microbatch_size: int,
    loader: Loader,
    timeout_s: float,
    seed: int,
    pad: float | None = None,
) -> Any:
    """*collective*. The outputs for the whole dataset, in its order and on the CPU: see ``Trainer.predict``.

    Raises:
        DataError: A sample cannot be read.
        ConfigurationError: ``function`` returns something else than rows of samples, or rows of different lengths without
            ``pad``.
    """
    outputs: list[Any] = []
    length = dataset_length(dataset)
    lo = _range(-(-length // microbatch_size), collective.rank, collective.size)[0]

    def keep(model: Any, batch: Any) -> tuple[float, int]:
        start = (lo + len(outputs)) * microbatch_size
        outputs.append(_on_cpu(replica.outputs(function(model, batch)), min(microbatch_size, length - start)))
        return 0.0, 1

    # A metric that keeps what it sees: so a replica of any framework predicts as it evaluates.
    how: dict[str, Any] = {"microbatch_size": microbatch_size, "loader": loader, "timeout_s": timeout_s, "seed": seed}
    evaluate(replica, collective, dataset, {"outputs": keep}, **how)
    everybodys = [from_bytes(data) for data in collective.all_gather_bytes(to_bytes(outputs))]
    return _joined([part for parts in everybodys for part in parts], pad)


def _of_rows(loss: Callable[..., Any], model: Any, rows: Sequence[Tensor]) -> Any:
    return loss(*rows)


def _checked(metrics: Any) -> Mapping[str, MetricFunction]:
    if not isinstance(metrics, Mapping):
        raise ConfigurationError(
            f'metrics must be a mapping from names to functions, such as {{"accuracy": accuracy}}, got {metrics!r}'
        )
    if not metrics:
        raise ConfigurationError("no metric to evaluate: pass a mapping from names to functions (model, batch) -> (sum, count)")
    return metrics


def _on_cpu(output: Any, samples: int) -> Any:
    if isinstance(output, Tensor) and output.dim() and len(output) == samples:
        return output.detach().cpu().contiguous()
    if isinstance(output, dict):
        return {name: _on_cpu(value, samples) for name, value in output.items()}
    if isinstance(output, (tuple, list)):
        return tuple(_on_cpu(value, samples) for value in output)
    got = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    raise ConfigurationError(
        f"the function given to predict returned {got} for {samples} samples: return a tensor with a row for each sample, or a "
        "dict or tuple of these"
    )


def _joined(parts: Sequence[Any], pad: float | None) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        shapes = [part.shape[1:] for part in parts]
        if len(set(shapes)) > 1:
            if pad is None:
                raise ConfigurationError(
                    f"the function given to predict returned rows of shapes {sorted(map(tuple, set(shapes)))}, which make no "
                    "tensor: pass pad=, with which shorter ones are filled up"
                )
            longest = [max(sizes) for sizes in zip(*shapes, strict=True)]
            parts = [_filled(part, longest, pad) for part in parts]
        return torch.cat(list(parts))
    if isinstance(first, dict):
        return {name: _joined([part[name] for part in parts], pad) for name in first}
    return tuple(_joined(column, pad) for column in zip(*parts, strict=True))


def _filled(part: Tensor, shape: Sequence[int], pad: float) -> Tensor:
    """Its rows in the upper left corners of rows of this shape."""
    whole = part.new_full((len(part), *shape), pad)
    whole[tuple(slice(size) for size in part.shape)] = part
    return whole


def _fold(
    replica: Replica,
    dataset: Any,
    metrics: Mapping[str, MetricFunction],
    span: Span,
    microbatches: int,
    length: int,
    microbatch_size: int,
    loader: Loader,
    timeout_s: float,
    seed: int,
) -> dict[Span, Tensor | None]:
    """This worker's pieces: for each, a float64 tensor of (sum, count) rows, one a metric."""

    def requests() -> Iterator[Request]:
        for microbatch in range(*span):
            start = microbatch * microbatch_size
            yield Request(0, np.arange(start, min(start + microbatch_size, length), dtype=np.int64))

    fold: Fold[Tensor] = Fold(microbatches, Tensor.add_)
    loaded = load(
        dataset,
        requests(),
        loader,
        seed=derive_seed("evaluate", seed),
        device=replica.device,
        timeout_s=timeout_s,
        trains=False,
    )
    for microbatch, data in zip(range(*span), loaded, strict=True):
        samples = min(microbatch_size, length - microbatch * microbatch_size)
        fold.push(microbatch, replica.evaluate(metrics, data, samples, derive_seed("evaluate", seed, microbatch)))
    return fold.parts()


def _finish(
    parts: dict[Span, Tensor | None], metrics: Mapping[str, MetricFunction], collective: Collective, microbatches: int
) -> dict[str, float]:
    rows = [value.flatten().tolist() for value in parts.values() if value is not None]
    everybodys = [json.loads(text) for text in collective.all_gather_bytes(json.dumps([list(metrics), rows]).encode())]
    whole: dict[Span, Tensor | None] = {}
    for rank, (names, values) in enumerate(everybodys):
        if names != list(metrics):
            raise ConfigurationError(
                f"worker {rank} evaluates {names}, worker {collective.rank} {list(metrics)}: call evaluate alike"
            )
        spans = pieces(*_range(microbatches, rank, collective.size), microbatches)
        whole.update((span, torch.tensor(row, dtype=torch.float64)) for span, row in zip(spans, values, strict=True))
    total = combine(whole, microbatches, torch.add)
    results: dict[str, float] = {}
    for name, (value, count) in zip(metrics, total.view(-1, 2).tolist() if total is not None else [], strict=True):
        results[name] = _quotient(name, value, count)
    return results


def _quotient(name: str, value: float, count: float) -> float:
    if not count > 0:
        raise DataError(f"the count of metric {name!r} is {count} over the whole dataset: there is nothing to divide by")
    return value / count


def _range(microbatches: int, rank: int, workers: int) -> Span:
    """Even contiguous shares; with fewer microbatches than workers some have none."""
    return microbatches * rank // workers, microbatches * (rank + 1) // workers
