"""Exact evaluation: each sample counts once, and every worker count gives the same number."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unisono.collective import Collective
from unisono.data.loader import Loader, Request, dataset_length, load
from unisono.errors import ConfigurationError, DataError
from unisono.order import derive_seed
from unisono.replica.randomness import seed_generators
from unisono.replica.torch_replica import TorchReplica, sum_and_count, to_device
from unisono.tree import Fold, Span, combine, pieces

MetricFunction = Callable[[Any, Any], Any]
"""``metric(model, batch)``: the metric's sum over the microbatch and the count to divide by, or one scalar: the mean."""


def evaluate(
    replica: TorchReplica,
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

    The tree's leaves are runs of ``microbatch_size`` consecutive samples, so the result is a function of that size and not of
    the number of workers. The model is in evaluation mode meanwhile.

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
    leaves = -(-length // microbatch_size)
    lo, hi = _range(leaves, collective.rank, collective.size)
    # Of each module: a frozen BatchNorm may be in evaluation mode inside a model that trains.
    modes = [(module, module.training) for module in replica.model.modules()]
    replica.model.eval()
    try:
        # Not inference_mode: what a model caches in it could never be used in training.
        with torch.no_grad():
            parts = _fold(replica, dataset, metrics, (lo, hi), leaves, length, microbatch_size, loader, timeout_s, seed)
    finally:
        for module, training in modes:
            module.training = training
    return _finish(parts, metrics, collective, leaves)


def seed_after_evaluation(seed: int, device: torch.device) -> None:
    """*local*. What is drawn after an evaluation must not depend on what this worker computed of it, if anything."""
    seed_generators(derive_seed("after evaluation", seed), device)


def _fold(
    replica: TorchReplica,
    dataset: Any,
    metrics: Mapping[str, MetricFunction],
    span: Span,
    leaves: int,
    length: int,
    microbatch_size: int,
    loader: Loader,
    timeout_s: float,
    seed: int,
) -> dict[Span, Tensor | None]:
    """This worker's pieces: for each, a float64 tensor of (sum, count) rows, one a metric."""

    def requests() -> Iterator[Request]:
        for leaf in range(*span):
            start = leaf * microbatch_size
            yield Request(0, np.arange(start, min(start + microbatch_size, length), dtype=np.int64))

    fold: Fold[Tensor] = Fold(leaves, Tensor.add_)
    loaded = load(dataset, requests(), loader, seed=derive_seed("evaluate", seed), device=replica.device, timeout_s=timeout_s)
    for leaf, data in zip(range(*span), loaded, strict=True):
        samples = min(microbatch_size, length - leaf * microbatch_size)
        batch = to_device(data, replica.device)
        rows: list[Tensor] = []
        for name, metric in metrics.items():
            seed_generators(derive_seed("evaluate", seed, leaf), replica.device)
            with replica.precision():
                value, count = sum_and_count(metric(replica.model, batch), samples, what=f"metric {name!r}")
            rows.append(torch.stack([value.detach().double(), torch.full_like(value, count, dtype=torch.float64)]).cpu())
        fold.push(leaf, torch.stack(rows))
    return fold.parts()


def _finish(
    parts: dict[Span, Tensor | None], metrics: Mapping[str, MetricFunction], collective: Collective, leaves: int
) -> dict[str, float]:
    rows = [value.flatten().tolist() for value in parts.values() if value is not None]
    everybodys = [json.loads(text) for text in collective.all_gather_bytes(json.dumps([list(metrics), rows]).encode())]
    whole: dict[Span, Tensor | None] = {}
    for rank, (names, values) in enumerate(everybodys):
        if names != list(metrics):
            raise ConfigurationError(
                f"worker {rank} evaluates {names}, worker {collective.rank} {list(metrics)}: call evaluate alike"
            )
        spans = pieces(*_range(leaves, rank, collective.size), leaves)
        whole.update((span, torch.tensor(row, dtype=torch.float64)) for span, row in zip(spans, values, strict=True))
    total = combine(whole, leaves, torch.add)
    results: dict[str, float] = {}
    for name, (value, count) in zip(metrics, total.view(-1, 2).tolist() if total is not None else [], strict=True):
        if not count > 0:
            raise DataError(f"the count of metric {name!r} is {count} over the whole dataset: there is nothing to divide by")
        results[name] = value / count
    return results


def _range(leaves: int, rank: int, workers: int) -> Span:
    """Even contiguous shares; with fewer leaves than workers some have none."""
    return leaves * rank // workers, leaves * (rank + 1) // workers
