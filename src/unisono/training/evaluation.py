"""Exact evaluation: each sample counts once, and every worker count gives the same number."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unisono.collective import Collective
from unisono.data.loader import Loader, Request, dataset_length, load
from unisono.errors import ConfigurationError, DataError
from unisono.order import derive_seed
from unisono.replica.base import MetricFunction, Replica
from unisono.tree import Fold, Span, combine, pieces


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
    if not isinstance(metrics, Mapping):
        raise ConfigurationError(
            f'metrics must be a mapping from names to functions, such as {{"accuracy": accuracy}}, got {metrics!r}'
        )
    if not metrics:
        raise ConfigurationError("no metric to evaluate: pass a mapping from names to functions (model, batch) -> (sum, count)")
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


def seed_after_evaluation(seed: int, replica: Replica) -> None:
    """*local*. What is drawn after an evaluation must not depend on what this worker computed of it, if anything."""
    replica.seed(derive_seed("after evaluation", seed))


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
        if not count > 0:
            raise DataError(f"the count of metric {name!r} is {count} over the whole dataset: there is nothing to divide by")
        results[name] = value / count
    return results


def _range(microbatches: int, rank: int, workers: int) -> Span:
    """Even contiguous shares; with fewer microbatches than workers some have none."""
    return microbatches * rank // workers, microbatches * (rank + 1) // workers
